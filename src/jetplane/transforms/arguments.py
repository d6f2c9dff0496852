"""What is differentiated and where: a function, its arguments, the tensors among them that move, directions for those.

A function is given as ``f`` and ``primals``, a tensor or, as in `torch.func.jvp`, a tuple of arguments, each of which
may be a tree of tensors (dicts, lists, tuples). ``argnums`` says which arguments move: an int, or a tuple of ints whose
results are then a tuple as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import transform_around, tree_flatten, tree_unflatten
from ..errors import ArgumentError, DeviceError, DTypeError, ShapeError
from ..jets import WORTH, Axes, Jet, Mirrored, Partial, Sparse, Tangents, plain

Argnums = int | Sequence[int] | None
Directions = list[Tensor | Tangents | None]  # K tangents for each tensor that moves; None where no direction moves it


@dataclass(frozen=True)
class Call:
    """A function and where it is differentiated.

    Attributes:
        name: of Jetplane's function, for errors.
        f: the user's function.
        has_aux: whether f returns ``(result, aux)``.
        arguments: all arguments of f.
        argnums: which of them move.
        single: whether results are those of one argument, and not a tuple over several.
        leaves: the tensors in the arguments that move.
        spec: the tree that they are the leaves of.
        batch_dim: the axis of points in each of the leaves; None where there is one point.
    """

    name: str
    f: Callable[..., Any]
    has_aux: bool
    arguments: tuple[Any, ...]
    argnums: tuple[int, ...]
    single: bool
    leaves: tuple[Tensor, ...]
    spec: Any
    batch_dim: int | None = None

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each leaf at one point."""
        return [self.at_one_point(x.shape) for x in self.leaves]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each leaf has at one point."""
        return [shape.numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """D: how many numbers move at one point."""
        size = sum(self.sizes)
        if torch.compiler.is_compiling():  # a number where shapes are symbols: directions are part of the program
            size = sum(1 for _ in range(size))
        return size

    @property
    def points(self) -> int | None:
        """How many points there are; None where one is given without an axis of points."""
        return None if self.batch_dim is None else self.leaves[0].shape[self.batch_dim]

    @property
    def bytes(self) -> int:
        """Of all that moves."""
        return sum(x.numel() * x.element_size() for x in self.leaves)

    @property
    def nested(self) -> bool:
        """Whether an outer evaluation differentiates these tensors too."""
        return any(isinstance(x, Jet) for x in self.leaves)

    def at_one_point(self, shape: torch.Size) -> torch.Size:
        """A shape without the axis of points."""
        if self.batch_dim is None:
            return shape
        return torch.Size((*shape[: self.batch_dim], *shape[self.batch_dim + 1 :]))

    def at(self, leaves: Sequence[Any]) -> Any:
        """What f returns with other tensors in place of those that move."""
        arguments = list(self.arguments)
        for n, moved in zip(self.argnums, tree_unflatten(list(leaves), self.spec), strict=True):
            arguments[n] = moved
        return self.f(*arguments)

    def outputs(self, returned: Any) -> tuple[list[Tensor], Any, Any]:
        """The tensors that f returned, the tree that they are the leaves of, and what it returned beside them.

        Raises:
            ArgumentError: ``has_aux`` of a function that does not return a pair.
            DTypeError: a result that is no floating-point tensor.
            ShapeError: no axis of points.
        """
        result, aux = returned, None
        if self.has_aux:
            if not (isinstance(returned, tuple) and len(returned) == 2):
                raise ArgumentError(f"has_aux=True: expected f to return (result, aux), got {_shown(returned)}")
            result, aux = returned
        leaves, spec = tree_flatten(result)
        if not leaves:
            raise DTypeError(f"f: expected floating-point tensors as results, got none in {_shown(result)}")
        for y in leaves:
            if not isinstance(y, Tensor) or not (y.dtype.is_floating_point or y.dtype.is_complex):
                kind = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
                raise DTypeError(
                    f"f: expected floating-point tensors as results, got {kind} in {_shown(result)}. Return what "
                    "needs no derivative as (result, aux), with has_aux=True"
                )
            if self.points is not None and self.points not in y.shape:
                raise ShapeError(
                    f"f: with batch_dim={self.batch_dim} expected a result with an axis of {self.points} points, one "
                    f"result for each, got shape {tuple(y.shape)}"
                )
        return leaves, spec, aux

    def check_scalar(self, results: Sequence[Tensor]) -> None:
        """Check that f gives one number (at each point).

        Raises:
            ShapeError: it does not.
            DTypeError: it is complex.
        """
        numbers = 1 if self.points is None else self.points
        if len(results) != 1 or results[0].numel() != numbers:
            at = "" if self.points is None else " at each point"
            shapes = ", ".join(str(tuple(y.shape)) for y in results)
            remedy = "sum them up, or use jetplane.hessian, which takes any shape"
            if self.name == "laplacian":
                remedy = "take mode='forward', which takes any shape"
            raise ShapeError(
                f"{self.name}: expected f to return one number{at}, got {len(results)} result(s) of shape {shapes}; "
                f"{remedy}{self.missing_points(results)}"
            )
        if results[0].is_complex():
            raise DTypeError(f"{self.name}: expected f to return a real number, got {results[0].dtype}")

    def missing_points(self, tensors: Sequence[Tensor]) -> str:
        """What to add to an error about shapes where ``batch_dim`` may have been forgotten."""
        if self.batch_dim is not None or any(x.dim() < 2 for x in self.leaves):
            return ""
        points = {x.shape[0] for x in (*self.leaves, *(t for t in tensors if t.dim()))}
        return f". For one result at each of {points.pop()} points pass batch_dim=0" if len(points) == 1 else ""

    def result(self, found: Any, aux: Any) -> Any:
        """What is found, and what f returned beside, where that is asked for."""
        return (found, aux) if self.has_aux else found

    def tree(self, leaves: Sequence[Any]) -> Any:
        """One result for each leaf, in the structure of the arguments that move."""
        tree = tree_unflatten(list(leaves), self.spec)
        return tree[0] if self.single else tree

    def split(self, stack: Tensor, dim: int) -> list[Tensor]:
        """An axis of all D numbers, in parts of each leaf's shape at one point."""
        dim = dim % stack.dim()
        return [
            part.reshape((*part.shape[:dim], *shape, *part.shape[dim + 1 :]))
            for part, shape in zip(stack.split(self.sizes, dim), self.shapes, strict=True)
        ]

    def like_primals(self, stack: Tensor) -> Any:
        """Numbers for each of the D coordinates, (D, points) or (D,), in the structure and shape of the primals."""
        parts = self.split(stack.reshape(self.size, *(() if self.points is None else (self.points,))), 0)
        if self.batch_dim is not None:
            parts = [part.movedim(-1, self.batch_dim) for part in parts]
        return self.tree(parts)

    # --- directions --------------------------------------------------------------------------------------------

    def axes(self, run: slice | None = None, which: Sequence[int] | None = None) -> Directions:
        """The coordinate directions, a run of them or those of the given numbers; all points share them."""
        numbers = range(self.size)[run or slice(None)] if which is None else sorted(which)
        k, start, found = len(numbers), 0, []
        for x, shape, size in zip(self.leaves, self.shapes, self.sizes, strict=True):
            rows = [n for n, d in enumerate(numbers) if start <= d < start + size]
            own = [numbers[n] - start for n in rows]
            if which is not None and self.batch_dim == 0 and x.dim() == 2 and not torch.compiler.is_compiling():
                tangents = Axes(own, x)
            else:
                stack = torch.zeros(len(rows), size, dtype=x.dtype, device=x.device)
                stack.scatter_(1, torch.tensor(own, dtype=torch.long, device=x.device).unsqueeze(1), 1)
                tangents = self.expanded(stack.reshape(-1, *shape))
            start += size
            if not rows:
                found.append(None)
            else:
                found.append(tangents if len(rows) == k else Partial(k, rows, tangents))
        return found

    def sparse_axes(self, run: slice) -> Directions:
        """`axes`, as coefficients of which each element has one, for operators that keep them few."""
        k = run.stop - run.start
        if k < 2 * WORTH or torch.compiler.is_compiling() or not plain(*self.leaves):
            return self.axes(run)
        start, found = run.start, []
        for x, shape, size in zip(self.leaves, self.shapes, self.sizes, strict=True):
            numbers = torch.arange(size).reshape(shape) - start
            found.append(Sparse.axes(x, numbers if self.batch_dim is None else numbers.unsqueeze(self.batch_dim), k))
            start -= size
        return found

    def axes_around(self, run: slice) -> Directions:
        """`axes`, where the evaluation around this one moves the same tensors along all of them in the same order."""
        if torch.compiler.is_compiling():
            return self.axes(run)
        jets = [x for x in self.leaves if isinstance(x, Jet) and x.space.level == 1]
        if len(jets) < len(self.leaves) or any(x.space.k != run.stop - run.start or x.space.order == 1 for x in jets):
            return self.axes(run)
        return [*map(Mirrored.seed, jets)]

    def expanded(self, stack: Tensor) -> Tensor:
        """Directions (K, *shape at one point) that all points share, expanded over the points."""
        if self.batch_dim is None or self.points is None:
            return stack
        stack = stack.unsqueeze(self.batch_dim + 1)
        return stack.expand(*stack.shape[: self.batch_dim + 1], self.points, *stack.shape[self.batch_dim + 2 :])

    def dense(self, directions: Directions, k: int) -> list[Tensor]:
        """Directions as tensors (k, *primal.shape)."""
        return [
            x.new_zeros(k, *x.shape) if v is None else v.materialized() if isinstance(v, Tangents) else v
            for x, v in zip(self.leaves, directions, strict=True)
        ]

    def contracted(self, y: Tensor, v: Tensor | Tangents) -> Tensor:
        """``sum_k y_k . v_k`` at each point, of (k, *primal.shape) both."""
        if isinstance(v, Partial):
            y, v = y[list(v.rows)], v.tangents
        product = y * (v.materialized() if isinstance(v, Tangents) else v)
        return product.sum([d for d in range(product.dim()) if self.batch_dim is None or d != self.batch_dim + 1])

    def flat(self, tree: Any, what: str) -> list[Any]:
        """The leaves of a tree of the primals' structure.

        Raises:
            ShapeError: it has another structure.
        """
        leaves, spec = tree_flatten((tree,) if self.single else tuple(tree) if type(tree) is list else tree)
        if spec != self.spec:
            raise ShapeError(
                f"{what}: expected the structure of the primals that move, {_shown(self.tree(self.leaves))}; "
                f"got {_shown(tree)}"
            )
        return leaves

    def directions(self, tree: Any, what: str = "tangents", k: int | None = None) -> tuple[list[Tensor], int]:
        """K directions in the structure of the primals: (K, *primal.shape), or (K, *shape at one point).

        Args:
            tree: of the directions.
            what: they are called in errors.
            k: 1 if they are one direction without an axis of K.

        Returns:
            A tensor (K, *primal.shape) for each leaf, and K.

        Raises:
            ShapeError, DTypeError, DeviceError, ArgumentError: directions that do not match the primals.
        """
        found: list[Tensor] = []
        for i, (x, shape, v) in enumerate(zip(self.leaves, self.shapes, self.flat(tree, what), strict=True)):
            if not isinstance(v, Tensor):
                raise ArgumentError(f"{what} {i}: expected a tensor, got {type(v).__name__}")
            if k == 1:
                if v.shape not in (x.shape, shape):
                    points = self.missing_points([]) if v.shape == x.shape[1:] else ""
                    raise ShapeError(f"{what} {i}: expected shape {tuple(x.shape)}, got {tuple(v.shape)}{points}")
                v = v.unsqueeze(0)
            many = v.shape[0] if v.dim() else 0
            if many < 1:
                raise ArgumentError(f"{what} {i}: k must be at least 1: expected shape (k, *primal.shape)")
            many = found[0].shape[0] if found else many
            if v.shape == (many, *shape):
                whole = self.expanded(v)
            elif v.shape == (many, *x.shape):
                whole = v
            else:
                raise ShapeError(f"{what} {i}: expected shape {(many, *x.shape)}, got {tuple(v.shape)}")
            if v.dtype != x.dtype:
                raise DTypeError(f"{what} {i}: expected {x.dtype}, the dtype of its primal, got {v.dtype}")
            if v.device != x.device:
                raise DeviceError(f"{what} {i}: expected {x.device}, the device of its primal, got {v.device}")
            found.append(whole)
        return found, found[0].shape[0]


def call_of(
    name: str, f: Callable[..., Any], primals: Any, argnums: Argnums = None, has_aux: bool = False,
    batch_dim: int | None = None, real: bool = True,
) -> Call:  # fmt: skip
    """A call of one of Jetplane's functions, checked.

    Args:
        name: of Jetplane's function.
        f: the user's.
        primals: a tensor, or a tuple or list of arguments; one argument that is a list is ``([a, b],)``.
        argnums: which arguments move; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points.
        real: whether complex numbers are refused.

    Raises:
        ArgumentError: f that cannot be called, argnums that are not there, nothing that moves, a transform of
            torch.func around.
        DTypeError: what moves is not a floating-point tensor.
        ShapeError: no axis of points, or different numbers of points.
    """
    _check_around()
    if not callable(f):
        raise ArgumentError(f"{name}: expected a function as first argument, got {type(f).__name__}")
    several = type(primals) in (tuple, list)
    arguments = tuple(primals) if several else (primals,)
    numbers, single = _numbers(argnums, len(arguments), several)
    leaves, spec = tree_flatten(tuple(arguments[n] for n in numbers))
    for i, x in enumerate(leaves):
        _check_leaf(i, x, real)
    if not sum(x.numel() for x in leaves):
        raise ArgumentError("primals: expected tensors with at least one number, got none")
    if batch_dim is not None:
        _check_batch(leaves, batch_dim)
    return Call(name, f, bool(has_aux), arguments, numbers, single, tuple(leaves), spec, batch_dim)


def _numbers(argnums: Argnums, count: int, several: bool) -> tuple[tuple[int, ...], bool]:
    if argnums is None:
        if not count:
            raise ArgumentError("primals: expected at least one argument, got an empty tuple")
        return tuple(range(count)), not several
    single = not isinstance(argnums, (tuple, list))
    numbers: tuple[Any, ...] = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int) or not -count <= n < count:
            raise ArgumentError(f"argnums: expected integers from {-count} to {count - 1}, got {n!r}")
    numbers = tuple(n % count for n in numbers)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ArgumentError(f"argnums: expected at least one argument, each once, got {argnums!r}")
    return numbers, single


def _check_leaf(i: int, x: Any, real: bool) -> None:
    if not isinstance(x, Tensor):
        raise DTypeError(
            f"primal {i}: expected a floating-point tensor, got {type(x).__name__}. "
            "Name the arguments to differentiate by argnums=; the others may be anything"
        )
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise ArgumentError(f"primal {i}: expected a dense tensor, got {kind}; differentiate in its values")
    if x.device.type == "meta":
        raise DeviceError(f"primal {i}: expected a tensor with values, got one on the meta device, which has none")
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise DTypeError(
            f"primal {i}: expected a floating dtype, got {x.dtype}. Name the arguments to differentiate by argnums="
        )
    if real and x.dtype.is_complex:
        raise DTypeError(
            f"primal {i}: expected real numbers, got {x.dtype}; differentiate in real and imaginary parts "
            "(torch.view_as_real), or along directions of your own with jetplane.jet"
        )


def _check_around() -> None:
    """Refuse to work inside a transform of torch.func, which sees no operator that takes a jet.

    Raises:
        ArgumentError: there is one around.
    """
    around = transform_around()
    if around == "Vmap":
        raise ArgumentError(
            "torch.vmap does not reach inside jetplane's functions. Give all points at once: with batch_dim=0 they "
            "call f once with all points"
        )
    if around is not None:
        raise ArgumentError(
            f"torch.func.{around.lower()} does not reach inside jetplane's functions. Their results have a graph: use "
            "torch.autograd.grad or backward() of them, or nest jetplane's functions"
        )


def _check_batch(leaves: Sequence[Tensor], batch_dim: int) -> None:
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ArgumentError(f"batch_dim must be None or an integer of at least 0, got {batch_dim!r}")
    for i, x in enumerate(leaves):
        if x.dim() <= batch_dim:
            raise ShapeError(f"primal {i}: expected an axis of points, batch_dim={batch_dim}, got {tuple(x.shape)}")
    points = [x.shape[batch_dim] for x in leaves]
    if len(set(points)) > 1:
        raise ShapeError(f"primals: expected as many points in each along axis {batch_dim}, got {points}")


def _shown(tree: Any) -> str:
    """A tree with shapes in place of its tensors."""
    leaves, spec = tree_flatten(tree)
    words = [_Word(f"tensor{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__) for x in leaves]
    return str(tree_unflatten(words, spec))


class _Word(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
