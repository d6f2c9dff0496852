"""Internal: what each layer gets in an estimate of the gradient, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .feedback import FeedbackSpec

Mode = Literal["outputs", "basis", "weights", "parameters"]

OTHERS = "*"  # the name under which plans have the parameters that no perturbed layer accounts for


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is perturbed.

    Attributes:
        mode: along what the layer moves. "outputs": random signs on its outputs; "basis": each feature of its output by
            itself, which gives the exact gradient; "weights": random signs on its weights, each example its own;
            "parameters", of `OTHERS`: random directions of the parameters themselves.
        samples: how many directions.
        passes: how many passes they are spread over, which bounds memory.
        per_position: whether each position of the output is an example to the loss, and its noise judged by that
            position's loss alone.
        successor: the layer whose input tells which outputs are active (`.active_outputs`); None if all count as such.
        feedback: the shape of the layer's learned feedback (`.feedback`), None if it has none.
        calls: how many calls of the layer in a pass move along directions of their own; 1 if all calls share theirs.
            They are as many as there are micro-batches where a closure runs over these one after another.
        together: whether the slope of the whole loss judges the noise of all examples, since its parts are not theirs.
    """

    mode: Mode
    samples: int
    passes: int = 1
    per_position: bool = False
    successor: str | None = None
    feedback: FeedbackSpec | None = None
    calls: int = 1
    together: bool = False

    def plain(self) -> dict[str, Any]:
        """The fields as a dictionary of plain numbers and words, for checkpoints."""
        return asdict(self) | {"feedback": self.feedback and self.feedback._asdict()}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LayerPlan:
        """A plan from what `plain` gave."""
        spec = fields["feedback"]
        return cls(**{**fields, "feedback": spec and FeedbackSpec(**spec)})

    def split(self) -> list[range]:
        """The samples of each pass."""
        ends = [self.samples * i // self.passes for i in range(self.passes + 1)]
        return [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]
