"""Wherever reverse mode gives a finite slope, so do jets, and the same one: at kinks, ties, zeros and saturation.

Torch's operator samples are taken where formulas break: entries become zeros, ones, kinks, ties, numbers so large
that functions saturate, or infinities that a mask has put there. What is not finite in the result is masked out of the
loss, as models do. The slope is held against autograd's gradient along directions that move the entries where that
gradient is finite; one more direction moves the others, which must not spoil the rest. Where the second derivative by
reverse over reverse is finite, the second coefficients have to be finite too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_ops import SKIPPED, name_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

import jetplane as jp
from jetplane.testing import CURVATURE, contract

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own samples call what torch deprecates

OPS = [
    op
    for op in op_db
    if torch.float64 in op.dtypes and op.supports_autograd and not {op.name, name_of(op)} & {*SKIPPED}
]

SAMPLES, EVERY = 2, 2  # samples of each operator, and every second draw for each

KINKS = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0], dtype=torch.float64)
LARGE = torch.tensor([-800.0, -40.0, -1e-30, 1e-30, 40.0, 800.0, 1e30], dtype=torch.float64)


def drawn(values: Tensor, x: Tensor, g: torch.Generator) -> Tensor:
    """A third of the entries from a list."""
    picked = values[torch.randint(len(values), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < 0.4, picked, x)


def copied(x: Tensor, g: torch.Generator) -> Tensor:
    """Entries copied from others."""
    flat = x.reshape(-1)
    return flat[torch.randint(max(len(flat) // 3, 1), flat.shape, generator=g)].reshape(x.shape) if len(flat) else x


# How the numbers of a sample are replaced.
POINTS = {
    "zeros": lambda x, g: torch.zeros_like(x),
    "ones": lambda x, g: torch.ones_like(x),
    "constant": lambda x, g: x.reshape(-1)[:1].expand(x.numel()).reshape(x.shape).clone(),
    "ties": copied,
    "integers": lambda x, g: x.round(),
    "kinks": lambda x, g: drawn(KINKS, x, g),
    "some zeros": lambda x, g: drawn(KINKS[:1], x, g),
    "saturated": lambda x, g: drawn(LARGE, x, g),
    "as it is": lambda x, g: x,
    "equal": lambda x, g: x,  # to the first of its shape
}

# What a mask puts in the place of some entries, or of all entries of some rows.
MASKS = {"none": None, "-inf": -torch.inf, "inf": torch.inf, "nan": torch.nan, "0": 0.0, "1": 1.0}

DRAWS = [
    ("zeros", "none"),
    ("ones", "none"),
    ("constant", "none"),
    ("ties", "none"),
    ("integers", "none"),
    ("kinks", "none"),
    ("some zeros", "none"),
    ("saturated", "none"),
    ("as it is", "-inf"),
    ("as it is", "inf"),
    ("as it is", "nan"),
    ("as it is", "0"),
    ("as it is", "1"),
    ("some zeros", "-inf"),
    ("equal", "none"),
    ("equal", "inf"),
]


@dataclass
class Point:
    """A function of some leaves, at a place where formulas break."""

    f: object
    leaves: list[Tensor]


def masked(x: Tensor, g: torch.Generator) -> Tensor:
    """A mask of some entries and the first row."""
    mask = torch.rand(x.shape, generator=g) < 0.3
    if x.dim():
        mask[0] = True
    return mask


def point(op, sample, how: str, mask: str, seed: int) -> Point | None:
    """The operator's sample with other numbers; None where nothing can be moved."""
    g = torch.Generator().manual_seed(seed)
    flat, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    where = [
        i
        for i, x in enumerate(flat)
        if isinstance(x, Tensor) and x.dtype == torch.float64 and x.layout == torch.strided and x.numel()
    ]
    if not where:
        return None
    origins = [POINTS[how](flat[i].detach().clone(), g) for i in where]
    if how == "equal":
        origins = [next(y for y in origins if y.shape == x.shape) for x in origins]
    masks = [masked(x, g) for x in origins]
    value = MASKS[mask]
    weights: list[Tensor] = []

    def f(*leaves: Tensor) -> Tensor:
        values = [x.clone() if isinstance(x, Tensor) else x for x in flat]
        for i, leaf, origin, hidden in zip(where, leaves, origins, masks, strict=True):
            x = leaf + CURVATURE * (leaf - origin) ** 2
            values[i] = x if value is None else torch.where(hidden, value, x)
        inner_args, inner_kwargs = tree_unflatten(values, spec)
        torch.manual_seed(0)
        results = [t for t in tree_flatten(op(*inner_args, **inner_kwargs))[0] if isinstance(t, Tensor)]
        results = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in results]
        results = [torch.where(t.isfinite(), t, 0) for t in results if t.dtype.is_floating_point]
        return contract(results, weights, torch.Generator().manual_seed(1))

    return Point(f, origins)


def gradient(p: Point) -> list[Tensor] | None:
    """Autograd's, with NaN where it is not finite; None where torch refuses these numbers."""
    leaves = [x.clone().requires_grad_() for x in p.leaves]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            loss = p.f(*leaves)
            if not isinstance(loss, Tensor) or not loss.requires_grad or loss.dtype != torch.float64:
                return None
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError, AttributeError):
        return None
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [torch.where(g.isfinite(), g, torch.nan) for g in grads] if loss.isfinite() else None


def second(p: Point, finite: list[Tensor], v: list[Tensor]) -> Tensor | None:
    """``v_i^T Hess v_j`` by reverse over reverse for the first two directions; None where torch cannot."""
    leaves = [x.clone().requires_grad_() for x in p.leaves]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(p.f(*leaves), leaves, allow_unused=True, create_graph=True)
            h = torch.zeros(2, 2, dtype=torch.float64)
            for i in range(2):
                terms = [
                    (torch.where(ok, g, 0) * t[i]).sum()
                    for g, ok, t in zip(grads, finite, v, strict=True)
                    if g is not None and g.requires_grad
                ]
                if not terms:
                    continue
                rows = torch.autograd.grad(sum(terms), leaves, allow_unused=True, retain_graph=True)
                for j in range(2):
                    h[i, j] = sum(
                        (torch.where(t[j] == 0, 0, r) * t[j]).sum()
                        for r, t in zip(rows, v, strict=True)
                        if r is not None
                    )
        return h
    except (RuntimeError, NotImplementedError):
        return None


def failures(p: Point) -> Iterator[str]:
    """What is wrong with jets at a point."""
    g = gradient(p)
    if g is None:
        return
    random_ = torch.Generator().manual_seed(2)
    finite = [x.isfinite() for x in g]
    v = [torch.randn(3, *x.shape, dtype=x.dtype, generator=random_) for x in p.leaves]
    for t, ok in zip(v, finite, strict=True):
        t[:2] *= ok
        t[2] *= ~ok
    expected = torch.stack(
        [sum((torch.where(ok, x, 0) * t[i]).sum() for x, ok, t in zip(g, finite, v, strict=True)) for i in (0, 1)]
    )
    size = sum((torch.where(ok, x, 0).abs() * t[:2].abs()).sum() for x, ok, t in zip(g, finite, v, strict=True))
    for order in (1, 2):
        try:
            _, first, curvature = jp.jet(p.f, p.leaves, v, order=order)
        except jp.JetplaneError:
            return
        found = first[:2]
        if not torch.isfinite(found).all():
            yield f"order {order}: slope {found.tolist()}, expected {expected.tolist()}"
        elif not (found - expected).abs().max() <= 1e-7 * size + 1e-10:
            yield f"order {order}: slope {found.tolist()} is not {expected.tolist()}"
        if order == 2 and not torch.isfinite(curvature[:2, :2]).all():
            h = second(p, finite, v)
            if h is not None and torch.isfinite(h).all():
                yield f"curvature {curvature[:2, :2].tolist()} where reverse over reverse has {h.tolist()}"


def points(op, samples: int, every: int) -> Iterator[tuple[str, Point]]:
    """Some samples of an operator, the n-th with each ``every``-th draw from the n-th on."""
    for n, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=False)):
        if n >= samples:
            return
        for how, mask in DRAWS[n % every :: every]:
            if "grid_sample" in op.name and (how == "saturated" or mask in ("-inf", "inf", "nan")):
                continue  # torch itself reads outside of the image there
            p = point(op, sample, how, mask, n)
            if p is not None:
                yield f"sample {n}, {how}, mask {mask}", p


# Where autograd's number is not held against jets, by kind.
SINGULAR = "of a matrix that is singular, not positive definite or not finite torch gives parts of an infinite gradient"
EXEMPT = {
    **dict.fromkeys(
        (
            "lu", "lu_solve", "linalg.lu", "linalg.lu_factor_ex", "linalg.lu_solve", "linalg.cholesky_ex", "ormqr", "qr",
            "linalg.qr", "linalg.householder_product", "triangular_solve", "linalg.solve_triangular", "svd_lowrank",
        ),
        SINGULAR,
    ),
    "polar": "torch's derivative by the magnitude is zero at magnitude zero, where the function is smooth",
    "logcumsumexp": "torch adds logarithms of gradients to logits of 1e30, which rounds them away",
    "scatter_reduce.prod": "a result that is NaN makes the local reverse pass NaN",
}  # fmt: skip

# Operators that fall short of it.
SHORT = {
    "nn.functional.gaussian_nll_loss",  # clamps under no_grad, which derivatives go through in reverse mode
}


@pytest.mark.parametrize("op", [op for op in OPS if name_of(op) not in EXEMPT], ids=name_of)
def test_operator(op, request):
    if name_of(op) in SHORT:
        request.applymarker(pytest.mark.xfail(strict=True))
    found = [f"{where}: {failure}" for where, p in points(op, SAMPLES, EVERY) for failure in failures(p)]
    assert not found, "\n".join(found)
