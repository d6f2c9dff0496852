"""Rules against reverse over reverse on torch's own operator samples, which no one here wrote."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import jetplane as jp
from jetplane.rules import RULES
from jetplane.rules.registry import operator
from jetplane.testing import check_plane, grad_of_grad, scalar_loss

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
SAMPLES = 3  # of each operator here; benchmarks/coverage.py runs all of them

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own samples call what torch deprecates

# Operators whose reverse mode is not the derivative of what is computed, and sparse or quantized layouts.
SKIPPED = {
    "native_layer_norm": "torch leaves mean and rstd out of the gradient",
    "nn.functional.max_unpool1d": "indices repeat: torch's gradient counts overwritten elements",
    "nn.functional.max_unpool2d": "indices repeat: torch's gradient counts overwritten elements",
    "nn.functional.max_unpool3d": "indices repeat: torch's gradient counts overwritten elements",
    "bfloat16": "compared at its own precision elsewhere",
    "half": "compared at its own precision elsewhere",
    "chalf": "compared at its own precision elsewhere",
    "cfloat": "compared at its own precision elsewhere",
    "float": "compared at its own precision elsewhere",
    "nn.functional.batch_norm": "samples move the running statistics themselves; see test_planes",
    "torch.ops.aten._safe_softmax.default": "has no sample in float64",
    "linalg.pinv.hermitian": "reads one triangle, and its gradient assumes a symmetric move",
    "linalg.eig": "samples depend on a phase that is not defined",
    "linalg.eigvals": "samples depend on a phase that is not defined",
    "sparse.sampled_addmm": "sparse",
    "sparse.mm": "sparse",
    "to_sparse": "sparse",
    "torch._scaled_mm": "8-bit floats",
    "torch._scaled_mm_v2": "8-bit floats",
}


def name_of(op) -> str:
    return op.name + ("." + op.variant_test_name if op.variant_test_name else "")


OPS = [
    op
    for op in op_db
    if torch.float64 in op.dtypes and op.supports_gradgrad and not {op.name, name_of(op)} & set(SKIPPED)
]


def cases(op):
    """Samples with a leaf to move and an oracle that is finite and symmetric."""
    for n, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=False)):
        if n >= SAMPLES:
            return
        loss, leaves = scalar_loss(op, (sample.input, *sample.args), sample.kwargs)
        if not leaves:
            continue
        generator = torch.Generator().manual_seed(2)
        tangents = [torch.randn(2, *x.shape, dtype=x.dtype, generator=generator) for x in leaves]
        try:
            plane = grad_of_grad(loss, leaves, tangents)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):
            continue
        finite = all(bool(torch.isfinite(t).all()) for t in (plane.value, plane.slope, plane.curvature))
        if finite and plane.value.dtype == torch.float64:
            yield loss, leaves, tangents, plane


def said_of(column: int) -> dict[str, str]:
    """What docs/coverage.md says of each operator in a column of its table."""
    rows = (line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| "))
    return {row[1].strip(): row[column].strip() for row in rows if len(row) == 9}


CARRIED = {name for name, said in said_of(2).items() if said in ("rule", "decomposed")}


def test_the_coverage_page_is_read():
    assert len(CARRIED) > 350 and "linalg.inv" in CARRIED and "scatter_reduce.prod" not in CARRIED


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_operator(op):
    """An operator that the coverage page calls a rule, or decomposed, does not need the local fallback."""
    for loss, leaves, tangents, plane in cases(op):
        try:
            with jp.strict(name_of(op) in CARRIED):
                check_plane(loss, leaves, tangents, 1e-7)
        except jp.UnusedParametersError:
            assert not plane.slope.any() and not plane.curvature.any()
        except jp.DerivativeError as error:
            # Of the chunked cross entropy, which computes gradients in its forward pass, torch's own are no oracle.
            assert "scale_grad_by_freq" in str(error) or "custom operator" in str(error)


# Rules that torch's samples do not reach, each with one of its own.
A = torch.linspace(0.2, 0.9, 12, dtype=torch.float64).reshape(3, 4)
LABELS = torch.tensor([1, 0, 3])
WEIGHTS = torch.linspace(-1, 1, 400, dtype=torch.float64)


def cut(n: int, *shape: int) -> torch.Tensor:
    """Weights for the samples below."""
    return WEIGHTS[n : n + torch.Size(shape).numel()].reshape(shape)


def recurrent(gates: int):
    """Weights of one layer with biases, 4 inputs and 2 states, that depend on x."""
    return lambda x: [
        cut(0, 2 * gates, 4) + x[0], cut(30, 2 * gates, 2) * x[0, 0], cut(50, 2 * gates), cut(60, 2 * gates)
    ]  # fmt: skip


def layer(gates: int, states: int):
    def run(f, x):
        h = tuple(cut(70 + n, 1, 1, 2) * x[1, 1] for n in range(states))
        return f(x.unsqueeze(1), h if states == 2 else h[0], recurrent(gates)(x), True, 1, 0.0, True, False, False)

    return run


def packed(gates: int, states: int):
    def run(f, x):
        h = tuple(cut(70 + n, 1, 2, 2) * x[1, 1] for n in range(states))
        sizes = torch.tensor([2, 1])
        return f(x, sizes, h if states == 2 else h[0], recurrent(gates)(x), True, 1, 0.0, True, False)

    return run


def cell(gates: int, states: int):
    def run(f, x):
        h = [cut(70 + n, 3, 2) * x[1, 1] for n in range(states)]
        return f(x, h if states == 2 else h[0], *recurrent(gates)(x))

    return run


def times(f, x, *args):
    """For results that carry no derivative of their own."""
    return f(x, *args) * x


BY_HAND = {
    "_euclidean_dist": lambda f, x: f(x, x.sin()),
    "rsub.Tensor": lambda f, x: f(x, 2 * x),
    "rsub.Scalar": lambda f, x: f(x, 2.0, 3.0),
    "linear": lambda f, x: f(x, x[:2] * 3, x[0, :2]),
    "copy": lambda f, x: x.clone().copy_(x.sin()),
    "fill.Tensor": lambda f, x: x.clone().fill_(x[0, 0].sin()),
    "alias": lambda f, x: f(x) * x,
    "numpy_T": lambda f, x: f(x) @ x,
    "conj": lambda f, x: f(torch.complex(x, x.sin())) * x,
    "_conj_physical": lambda f, x: f(torch.complex(x, x.sin())) * x,
    "_neg_view": lambda f, x: f(x) * x,
    "imag": lambda f, x: f(torch.complex(x, x.sin())) * x,
    "contiguous": lambda f, x: f(x.T) * x.T,
    "to.other": lambda f, x: f(x, torch.complex(A, A)) * x,
    "to.dtype_layout": lambda f, x: f(x, dtype=torch.float64, copy=True) * x,
    "_to_copy": lambda f, x: f(x) * x,
    "copysign.Scalar": lambda f, x: f(x, -1.0) * x,
    "div.Scalar_mode": lambda f, x: f(x, 0.3, rounding_mode="floor") * x,
    "remainder.Scalar": lambda f, x: f(x, 0.3) * x,
    "clamp_max": lambda f, x: f(x, 0.5) * x,
    "pow.Scalar": lambda f, x: f(2.5, x),
    "where.Scalar": lambda f, x: f(x > 0.5, 1.0, 2.0) * x,
    "xlogy.Scalar_Other": lambda f, x: f(x, 2.5) * x,
    "xlogy.Scalar_Self": lambda f, x: f(2.5, x),
    "special_xlog1py.other_scalar": lambda f, x: f(x, 2.5) * x,
    "special_xlog1py.self_scalar": lambda f, x: f(2.5, x),
    "_prelu_kernel": lambda f, x: f(x - 0.5, x[0].sin()),
    "scatter.value": lambda f, x: f(x, 1, LABELS[:, None], 0.5) * x,
    "unsafe_split_with_sizes": lambda f, x: f(x * x, [1, 3], 1),
    "_softmax": lambda f, x: f(x, 1, False) * x,
    "_log_softmax": lambda f, x: f(x, 1, False) * x,
    "special_softmax": lambda f, x: f(x, 1) * x,
    "special_log_softmax": lambda f, x: f(x, 1) * x,
    "special_logsumexp": lambda f, x: f(x, [1]),
    "nll_loss": lambda f, x: f(x.sin(), LABELS),
    "nll_loss_forward": lambda f, x: f(x.sin(), LABELS, None, 1, -100)[0],
    "nll_loss2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.long)),
    "nll_loss2d_forward": lambda f, x: f(
        x.sin().reshape(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.long), None, 1, -100
    )[0],
    "_weight_norm": lambda f, x: f(x, x[:, :1].exp(), 0),
    "_weight_norm_interface": lambda f, x: f(x, x[:, :1].exp(), 0)[0],
    "_native_batch_norm_legit": lambda f, x: f(
        x.sin(), x[0], x[1], torch.zeros_like(x[0]), torch.ones_like(x[0]), True, 0.1, 1e-5
    )[0],
    "_native_batch_norm_legit.no_stats": lambda f, x: f(x.sin(), x[0], x[1], True, 0.1, 1e-5)[0],
    "_native_batch_norm_legit_no_training": lambda f, x: f(
        x.sin(), x[0], x[1], torch.zeros_like(x[0]), torch.ones_like(x[0]), 0.1, 1e-5
    )[0],
    "native_group_norm": lambda f, x: torch.cat([y.flatten() for y in f(x.sin(), x[0], x[1], 3, 4, 1, 2, 1e-5)]),
    "_embedding_bag": lambda f, x: f(x.sin(), LABELS % 3, torch.tensor([0, 2]))[0],
    "native_dropout": lambda f, x: f(x.sin(), 0.4, True)[0],
    "reflection_pad2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [1, 1, 1, 0]),
    "reflection_pad3d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [1, 1, 1, 0, 1, 1]),
    "replication_pad3d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [1, 1, 1, 0, 1, 1]),
    "_adaptive_avg_pool2d": lambda f, x: f(x.sin().reshape(1, 3, 4), [2, 2]),
    "_adaptive_avg_pool3d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [2, 1, 2]),
    "col2im": lambda f, x: f(x.sin().reshape(4, 3), [2, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "upsample_nearest1d": lambda f, x: f(x.sin()[None], [7]),
    "_upsample_nearest_exact1d": lambda f, x: f(x.sin()[None], [7]),
    "upsample_linear1d": lambda f, x: f(x.sin()[None], [7], False),
    "upsample_nearest2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [3, 5]),
    "_upsample_nearest_exact2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [3, 5]),
    "upsample_bilinear2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [3, 5], False),
    "upsample_bicubic2d": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [3, 5], False),
    "_upsample_bicubic2d_aa": lambda f, x: f(x.sin().reshape(1, 3, 2, 2), [3, 5], False),
    "upsample_nearest3d": lambda f, x: f(x.sin().reshape(1, 1, 3, 2, 2), [3, 5, 3]),
    "_upsample_nearest_exact3d": lambda f, x: f(x.sin().reshape(1, 1, 3, 2, 2), [3, 5, 3]),
    "upsample_trilinear3d": lambda f, x: f(x.sin().reshape(1, 1, 3, 2, 2), [3, 5, 3], False),
    "lstm.input": layer(4, 2),
    "lstm.data": packed(4, 2),
    "lstm_cell": cell(4, 2),
    "gru.input": layer(3, 1),
    "gru.data": packed(3, 1),
    "gru_cell": cell(3, 1),
    "rnn_tanh.input": layer(1, 1),
    "rnn_tanh.data": packed(1, 1),
    "rnn_tanh_cell": cell(1, 1),
    "rnn_relu.input": layer(1, 1),
    "rnn_relu.data": packed(1, 1),
    "rnn_relu_cell": cell(1, 1),
    # without a derivative of their own
    "rand_like": times,
    "bernoulli.Tensor": lambda f, x: f(x, x) * x,
    "poisson": times,
    "normal.float_Tensor": lambda f, x: f(0.0, x) * x,
    "is_nonzero": lambda f, x: x * f(x[0, 0]),
    "_local_scalar_dense": lambda f, x: x * f(x[0, 0]),
}


# Autograd has no word for these: their derivative is zero.
FLAT = {
    "floor_divide.Scalar": lambda f, x: f(x, 0.3),
    "bernoulli.p": lambda f, x: f(x, 0.5),
    "binomial": lambda f, x: f(10 * x.round(), x),
}


def test_every_rule_is_reached_by_a_sample(monkeypatch):
    """A rule without a sample is a rule without a test."""
    import sys

    from jetplane.rules import dispatch  # noqa: F401

    module = sys.modules["jetplane.rules.dispatch"]
    reached = set()

    class Spy(dict):
        def get(self, key, default=None):
            reached.add(key)
            return super().get(key, default)

    monkeypatch.setattr(module, "RULES", Spy(RULES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if torch.float64 not in op.dtypes or op.name in ("torch._scaled_mm", "torch._scaled_mm_v2"):
                continue
            for n, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=False)):
                if n >= 6:
                    break
                loss, leaves = scalar_loss(op, (sample.input, *sample.args), sample.kwargs)
                if leaves and not sample_is_slow(op):
                    try:
                        jp.evaluate(loss, leaves, [torch.ones_like(x).unsqueeze(0) for x in leaves])
                    except (jp.JetplaneError, RuntimeError, TypeError, AttributeError, AssertionError):
                        pass
    own = {op for op in RULES if op.namespace == "aten"}  # other tests register rules of their own
    own -= {op for op in own if re.search("fake_quant|obs_fq|pack_mm", str(op))}  # tests/test_quantized.py
    missing = own - reached - {operator(name) for name in BY_HAND | FLAT}
    assert not missing, " ".join(sorted(map(str, missing)))


def sample_is_slow(op) -> bool:
    return op.name in ("nn.functional.ctc_loss",)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    jp.testing.check_rule(lambda x: BY_HAND[name](operator(name), x), A)


@pytest.mark.parametrize("name", FLAT)
def test_flat(name):
    value, first, _ = jp.jet(lambda x: FLAT[name](operator(name), x), A, torch.ones(1, 3, 4).double())
    assert value.shape == A.shape and not first.any()
