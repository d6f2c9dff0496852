"""Planes as programs of plain operators, which runtimes take that know nothing of jets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch import compiler_pieces, decompositions, tree_flatten, tree_unflatten
from .errors import ArgumentError, DerivativeError
from .evaluation.compiled import verified
from .evaluation.side_effects import without_side_effects

_CLOSE = 1e-4  # how far the program's numbers may be from the function's, relative to the largest of each result


class _Program(torch.nn.Module):
    """A captured graph, with its inputs in the order of the function's arguments."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[int | Tensor]) -> None:
        super().__init__()
        self.graph, self.places, self.results = graph, [], 0
        for n, one in enumerate(inputs):
            if isinstance(one, Tensor):
                self.register_buffer(f"constant_{n}", one.detach().clone())
            self.places.append(one if isinstance(one, int) else f"constant_{n}")

    def forward(self, *leaves: Tensor) -> Any:
        inputs = [leaves[place] if isinstance(place, int) else getattr(self, place) for place in self.places]
        found = tuple(self.graph(*inputs))
        return found[len(found) - self.results :]  # behind new values of buffers, which stay


def export(f: Callable[..., Any], args: Sequence[Any]) -> torch.export.ExportedProgram:
    """Export a function that evaluates planes or takes derivatives as a `torch.export.ExportedProgram`.

    The program consists of plain operators. It can be saved and converted to other formats, such as ONNX with
    ``torch.onnx.export``. It computes f's results from the arguments (weights, tangents and data) of the given shapes.
    Other tensors that f uses are copied as constants of the program. Writes to buffers are left out, also in the call
    to ``export`` itself. The program does not check that its numbers are finite.

    Args:
        f: a function of tensors, or of lists and dicts of tensors, that returns a tensor or a tuple of tensors.
            ``torch.compile(fullgraph=True)`` must accept it. The tensors that move are among its arguments.
        args: the arguments of f. The program takes the tensors in them, one after the other. Their values are used
            only to check the program.

    Returns:
        The program. Its results were compared with those of f, at these arguments and at others.

    Raises:
        ArgumentError: no tensors in the arguments, or two that share memory.
        DerivativeError: the program gives other numbers than f.
        Others: as ``torch.compile`` and ``torch.export.export``.

    >>> import torch, jetplane as jp
    >>> def plane(w, v, x):
    ...     found = jp.evaluate(lambda: (x @ w).square().mean(), [w], [v])
    ...     return found.value, found.slope, found.curvature
    >>> args = torch.ones(3), torch.eye(3)[:2], torch.tensor([[1.0, 2.0, 3.0]])
    >>> program = jp.export(plane, args)
    >>> program.module()(*args)
    (tensor(36.), tensor([12., 24.]), tensor([[2., 4.],
            [4., 8.]]))
    """
    leaves, spec = tree_flatten(tuple(args))
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ArgumentError("args: expected tensors, or lists and dicts of them; bind everything else into f")
    if len({(leaf.data_ptr(), leaf.numel() > 0) for leaf in leaves}) < len(leaves):
        raise ArgumentError("args: two tensors share memory, so the program could not tell them apart; clone() one")
    others = [_other(leaf, n) for n, leaf in enumerate(leaves)]
    with torch.no_grad():
        expected = [_results(f, tree_unflatten(values, spec)) for values in (leaves, others)]
        program = _captured(f, args, leaves)
        program.results = len(expected[0])
        exported = torch.export.export(program, tuple(leaves))
        module = exported.module()
        for values, results in zip((leaves, others), expected, strict=True):
            _check_same(results, module(*values))
    return exported


def _results(f: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """The tensors that f returns, without its side effects."""
    with without_side_effects():
        return tree_flatten(f(*args))[0]


def _captured(f: Callable[..., Any], args: Sequence[Any], leaves: Sequence[Tensor]) -> _Program:
    aot_autograd, forget = compiler_pieces()
    found: list[_Program] = []
    places = {leaf.data_ptr(): n for n, leaf in enumerate(leaves)}

    constants: list[Tensor] = []

    def capture(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            sources = [places.get(one.data_ptr(), one) for one in inputs]
            constants.extend(one for one in sources if isinstance(one, Tensor))
            found.append(_Program(graph, sources))
            return graph(*inputs)

        return run

    forget(f)
    # torch's ONNX exporter (2.13) takes batch normalization in training for one in evaluation mode.
    apart = {op: decompositions()[op] for op in [torch.ops.aten._native_batch_norm_legit_functional.default]}
    backend = aot_autograd(fw_compiler=capture, decompositions=apart)
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=False)
    try:
        with verified():
            compiled(*args)
    finally:
        forget(f)  # an f may be exported any number of times
    for constant, before in zip(constants, found[0].buffers(recurse=False), strict=True):
        constant.detach().copy_(before)  # such as running statistics
    return found[0]


def _other(leaf: Tensor, seed: int) -> Tensor:
    """Nearby numbers; integers and truth values stay."""
    if not leaf.dtype.is_floating_point:
        return leaf
    generator = torch.Generator(leaf.device).manual_seed(seed)
    return leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)


def _check_same(expected: Sequence[Any], found: Sequence[Tensor]) -> None:
    for n, (a, b) in enumerate(zip(expected, found, strict=True)):
        size = max(a.abs().max().item(), 1e-30) if a.numel() else 1.0
        if a.shape != b.shape or not bool(((a - b).abs() <= _CLOSE * size).all()):
            raise DerivativeError(
                f"result {n} of the program is not that of f: expected {_shown(a)}, got {_shown(b)}. Does "
                "the function branch on values of its arguments (Python's if), or depend on anything that changes?"
            )


def _shown(t: Tensor) -> str:
    return f"{t.tolist()}" if t.numel() <= 9 else f"a tensor of shape {tuple(t.shape)}"
