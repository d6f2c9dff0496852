"""The local fallback: its check of linearity in the cotangent, and what single precision does to it."""

import pytest
import torch

import jetplane as jp
from jetplane.rules import fallback

INDEX = torch.arange(60) % 7


def scattered(x):
    """A product of many numbers, which has no rule."""
    return torch.ones(7, dtype=x.dtype).scatter_reduce(0, INDEX, 1 + x / 7, "prod")


@pytest.fixture
def counted(monkeypatch):
    """How often what was called."""
    calls = []
    for name in ("_differentiated", "_by_element"):
        original = getattr(fallback, name)
        monkeypatch.setattr(
            fallback, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    return calls


@pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_that_fails_the_check_is_settled_in_double_precision(dtype, counted, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((60,), (3, 60)))
    monkeypatch.setattr(fallback, "ROUNDING", 0)
    monkeypatch.setattr(fallback, "PRECISION", {torch.float32: -1.0, torch.float64: 1e-9})  # no single number passes
    found = jp.jet(scattered, x, v)
    assert counted == ["_differentiated", "_differentiated"]
    expected = jp.jet(scattered, x.double(), v.double())
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    rounding = 1e-6 if dtype == torch.float32 else 3e-2  # of the numbers that enter the operator
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other.float(), rtol=rounding, atol=rounding)


@pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")
def test_single_precision_passes_at_any_size_of_numbers(counted):
    for size in (1e-12, 1.0, 1e12):
        x = torch.randn(60, generator=torch.Generator().manual_seed(0))
        jp.jet(lambda x, size=size: scattered(x / size) * size, x * size, size * torch.randn(4, 60))
    assert set(counted) == {"_differentiated"} and len(counted) == 3


class Squared(torch.autograd.Function):
    """A backward pass that squares its cotangent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return u * u * x.cos()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_linear_is_said_with_numbers(dtype):
    x = torch.randn(5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with pytest.raises(jp.DerivativeError, match=r"along a random one it gives .*, which is the first coefficient 0"):
        jp.evaluate(lambda: Squared.apply(x * w).sum(), [w := torch.ones(5, dtype=dtype)], jp.Directions(k=2), "none")


@pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")
def test_coefficients_that_are_zero_keep_their_place_in_the_graph():
    """A parameter at zero stops a direction, and a step of the parameter lets it go on."""
    x = torch.linspace(0.5, 1.5, 60, dtype=torch.float64)
    scale = torch.ones(60, dtype=torch.float64)
    scale[::2] = 0
    scale.requires_grad_()
    weights = torch.linspace(-1, 1, 7 * 60, dtype=torch.float64).reshape(7, 60)

    def value():
        return (jp.jacobian(lambda x: scattered(x * scale), x) * weights).sum()

    (slope,) = torch.autograd.grad(value(), scale)
    expected = torch.zeros_like(slope)
    with torch.no_grad():
        for n in range(4):
            for h in (1e-5, -1e-5):
                scale[n] += h
                expected[n] += value() / (2 * h)
                scale[n] -= h
    torch.testing.assert_close(slope[:4], expected[:4], rtol=1e-6, atol=1e-8)
