"""Gauss-Newton planes a part of their directions at a time: what enters the losses is kept, not computed again.

Between parameters and losses Gauss-Newton curvature needs first coefficients alone, so parts of the directions need
not meet there. Every run but the last carries one part and keeps its coefficients of the model's outputs where they
enter a loss (`Entrance`). In the last run (`LastEntrance`) parameters and losses have all K directions and the model
between them only the last part: what enters the model is narrowed to it, what enters a loss widened by what was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_leaves, tree_map
from ..errors import DerivativeError
from ..jets import LOSS, MODEL, Jet, Space, is_jet, kind_of, parts


class Entrance:
    """What of the model enters losses in one run.

    Attributes:
        kept: first coefficients of the model's outputs, in the order in which they enter losses; None where there
            are none.
        barred: whether a tensor was written to across kinds, which coefficients of two numbers would not allow.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor | None] = []
        self.barred = False

    def admit(self, func: Any, space: Space, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """An operator's arguments as they enter it; ``space.kind`` is the kind of what it makes."""
        if func._schema.is_mutable:
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            jets = [x for x in tree_leaves([named.get(name) for name in written]) if is_jet(x, space)]
            self.barred = self.barred or any(kind_of(x) != space.kind for x in jets)
        if space.kind == LOSS:
            return tree_map(lambda x: self.into_loss(x, space), (args, kwargs))
        return self._into_model(space, args, kwargs) if space.kind == MODEL else (args, kwargs)

    def into_loss(self, x: Any, space: Space) -> Any:
        """An output of the model as a loss takes it; anything else as it is."""
        if is_jet(x, space) and kind_of(x) == MODEL:
            self.kept.append(_first(x, space))
            return Jet(x.primal, parts(x, space)[1], None, space, kind=LOSS)  # counted once, not by operators inside
        return x

    def _into_model(self, space: Space, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


def _first(x: Jet, space: Space) -> Tensor | None:
    """All first coefficients as a tensor of its own."""
    x1 = parts(x, space)[1]
    return x1.full(x.shape, x1.tensor.dtype, x.device).clone() if x1 else None


class LastEntrance(Entrance):
    """The run that puts the parts together.

    Args:
        earlier: what the runs before kept, in the order of their directions.
        run: the directions that the model carries in this one, which are the last.
    """

    def __init__(self, earlier: Sequence[Sequence[Tensor | None]], run: slice) -> None:
        super().__init__()
        self._earlier, self._run = earlier, run

    def into_loss(self, x: Any, space: Space) -> Any:
        """See `Entrance`: with the coefficients of all runs."""
        if not is_jet(x, space) or kind_of(x) != MODEL:
            return x
        n, first = len(self.kept), _first(x, space)
        before = [kept[n] if n < len(kept) else None for kept in self._earlier]
        self.kept.append(None)
        known = [c for c in (*before, None if first is None else first[self._run]) if c is not None]
        if any(c.shape[1:] != known[0].shape[1:] for c in known) or len(known) not in (0, len(before) + 1):
            raise DerivativeError(
                f"chunk= runs the closure more than once, and in its last run another output of the model, of shape "
                f"{tuple(x.shape)}, entered a loss than before; expected a closure that computes the same in each run"
            )
        return Jet(x.primal, torch.cat(known) if known else None, None, space, kind=LOSS)

    def _into_model(self, space: Space, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(lambda x: self._narrowed(x, space), (args, kwargs))

    def _narrowed(self, x: Any, space: Space) -> Any:
        if not is_jet(x, space) or kind_of(x) >= MODEL:
            return x
        x1 = parts(x, space)[1].selected(self._run)
        narrow = Jet(x.primal, x1, None, space, kind=MODEL)
        narrow.is_seed = x.is_seed
        return narrow
