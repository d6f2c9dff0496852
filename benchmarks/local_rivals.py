"""Rivals that learn without a global backward pass: local heads with Adam, aligned feedback, tangents from activations.

Each is our own code from its paper, for models that are a `torch.nn.Sequential` (AGZO: for any model), and is held to
the paper's formula by tests/test_local_rivals.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

Closure = Callable[[], Tensor]


def blocks(model: nn.Module) -> list[nn.Sequential]:
    """A sequential model cut before each layer with parameters but the first."""
    assert isinstance(model, nn.Sequential)
    found: list[list[nn.Module]] = [[]]
    for module in model:
        owns = any(True for _ in module.parameters())
        if owns and any(True for m in found[-1] for _ in m.parameters()):
            found.append([])
        found[-1].append(module)
    return [nn.Sequential(*part) for part in found]


def sizes(parts: list[nn.Sequential], x: Tensor) -> list[int]:
    """How many numbers each block puts out for an example."""
    found = []
    with torch.no_grad():
        for part in parts:
            x = part(x)
            found.append(x[0].numel())
    return found


class MonoForward:
    """Each layer by Adam on its own cross entropy of ``G = a M^T``, M learned too; the last block's output is its G.

    Source: Mono-Forward, arXiv 2501.09238. ``a`` is the activation of the block, after its ReLU and pooling; nothing
    but activations goes from a block to the next, so each block's graph ends at its input.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model, self.parts, self.rate = model, blocks(model), rate
        self.matrices: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of all blocks, each with a graph of its own."""
        if self.optimizer is None:
            features = sizes(self.parts[:-1], x)
            self.matrices = [nn.Parameter(torch.empty(self._classes(), n)) for n in features]
            for m in self.matrices:
                nn.init.kaiming_uniform_(m, a=math.sqrt(5))
            self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.matrices], lr=self.rate)
        found = []
        for part, m in zip(self.parts, [*self.matrices, None], strict=True):
            a = part(x)
            found.append(F.cross_entropy(a if m is None else F.linear(a.flatten(1), m), y))
            x = a.detach()
        return found

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """A step; returns the last block's loss before it, which is the model's."""
        losses = self.losses(x, y)
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        self.optimizer.step()
        return losses[-1].detach()

    def _classes(self) -> int:
        return [p for p in self.model.parameters()][-1].shape[0]


class AlignedFeedback:
    """GrAPE: feedback matrices B aligned with a JVP's rank-one estimate of the Jacobian, and Adam on what they give.

        J = mean_n (J_n u_n) u_n^T,  B <- B - eta grad_B (1 - cos(B, J^T)),  delta_n = (B e_n) * f'(a_n)

    with u_n Gaussian at a block's output, J_n the Jacobian of the model's output there, and e_n the gradient of the
    loss at the model's output. ``delta`` goes through its own block alone. The paper's rare steps of backpropagation,
    which set B to the gradient of one batch, are left out: there is no backward pass.

    Source: Caillon, Fagnou, Delattre, Allauzen, "Scaling direct feedback learning with Jacobian alignment guarantees",
    ICLR 2026. Direct feedback: Nøkland, arXiv 1609.01596.
    """

    def __init__(self, model: nn.Module, rate: float, eta: float = 0.1) -> None:
        self.model, self.parts, self.eta = model, blocks(model), eta
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        self.feedback: list[Tensor] = []

    @torch.no_grad()
    def align(self, i: int, a: Tensor) -> Tensor:
        """One step of the alignment of block i's feedback on activations a; returns the estimate of J^T."""
        u = torch.randn_like(a)
        out = nn.Sequential(*self.parts[i + 1 :])
        moved = jvp(out, (a,), (u,))[1]
        estimate = u.flatten(1).mT @ moved / len(a)
        b = self.feedback[i]
        cosine = (b * estimate).sum() / (b.norm() * estimate.norm())
        self.feedback[i] = b + self.eta * (estimate / estimate.norm() - cosine * b / b.norm()) / b.norm()
        return estimate

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Fill the parameters' ``grad``; returns the loss."""
        inputs, outputs = [x], []
        for part in self.parts:
            with torch.enable_grad():
                outputs.append(part(inputs[-1]))
            inputs.append(outputs[-1].detach())
        logits = inputs[-1]
        e = logits.softmax(1)
        e[torch.arange(len(y)), y] -= 1
        e /= len(y)
        if not self.feedback:
            classes = logits.shape[1]
            self.feedback = [torch.randn(a[0].numel(), classes) / math.sqrt(a[0].numel()) for a in inputs[1:-1]]
        self.optimizer.zero_grad()
        for i, a in enumerate(outputs[:-1]):
            self.align(i, inputs[i + 1])
            a.backward((e @ self.feedback[i].mT).reshape(a.shape))
        outputs[-1].backward(e)
        return F.cross_entropy(logits, y)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """A step; returns the loss before it."""
        loss = self.gradients(x, y)
        self.optimizer.step()
        return loss


class ActivationGuided:
    """AGZO: a difference of the loss along directions whose rows lie in the span of each linear layer's inputs.

        A = orth(power iterations of H H^T),   Delta = R A^T,  g = (f(W + mu Delta) - f(W)) / mu,  W <- W - rate g Delta

    with H the inputs (in, examples), A (in, rank), and R Gaussian; other parameters get Gaussian directions.

    Source: AGZO, arXiv 2601.17261.
    """

    def __init__(self, model: nn.Module, rate: float, rank: int = 1, iterations: int = 3, mu: float = 1e-3) -> None:
        self.model, self.rate, self.rank, self.iterations, self.mu = model, rate, rank, iterations, mu
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.bases: dict[int, Tensor] = {}

    def basis(self, h: Tensor) -> Tensor:
        """An orthonormal basis (in, rank) of what inputs (examples, in) mostly span."""
        start = torch.randn(h.shape[1], min(self.rank, *h.shape), dtype=h.dtype)
        a = torch.linalg.qr(start).Q
        for _ in range(self.iterations):
            a = torch.linalg.qr(h.mT @ (h @ a)).Q
        return a

    def _seen(self, module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.Linear)
        self.bases[id(module.weight)] = self.basis(args[0].reshape(-1, module.in_features))

    def directions(self) -> list[Tensor]:
        """Of all parameters, drawn anew."""
        found = []
        for p in self.params:
            a = self.bases.get(id(p))
            found.append(torch.randn_like(p) if a is None else torch.randn(len(p), a.shape[1], dtype=p.dtype) @ a.mT)
        return found

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """A step; returns the loss before it."""
        hooks = [m.register_forward_pre_hook(self._seen) for m in self.model.modules() if isinstance(m, nn.Linear)]
        before = closure().item()
        for hook in hooks:
            hook.remove()
        directions = self.directions()
        for p, v in zip(self.params, directions, strict=True):
            p.add_(v, alpha=self.mu)
        slope = (closure().item() - before) / self.mu
        for p, v in zip(self.params, directions, strict=True):
            p.sub_(v, alpha=self.mu + self.rate * slope)
        return before
