"""Every derivative of functions with every option, against reverse mode of the same function of one vector."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import jetplane as jp

D, B = 4, 3


def number(z: Tensor) -> Tensor:
    """Of a vector."""
    return (z * z.roll(1, -1)).sin().sum(-1) * z.exp().sum(-1) + (z**3).sum(-1)


def field(z: Tensor) -> Tensor:
    """A vector of a vector."""
    return z.roll(1, -1).sin() * z + z**2


@dataclass(frozen=True)
class Form:
    """How the numbers of a vector are given to a function: ``primals`` of a vector, the vector of the primals again."""

    primals: Callable[[Tensor], Any]
    vector: Callable[..., Tensor]  # of all arguments
    moved: Callable[[Tensor], Any]  # what moves, of a vector: directions and fields have its structure
    joined: Callable[[Any], Tensor]  # a result in that structure, as a vector
    options: dict[str, Any]
    size: int = D


def last(tree: Any, *parts: Callable[[Any], Tensor]) -> Tensor:
    return torch.cat([part(tree).flatten(-1) for part in parts], -1)


FORMS = {
    "tensor": Form(lambda z: z, lambda x: x, lambda z: z, lambda t: t, {}),
    "dict": Form(
        lambda z: {"a": z[..., :2], "b": [z[..., 2:]]}, lambda p: torch.cat([p["a"], p["b"][0]], -1),
        lambda z: {"a": z[..., :2], "b": [z[..., 2:]]}, lambda t: last(t, lambda t: t["a"], lambda t: t["b"][0]), {},
    ),
    "one of several arguments": Form(
        lambda z: ("label", z), lambda _, x: x, lambda z: z, lambda t: t, {"argnums": 1},
    ),
    "several of several arguments": Form(
        lambda z: (z[..., 1:], "label", z[..., :1]), lambda a, _, b: torch.cat([b, a], -1),
        lambda z: (z[..., :1], z[..., 1:]), lambda t: last(t, lambda t: t[0], lambda t: t[1]), {"argnums": (2, 0)},
    ),
    "number": Form(lambda z: z[..., 0], lambda x: x[..., None], lambda z: z[..., 0], lambda t: t[..., None], {}, 1),
}  # fmt: skip


def as_matrix(form: Form, h: Any) -> Tensor:
    """Blocks within blocks as (..., D, D)."""
    leaves = torch.utils._pytree.tree_leaves(form.moved(torch.zeros(form.size)))
    sizes, axes = [t.numel() for t in leaves], leaves[0].dim()
    found = iter(torch.utils._pytree.tree_leaves(h))
    rows = []
    for a in sizes:
        row = [(next(found), b) for b in sizes]
        rows.append(torch.cat([t.reshape(*t.shape[: t.dim() - 2 * axes], a, b) for t, b in row], -1))
    return torch.cat(rows, -2)


def bent(z: Tensor) -> Tensor:
    """The Laplacian, by reverse mode."""
    return torch.func.hessian(number)(z).trace()


@dataclass(frozen=True)
class Case:
    """What is called, and what it must be equal to: of the form, and of vector, gradient, Hessian and v."""

    call: Callable[..., Any]  # (f, primals, v, **options)
    found: Callable[[Form, Any], Any]
    expected: Callable[..., Any]  # (z, v, g, h), one point
    chunk: bool = True
    field: bool = False


def pushed(linearized: Any, v: Any) -> Any:
    _, push, *aux = linearized
    return (push(v), *aux) if aux else push(v)


SIGMA = torch.randn(D, 3, generator=torch.Generator().manual_seed(3)).double()


def sigma(form: Form, z: Tensor) -> Any:
    s = SIGMA[: form.size]
    return form.moved(s.T) if form.size == 1 else torch.utils._pytree.tree_map(lambda t: t.mT, form.moved(s.T))


CASES = {
    "jvp": Case(
        lambda f, x, v, **o: jp.jvp(f, x, v, **o), lambda form, r: torch.stack(r[:2]),
        lambda z, v, g, h: torch.stack([number(z), g @ v]), chunk=False,
    ),
    "linearize": Case(
        lambda f, x, v, **o: pushed(jp.linearize(f, x, **o), v), lambda form, r: r, lambda z, v, g, h: g @ v,
    ),
    "jacobian": Case(
        lambda f, x, v, **o: jp.jacobian(f, x, **o), lambda form, r: form.joined(r), lambda z, v, g, h: g,
    ),
    "divergence": Case(
        lambda f, x, v, **o: jp.divergence(f, x, **o), lambda form, r: r,
        lambda z, v, g, h: torch.func.jacrev(field)(z).trace(), field=True,
    ),
    "hessian": Case(
        lambda f, x, v, **o: jp.hessian(f, x, **o), as_matrix, lambda z, v, g, h: h,
    ),
    "hessian by reverse mode": Case(
        lambda f, x, v, **o: jp.hessian(f, x, mode="forward-over-reverse", **o), as_matrix, lambda z, v, g, h: h,
    ),
    "hessian_diagonal": Case(
        lambda f, x, v, **o: jp.hessian_diagonal(f, x, **o), lambda form, r: form.joined(r),
        lambda z, v, g, h: h.diagonal(),
    ),
    "hvp": Case(lambda f, x, v, **o: jp.hvp(f, x, v, **o), lambda form, r: form.joined(r), lambda z, v, g, h: h @ v),
    "hvp by reverse mode": Case(
        lambda f, x, v, **o: jp.hvp(f, x, v, mode="forward-over-reverse", **o), lambda form, r: form.joined(r),
        lambda z, v, g, h: h @ v,
    ),
    "vhv": Case(
        lambda f, x, v, **o: jp.vhv(f, x, v, **o), lambda form, r: r, lambda z, v, g, h: v @ h @ v, chunk=False,
    ),
    "laplacian": Case(
        lambda f, x, v, **o: jp.laplacian(f, x, **o), lambda form, r: r, lambda z, v, g, h: h.trace(),
    ),
    "laplacian by reverse mode": Case(
        lambda f, x, v, **o: jp.laplacian(f, x, mode="forward-over-reverse", **o), lambda form, r: r,
        lambda z, v, g, h: h.trace(),
    ),
    "value_and_laplacian": Case(
        lambda f, x, v, **o: jp.value_and_laplacian(f, x, **o),
        lambda form, r: torch.cat([r.value[..., None], form.joined(r.gradient), r.laplacian[..., None]], -1),
        lambda z, v, g, h: torch.cat([number(z)[None], g, h.trace()[None]]),
    ),
    "bilaplacian": Case(
        lambda f, x, v, **o: jp.bilaplacian(f, x, **o), lambda form, r: r,
        lambda z, v, g, h: torch.func.hessian(bent)(z).trace(),
    ),
    "weighted_laplacian": Case(
        lambda f, x, v, form=None, **o: jp.weighted_laplacian(f, x, sigma(form, x), v, **o), lambda form, r: r,
        lambda z, v, g, h: (SIGMA[: len(z)].T @ h @ SIGMA[: len(z)]).trace() + g @ v,
    ),
}  # fmt: skip
# `jet` and `quadratic_form` take K directions in the structure of the primals.
TANGENTS = {
    "jet": Case(
        lambda f, x, v, **o: jp.jet(f, x, v, **o), lambda form, r: torch.stack(r[1:]),
        lambda z, v, g, h: torch.stack([torch.outer(v @ g, torch.ones(len(v)).double()), v @ h @ v.T]), chunk=False,
    ),
    "quadratic_form": Case(
        lambda f, x, v, **o: jp.quadratic_form(f, x, v, **o), lambda form, r: r, lambda z, v, g, h: v @ h @ v.T,
    ),
    "quadratic_form, diagonal": Case(
        lambda f, x, v, **o: jp.quadratic_form(f, x, v, pairs="diagonal", **o), lambda form, r: r,
        lambda z, v, g, h: (v @ h @ v.T).diagonal(),
    ),
}  # fmt: skip


def expected(case: Case, zs: Tensor, v: Tensor) -> Tensor:
    found = [case.expected(z, v, torch.func.grad(number)(z), torch.func.hessian(number)(z)) for z in zs]
    return torch.stack(found)


def applied(form: Form, case: Case, has_aux: bool) -> Callable[..., Any]:
    def f(*arguments: Any) -> Any:
        z = form.vector(*arguments)
        result = form.moved(field(z)) if case.field else number(z)
        return (result, {"vector": z, "word": "aux"}) if has_aux else result

    return f


CHUNKS: tuple[Any, ...] = ("auto", None, 1, 3)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("shape", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_an_option_at_one_point_and_at_each(name: str, shape: str, has_aux: bool):
    case, form = CASES[name], FORMS[shape]
    zs, v = torch.randn(B, form.size).double(), torch.randn(form.size).double()
    want = expected(case, zs, v)
    f = applied(form, case, has_aux)
    options = form.options | {"has_aux": has_aux} | ({"form": form} if name == "weighted_laplacian" else {})
    for chunk in (CHUNKS[::3] if has_aux else CHUNKS) if case.chunk else (None,):
        chunked = {"chunk": chunk} if case.chunk else {}
        for z, right, axis in ((zs[0], want[0], {}), (zs, want.mT if name == "jvp" else want, {"batch_dim": 0})):
            got = case.call(f, form.primals(z), form.moved(v), **options, **chunked, **axis)
            if has_aux:
                *got, aux = got
                got = got[0] if len(got) == 1 else got
                assert aux["word"] == "aux"
                torch.testing.assert_close(aux["vector"], z)
            torch.testing.assert_close(case.found(form, got), right)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("shape", FORMS)
@pytest.mark.parametrize("name", TANGENTS)
def test_an_option_with_directions(name: str, shape: str, has_aux: bool):
    case, form = TANGENTS[name], FORMS[shape]
    zs, v = torch.randn(B, form.size).double(), torch.randn(3, form.size).double()
    want = expected(case, zs, v)
    f = applied(form, case, has_aux)
    for chunk in (CHUNKS[::3] if has_aux else CHUNKS) if case.chunk else (None,):
        options = form.options | ({"chunk": chunk} if case.chunk else {}) | {"has_aux": has_aux}
        for z, tangents, axis, right in (
            (zs[0], v, {}, want[0]),
            (zs, v, {"batch_dim": 0}, want.movedim(0, -1)),
            (zs, v[:, None].expand(3, B, form.size), {"batch_dim": 0}, want.movedim(0, -1)),
        ):
            got = case.call(f, form.primals(z), form.moved(tangents), **axis, **options)
            value = got[0] if has_aux else got
            if name == "jet":
                assert torch.equal(value[0], number(z))
                found = torch.stack([value[1][:, None].expand_as(value[2]), value[2]])
            else:
                found = value
            torch.testing.assert_close(found, right)


def test_planes_of_directions_in_chunks():
    z, v = torch.randn(D).double(), torch.randn(6, D).double()
    h = torch.func.hessian(number)(z)
    want = torch.stack([v[i : i + 2] @ h @ v[i : i + 2].T for i in (0, 2, 4)])
    for chunk in ("auto", None, 2, 4):
        torch.testing.assert_close(jp.quadratic_form(number, z, v, pairs=2, chunk=chunk), want)
    with pytest.raises(jp.ArgumentError, match="multiple of the 2"):
        jp.quadratic_form(number, z, v, pairs=2, chunk=3)


def test_auto_takes_what_fits_into_half_of_the_memory(monkeypatch):
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        return number(z)

    z = torch.randn(12).double()
    want = jp.bilaplacian(f, z), *jp.value_and_laplacian(f, z)
    assert len(calls) == 2
    calls.clear()
    monkeypatch.setattr("jetplane.transforms.costs.free_memory", lambda device: 40_000)
    got = jp.bilaplacian(f, z), *jp.value_and_laplacian(f, z)
    torch.testing.assert_close(got, want)
    assert 4 < len(calls) < 30
    monkeypatch.setattr("jetplane.transforms.costs.free_memory", lambda device: 4_000)
    with pytest.raises(jp.ArgumentError, match=r"bilaplacian: D = 80: .* runs of f .* chunk=1"):
        jp.bilaplacian(f, z.repeat(7)[:80])
