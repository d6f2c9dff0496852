# %% [markdown]
# # A custom operator with a rule of its own
#
# Derivatives pass through torch's own operators. An operator that you have registered yourself, in C++, CUDA, Triton
# or, as here, NumPy, is opaque: without a rule it raises `MissingRuleError`, rather than counting as a constant.

# %%
from __future__ import annotations

import numpy as np
import torch

import jetplane as jp


@torch.library.custom_op("gallery::softsign", mutates_args=())
def softsign(x: torch.Tensor) -> torch.Tensor:
    """The function x / (1 + |x|), by NumPy."""
    at = x.numpy()
    return torch.from_numpy(at / (1 + np.abs(at)))


x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
try:
    jp.hessian(lambda x: softsign(x).sum(), x)
except jp.MissingRuleError as error:
    print("without a rule:", str(error)[:100], "...")

# %% [markdown]
# A rule in one line. An elementwise operator needs f' and f'' at its input `x` and result `y`. Operators that are
# linear give `linear=`; those that can be written in torch give `composed=`.


# %%
def derivatives(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / (1 + |x|)² and −2 sign(x) / (1 + |x|)³."""
    width = 1 + x.abs()
    return width**-2, -2 * x.sign() * width**-3


jp.register_rule(softsign, elementwise=derivatives)

# %% [markdown]
# The rule is checked against central differences of the operator, on inputs you give:

# %%
jp.testing.check_rule(softsign, x)

# %% [markdown]
# From here on it takes part everywhere: Hessians, Laplacians, training.

# %%
hessian = jp.hessian(lambda x: softsign(x).sum(), x)
reference = torch.func.hessian(lambda x: torch.nn.functional.softsign(x).sum())(x)
print("by the rule     ", [round(n, 6) for n in hessian.diagonal().tolist()])
print("torch's softsign", [round(n, 6) for n in reference.diagonal().tolist()])

weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
opt = jp.optim.FoMoHKD([weight], k=4, descent="saddle-free")
losses = [float(opt.step(lambda: (softsign(weight @ x) - 0.5).square().mean())) for _ in range(25)]
print(f"training through it: {losses[0]:.4f} to {losses[-1]:.2e}")
