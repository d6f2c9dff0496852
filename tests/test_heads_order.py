"""Local heads of models that change the order of examples or positions between layers: the same as without."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.gradients import Batch, LocalHeads
from jetplane.gradients.order import Order

DOUBLE = {"dtype": torch.float64}
N, T = 6, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), **DOUBLE)


ORDER, OTHER = torch.randperm(N, generator=seeded(3)), torch.randperm(T, generator=seeded(4))
BACK = ORDER.argsort()
ROWS, IMAGES, WORDS = normal(N, 4, seed=1), normal(N, 2, 4, 4, seed=2), normal(N, T, 4, seed=3)
LABELS, NEXT = torch.randint(3, (N,), generator=seeded(5)), torch.randint(3, (N, T), generator=seeded(6))


def measured(model, closure, recompute=False, again=None):
    """What is estimated, and its parameters' names."""
    params = list(model.parameters())
    given = Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=0)
    estimator = LocalHeads(recompute=recompute)
    state = estimator.prepare(given, {})
    with torch.no_grad():
        return estimator.measure(given if again is None else Batch(**{**vars(given), "closure": again}), state)


class Between(nn.Module):
    """Three layers, and what is done to what lies between the first and second, and between second and third."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = layers()
        self.double()

    def forward(self, x, there=None, back=None):
        h = self.a(x).relu()
        h = self.b(there(h) if there else h).tanh()
        return self.c(back(h) if back else h)


def dense():
    return nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 3)


def convolutions():
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    return nn.Conv2d(2, 5, 3, padding=1), nn.Sequential(nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)), last


def attention():
    return nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), nn.Linear(8, 3)


def written(order):
    def write(h):
        out = torch.zeros_like(h)
        out[order] = h
        return out

    return write


def rolled(h, by):
    return torch.cat([h[by:], h[:by]])


KINDS = {  # of what is done, and what puts it back
    "indexed": (lambda h: h[ORDER], lambda h: h[BACK]),
    "selected": (lambda h: h.index_select(0, ORDER), lambda h: torch.index_select(h, 0, index=BACK)),
    "sorted": (lambda h: h[h.flatten(1).sum(1).argsort()], None),
    "cut": (lambda h: rolled(h, 2), lambda h: rolled(h, -2)),
    "chunks": (lambda h: torch.cat(h.chunk(3)[::-1]), lambda h: torch.cat(h.chunk(3)[::-1])),
    "stacked": (lambda h: torch.stack([h[i] for i in ORDER.tolist()]), lambda h: h[BACK.tolist()]),
    "rolled": (lambda h: h.roll(2, 0), lambda h: torch.roll(h, -2, 0)),
    "flipped": (lambda h: h.flip(0), lambda h: torch.flip(h, (0,))),
    "written": (written(ORDER), written(BACK)),
    "copied": (lambda h: torch.zeros_like(h).index_copy(0, ORDER, h), lambda h: h[ORDER]),
    "added": (lambda h: h[ORDER], lambda h: torch.zeros_like(h).index_add_(0, ORDER, h)),
    "kept": (lambda h: h[ORDER], lambda h: (h + h.roll(1, 0).roll(-1, 0))[BACK] / 2),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "x"), [(dense, ROWS), (convolutions, IMAGES)])
def test_examples_in_another_order_between_layers(layers, x, kind, recompute):
    model = Between(layers)
    there, back = KINDS[kind]
    if back is None:  # by what the model itself puts out
        order = []
        there, back = (
            lambda h: h[order.append(h.flatten(1).sum(1).argsort()) or order[-1]],
            lambda h: h[order[-1].argsort()],
        )
    found = measured(model, lambda: F.cross_entropy(model(x, there, back), LABELS), recompute)
    plain = measured(model, lambda: F.cross_entropy(model(x), LABELS), recompute)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


POSITIONS = {
    "rolled windows": (lambda h: h.roll(2, 1), lambda h: h.roll(-2, 1)),
    "indexed": (lambda h: h[:, OTHER], lambda h: h[:, OTHER.argsort()]),
    "examples": (lambda h: h[ORDER], lambda h: h[BACK]),
    "both": (lambda h: h[ORDER][:, OTHER], lambda h: h[:, OTHER.argsort()][BACK]),
    "swapped": (lambda h: h.transpose(0, 1)[OTHER], lambda h: h[OTHER.argsort()].transpose(0, 1)),
    "flattened": (lambda h: h.flatten(0, 1).flip(0), lambda h: h.flip(0).unflatten(0, (N, T))),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("kind", "loss"),
    # Of flattened positions a head reads no example.
    [(k, one) for k in POSITIONS for one in ("positions", "last", "means") if k != "flattened" or one == "positions"],
)
def test_positions_in_another_order_between_layers(kind, loss, recompute):
    model = Between(dense)
    there, back = POSITIONS[kind]

    def closure(*moves):
        z = model(WORDS, *moves)
        if loss == "positions":
            return F.cross_entropy(z.flatten(0, 1), NEXT.flatten())
        return F.cross_entropy(z[:, -1] if loss == "last" else z.mean(1), LABELS)

    found, plain = (measured(model, lambda m=m: closure(*m), recompute) for m in ((there, back), ()))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_attention_over_examples_in_another_order():
    model = Between(attention)

    def closure(*moves):
        return F.cross_entropy(model(WORDS, *moves).transpose(1, 2), NEXT)

    found = measured(model, lambda: closure(lambda h: h[ORDER], lambda h: h[BACK]))
    for one, other in zip(found, measured(model, closure), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_frozen_layers_keep_the_order(frozen):
    model = Between(
        lambda: (nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    )
    params = [p for name, p in model.named_parameters() if not name.startswith(frozen)]
    found = []
    for moves in ((lambda h: h[ORDER], lambda h: h[BACK]), ()):
        closure = lambda m=moves: F.cross_entropy(model(ROWS, *m), LABELS)  # noqa: E731
        given = Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=0)
        state = LocalHeads().prepare(given, {})
        with torch.no_grad():
            found.append(LocalHeads().measure(given, state))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("layers", "x"), [(dense, ROWS), (convolutions, IMAGES)])
def test_outputs_and_labels_in_another_order(layers, x):
    model = Between(layers)
    found = measured(model, lambda: F.cross_entropy(model(x)[ORDER], LABELS[ORDER]))
    for one, other in zip(found, measured(model, lambda: F.cross_entropy(model(x), LABELS)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_words_that_a_mask_has_picked_and_put_back():
    """The first layer's head reads the words that the loss takes, the second's all that it has put out."""
    model, mask = Between(dense), NEXT > 0

    def closure(there, back):
        return F.cross_entropy(model(WORDS, there, back), NEXT[mask])

    found = measured(model, lambda: closure(lambda h: h[mask], None))
    order = torch.randperm(int(mask.sum()), generator=seeded(9))
    other = measured(model, lambda: closure(lambda h: h[mask][order], lambda h: h[order.argsort()]))
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    assert all(bool(g.any()) for g in found)


def test_the_order_of_each_step_counts():
    """What the first step has not moved is followed in later ones."""
    model, order = Between(dense), [torch.arange(N)]

    def closure():
        return F.cross_entropy(model(ROWS, lambda h: h[order[0]], lambda h: h[order[0].argsort()]), LABELS)

    def later():
        order[0] = ORDER
        return closure()

    found = measured(model, closure, again=later)
    for one, other in zip(found, measured(model, lambda: F.cross_entropy(model(ROWS), LABELS)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def mixed(h):
    """Each row is of two examples."""
    return h[ORDER] + h[BACK]


def test_what_comes_before_examples_are_mixed_has_no_head():
    model = Between(dense)
    params = list(model.parameters())
    closure = lambda: F.cross_entropy(model(ROWS, None, mixed), LABELS)  # noqa: E731
    given = Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=0)
    with pytest.warns(jp.JetplaneWarning, match="2 of 6 parameters"):
        state = LocalHeads().prepare(given, {})
    assert list(state["heads"]) == ["b"]


def test_an_order_that_a_later_step_loses_is_said():
    model = Between(dense)
    with pytest.warns(jp.JetplaneWarning, match="an order of examples that is not known, without a head: .'a'"):
        found = measured(
            model,
            lambda: F.cross_entropy(model(ROWS, lambda h: h[ORDER], lambda h: h[BACK]), LABELS),
            again=lambda: F.cross_entropy(model(ROWS, None, mixed), LABELS),
        )
    assert not bool(found[0].any()) and bool(found[2].any())


@pytest.mark.parametrize("layers", [dense, attention])
def test_models_that_keep_the_order_are_not_followed_after_the_first_step(layers):
    model = Between(layers)
    params = list(model.parameters())
    closure = lambda: F.cross_entropy(model(WORDS)[:, 1:].transpose(1, 2), NEXT[:, 1:])  # noqa: E731
    given = Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LocalHeads().prepare(given, {})["moved"] is False


def test_two_towers_and_one_batch():
    """Outputs of two calls that are put side by side are in order."""
    model = nn.ModuleList(dense()).double()
    x, y = normal(N, 4, seed=8), torch.cat([LABELS, LABELS.flip(0)])

    def joined(h):
        return model[2](model[1](h).relu())

    found = measured(model, lambda: F.cross_entropy(joined(torch.cat([model[0](ROWS), model[0](x)]).relu()), y))
    plain = measured(model, lambda: F.cross_entropy(joined(model[0](torch.cat([ROWS, x])).relu()), y))
    torch.testing.assert_close(found[2], plain[2], rtol=1e-9, atol=1e-11)


def test_labels_of_rows():
    start = Order.start(torch.Size((3, 2, 4)), None)
    assert start.labels(6, -1).tolist() == [1, 2, 3, 4, 5, 6]
    assert start.labels(3, -1) is None  # two positions each
    assert start.labels(3, -1, scaled=True).tolist() == [1, 2, 3]
    assert start.passed(torch.Size((3, 7))).labels(6, -1, scaled=True) is None
    channels = Order.start(torch.Size((3, 2, 4)), 2)
    assert channels.count == 12 and channels.labels(12, 1).tolist() == list(range(1, 13))


def test_training_with_sorted_examples_reaches_the_loss_of_training_without():
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def trained(move):
        torch.manual_seed(1)
        a, b, c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 2)
        model, generator = nn.ModuleList([a, b, c]), seeded()
        opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=LocalHeads())
        for _ in range(96):
            at = torch.randint(1024, (128,), generator=generator)

            def closure(at=at):
                h = a(x[at]).relu()
                order = h.sum(1).argsort() if move else torch.arange(128)
                return F.cross_entropy(c(b(h[order]).relu()[order.argsort()]), y[at])

            loss = opt.step(closure)
        return loss.item()

    plain = trained(False)
    assert plain < 0.55 and abs(trained(True) - plain) < 0.02
