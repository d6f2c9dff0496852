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
import torch.nn.functional as F
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

SAMPLES, EVERY = 2, 3  # samples of each operator, and every third draw for each

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


# Draws that are left out.
EXEMPT = {
    # torch itself reads outside of the image there
    **dict.fromkeys(
        ("nn.functional.grid_sample", "grid_sampler_2d", "grid_sampler_3d"), {"saturated", "-inf", "inf", "nan"}
    ),
    # torch's derivative by the magnitude is zero at magnitude zero, where the function is smooth
    "polar": {"zeros", "some zeros", "kinks", "integers", "0"},
    # torch adds logarithms of gradients to logits of 1e30, which rounds them away
    "logcumsumexp": {"saturated"},
    # of a product with infinite weights the tangents of what does not move are not zero but NaN
    "nn.functional.linear_cross_entropy.chunked_none": {"inf"},
    # a matrix with entries of 1e30 has lost the others to rounding
    "linalg.tensorsolve": {"saturated"},
    # a result that is not a number spoils the local reverse pass, of which all results are one
    "scatter_reduce.prod": {"nan"},
}


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
            if {how, mask} & EXEMPT.get(name_of(op), set()):
                continue
            p = point(op, sample, how, mask, n)
            if p is not None:
                yield f"sample {n}, {how}, mask {mask}", p


# Where autograd's number is not held against jets. Of a matrix that is singular, not positive definite or not finite
# torch gives parts of an infinite gradient.
NOT_DEFINED = {
    "lu", "lu_solve", "linalg.lu", "linalg.lu_factor", "linalg.lu_factor_ex", "linalg.lu_solve", "linalg.cholesky_ex",
    "ormqr", "qr", "linalg.qr", "linalg.householder_product", "triangular_solve", "linalg.solve_triangular",
    "svd_lowrank",
}  # fmt: skip

HELD = [pytest.param(op, id=name_of(op)) for op in OPS if name_of(op) not in NOT_DEFINED]


@pytest.mark.parametrize("op", HELD)
def test_operator(op):
    found = [f"{where}: {failure}" for where, p in points(op, SAMPLES, EVERY) for failure in failures(p)]
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("op", HELD)
def test_more_samples_of_an_operator(op):
    found = [f"{where}: {failure}" for where, p in points(op, 4, 1) for failure in failures(p)]
    assert not found, "\n".join(found)


INF, NAN = torch.inf, torch.nan
BOTH = torch.tensor([[True, True], [False, True]])
TARGETS = torch.tensor([0.0, 1.0, 0.5, 1.0])


def like(x: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=x.dtype)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x.sin(), torch.tensor([[True, False], [False, False]]))


# Programs whose gradient by reverse mode is finite, though a formula in them is not.
PROGRAMS = {
    "a softmax of which all is masked, nan_to_num": (
        lambda x: x.view(2, 2).masked_fill(BOTH, -INF).softmax(-1).nan_to_num(), [0.0, 0.5, 1.0, 2.0]
    ),
    "the same by where": (
        lambda x: torch.where(BOTH.all(1, True), 0, torch.where(BOTH, -INF, x.view(2, 2)).softmax(-1)), [0.0, 0.5, 1, 2]
    ),
    "a log softmax of which all is masked": (
        lambda x: x.view(2, 2).masked_fill(BOTH, -INF).log_softmax(-1).nan_to_num(0, 0, 0), [0.0, 0.5, 1.0, 2.0]
    ),
    "a mask that is added": (lambda x: (x + like(x, [0, -INF, 0, -INF])).softmax(0), [0.3, 0.1, 0.2, 0.5]),
    "logsumexp of masked logits": (
        lambda x: (x + like(x, [0, -INF, 0, -INF])).logsumexp(0).exp() + x.sum(), [0.3, 0.1, 0.2, 0.5]
    ),
    "attention of rows that see nothing": (lambda x: attention(x.view(1, 2, 2)), [0.3, 0.1, 0.2, 0.5]),
    "cross entropy of masked logits": (
        lambda x: F.cross_entropy(x.view(2, 2) + like(x, [0, -INF, 0, 0]).view(2, 2), torch.tensor([0, 1])),
        [0.3, 1.0, 2.0, 3.0],
    ),
    "cross entropy of confident logits": (
        lambda x: F.cross_entropy(x.view(2, 2), torch.tensor([0, 1])), [1e4, -1e4, 1e4, -1e4]
    ),
    "binary cross entropy of a saturated sigmoid": (
        lambda x: F.binary_cross_entropy(torch.sigmoid(x), TARGETS.to(x.dtype)), [-800.0, 800.0, 40.0, -800.0]
    ),
    "binary cross entropy of zeros and ones": (
        lambda x: F.binary_cross_entropy(x, TARGETS.to(x.dtype), reduction="none"), [0.0, 1.0, 1.0, 0.0]
    ),
    "binary cross entropy of large logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, TARGETS.to(x.dtype)), [-1e4, 1e4, 1e4, -1e4]
    ),
    "binary cross entropy of large logits, targets that move": (
        lambda x: F.binary_cross_entropy_with_logits(x, x.sin() / 2 + 0.5), [-1e4, 1e4, 100.0, -100.0]
    ),
    "soft margin of large scores": (
        lambda x: F.soft_margin_loss(x, like(x, [1, -1, 1, -1])), [-40.0, 40.0, 40.0, -40.0]
    ),
    "divergence from a distribution with zeros": (
        lambda x: F.kl_div(x.log_softmax(0), TARGETS.to(x.dtype), reduction="sum"), [0.0, 1.0, 2.0, 3.0]
    ),
    "divergence from masked logits": (
        lambda x: F.kl_div(
            x.masked_fill(x > 2, -INF).log_softmax(0).nan_to_num(neginf=-9),
            like(x, [0.2, 0.8, 0, 0]), reduction="sum",
        ),
        [0.0, 1.0, 2.0, 3.0],
    ),
    "entropy of clamped probabilities": (
        lambda x: torch.special.entr(F.relu(x)) + torch.xlogy(F.relu(x), F.relu(x)), [-1.0, 1.0, 0.5, -2.0]
    ),
    "deviation of a constant": (lambda x: x.std() + x.sum(), [2.0, 2.0, 2.0]),
    "deviation without correction": (lambda x: x.std(0, correction=0) + x.sum(), [2.0, 2.0, 2.0]),
    "deviation and mean of rows": (lambda x: torch.cat(torch.std_mean(x.view(2, 2), 1)), [2.0, 2.0, 1.0, 3.0]),
    "norm of zeros": (lambda x: x.norm() + x.sum(), [0.0, 0.0]),
    "norms of zeros": (
        lambda x: sum(torch.linalg.vector_norm(x, p) for p in (0.5, 1, 1.5, 3, INF)) + x.sum(), [0.0, 0.0]
    ),
    "norms with one zero": (lambda x: sum(torch.linalg.vector_norm(x, p) for p in (1, 2, 3, INF)), [0.0, 1.0, -1.0]),
    "normalized zeros": (lambda x: F.normalize(x.view(2, 2), dim=1), [0.0, 0.0, 3.0, 4.0]),
    "cosine with zeros": (lambda x: F.cosine_similarity(x[:2], x[2:], dim=0), [0.0, 0.0, 3.0, 4.0]),
    "distances of equal points": (
        lambda x: torch.cdist(x.view(3, 2), x.view(3, 2)).sum() + F.pdist(x.view(3, 2)), [1.0, 2.0, 1.0, 2.0, 0.0, 1.0]
    ),
    "distances of equal points, other norms": (
        lambda x: sum(torch.cdist(x.view(3, 2), x.view(3, 2).sin(), p) for p in (1.0, 3.0, INF)),
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ),
    "distances of many points": (
        lambda x: torch.cdist(x.view(1, 2).expand(30, 2), x.view(1, 2).expand(30, 2).sin()), [0.0, 1.0]
    ),
    "pairwise distance of equal points": (lambda x: F.pairwise_distance(x.view(1, 2), x.view(1, 2)), [1.0, 2.0]),
    "triplets of equal points": (
        lambda x: F.triplet_margin_loss(x[None, :2], x[None, 2:4], x[None, 4:]), [1.0, 2, 1, 2, 1, 2]
    ),
    "root of what relu cut off": (lambda x: F.relu(x).sqrt(), [-1.0, 4.0, -2.0]),
    "powers of what relu cut off": (
        lambda x: F.relu(x) ** 0.5 + F.relu(x) ** 1.5 + F.relu(x).pow(like(x, [0.3] * 3)), [-1.0, 4.0, -2.0]
    ),
    "inverses behind a mask": (
        lambda x: torch.where(x > 0, x, 1).rsqrt() + torch.where(x > 0, x, INF).reciprocal(), [0.0, 4.0, -2.0]
    ),
    "a guard before and behind": (
        lambda x: torch.where(x > 0, torch.where(x > 0, x, 0).log(), 0) + 1 / torch.where(x > 0, x, INF), [0.0, 4, -2]
    ),
    "angles at the border, masked": (
        lambda x: x.clamp(-1, 1).acos() + torch.where(x.abs() < 1, x, 1).asin()
        + x.clamp(-1, 1).atanh().nan_to_num(0, 0, 0),
        [-1.5, 0.5, 2.0],
    ),
    "masked to minus infinity, then exp": (lambda x: x.masked_fill(x < 0, -INF).exp(), [-1.0, 0.5, 2.0]),
    "times a mask": (lambda x: F.relu(x) * like(x, [0, 0, 1]) + F.relu(x) * 0, [-1.0, 0.5, 0.0]),
    "infinities that saturate": (
        lambda x: sum(
            f(x + like(x, [INF, -INF, 0])) for f in (torch.sigmoid, torch.tanh, torch.erf, torch.atan, F.logsigmoid)
        ).nan_to_num(0, 0, 0),
        [1.0, 0.5, 2.0],
    ),
    "not a number on one side": (
        lambda x: torch.fmax(x, like(x, [NAN, 0, 9])) + torch.fmin(like(x, [NAN, 0, 9]), x), [1.0, 0.5, 2.0]
    ),
    "sums without what is not a number": (
        lambda x: torch.where(x > 1, NAN, x).nansum() + torch.where(x > 1, NAN, x).nanmean(), [1.0, 0.5, 2.0]
    ),
    "ties": (
        lambda x: x.max() + x.min() + x.amax() + x.median() + x.nanmedian() + x.sort()[0] * like(x, [1, 2, 3, 4])
        + x.topk(2)[0].sum() + x.cummax(0)[0] + x.cummin(0)[0] + torch.maximum(x, x.flip(0)) + x.kthvalue(2)[0]
        + x.median(0)[0] + x.mode(0)[0],
        [1.0, 2.0, 1.0, 1.0],
    ),
    "ties in pools": (
        lambda x: F.max_pool1d(x.view(1, 1, 4), 2).sum() + F.adaptive_max_pool1d(x.view(1, 1, 4), 2).sum()
        + F.max_pool2d(x.view(1, 1, 2, 2), 2).sum(),
        [1.0, 1.0, 0.0, 0.0],
    ),
    "products with zeros": (lambda x: x.prod() + x.cumprod(0) + x.view(2, 2).prod(0).sum(), [0.0, 2.0, 0.0, 3.0]),
    "one zero in a product": (lambda x: x.prod() + x.cumprod(0), [3.0, 2.0, 0.0, 3.0]),
    "kinks": (
        lambda x: sum(
            f(x)
            for f in (
                F.relu, F.relu6, F.elu, F.selu, F.celu, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid,
                F.softshrink, F.hardshrink, F.softsign, F.rrelu, torch.abs, torch.sign, torch.frac, torch.floor,
            )
        ),
        [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0],
    ),
    "bounds": (
        lambda x: x.clamp(0, 1) + x.clamp(min=0) + x.clamp(max=1) + torch.clamp(x, x * 0, x * 0 + 1),
        [0.0, 1.0, 2.0, -1.0],
    ),
    "kinks of losses": (
        lambda x: F.huber_loss(x, x * 0) + F.smooth_l1_loss(x, x * 0) + F.l1_loss(x, x * 0)
        + F.hinge_embedding_loss(x, -torch.ones_like(x)),
        [0.0, 1.0, -1.0],
    ),
    "prelu at zero": (lambda x: F.prelu(x[:3], x[3:]), [0.0, -1.0, 1.0, 0.25]),
    "random leaks at zero": (lambda x: F.rrelu(x, training=True), [0.0, -1.0, 1.0, -0.0]),
    "normalization of constants": (
        lambda x: F.layer_norm(x.view(2, 2), (2,)) + F.batch_norm(x.view(2, 2), None, None, training=True)
        + F.group_norm(x.view(2, 2), 1) + F.rms_norm(x.view(2, 2), (2,)),
        [0.0, 0.0, 0.0, 0.0],
    ),
    "renormalized": (lambda x: torch.renorm(x.view(2, 2), 2, 0, 1.0), [0.0, 0.0, 3.0, 4.0]),
    "angle and length at the origin": (lambda x: torch.atan2(x, x * 2) + x, [0.0, 1.0]),
    "logaddexp of what is impossible": (
        lambda x: torch.logaddexp(x, torch.where(x > 0, x, -INF)) + torch.logcumsumexp(x, 0), [-1.0, 2.0, 0.0]
    ),
    "logit with bounds": (lambda x: torch.logit(x, 1e-3), [0.0, 1.0, 0.5, 1e-3]),
    "numbers for what is not one": (lambda x: torch.where(x > 1, INF, x).nan_to_num() / 1e300, [0.0, 2.0]),
    "rounding": (lambda x: x.fmod(2) + x.remainder(2) + x.round() + x.trunc(), [0.0, 2, -2, 3]),
    "between pixels": (
        lambda x: F.grid_sample(x[:4].view(1, 1, 2, 2), x[4:].view(1, 2, 1, 2), align_corners=True)
        + F.interpolate(x[:4].view(1, 1, 2, 2), scale_factor=2, mode="bilinear").sum(),
        [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 1.0, -1.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    f, x = PROGRAMS[name]

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return contract(f(x + CURVATURE * (x - x.detach()) ** 2), [], torch.Generator().manual_seed(1))

    p = Point(loss, [torch.tensor(x, dtype=torch.float64)])
    found = gradient(p)
    assert found is not None and torch.isfinite(found[0]).all(), "nothing is demanded where autograd is not finite"
    assert not list(failures(p))
    second = jp.hessian(loss, p.leaves[0])
    assert torch.isfinite(second).all()


# Programs whose gradient by reverse mode is not finite, where jets forget what a mask behind takes away.
BETTER = {
    "a logarithm cut off": (lambda x: x.log().clamp(min=-100), [0.0, 1.0], [0.0, 1.0]),
    "a root masked": (lambda x: torch.where(x > 0, x.sqrt(), 0), [0.0, 1.0], [0.0, 0.5]),
    "an inverse made finite": (lambda x: (1 / x).nan_to_num(0, 0, 0), [0.0, 1.0], [0.0, -1.0]),
    "the larger of two roots": (lambda x: x.sqrt().amax(), [0.0, 1.0], [0.0, 0.5]),
}


@pytest.mark.parametrize("name", BETTER)
def test_masks_behind_a_function(name):
    f, x, expected = BETTER[name]
    x = torch.tensor(x)
    _, first, second = jp.jet(lambda x: f(x).sum(), x, torch.eye(2))
    torch.testing.assert_close(first, torch.tensor(expected))
    assert torch.isfinite(second).all()


def test_large_tensors_with_a_mask():
    """Elementwise functions of many elements are carried in blocks."""
    x = torch.linspace(-1, 1, 1 << 17, dtype=torch.float64)
    for f in (lambda x: F.relu(x).sqrt(), lambda x: x.log().clamp(min=-9).nan_to_num(-9), lambda x: x.clamp(-0.5, 0.5)):
        plane = jp.evaluate(lambda f=f: f(x).sum(), [x], [torch.ones(1, *x.shape).double()])
        inside = jp.evaluate(
            lambda f=f: f(x[x > 0.01]).sum() + f(x[x <= 0.01]).sum(), [x], [torch.ones(1, *x.shape).double()]
        )
        torch.testing.assert_close(plane.slope, inside.slope)


def test_directions_that_stay_away_from_an_infinite_slope():
    """Each direction has its own coefficients: an infinite one does not spoil the others."""
    x = torch.tensor([0.0, 4.0], dtype=torch.float64)
    _, first, second = jp.jet(lambda x: x.sqrt().sum(), x, torch.eye(2).double())
    torch.testing.assert_close(first, torch.tensor([INF, 0.25]).double())
    torch.testing.assert_close(second[1], torch.tensor([0.0, -1 / 32]).double())


@pytest.mark.parametrize("f", [torch.log1p, torch.atan, lambda x: (1 + x).sqrt(), lambda x: (1 + x) ** 3, torch.erf])
def test_nested_coefficients_that_are_zero_at_the_point_alone(f):
    """The slope along x of f(w x) is zero at w = 0, but its derivative by w is not."""
    x = torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64)

    def slope(w: Tensor) -> Tensor:
        return jp.jet(lambda x: f(w * x), x, torch.ones(1, 3).double())[1][0]

    def expected(w: Tensor) -> Tensor:
        return torch.autograd.functional.vjp(lambda x: f(w * x), x, torch.ones(3).double(), create_graph=True)[1]

    w = torch.zeros(3, dtype=torch.float64)
    found = jp.jet(slope, w, torch.ones(1, 3).double())[1][0]
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(expected, w).diagonal())
    assert found.all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 3.0])}])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropies_of_no_examples_are_those_of_torch(reduction, settings, soft):
    """NaN for a mean, which was zero, and zero for a sum."""
    w, x = torch.randn(3, 4), torch.zeros(0, 4)
    goal = torch.zeros(0, 3) if soft else torch.zeros(0, dtype=torch.long)

    def loss(w):
        return F.cross_entropy(x @ w.T, goal, reduction=reduction, **settings)

    value, slope = jp.jvp(loss, (w,), (torch.ones_like(w),))
    torch.testing.assert_close(value, loss(w), equal_nan=True)
    assert slope.shape == value.shape and (reduction == "mean" or not slope.any())
