"""Jets as a class: what they hold, what rules see of them, what a compiler sees, and how they are shown."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import jetplane as jp
from jetplane.evaluation.context import expansion
from jetplane.jets import AllPairs, Coefficients, Diagonal, Jet, LowRank, Partial, Space, outer, parts
from jetplane.jets import jet as jet_module
from jetplane.jets.jet import (
    LOST,
    _jet_class,
    carried,
    goes_outside,
    innermost,
    is_jet,
    kind_of,
    make,
    precise,
    primal,
    whole,
)
from jetplane.jets.space import LOSS, MODEL, PARAMETER

K, PAIRS = 2, 3


@pytest.fixture
def space():
    with torch.inference_mode(), expansion(AllPairs(K), 2) as made:
        yield made


def jet(space, *shape, dtype=torch.float64, **options):
    """A jet of random coefficients."""
    draw = lambda *lead: torch.randn((*lead, *shape)).to(dtype)  # noqa: E731
    return Jet(draw(), draw(K), draw(PAIRS), space, **options)


def test_a_new_jet(space):
    y = jet(space, 3, 4)
    assert (y.shape, y.dtype, y.stride(), y.is_contiguous()) == ((3, 4), torch.float64, (4, 1), True)
    assert (y.base, y.version, y.origin, y.examples, y.kind) == (None, 0, None, None, PARAMETER)
    assert not y.is_seed and not y.is_argument
    assert y.first.order == 1 and y.second.order == 2
    turned = Jet(y.primal.mT[:, 1:], y.first, y.second, space)
    assert (turned.shape, turned.stride(), turned.storage_offset()) == ((4, 2), (1, 4), 4)


def test_coefficients_of_a_jet_are_no_longer_its_makers_to_overwrite(space):
    first, second = (Coefficients(space, n, torch.ones(n + 1, 3), owned=True) for n in (1, 2))
    y = Jet(torch.ones(3), first, second, space)
    assert not first.owned and not second.owned and not y.first.owned and not y.second.owned


def test_jets_have_the_kind_of_what_makes_them(space):
    space.kind = MODEL
    assert jet(space, 2).kind == MODEL and jet(space, 2, kind=PARAMETER).kind == PARAMETER
    view, base = jet(space, 2), jet(space, 2, kind=LOSS)
    assert kind_of(view) == MODEL
    view.base = base  # which has been written to
    assert kind_of(view) == LOSS and view.root() is base and base.root() is base
    base.kind = PARAMETER
    assert kind_of(view) == MODEL


def test_rules_see_the_coefficients_of_their_own_space_alone(space):
    y = jet(space, 3)
    value, first, second = parts(y, space)
    assert value is y.primal and first is y.first and second is y.second
    with expansion(Diagonal(3), 1) as inner:
        for constant in (y, 2.0, torch.ones(2)):
            value, first, second = parts(constant, inner)
            assert value is constant and not first and not second and (first.order, second.order) == (1, 2)
            assert primal(constant, inner) is constant and not is_jet(constant, inner)
        outer = Jet(y, torch.ones(3, 3), None, inner)
        assert primal(outer, inner) is y and is_jet(outer, inner) and not is_jet(outer, space)
        assert innermost(outer) is y.primal and innermost(2.0) == 2.0


@pytest.mark.parametrize(
    ("of", "making", "kept"),
    [
        (PARAMETER, PARAMETER, True),
        (PARAMETER, MODEL, False),
        (MODEL, MODEL, True),
        (PARAMETER, LOSS, True),
        (MODEL, LOSS, True),
        (LOSS, MODEL, True),
    ],
)
def test_gauss_newton_models_are_linear_in_functions_of_the_parameters(space, of, making, kept):
    y = jet(space, 3, kind=of)
    space.kind = making
    _, first, second = parts(y, space)
    assert bool(first) and bool(second) is kept and (first.order, second.order) == (1, 2)


def test_looking_at_tangents_does_not_keep_them(space):
    """A rule may ask for the tensor more than once; the jet goes on to hold the factors."""
    low = LowRank(torch.randn(K, 1, 3), torch.randn(K, 1, 4), (3, 4))
    y = Jet(torch.ones(3, 4), Partial(K, (0, 1), low), None, space)
    first = parts(y, space)[1]
    torch.testing.assert_close(first.tensor, low.materialized())
    assert isinstance(y.first.held, LowRank) and isinstance(first.held, Tensor) and first.order == 1
    one = Jet(torch.ones(3, 4), Partial(K, (1,), low[0:1]), None, space)
    assert parts(one, space)[1].rows == (1,)


def test_copies_look_into_the_same_memory(space):
    base = jet(space, 3)
    base.version = 4
    view = copy.copy(copy.copy(base))
    assert view.base is base and view.version == 4 and view.primal is base.primal
    assert view.first.held is base.first.held
    apart = copy.deepcopy(base)
    assert apart.base is None and torch.equal(apart.primal, base.primal)
    assert apart.primal.data_ptr() != base.primal.data_ptr()


def test_views_of_what_was_written_to_are_read_again(space, monkeypatch):
    """The primal only where the base has another one now."""
    read = []
    monkeypatch.setattr(jet_module, "_refresh", read.append)
    base = jet(space, 3)
    view = base.alias(base.primal)
    for moved, written in ((None, False), (None, True), (base.primal, False), (base.primal, True)):
        base.origin, view.version = moved, base.version - written
        primal(view, space)
        assert read == [view] * (written and moved is not None)
        read.clear()
        parts(view, space)
        assert read == [view] * written
        read.clear()
    parts(base, space)
    assert not read


# --- how rules answer -------------------------------------------------------------------------------------


def test_what_has_no_coefficients_is_no_jet(space):
    value, none = torch.ones(3), [Coefficients(space, n) for n in (1, 2)]
    assert make(value, *none, space) is value
    first, second = (Coefficients(space, n, torch.ones(space.count(n), 3)) for n in (1, 2))
    assert is_jet(make(value, first, none[1], space), space)
    assert is_jet(make(value, none[0], second, space), space)
    for dtype in (torch.int64, torch.bool):
        whole = value.to(dtype)
        assert make(whole, first, second, space) is whole
    assert is_jet(make(value.to(torch.complex64), first.to(torch.complex64), none[1], space), space)


def test_products_stay_products_in_a_jet(space):
    first = Coefficients(space, 1, torch.randn(K, 3))
    y = make(torch.ones(3), first, outer(first, first), space)
    assert isinstance(y, Jet) and y.second.is_product
    assert not make(torch.ones(2, 3), first, outer(first, first), space).second.is_product  # of another shape


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_coefficients_are_in_single_precision_at_least(space, dtype, expected):
    assert carried(dtype) == expected
    value = torch.ones(3, dtype=dtype)
    assert precise(value).dtype == expected and (precise(value) is value) == (dtype == expected)
    first = Coefficients(space, 1, torch.ones(K, 1, dtype=torch.complex128 if dtype.is_complex else torch.float64))
    y = make(value, first, Coefficients(space, 2), space)
    assert y.dtype == dtype and y.first.dtype == expected and y.first.tensor.shape == (K, 3)


def test_integers_of_two_bytes_are_as_they_are():
    assert carried(torch.int16) == torch.int16


# --- what a compiler sees ---------------------------------------------------------------------------------


def again(y):
    """The jet made of what a compiler holds of it."""
    names, meta = y.__tensor_flatten__()
    return names, Jet.__tensor_unflatten__({name: getattr(y, name) for name in names}, meta, y.shape, y.stride())


def test_a_jet_is_made_again_of_its_tensors(space):
    y = jet(space, 3, 4)
    y.kind = LOSS
    names, copied = again(y)
    assert names == ["primal", "first_tensor", "second_tensor"]
    assert copied.primal is y.primal and copied.kind == LOSS and copied.space.key == space.key
    assert torch.equal(copied.first_tensor, y.first.tensor) and torch.equal(copied.second_tensor, y.second.tensor)
    assert copied.examples is None


def test_what_is_absent_stays_absent_when_flattened(space):
    y = Jet(torch.ones(3), torch.ones(K, 3), None, space)
    names, copied = again(y)
    assert names == ["primal", "first_tensor"] and y.second_tensor is None and not copied.second
    y = Jet(torch.ones(3), None, torch.ones(PAIRS, 3), space)
    names, copied = again(y)
    assert names == ["primal", "second_tensor"] and y.first_tensor is None and not copied.first
    some = Jet(torch.ones(3), Partial(K, (1,), torch.ones(1, 3)), None, space)
    assert some.first_tensor.tolist() == [[0.0] * 3, [1.0] * 3]  # zeros where some are there


def test_factors_stay_factors_when_flattened(space):
    low = LowRank(torch.randn(K, 1, 3), torch.randn(K, 1, 4), (3, 4))
    y = Jet(torch.ones(3, 4), low, None, space)
    names, copied = again(y)
    assert names == ["primal", "left", "right"] and y.has_factors and copied.has_factors
    assert y.left is low.left and y.right is low.right
    torch.testing.assert_close(copied.first.structured.materialized(), low.materialized())
    assert not jet(space, 2).has_factors


def test_parts_of_examples_stay_when_flattened(space):
    y = jet(space)
    y.examples = torch.randn(5, K)
    names, copied = again(y)
    assert names[-1] == "examples" and copied.examples is y.examples
    y.examples = LOST
    assert "examples" not in y.__tensor_flatten__()[0]


def test_one_space_for_each_key():
    made = Space(AllPairs(2), 2, 1, True)
    assert Space.of(made.key) is Space.of(made.key) and Space.of(made.key).key == made.key
    y = Jet(torch.ones(1), torch.ones(2, 1), None, made.key)
    assert y.space is Space.of(made.key)


# --- how they are shown, and of which class ---------------------------------------------------------------


def test_jets_say_what_they_carry(space):
    y = jet(space)
    assert repr(y) == f"Jet({y.primal!r}, k=2, carried order=2)" == f"{y}"
    assert f"{y:.3f}" == f"{y.primal.item():.3f}"
    assert repr(Jet(torch.ones(1), torch.ones(K, 1), None, space)).endswith("order=1)")
    assert repr(Jet(torch.ones(1), None, None, space)).endswith("order=0)")


class Tagged(Tensor):
    """Data of a user's own class."""


class Asked(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_classes_of_jets():
    assert _jet_class(Tensor) is Jet and _jet_class(Jet) is Jet and _jet_class(torch.nn.Parameter) is Jet
    assert issubclass(_jet_class(Asked), (Jet, Asked)) and _jet_class(Asked) is _jet_class(Asked)
    assert _jet_class(_jet_class(Asked)) is _jet_class(Asked)
    with pytest.raises(jp.DerivativeError, match=r"as_subclass\(Wrapper\)"):
        _jet_class(Wrapper)


def test_who_takes_operators_apart():
    assert goes_outside(Wrapper)
    assert not any(goes_outside(cls) for cls in (Tensor, torch.nn.Parameter, Tagged, Asked, Jet, _jet_class(Asked)))


def test_another_class_is_another_view(space):
    base = jet(space, 3, kind=MODEL)
    base.version, base.examples = 2, torch.ones(5, K)
    tagged = base.as_subclass(Asked)
    assert isinstance(tagged, (Jet, Asked)) and tagged.base is base
    assert (tagged.version, tagged.kind) == (2, MODEL) and tagged.examples is base.examples
    assert base.as_subclass(Tensor) is base and type(tagged.as_subclass(Tensor)) is Jet


# --- where rules record a graph -----------------------------------------------------------------------------


def test_plain_tensors_are_recorded_between_operators():
    w, x = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    with whole(between=True):
        recorded, plain = torch.add(w, w, alpha=3), torch.add(x, x, alpha=3)
    assert recorded.item() == 8.0 and torch.autograd.grad(recorded, w)[0].item() == 4.0
    assert plain.item() == 12.0 and not plain.requires_grad
    with whole(between=False):
        assert not torch.add(w, w, alpha=3).requires_grad


def test_functions_that_torch_defines_in_python_record_what_they_compute_of_plain_tensors():
    variance, x, target = torch.tensor(2.0, requires_grad=True), torch.tensor([1.0]), torch.tensor([0.0])
    value, _, laplacian = jp.value_and_laplacian(lambda x: F.gaussian_nll_loss(x, target, variance.view(1)), x)
    torch.testing.assert_close(torch.autograd.grad(value, variance, retain_graph=True)[0], torch.tensor(0.25 - 0.125))
    torch.testing.assert_close(torch.autograd.grad(laplacian, variance)[0], torch.tensor(-0.25))


# --- where an evaluation has ended meanwhile ----------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch):
    """Operators meet what another thread has left of a jet, which has no coefficients any more."""

    def dispatch(func, args, kwargs):
        raise AttributeError("primal")

    monkeypatch.setattr(jet_module, "_dispatch", dispatch)


def test_what_jets_have_become_is_computed_with(ended):
    call, x = Jet.__torch_dispatch__, torch.arange(6.0).reshape(2, 3)
    assert call(torch.ops.aten.sum.dim_IntList, (Jet,), (x, [1]), {"keepdim": True}).tolist() == [[3.0], [12.0]]
    assert call(torch.ops.aten.sum.default, (Jet,), (x,)).item() == 15.0


def test_jets_that_cannot_be_carried_and_writes_raise(space, ended):
    with pytest.raises(AttributeError, match="primal"):
        jet(space, 3).sin()
    with pytest.raises(AttributeError, match="primal"):
        torch.ops.aten.stack.default([torch.ones(3), jet(space, 3).primal, jet(space, 3)])
    x = torch.ones(3)
    with pytest.raises(AttributeError, match="primal"):
        Jet.__torch_dispatch__(torch.ops.aten.add_.Tensor, (Jet,), (x, x))
    assert torch.equal(x, torch.ones(3))


# --- what an evaluation remembers of its jets --------------------------------------------------------------


def test_jets_that_are_gone_are_forgotten_when_there_are_many(space):
    space.most = 8
    made = space.made
    assert made is not None
    kept = [jet(space, 1) for _ in range(5)]
    for _ in range(3):
        jet(space, 1)
    assert (len(made), space.most) == (8, 8)
    kept.append(jet(space, 1))
    assert [ref() for ref in made] == kept
    assert space.most == 2 * 6 + 4096  # the next time only where many more are alive
