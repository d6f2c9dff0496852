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
