"""What code that was written for torch meets: losses by hand, layers that are cut off, calls that go wrong."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal, StudentT
from torch.nn import functional as F

import jetplane as jp
from jetplane.evaluation.reached import unreached
from jetplane.subspace.sources import Drawn, PreviousStep, Subspace
from jetplane.testing import grad_of_grad

torch.manual_seed(0)
X, Y, WEIGHT = torch.randn(7, 3).double(), torch.randn(7, 2).double(), torch.rand(7, 1).double()


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def directions(params, k=4):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(k, *p.shape, generator=generator, dtype=p.dtype) for p in params]


def gauss_newton(residual, params, along):
    """``2 J^T J`` of a residual, the jacobian J along directions row by row from reverse mode."""
    y = residual().flatten()
    rows = [torch.autograd.grad(v, params, retain_graph=True) for v in y]
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    jacobian = gradients @ torch.cat([v.flatten(1) for v in along], 1).T
    return 2 * jacobian.T @ jacobian


# Each: the loss of (output, target), and the residual whose squares it sums up.
SQUARES = {
    "mean": (lambda a, b: (a - b).square().mean(), lambda a, b: (a - b) / 14**0.5),
    "power": (lambda a, b: ((a - b) ** 2).sum(), lambda a, b: a - b),
    "product": (lambda a, b: (lambda d: (d * d).sum() / 3)(a - b), lambda a, b: (a - b) / 3**0.5),
    "features first": (lambda a, b: (a - b).pow(2).sum(1).mean(), lambda a, b: (a - b) / 7**0.5),
    "kept axes": (lambda a, b: (a - b).pow(2).mean(0, keepdim=True).sum(), lambda a, b: (a - b) / 7**0.5),
    "weights": (lambda a, b: (WEIGHT * (a - b) ** 2).sum(-1).mean(), lambda a, b: (a - b) * (WEIGHT / 7).sqrt()),
    "a sum of two": (
        lambda a, b: 0.5 * (a - b).square().sum() + 3 * a.square().mean(),
        lambda a, b: torch.cat([(a - b) * 0.5**0.5, a * (3 / 14) ** 0.5]),
    ),
}


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", SQUARES)
def test_sums_of_squares_have_their_gauss_newton_curvature(name, chunk):
    loss, residual = SQUARES[name]
    net = network()
    params = list(net.parameters())
    along = directions(params)
    plane = jp.evaluate(lambda: loss(net(X), Y), params, along, "ggn", examples=True, chunk=chunk)
    exact = grad_of_grad(lambda: loss(net(X), Y), params, along)
    torch.testing.assert_close(plane.value, exact.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(plane.slope, exact.slope, rtol=1e-9, atol=1e-12)
    expected = gauss_newton(lambda: residual(net(X), Y), params, along)
    torch.testing.assert_close(plane.curvature, expected, rtol=1e-9, atol=1e-12)
    assert plane.examples is not None
    torch.testing.assert_close(plane.examples.sum(0), exact.slope, rtol=1e-9, atol=1e-12)


# Losses of (output, target, classes), linear in squares or log-probabilities.
SPOTS, CLASSES, FIRST, SINGLE = (
    torch.rand(7, 2) > 0.4,
    torch.randint(0, 2, (7,)),
    torch.rand(7).double(),
    WEIGHT.float(),
)
ROWS = torch.arange(7)
LINEAR = {
    "mask": lambda a, b, c: ((a - b) ** 2 * SPOTS).sum() / SPOTS.sum(),
    "selected": lambda a, b, c: ((a - b) ** 2)[SPOTS].mean(),
    "where": lambda a, b, c: torch.where(SPOTS, (a - b) ** 2, 0.5).mean(),
    "filled": lambda a, b, c: ((a - b) ** 2).masked_fill(SPOTS, 1.0).mean(),
    "views": lambda a, b, c: ((a - b) ** 2).T.reshape(7, -1).flatten(1).unsqueeze(0).mean(2).squeeze(0).mean(),
    "repeated": lambda a, b, c: ((a - b).square() * torch.tensor([[[1.0]], [[2.0]]])).mean(),
    "side by side": lambda a, b, c: torch.cat([(a - b) ** 2, a.square()[:3], b]).mean() + torch.stack([a**2, b]).sum(),
    "split": lambda a, b, c: sum(s.mean() * n for n, s in enumerate(((a - b) ** 2).split([3, 4]), 1)),
    "an integer tensor": lambda a, b, c: ((a - b) ** 2 / torch.tensor(3)).sum(),
    "single precision": lambda a, b, c: ((a - b) ** 2 * SINGLE).mean(),
    "two squares": lambda a, b, c: (WEIGHT * (a - b) ** 2 - (1 - WEIGHT) * -(a**2) + 1).mean(),
    "norm": lambda a, b, c: torch.norm(a - b) ** 2 / 7,
    "norms": lambda a, b, c: ((a - b).norm(dim=1) ** 2 * FIRST).sum(),
    "modulus": lambda a, b, c: torch.view_as_complex(a - b).abs().square().mean(),
    "einsum": lambda a, b, c: (lambda r: torch.einsum("nd,nd->n", r, r))(a - b).mean(),
    "inner": lambda a, b, c: (lambda r: torch.inner(r, r))((a - b).flatten()),
    "of one element": lambda a, b, c: (a[0, :1] - b[0, :1]) ** 2 + (a[1, :1] - b[1, :1]) ** 2,
    "number by number": lambda a, b, c: sum((a[i, 0] - b[i, 0]) ** 2 for i in range(3)) / 3,
    "weighed": lambda a, b, c: torch.stack([(a - b).square().mean(), a.square().sum()]) @ FIRST[:2],
    "root": lambda a, b, c: ((a - b) ** 2).mean().sqrt(),
    "gathered": lambda a, b, c: -a.log_softmax(1).gather(1, c[:, None]).mean(),
    "indexed": lambda a, b, c: -torch.log_softmax(a, -1)[ROWS, c].mean(),
    "one hot": lambda a, b, c: -(F.one_hot(c, 2) * F.log_softmax(a / 2, 1)).sum(1).mean(),
    "nll of a view": lambda a, b, c: F.nll_loss(F.log_softmax(a, 1).view(-1, 2), c.view(-1)),
    "nll of a part": lambda a, b, c: F.nll_loss(F.log_softmax(a, 1)[2:], c[2:], reduction="sum"),
    "smoothed": lambda a, b, c: (lambda z: 0.9 * F.nll_loss(z, c) - 0.1 * z.mean(-1).mean())(a.log_softmax(1)),
    "smoothed, each": lambda a, b, c: (lambda z: F.nll_loss(z, c, reduction="none") - z.sum(1))(a.log_softmax(1)).sum(),
    "distilled": lambda a, b, c: F.cross_entropy(a, c) - 4 * (b.softmax(1) * (a / 2).log_softmax(1)).sum(1).mean(),
    "kl of a view": lambda a, b, c: F.kl_div(a.log_softmax(1).view(1, 7, 2), b.softmax(1)[None], reduction="sum"),
    "other axes": lambda a, b, c: -a.log_softmax(0)[:3].mean(),
    "binary": lambda a, b, c: -(b.sigmoid() * F.logsigmoid(a) + (1 - b.sigmoid()) * F.logsigmoid(-a)).mean(),
    "softplus": lambda a, b, c: F.softplus(-a * b.sign()).mean(),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", LINEAR)
def test_losses_by_hand_have_the_curvature_of_the_outputs(name, chunk):
    """``J^T Hess(l) J``, with the Hessian of the loss on the outputs linearized."""
    net, loss = network(), lambda a: LINEAR[name](a, Y, CLASSES)
    params = list(net.parameters())
    along = directions(params)
    plane = jp.evaluate(lambda: loss(net(X)), params, along, "ggn", examples=True, chunk=chunk)
    y = net(X)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in y.flatten()]
    tangents = (torch.stack(rows) @ torch.cat([v.flatten(1) for v in along], 1).T).reshape(*y.shape, 4)
    linearized = lambda a: loss(y.detach() + tangents @ a).sum()  # noqa: E731
    origin = torch.zeros(4, dtype=torch.float64)
    exact = grad_of_grad(lambda: loss(net(X)), params, along)
    torch.testing.assert_close(plane.value, exact.value.reshape(()), rtol=1e-12, atol=0)
    torch.testing.assert_close(plane.slope, exact.slope.reshape(4), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.functional.hessian(linearized, origin)
    torch.testing.assert_close(plane.curvature, expected, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    beside = jp.evaluate(lambda: loss(net(X)), params, along, "none", examples=True)
    torch.testing.assert_close(beside.slope, exact.slope.reshape(4), rtol=1e-10, atol=1e-12)
    if name not in ("root", "weighed", "number by number"):
        for found in (plane, beside):
            assert found.examples is not None
            torch.testing.assert_close(found.examples.sum(0), exact.slope.reshape(4), rtol=1e-10, atol=1e-12)


# Penalties: exact, and an equal part of each example's loss.
PENALTIES = {
    "squares": lambda params: sum(p.square().sum() for p in params),
    "norms": lambda params: sum(p.norm() ** 2 for p in params),
    "from a start": lambda params: sum(((p - torch.full_like(p, 0.3)) ** 2).sum() for p in params),
    "elastic": lambda params: sum((torch.full_like(p, 2.0) * (p - p.detach() - 0.1) ** 2).sum() for p in params),
    "vector": lambda params: torch.cat([p.flatten() for p in params]).pow(4).sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("curvature", ["ggn", "none"])
def test_penalties_are_exact_and_no_examples(name, curvature):
    net, penalty = network(), PENALTIES[name]
    params = list(net.parameters())
    along = directions(params)
    data = lambda: F.cross_entropy(net(X), CLASSES)  # noqa: E731
    both, alone = (
        jp.evaluate(f, params, along, curvature, examples=True) for f in (lambda: data() + penalty(params), data)
    )
    exact = grad_of_grad(lambda: penalty(params), params, along)
    if curvature == "ggn":
        torch.testing.assert_close(both.curvature, alone.curvature + exact.curvature, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(both.examples, alone.examples + exact.slope / 7, rtol=1e-9, atol=1e-10)  # type: ignore[operator]


def test_products_of_parameters_have_the_curvature_of_residuals():
    """As a factorization ``|U V^T - M|^2``, which has no data but M, and whose Hessian is indefinite."""
    u, v, m = torch.randn(5, 2).double(), torch.randn(4, 2).double(), 9 + torch.randn(5, 4).double()
    params = [u.requires_grad_(), v.requires_grad_()]
    along = directions(params)
    plane = jp.evaluate(lambda: ((u @ v.T - m) ** 2).sum(), params, along, "ggn")
    expected = gauss_newton(lambda: u @ v.T - m, params, along)
    torch.testing.assert_close(plane.curvature, expected, rtol=1e-9, atol=1e-10)


def test_of_a_model_that_is_linear_in_its_parameters_it_is_the_hessian():
    net = nn.Linear(3, 2).double()
    params = list(net.parameters())
    closure = lambda: (net(X) - Y).square().mean() + 0.1 * sum((p**4).sum() for p in params)  # noqa: E731
    along = directions(params)
    plane, exact = jp.evaluate(closure, params, along, "ggn"), grad_of_grad(closure, params, along)
    torch.testing.assert_close(plane.curvature, exact.curvature, rtol=1e-9, atol=1e-12)


# Closures in which a sum of squares is a part of the model; what they compute otherwise.
PARTS = {
    "a norm": (
        lambda net: F.mse_loss(net(X) / net(X).square().mean().sqrt(), Y),
        lambda net: F.mse_loss(net(X) / torch.linalg.vector_norm(net(X)) * 14**0.5, Y),
    ),
    "into a loss function": (
        lambda net: F.mse_loss(net(X).square().sum(), torch.tensor(1.0).double()),
        lambda net: F.mse_loss(torch.einsum("ij,ij->", net(X), net(X)), torch.tensor(1.0).double()),
    ),
}


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", PARTS)
def test_models_that_go_on_with_a_sum_of_squares(name, chunk):
    net = network()
    params = list(net.parameters())
    along = directions(params)
    found, expected = (jp.evaluate(lambda f=f: f(net), params, along, "ggn", chunk=chunk) for f in PARTS[name])
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", ["square", "squared"])
def test_what_was_written_to_is_no_square(how):
    net = network()

    def closure():
        d = net(X) - Y
        y = d**2
        (d if how == "squared" else y).mul_(3)
        return y.mean()

    params = list(net.parameters())
    with pytest.raises(jp.UnknownLossError):
        jp.evaluate(closure, params, directions(params), "ggn")


def test_loss_marks_with_and_without_parentheses():
    @jp.loss
    def bare(output, target):
        """Its words."""
        return torch.cosh(output - target).log().mean()

    marked = jp.loss()(bare.__wrapped__)
    net = network()
    params = list(net.parameters())
    along = directions(params)
    one, other = (jp.evaluate(lambda f=f: f(net(X), Y), params, along, "ggn") for f in (bare, marked))
    torch.testing.assert_close(one.curvature, other.curvature, rtol=0, atol=0)
    assert bare.__doc__ == "Its words." and torch.linalg.eigvalsh(one.curvature)[0] > 0
    with pytest.raises(jp.ArgumentError, match="with jetplane.loss"):
        jp.loss(3)  # type: ignore[call-overload]


# --- losses by hand, with the default PlaneSearch --------------------------------------------------------------------

T = torch.linspace(-1, 1, 64)[:, None]
S = torch.sin(3 * T)
KNOWN = {
    "mean": lambda y: (y - S).square().mean(),
    "sum": lambda y: ((y - S) ** 2).sum() / 64,
    "normal": lambda y: -Normal(y, 1.0).log_prob(S).mean(),
}
UNKNOWN = {
    "heavy tails": lambda y: -StudentT(3.0, y).log_prob(S).mean(),
    "beside a known one": lambda y: F.mse_loss(y, S) + 1e-3 * y.abs().mean(),
    "log cosh": lambda y: (y - S).cosh().log().mean(),
}


def curve(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_losses_by_hand_train(name, with_model):
    net = curve()
    opt = jp.optim.PlaneSearch(net.parameters(), net if with_model else None)
    loss = (KNOWN | UNKNOWN)[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = [opt.step(lambda: loss(net(T))).item() for _ in range(15)]
    with torch.no_grad():
        best = loss(S).item()
    assert losses[-1] - best < 0.35 * (losses[0] - best)
    assert opt.curvature == ("ggn" if name in KNOWN else "hessian")
    assert [w.category for w in said] == ([] if name in KNOWN else [jp.JetplaneWarning])
    if said:
        assert "jetplane.loss" in str(said[0].message) and said[0].filename == __file__


def test_a_square_by_hand_trains_as_the_loss_function():
    found = []
    for loss in (F.mse_loss, lambda a, b: (a - b).square().mean()):
        net = curve()
        opt = jp.optim.PlaneSearch(net.parameters(), net)
        found.append([opt.step(lambda f=loss, net=net: f(net(T), S)).item() for _ in range(6)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_curvature_that_is_asked_for_is_taken():
    net = curve()
    unknown = lambda: UNKNOWN["heavy tails"](net(T))  # noqa: E731
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=Subspace([Drawn(3), PreviousStep()], "ggn"))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(jp.UnknownLossError, match=r"@jetplane\.loss.*curvature='hessian'.*Subspace"):
        opt.step(unknown)
    assert all(map(torch.equal, before, net.parameters()))
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=Subspace([Drawn(3), PreviousStep()], "hessian"))
    opt.step(unknown)  # no warning
    assert opt.curvature == "hessian"


def test_each_closure_has_its_own_curvature():
    net = curve()
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    known, unknown = (lambda: KNOWN["mean"](net(T))), (lambda: UNKNOWN["heavy tails"](net(T)))
    opt.step(known)
    with pytest.warns(jp.JetplaneWarning) as met:  # also that the plan of the other loss's estimate does not fit
        opt.step(unknown)
    assert any("exact curvature" in str(warning.message) for warning in met)
    assert opt.curvature == "hessian" and isinstance(opt.descent, jp.descent.SaddleFree)
    opt.step(known)
    assert opt.curvature == "ggn" and isinstance(opt.descent, jp.descent.Damped)


# --- parameters that no derivative reaches ---------------------------------------------------------------------------


class Cut(nn.Module):
    """A network whose first layer is cut off in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.how = how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.first(x)
        else:
            h = self.first(x)
            h = h.detach() if self.how == "detach" else h
        return self.last(torch.tanh(self.second(torch.tanh(h))))


A, B = torch.randn(32, 4), torch.randint(0, 2, (32,))
OPTIMIZERS = {
    "FGD": lambda net: jp.optim.FGD(net.parameters(), lr=1e-2, k=4),
    "FoMoH": lambda net: jp.optim.FoMoH(net.parameters(), k=2, clip=1.0),
    "FoMoHKD": lambda net: jp.optim.FoMoHKD(net.parameters(), k=3, clip=1.0, descent="saddle-free"),
    "PlaneSearch": lambda net: jp.optim.PlaneSearch(net.parameters()),
    "PlaneSearch, a model": lambda net: jp.optim.PlaneSearch(net.parameters(), net),
    "LocalHeads": lambda net: jp.optim.PlaneSearch(net.parameters(), net, gradient=jp.gradients.LocalHeads()),
}


@pytest.mark.parametrize("how", ["detach", "no_grad"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_cut_off_does_not_move(name, how):
    torch.manual_seed(0)
    net = Cut(how)
    before = {n: p.clone() for n, p in net.named_parameters()}
    opt = OPTIMIZERS[name](net)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(16 if name == "LocalHeads" else 2):
            opt.step(lambda: F.cross_entropy(net(A), B))
    # Local heads say which layers have none, too.
    assert [w.filename for w in said] == ([__file__] if how == "detach" or name == "LocalHeads" else [])
    assert how == "no_grad" or "parameter 0 of shape (8, 4), parameter 1 of shape (8,)" in str(said[0].message)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if not n.startswith("first")}


def test_what_is_cut_off_for_a_while_moves_afterwards():
    net = Cut("detach")
    opt = jp.optim.FGD(net.parameters(), lr=1e-2)
    closure = lambda: F.cross_entropy(net(A), B)  # noqa: E731
    with pytest.warns(jp.JetplaneWarning, match="no derivative"):
        opt.step(closure)
    net.how, before = "", net.first.weight.clone()
    opt.step(closure)
    assert not torch.equal(net.first.weight, before)


def test_a_slope_that_happens_to_be_zero_is_not_cut_off():
    """As of adapters, the second factor of which begins at zero."""
    down, up, seen = torch.randn(3, 2, requires_grad=True), torch.zeros(2, 3, requires_grad=True), []

    def closure():
        loss = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) @ down @ up - 1).square().mean()
        seen.append(loss.item())  # stops derivatives of what it gives
        return loss

    report = jp.audit(closure, [down, up])
    assert report.verdict == "agrees" and report.cut_off == ()


def test_what_autograd_does_not_know_is_not_cut_off():
    w, v = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    doubled = jp.blackbox(lambda x: torch.from_numpy(2 * x.detach().numpy()))
    closure = lambda: (doubled(w) * w.detach() * v).sum()  # noqa: E731
    assert jp.audit(closure, [w, v]).cut_off == ()
    assert jp.audit(lambda: (w.detach() * v).sum(), [w, v]).cut_off == (0,)


def test_reached_by_a_closure_that_goes_back_itself():
    w, v, u = (torch.ones(3, requires_grad=True) for _ in range(3))

    def closure():
        z = torch.ones(3, requires_grad=True)
        (slope,) = torch.autograd.grad((z**3 * w + v.detach()).sum(), z, create_graph=True)
        return slope.sum()

    assert unreached(closure, [w, v, u]) == [1, 2]


@pytest.mark.parametrize("how", ["argmax", "compared", "integers"])
def test_what_is_made_integers_is_cut_off(how):
    """As by hard choices without a straight-through estimator."""
    net = Cut("")
    hard = {
        "argmax": lambda h: F.one_hot(h.argmax(1), 8).float(), "compared": lambda h: (h > 0).float(),
        "integers": lambda h: h.long().float(),
    }[how]  # fmt: skip
    closure = lambda: F.cross_entropy(net.last(hard(net.first(A))), B)  # noqa: E731
    params = [*net.first.parameters(), *net.last.parameters()]
    assert jp.audit(closure, params).cut_off == (0, 1)
    opt, before = jp.optim.FGD(params, lr=1e-2), net.first.weight.clone()
    with pytest.warns(jp.JetplaneWarning, match="no derivative of the loss reaches"):
        opt.step(closure)
    assert torch.equal(net.first.weight, before)


def test_without_anything_that_stops_derivatives_no_run_is_added():
    net, calls = network(torch.float32), []
    report = jp.audit(lambda: calls.append(1) or F.mse_loss(net(X.float()), Y.float()), list(net.parameters()))
    assert report.cut_off == () and report.runs == len(calls) == 3


# --- a loss that differentiates the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["laplacian", "autograd"])
def test_layers_that_the_loss_differentiates_are_not_perturbed(how):
    net, points = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)), torch.rand(32, 2)

    def laplacian():
        if how == "laplacian":
            return jp.laplacian(net, points, batch_dim=0)
        z = points.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        rows = [torch.autograd.grad(g[:, i].sum(), z, create_graph=True)[0][:, i : i + 1] for i in range(2)]
        return rows[0] + rows[1]

    def closure():
        return F.mse_loss(laplacian(), points.sum(1, keepdim=True)) + net(points[:8]).square().mean()

    opt = jp.optim.PlaneSearch(net.parameters(), net)
    with pytest.warns(jp.JetplaneWarning, match="differentiates the model"):
        losses = [opt.step(closure).item() for _ in range(8)]
    assert isinstance(opt.gradient, jp.gradients.ForwardGradients) and losses[-1] < 0.1 * losses[0]


# --- calls that go wrong ---------------------------------------------------------------------------------------------

NET, POINTS = nn.Linear(2, 3), torch.rand(10, 2)
SUMS = lambda q: (q**2).sum(1)  # noqa: E731
WRONG = {
    "sigma of a point": (
        lambda: jp.weighted_laplacian(SUMS, POINTS, torch.eye(2)), jp.ShapeError,
        r"sigma 0: expected r columns, shape \(10, 2, r\).*got \(2, 2\).*batch_dim=0",
    ),
    "sigma without columns": (
        lambda: jp.weighted_laplacian(SUMS, POINTS, torch.ones(2), batch_dim=0), jp.ShapeError,
        r"\(2, r\) or \(10, 2, r\).*got \(2,\).*unsqueeze",
    ),
    "v of a point": (lambda: jp.hvp(SUMS, POINTS, torch.ones(2)), jp.ShapeError, "batch_dim=0"),
    "many results": (lambda: jp.hvp(SUMS, POINTS, POINTS), jp.ShapeError, "batch_dim=0"),
    "reverse mode": (
        lambda: jp.laplacian(lambda x: x**2, torch.rand(3), mode="forward-over-reverse"), jp.ShapeError,
        "mode='forward'",
    ),
    "a module": (lambda: jp.optim.PlaneSearch(NET), jp.ArgumentError, r"PlaneSearch\(model\.parameters\(\)"),  # type: ignore[arg-type]
    "no module": (
        lambda: jp.optim.PlaneSearch(NET.parameters(), NET.parameters()),  # type: ignore[arg-type]
        jp.ArgumentError, "got generator",
    ),
    "momentum": (
        lambda: jp.optim.FoMoH([{"params": [*NET.parameters()], "momentum": 0.9}]), jp.ArgumentError, "momentum",
    ),
    "a rate by place": (
        lambda: jp.optim.PlaneSearch(NET.parameters(), NET, 0.1),  # type: ignore[call-arg]
        jp.ArgumentError, r"expected PlaneSearch\(params, model\) and, by name alone, lr, .*lr=",
    ),
    "a rate for the model": (lambda: jp.optim.PlaneSearch(NET.parameters(), 0.1), jp.ArgumentError, "got float"),  # type: ignore[arg-type]
    "another name of a rate": (
        lambda: jp.optim.FGD(NET.parameters(), learning_rate=0.1),  # type: ignore[call-arg]
        jp.ArgumentError, "unexpected keyword argument 'learning_rate'; expected FGD.*lr",
    ),
    "another name in a group": (
        lambda: jp.optim.FGD([{"params": [NET.weight], "learning_rate": 0.1}]), jp.ArgumentError, "learning_rate",
    ),
    "a setting in a group": (
        lambda: jp.optim.FoMoH([{"params": [*NET.parameters()], "clip": 0.1}]), jp.ArgumentError, "no option clip",
    ),
    "another model": (lambda: jp.optim.PlaneSearch(NET.parameters(), nn.Linear(2, 3)), jp.ArgumentError, "not a copy"),
    "no parameters": (lambda: jp.optim.FGD(None), jp.ArgumentError, r"got None: FGD\(model"),  # type: ignore[arg-type]
    "spent parameters": (lambda: jp.optim.FGD(iter(())), jp.ArgumentError, r"call model.parameters\(\) again"),
    "a dict": (lambda: jp.optim.FGD(dict(NET.named_parameters())), jp.ArgumentError, "got a dict: give its values"),  # type: ignore[arg-type]
    "one group": (lambda: jp.optim.FGD({"params": [NET.weight]}), jp.ArgumentError, "put the group in a list"),  # type: ignore[arg-type]
    "names": (lambda: jp.optim.FGD(["weight"]), jp.ArgumentError, "one of them is 'weight'"),  # type: ignore[list-item]
    "modules": (lambda: jp.optim.FGD([NET, NET]), jp.ArgumentError, r"\*b.parameters\(\)"),  # type: ignore[list-item]
    "lists": (lambda: jp.optim.FGD([[*NET.parameters()]]), jp.ArgumentError, "one of them is a list"),  # type: ignore[list-item]
    "a group of nothing": (lambda: jp.optim.FGD([{"lr": 0.1}]), jp.ArgumentError, 'a dict with "params"'),
    "a group of a module": (lambda: jp.optim.FGD([{"params": NET}]), jp.ArgumentError, "got a Linear"),
    "a set": (lambda: jp.optim.FGD([{"params": {NET.weight}}]), jp.ArgumentError, "got a set"),
    "twice": (lambda: jp.optim.FGD([NET.weight, NET.weight]), jp.ArgumentError, "more than once"),
    "in two groups": (
        lambda: jp.optim.FGD([{"params": [NET.weight]}, {"params": [NET.bias, NET.weight]}]),
        jp.ArgumentError, r"shape \(3, 2\) is given more than once",
    ),
    "a result": (lambda: jp.optim.FGD([2 * NET.weight]), jp.ArgumentError, "result of a computation"),
    "many rates": (lambda: jp.optim.FGD([NET.weight], lr=torch.ones(2)), jp.ArgumentError, "lr must be a number"),  # type: ignore[arg-type]
    "a clip of words": (lambda: jp.optim.FGD([NET.weight], clip="1"), jp.ArgumentError, "clip.*'1'"),  # type: ignore[arg-type]
    "a seed of words": (lambda: jp.optim.FGD([NET.weight], seed="1"), jp.ArgumentError, "seed"),  # type: ignore[arg-type]
    "a long seed": (lambda: jp.optim.FGD([NET.weight], seed=2**70), jp.ArgumentError, "64 bits"),
    "one generator": (
        lambda: jp.optim.FGD([NET.weight], generators=torch.Generator()), jp.ArgumentError, r"generators=\[generator\]",  # type: ignore[arg-type]
    ),
    "a weight below zero": (
        lambda: jp.optim.FGD([NET.weight]).step(lambda: NET(POINTS).mean(), weight=-1), jp.ArgumentError, "weight",
    ),
    "one source": (
        lambda: jp.optim.PlaneSearch([NET.weight], subspace=Drawn(2)), jp.ArgumentError, r"subspace=\[Drawn\(",  # type: ignore[arg-type]
    ),
    "a loss for a closure": (
        lambda: jp.evaluate(NET(POINTS).mean(), [NET.weight], jp.Directions(1)), jp.ArgumentError, "lambda:",  # type: ignore[arg-type]
    ),
    "a number of directions": (
        lambda: jp.evaluate(lambda: NET(POINTS).mean(), [NET.weight], 2), jp.ArgumentError, r"jetplane.Directions\(k\)",  # type: ignore[arg-type]
    ),
    "arguments the wrong way round": (
        lambda: jp.audit([NET.weight], lambda: NET(POINTS).mean()), jp.ArgumentError, "expected a closure",  # type: ignore[arg-type]
    ),
    "memory in words": (
        lambda: jp.evaluate(lambda: NET(POINTS).mean(), [NET.weight], jp.Directions(1), memory="1 GB"),  # type: ignore[arg-type]
        jp.ArgumentError, "number of bytes",
    ),
    "a number": (lambda: jp.audit(lambda: NET(POINTS).mean().item(), [NET.weight]), jp.LossError, r"without \.item"),
    "nothing": (lambda: jp.audit(lambda: None, [NET.weight]), jp.LossError, "return loss"),
    "several": (lambda: jp.audit(lambda: (NET(POINTS).mean(), 1), [NET.weight]), jp.LossError, "the loss alone"),
    "an adapter of nothing": (lambda: jp.Adapter(POINTS, NET), jp.ArgumentError, "got Tensor"),  # type: ignore[arg-type]
    "another model's state": (
        lambda: jp.optim.FGD(NET.parameters()).load_state_dict(
            jp.optim.FGD(nn.Linear(2, 4).parameters()).state_dict()
        ),
        jp.ShapeError, r"parameter 0 had shape \(4, 2\).*\(3, 2\) here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_name_the_remedy(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_a_group_may_be_empty():
    """As of parameters without weight decay, of which a model may have none."""
    net = nn.Linear(2, 3)
    groups = [{"params": [*net.parameters()], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    before = net.weight.clone()
    for opt in (jp.optim.FGD(groups), jp.optim.PlaneSearch(groups, net)):
        opt.step(lambda: net(POINTS).square().mean())
        opt.load_state_dict(opt.state_dict())
    assert not torch.equal(net.weight, before)


def test_groups_keep_what_is_the_users_own():
    opt = jp.optim.FGD([{"params": [*NET.parameters()], "name": "head", "momentum": 0.5}])
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=3, cycle_momentum=False)
    assert opt.param_groups[0]["name"] == "head"


def test_progress_is_printed_where_there_is_no_terminal(capsys, monkeypatch):
    cli = pytest.importorskip("jetplane.cli", reason="needs the extra cli")
    monkeypatch.setattr(cli, "SECONDS", 0.0)
    with cli._progress() as progress:
        task = progress.add_task("a run", total=None, loss="")
        progress.update(task, completed=1, total=4, loss="0.5000")
    assert "a run: 25 %, loss 0.5000" in capsys.readouterr().out


@pytest.mark.parametrize("penalty", [0.0, 1e-3])
@pytest.mark.filterwarnings("ignore:l1_loss has no curvature")
def test_a_loss_without_curvature_takes_the_exact_one(penalty):
    """Beside a penalty too, whose curvature alone would say nothing of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x[:, :1] - x[:, 1:2]
    closure = lambda: F.l1_loss(model(x), y) + penalty * sum(p.square().sum() for p in model.parameters())  # noqa: E731
    opt = jp.optim.PlaneSearch(model.parameters(), model)
    with pytest.warns(jp.JetplaneWarning, match="no loss function that is known and curved"):
        first = opt.step(closure)
    for _ in range(30):
        last = opt.step(closure)
    assert last < 0.6 * first
