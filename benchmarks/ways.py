"""Ways to evaluate a plane that need nothing but torch and this project.

A way takes a `Problem` and returns a function that evaluates it once: (loss, slope, curvature), with None
for what the way does not compute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap
from torch.nn import functional as F

import jetplane as jp
from jetplane.jets import Deferred

from .adapter import plane_eval
from .problems import Problem

Result = tuple[Tensor, Tensor | None, Tensor | None]
Run = Callable[[], Result]
Way = Callable[[Problem], Run]


def forward(problem: Problem) -> Run:
    """The plain forward pass: the unit of every ratio."""

    def run() -> Result:
        with torch.inference_mode():
            return problem.loss(), None, None

    return run


def forward_backward(problem: Problem) -> Run:
    """What a step of backpropagation computes."""
    params = list(problem.params.values())

    def run() -> Result:
        loss = problem.loss()
        torch.autograd.grad(loss, params)
        return loss.detach(), None, None

    return run


def ours(problem: Problem) -> Run:
    """`jetplane.evaluate` on given tangents."""
    return lambda: plane_eval(F.cross_entropy, problem.model, problem.tangents, (problem.x, problem.y))


def _ours(problem: Problem, rank_one: bool = False, **options: str) -> Run:
    params, tangents = list(problem.params.values()), list(problem.tangents.values())
    if rank_one:
        tangents = [jp.Directions(problem.k, tangents="rank-one").structured(i, p) for i, p in enumerate(params)]
        tangents = [t.materialized() if isinstance(t, Deferred) else t for t in tangents]

    def run() -> Result:
        plane = jp.evaluate(problem.loss, params, tangents, **options)  # pyright: ignore[reportArgumentType]
        return plane.value, plane.slope, plane.curvature

    return run


def ours_diagonal(problem: Problem) -> Run:
    """Exact curvature of each direction alone, as FoMoH needs it."""
    return _ours(problem, pairs="diagonal")


def ours_ggn(problem: Problem) -> Run:
    """Gauss-Newton curvature."""
    return _ours(problem, curvature="ggn")


def ours_rank_one(problem: Problem) -> Run:
    """Exact curvature on rank-one tangents of its own."""
    return _ours(problem, rank_one=True)


def ours_ggn_rank_one(problem: Problem) -> Run:
    """Gauss-Newton curvature on rank-one tangents of its own."""
    return _ours(problem, rank_one=True, curvature="ggn")


def ours_slope(problem: Problem) -> Run:
    """Slope alone, as FGD needs it."""
    return _ours(problem, curvature="none")


def ours_drawn(problem: Problem) -> Run:
    """Exact curvature on directions that are drawn during the evaluation."""
    params = list(problem.params.values())
    directions = jp.Directions(problem.k)

    def run() -> Result:
        plane = jp.evaluate(problem.loss, params, directions)
        directions.step += 1
        return plane.value, None, None

    return run


def ours_step(problem: Problem) -> Run:
    """A whole step of FoMoH-KD: directions drawn, plane evaluated and solved, parameters moved."""
    optimizer = jp.optim.FoMoHKD(problem.model.parameters(), lr=1e-6, k=problem.k, descent="saddle-free")

    def run() -> Result:
        return optimizer.step(problem.loss), None, None

    return run


def _compiled(problem: Problem, rank_one: bool = False) -> Run:
    run = torch.compile(_ours(problem, rank_one), fullgraph=True)

    def evaluated() -> Result:
        with torch.no_grad():
            return run()

    return evaluated


def ours_compiled(problem: Problem) -> Run:
    """The evaluation compiled as one graph."""
    return _compiled(problem)


def ours_compiled_rank_one(problem: Problem) -> Run:
    """The same on rank-one tangents."""
    return _compiled(problem, rank_one=True)


def batched_jvps(problem: Problem) -> Run:
    """Gauss-Newton curvature from K Jacobian-vector products of `torch.func` in one batch: SOFO's method."""
    names = list(problem.params)
    values = tuple(p.detach() for p in problem.params.values())
    tangents = tuple(problem.tangents.values())

    def outputs(*params: Tensor) -> Tensor:
        return functional_call(problem.model, dict(zip(names, params, strict=True)), (problem.x,))

    def run() -> Result:
        with torch.no_grad():
            logits = problem.model(problem.x)
            along = vmap(lambda *v: jvp(outputs, values, v)[1])(*tangents)
            p = logits.softmax(-1).flatten(0, -2)
            rows, along = len(p), along.reshape(problem.k, -1, p.shape[-1])
            goal = F.one_hot(problem.y.flatten(), p.shape[-1])
            slope = (along * (p - goal)).sum((1, 2)) / rows
            mean = (along * p).sum(-1)
            curvature = ((along * p).flatten(1) @ along.flatten(1).T - mean @ mean.T) / rows
            return F.cross_entropy(logits.flatten(0, -2), problem.y.flatten()), slope, curvature

    return run


def reverse_over_reverse(problem: Problem) -> Run:
    """K Hessian-vector products by a second backward pass through one graph of the first."""
    params, tangents = list(problem.params.values()), list(problem.tangents.values())
    k = problem.k

    def inner(grads: tuple[Tensor, ...], i: int) -> Tensor:
        return torch.stack([(g * v[i]).sum() for g, v in zip(grads, tangents, strict=True)]).sum()

    def run() -> Result:
        loss = problem.loss()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        slope, curvature = [], []
        for i in range(k):
            along = inner(grads, i)
            hv = torch.autograd.grad(along, params, retain_graph=i + 1 < k)
            slope.append(along.detach())
            curvature.append(torch.stack([inner(hv, j) for j in range(k)]))
        return loss.detach(), torch.stack(slope), torch.stack(curvature)

    return run


def nested_jvp(problem: Problem) -> Run:
    """`torch.func.jvp` of jvp, vectorised over both directions: the first thing a user tries."""
    names = list(problem.params)
    values = tuple(p.detach() for p in problem.params.values())
    tangents = tuple(problem.tangents.values())

    def loss(*params: Tensor) -> Tensor:
        out = functional_call(problem.model, dict(zip(names, params, strict=True)), (problem.x,))
        return F.cross_entropy(out, problem.y)

    def twice(v: tuple[Tensor, ...], w: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        inner, outer = jvp(lambda *p: jvp(loss, p, v), values, w)[:2]
        return *inner, outer[1]

    grid = vmap(vmap(twice, (None, 0)), (0, None))

    def run() -> Result:
        with torch.no_grad():
            value, slope, curvature = grid(tangents, tangents)
            return value[0, 0], slope[:, 0], curvature

    return run


REFERENCE = "reverse over reverse"
FORWARD, BACKWARD, OURS = "forward", "forward+backward", "ours"
WAYS: dict[str, Way] = {
    FORWARD: forward,
    BACKWARD: forward_backward,
    OURS: ours,
    REFERENCE: reverse_over_reverse,
    "torch.func": nested_jvp,
}
VARIANTS: dict[str, Way] = {
    "diagonal": ours_diagonal,
    "rank-one": ours_rank_one,
    "ggn": ours_ggn,
    "ggn, rank-one": ours_ggn_rank_one,
    "batched jvps": batched_jvps,
    "slope": ours_slope,
    "drawn": ours_drawn,
    "step": ours_step,
    "compiled": ours_compiled,
    "compiled, rank-one": ours_compiled_rank_one,
}
