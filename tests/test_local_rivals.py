"""Rivals without a global backward pass, held against their papers' formulas."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.local_rivals import ActivationGuided, AlignedFeedback, MonoForward, blocks

X = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (8,), generator=torch.Generator().manual_seed(1))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(75, 6), nn.ReLU(), nn.Linear(6, 4)
    )


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 4))


def test_blocks_begin_at_layers_with_parameters():
    assert [[type(m).__name__ for m in part] for part in blocks(convolutional())] == [
        ["Conv2d", "ReLU", "MaxPool2d", "Flatten"], ["Linear", "ReLU"], ["Linear"]
    ]  # fmt: skip


class TestMonoForward:
    def test_losses_are_cross_entropies_of_activations_times_matrices(self):
        model = convolutional()
        rival = MonoForward(model, 1e-3)
        losses = rival.losses(X, Y)
        first = model[:4](X)
        second = model[4:6](first)
        expected = [first @ rival.matrices[0].T, second @ rival.matrices[1].T, model[6](second)]
        for loss, g in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss, -torch.log(g.softmax(1)[torch.arange(8), Y]).mean())

    def test_the_gradient_of_a_layer_is_local_and_closed(self):
        model = dense()
        rival = MonoForward(model, 1e-3)
        sum(rival.losses(X, Y)).backward()
        x = X.flatten(1)
        a = model[1](x)
        h, m = a.relu(), rival.matrices[0]
        off = ((h @ m.T).softmax(1) - F.one_hot(Y, 4)) / 8  # of the hidden layer's own loss
        torch.testing.assert_close(model[1].weight.grad, ((off @ m) * (a > 0)).T @ x)
        torch.testing.assert_close(m.grad, off.T @ h)
        torch.testing.assert_close(model[3].weight.grad, (((model[3](h)).softmax(1) - F.one_hot(Y, 4)) / 8).T @ h)

    def test_it_learns(self):
        model = convolutional()
        rival = MonoForward(model, 1e-2)
        losses = [rival.step(X, Y).item() for _ in range(30)]
        assert losses[-1] < 0.5 * losses[0]


class TestAlignedFeedback:
    def test_the_jacobians_estimate_is_a_mean_of_rank_one_terms(self, monkeypatch):
        model = dense()
        rival = AlignedFeedback(model, 1e-3)
        a = model[:3](X).detach()
        u = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
        monkeypatch.setattr(torch, "randn_like", lambda t: u)
        rival.feedback = [torch.randn(6, 4)]
        jacobian = model[3].weight.detach()  # of the model's output at the hidden layer's
        expected = sum(torch.outer(v, jacobian @ v) for v in u) / 8
        torch.testing.assert_close(rival.align(0, a), expected)

    def test_feedback_descends_the_cosine_loss(self):
        model = dense()
        rival = AlignedFeedback(model, 1e-3, eta=0.3)
        b = torch.randn(6, 4, requires_grad=True)
        rival.feedback = [b.detach().clone()]
        estimate = rival.align(0, model[:3](X).detach())
        (slope,) = torch.autograd.grad(1 - F.cosine_similarity(b.flatten(), estimate.flatten(), 0), b)
        torch.testing.assert_close(rival.feedback[0], b.detach() - 0.3 * slope)

    def test_errors_go_through_the_feedback_and_the_layers_own_activation(self):
        model = dense()
        rival = AlignedFeedback(model, 1e-3, eta=0.0)
        rival.gradients(X, Y)
        x = X.flatten(1)
        a = model[1](x)
        e = (model[3](a.relu()).softmax(1) - F.one_hot(Y, 4)) / 8
        torch.testing.assert_close(model[1].weight.grad, ((e @ rival.feedback[0].T) * (a > 0)).T @ x)
        torch.testing.assert_close(model[3].weight.grad, e.T @ a.relu())

    def test_alignment_brings_the_feedback_to_the_jacobian(self):
        model = dense()
        rival = AlignedFeedback(model, 1e-3)
        rival.feedback = [torch.randn(6, 4)]
        target, a = model[3].weight.detach().T, torch.randn(256, 6).relu()
        cosine = lambda: F.cosine_similarity(rival.feedback[0].flatten(), target.flatten(), 0)  # noqa: E731
        before = cosine()
        for _ in range(300):
            rival.align(0, a)
        assert before < 0.7 and cosine() > 0.8


class TestActivationGuided:
    def test_bases_are_orthonormal_and_span_what_inputs_mostly_do(self):
        torch.manual_seed(0)
        strong, weak = torch.linalg.qr(torch.randn(20, 5)).Q.split([2, 3], 1)
        h = torch.randn(64, 2) @ strong.T * 10 + torch.randn(64, 3) @ weak.T
        a = ActivationGuided(dense(), 1e-3, rank=2, iterations=8).basis(h)
        torch.testing.assert_close(a.T @ a, torch.eye(2), atol=1e-5, rtol=0)
        top = torch.linalg.svd(h).Vh[:2]
        torch.testing.assert_close(a @ (a.T @ top.T), top.T, atol=1e-3, rtol=0)

    def test_directions_lie_in_the_span_of_bases(self):
        model = dense()
        rival = ActivationGuided(model, 1e-3)
        rival.step(lambda: F.cross_entropy(model(X), Y))
        weight, bias, *_ = rival.directions()
        a = rival.bases[id(model[1].weight)]
        torch.testing.assert_close(weight @ a @ a.T, weight)
        assert bias.shape == (6,) and not torch.equal(rival.directions()[0], weight)

    def test_a_step_is_a_forward_difference_along_them(self, monkeypatch):
        model = dense()
        rival = ActivationGuided(model, rate=0.5, mu=1e-2)
        closure = lambda: F.cross_entropy(model(X), Y)  # noqa: E731
        before = [p.detach().clone() for p in model.parameters()]
        along = [torch.randn_like(p) for p in before]
        monkeypatch.setattr(rival, "directions", lambda: along)
        loss = rival.step(closure)
        moved = [p.detach().clone() for p in model.parameters()]

        def at(size):
            with torch.no_grad():
                for p, q, v in zip(model.parameters(), before, along, strict=True):
                    p.copy_(q + size * v)
                return closure().item()

        slope = (at(1e-2) - at(0.0)) / 1e-2
        assert loss == pytest.approx(at(0.0))
        for q, v, p in zip(before, along, moved, strict=True):
            torch.testing.assert_close(p, q - 0.5 * slope * v, rtol=1e-3, atol=1e-4)
