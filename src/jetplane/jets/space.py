"""The directions that the jets of one evaluation are expanded along."""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from .memory import Memory
from .pairs import PairStructure, structure_of

PARAMETER, TOTAL, MODEL, LOSS = 0, 1, 2, 3  # kinds of jets: see Space.gauss_newton

# Structure, order, level, gauss_newton, examples, penalties and recorded of a space.
Key = tuple[tuple[Any, ...], int, int, bool, bool, bool, bool]


@dataclass(eq=False)
class Space:
    """The directions that jets of one evaluation are expanded along.

    Attributes:
        structure: which second coefficients are kept.
        order: 2 where operators make second coefficients, 1 where they only pass on those that are there.
        level: nesting depth. Jets of an outer evaluation have a smaller level and are constants
            for this one, which is what rules perturbation confusion out.
        gauss_newton: second coefficients are made by loss functions and by functions of the parameters
            alone (regularizers), not by the model between them. Jets then have a kind: PARAMETER (a
            function of parameters alone), MODEL (of data too), LOSS (what a loss function made), TOTAL (a sum
            of curved functions of the model: a loss, unless the model goes on with it; see `jetplane.rules.by_hand`).
        penalties: whether functions of the parameters alone make second coefficients too.
        examples: whether each example's part of the slope is kept: see `jetplane.rules.examples`.
        recorded: whether rules record a graph for reverse mode: they run outside of inference mode then.
        points: whether values at many points are carried together, which no operator may mix.
        kind: the kind of what the operator being carried makes.
        keys: torch's dispatch keys as they are for user code. Inside ``__torch_dispatch__`` more of them
            are off, lazy conjugation and view tracking among them, which rules and autograd rely on.
        operator: the name of the operator being carried.
        materialized: operators that materialized low-rank tangents since they could not use the factors, and how
            often.
        stopped: whether derivatives stop, since an evaluation inside of this one began while the user had switched
            grad mode off: see `jetplane.rules.grad_mode`.
        made: the jets, for those that are left to become ordinary tensors at the end: see
            `jetplane.evaluation.leaving`; None in compiled code, and afterwards.
        most: how many ``made`` may hold before those that are gone are taken out.
        written: plain tensors that jets were written into.
        remembered: whether tensors that carried derivatives may not enter a later evaluation.
        graph_lost: what has cut a graph that the closure's own reverse mode goes through, or nothing.
        absent: the coefficients of each order of which none is there.
        entrance: where the model carries a part of the directions only: see `jetplane.evaluation.entrance`.
    """

    structure: PairStructure
    order: int = 2
    level: int = 0
    gauss_newton: bool = False
    examples: bool = False
    penalties: bool = True
    recorded: bool = False
    points: bool = False
    kind: int = PARAMETER
    keys: tuple[Any, Any] | None = None
    operator: str = ""
    materialized: dict[str, int] = field(default_factory=dict)
    entrance: Any = None
    stopped: bool = False
    made: deque[ref[Any]] | None = None
    written: list[ref[Any]] = field(default_factory=list)
    remembered: bool = False
    graph_lost: str = ""
    most: int = 1 << 12
    absent: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def traced(self) -> bool:
        """Whether a compiler traces this evaluation."""
        return self.keys is None

    def forget(self) -> None:
        """Take jets that are gone out of ``made``. Safe under threads."""
        made = self.made or deque()
        for _ in range(len(made)):
            kept = made.popleft()
            if kept() is not None:
                made.append(kept)
        self.most = 2 * len(made) + (1 << 12)

    @property
    def tells_kinds(self) -> bool:
        """Whether jets have kinds: with Gauss-Newton curvature, and beside slopes alone where examples are kept."""
        return self.gauss_newton or (self.examples and self.order == 1)

    @property
    def k(self) -> int:
        """Number of directions."""
        return self.structure.k

    def count(self, order: int) -> int:
        """Number of coefficients of an order, 1 or 2."""
        return self.structure.k if order == 1 else self.structure.count

    @property
    def key(self) -> Key:
        """What a compiler may hold of a space: plain numbers."""
        return (
            self.structure.key,
            self.order,
            self.level,
            self.gauss_newton,
            self.examples,
            self.penalties,
            self.recorded,
        )

    @staticmethod
    @functools.cache
    def of(key: Key) -> Space:
        """The one space with this key, for compiled code."""
        return Space(structure_of(key[0]), *key[1:])

    @functools.cached_property
    def memory(self) -> Memory:
        """Where large coefficients of this evaluation are; compiled code has its own."""
        return Memory(self.k)

    def finish(self) -> None:
        """The evaluation is over; tensors that it returned may be in its memory."""
        if "memory" in self.__dict__:
            self.memory.trim()
