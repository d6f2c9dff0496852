"""`out=` and in-place variants equal what they write, whichever overload torch has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jetplane as jp
from jetplane.testing import check_plane

CASES: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "add": (torch.add, lambda w: (w, w.sin())),
    "sub": (torch.sub, lambda w: (w, w.sin())),
    "mul": (torch.mul, lambda w: (w, w.sin())),
    "div": (torch.div, lambda w: (w, w.cosh())),
    "exp": (torch.exp, lambda w: (w,)),
    "pow": (torch.pow, lambda w: (w, 3)),
    "maximum": (torch.maximum, lambda w: (w, w.sin())),
    "max": (torch.max, lambda w: (w, w.sin())),
    "xlogy": (torch.xlogy, lambda w: (2.0, w.square())),
    "copysign": (torch.copysign, lambda w: (w, -1.0)),
    "mm": (torch.mm, lambda w: (w, w.sin())),
    "sum": (torch.sum, lambda w: (w.square(), 0)),
    "mean": (torch.mean, lambda w: (w.square(), 0)),
    "prod": (torch.prod, lambda w: (w, 0)),
    "var": (torch.var, lambda w: (w, 0)),
    "std": (torch.std, lambda w: (w, 0)),
    "cumsum": (torch.cumsum, lambda w: (w.square(), 0)),
    "cat": (torch.cat, lambda w: ([w, w.sin()],)),
}


@pytest.mark.parametrize("name", CASES)
def test_out(name: str) -> None:
    op, arguments = CASES[name]
    w = torch.rand(3, 3, dtype=torch.float64) + 0.5
    w.requires_grad_()
    tangent = torch.randn(2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        out = torch.empty_like(op(*arguments(w)))
        written = jp.evaluate(lambda: op(*arguments(w), out=out).square().sum(), [w], [tangent])
        read = jp.evaluate(lambda: (op(*arguments(w), out=out), out.square().sum())[1], [w], [tangent])
        torch.testing.assert_close(out, op(*arguments(w)))
    expected = check_plane(lambda: op(*arguments(w)).square().sum(), [w], [tangent])
    for found in (written, read):
        torch.testing.assert_close(found.slope, expected.slope)
        torch.testing.assert_close(found.curvature, expected.curvature)


def test_out_list() -> None:
    w = torch.randn(2, 3, dtype=torch.float64)
    tangent = torch.randn(2, 2, 3, dtype=torch.float64)
    out = [torch.empty(3, dtype=torch.float64) for _ in range(2)]

    def closure() -> Tensor:
        torch.unbind_copy(w, out=out)
        return (out[0] * out[1]).sum()

    found = jp.evaluate(closure, [w], [tangent])
    expected = jp.evaluate(lambda: w.prod(0).sum(), [w], [tangent])
    torch.testing.assert_close(found.slope, expected.slope)
    torch.testing.assert_close(found.curvature, expected.curvature)


def test_in_place_with_another_order_of_arguments() -> None:
    w = torch.rand(3, dtype=torch.float64) + 1
    tangent = torch.randn(2, 3, dtype=torch.float64)
    found = jp.evaluate(lambda: (w * 1.0).polygamma_(1).sum(), [w], [tangent])
    expected = jp.evaluate(lambda: torch.polygamma(1, w).sum(), [w], [tangent])
    torch.testing.assert_close(found.slope, expected.slope)
    torch.testing.assert_close(found.curvature, expected.curvature)


SCATTERED = {
    "select": lambda v, z: torch.select_scatter(v, z[: v.shape[1]] ** 2, 0, 1),
    "slice": lambda v, z: torch.slice_scatter(v, z[: v.shape[1]].expand(2, -1) ** 2, 0, 0, 2),
    "diagonal": lambda v, z: torch.diagonal_scatter(v, z[: min(v.shape)] ** 2),
}
OVERLAPPING = {
    "unfold": lambda y: y.unfold(0, 3, 1),
    "as_strided": lambda y: y.as_strided((2, 3), (2, 1)),
}
APART = {
    "expanded": lambda y: y[:3].expand(4, 3),
    "transposed": lambda y: y.reshape(2, 3).t(),
    "every other": lambda y: y.repeat(4).reshape(4, 6)[:, ::2],
    "unfold apart": lambda y: y.unfold(0, 3, 3),
    "contiguous": lambda y: y.unfold(0, 3, 1).contiguous(),
}
POINT = torch.linspace(0.3, 1.4, 6, dtype=torch.float64)


@pytest.mark.parametrize("view", OVERLAPPING)
@pytest.mark.parametrize("name", SCATTERED)
def test_scattering_where_elements_share_memory(name: str, view: str) -> None:
    """Torch writes to several elements at once there, and its own gradient is wrong."""
    with pytest.raises(jp.errors.DerivativeError, match="share memory"):
        jp.jacobian(lambda z: SCATTERED[name](OVERLAPPING[view](z.sin()), z), POINT)


@pytest.mark.parametrize("view", APART)
@pytest.mark.parametrize("name", SCATTERED)
def test_scattering_into_views(name: str, view: str) -> None:
    f = lambda z: SCATTERED[name](APART[view](z.sin()), z)  # noqa: E731
    h = 1e-6
    columns = [(f(POINT + h * e) - f(POINT - h * e)) / (2 * h) for e in torch.eye(6, dtype=torch.float64)]
    torch.testing.assert_close(jp.jacobian(f, POINT), torch.stack(columns, -1), rtol=1e-7, atol=1e-8)
