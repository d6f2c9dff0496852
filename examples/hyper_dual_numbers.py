# %% [markdown]
# # Hyper-dual numbers by hand
#
# A hyper-dual number carries a value, a first derivative along each of two directions, and the second derivative along
# both: x = a + b ε₁ + c ε₂ + d ε₁ε₂ with ε₁² = ε₂² = 0. A function of one variable maps it to
#
# f(x) = f(a) + f'(a) b ε₁ + f'(a) c ε₂ + (f'(a) d + f''(a) b c) ε₁ε₂,
#
# and a product multiplies out. That is all of second-order forward mode. Here it is in 20 lines for scalars, and then
# by `jetplane`, which does the same for tensors, all operators of torch and K directions at once.

# %%
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import jetplane as jp


@dataclass
class HyperDual:
    """a + b ε₁ + c ε₂ + d ε₁ε₂."""

    a: float
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0

    def __add__(self, o: HyperDual) -> HyperDual:
        return HyperDual(self.a + o.a, self.b + o.b, self.c + o.c, self.d + o.d)

    def __mul__(self, o: HyperDual) -> HyperDual:
        d = self.d * o.a + self.b * o.c + self.c * o.b + self.a * o.d
        return HyperDual(self.a * o.a, self.b * o.a + self.a * o.b, self.c * o.a + self.a * o.c, d)

    def map(self, f: Callable, f1: Callable, f2: Callable) -> HyperDual:
        """A function of one variable with its first two derivatives."""
        first, second = f1(self.a), f2(self.a)
        return HyperDual(f(self.a), first * self.b, first * self.c, first * self.d + second * self.b * self.c)

    def sin(self) -> HyperDual:
        return self.map(math.sin, math.cos, lambda a: -math.sin(a))


# %% [markdown]
# f(x, y) = x² sin(x y). The direction of ε₁ is x, that of ε₂ is y: the coefficients are ∂f/∂x, ∂f/∂y and ∂²f/∂x∂y.


# %%
def by_hand(x: float, y: float) -> HyperDual:
    """Value and derivatives of x² sin(x y)."""
    u, v = HyperDual(x, b=1.0), HyperDual(y, c=1.0)
    return u * u * (u * v).sin()


hand = by_hand(1.2, 0.7)
print("by hand      ", [round(n, 9) for n in (hand.a, hand.b, hand.c, hand.d)])

# %% [markdown]
# The same by `jp.jet`: directions are the rows of a matrix, and `second` holds all pairs of them.

# %%
point = torch.tensor([1.2, 0.7], dtype=torch.float64)
value, first, second = jp.jet(lambda z: z[0] ** 2 * torch.sin(z[0] * z[1]), point, torch.eye(2, dtype=torch.float64))
print("by jetplane  ", [round(float(n), 9) for n in (value, *first, second[0, 1])])

# %% [markdown]
# Torch's own reverse mode, twice, agrees:

# %%
hessian = torch.func.hessian(lambda z: z[0] ** 2 * torch.sin(z[0] * z[1]))(point)
print("reverse twice", round(float(hessian[0, 1]), 9))
