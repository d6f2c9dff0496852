"""Kinds of tensors and code that a closure may hold: carried with right derivatives, or told."""

import threading

import torch
from cases import Doubled

import jetplane as jp
from jetplane.rules.functions import REGISTERED


class TestThreads:
    """What is intercepted belongs to the thread that evaluates; torch is as it was once nobody does."""

    def test_evaluations_that_end_in_the_order_they_began(self):
        original = vars(torch.autograd.Function)["apply"]
        first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
        w, u, found = torch.ones(3), torch.ones(3), {}

        def first() -> None:
            jp.evaluate(lambda: (first_in.set(), second_in.wait(5), (w * w).sum())[2], [w], [torch.ones(1, 3)])
            first_out.set()

        def second() -> None:
            first_in.wait(5)
            jp.register_rule(Doubled, composed=lambda x: 3 * x)
            closure = lambda: (second_in.set(), first_out.wait(5), Doubled.apply(u).sum())[2]  # noqa: E731
            found["slope"] = jp.evaluate(closure, [u], [torch.ones(1, 3)]).slope

        threads = [threading.Thread(target=f) for f in (first, second)]
        try:
            [t.start() for t in threads]
            [t.join(20) for t in threads]
        finally:
            REGISTERED.pop(Doubled, None)
        assert found["slope"].tolist() == [9.0]
        assert vars(torch.autograd.Function)["apply"] is original

    def test_reverse_mode_in_one_thread_while_another_evaluates(self):
        inside, done, x = threading.Event(), threading.Event(), torch.ones(3, requires_grad=True)

        def other() -> None:
            inside.wait(5)
            Doubled.apply(x).sum().backward()
            done.set()

        thread = threading.Thread(target=other)
        thread.start()
        w = torch.ones(3)
        jp.evaluate(lambda: (inside.set(), done.wait(5), (w * w).sum())[2], [w], [torch.ones(1, 3)])
        thread.join(5)
        assert x.grad is not None and x.grad.tolist() == [3.0, 3.0, 3.0]

    def test_somebody_elses_replacement_is_left_alone(self):
        original, calls, w = vars(torch.autograd.Function)["apply"], [], torch.ones(3)

        def closure() -> torch.Tensor:
            ours = vars(torch.autograd.Function)["apply"]

            def counted(function, *args):
                calls.append(function)
                return ours.__func__(function, *args)

            torch.autograd.Function.apply = classmethod(counted)  # type: ignore[method-assign]
            return (w * w).sum()

        jp.evaluate(closure, [w], [torch.ones(1, 3)])
        theirs = vars(torch.autograd.Function)["apply"]
        try:
            x = torch.ones(3, requires_grad=True)
            jp.evaluate(lambda: (w * Doubled.apply(x)).sum(), [w], [torch.ones(1, 3)])
            assert vars(torch.autograd.Function)["apply"] is theirs and calls == [Doubled]
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]
            jp.evaluate(lambda: (w * w).sum(), [w], [torch.ones(1, 3)])
        assert vars(torch.autograd.Function)["apply"] is original
