"""The options of `jetplane finetune`, as plain values: nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import ArgumentError

METHODS = ("plane-search", "perturbation", "fgd", "sofo", "mezo", "fzoo", "hizoo", "lozo", "adam", "adam-checkpointed")
WITHOUT_RATE = ("plane-search", "perturbation")
DEFAULT = ["plane-search", "mezo"]
ParametersName = Literal["lora", "prefix", "last-blocks", "norms", "head"]
Clock = Literal["wall", "processor"]
SIZES = (1000, 500, 1000)  # MeZO's: training, dev, test
RANK, PREFIX = 8, 5  # of adapters, as in MeZO; vectors, likewise
TARGETS = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "query_key_value", "qkv_proj", "Wqkv")
METHODS_HELP = f"Method; repeat for several: {', '.join(METHODS)}."
TARGETS_HELP = f"Name of the layers that get LoRA adapters; repeat for several [default: {', '.join(TARGETS)}]."


@dataclass(frozen=True)
class Source:
    """Where a task comes from.

    Attributes:
        model: folder or GGUF file; see `language_model.load`.
        data: labelled texts; see `texts.read`, also for the columns.
        test_data: those to test on; None for a part of ``data``.
        text_column: of the texts.
        label_column: of the classes.
        sizes: of train, dev and test.
        prompt: see `language_model.tokenize`.
        words: by class; see `language_model.class_tokens`.
        tokens: most tokens of a text with its prompt.
        blocks: how many of the last blocks the parameters that train are in.
        cache: folder for states.
    """

    model: Path
    data: Path
    test_data: Path | None = None
    text_column: str | None = None
    label_column: str | None = None
    sizes: tuple[int, int, int] = SIZES
    prompt: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 64
    blocks: int = 1
    cache: Path = Path("runs/states")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        parameters: which train; see `parameters.choose`, also for ``rank``, ``prefix`` and ``targets``.
        batch: texts in a step.
        micro_batch: texts at a time, of methods that take more memory for a text than inference does: those of jets,
            whose closure runs over them one after another, and "adam-checkpointed", which adds up their gradients.
        seconds: of training. Scores do not count.
        scores: how many times, evenly, the dev texts are scored; the best weights are kept.
        clock: what seconds are of: "wall", or "processor" for the processor time of all threads.

    Raises:
        ArgumentError: a number is not positive.
    """

    parameters: ParametersName = "lora"
    rank: int = RANK
    prefix: int = PREFIX
    targets: tuple[str, ...] = TARGETS
    batch: int = 16
    micro_batch: int = 4
    seconds: float = 60.0
    scores: int = 4
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        for name in ("rank", "prefix", "batch", "micro_batch", "seconds", "scores"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ArgumentError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        source: of the task.
        settings: of all runs.
        methods: their names.
        seeds: how many.
        trials: of the search of each rate; 0 for published rates.
        rates: given ones by method.

    Raises:
        ArgumentError: there is no such method, or a rate is given for one that does not run or has none.
    """

    source: Source
    settings: Settings
    methods: Sequence[str]
    seeds: int = 1
    trials: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.rates):
            if name not in METHODS:
                raise ArgumentError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
        for name in self.rates:
            if name in WITHOUT_RATE or name not in self.methods:
                why = "takes none" if name in WITHOUT_RATE else f"is not among the methods: {', '.join(self.methods)}"
                raise ArgumentError(f"a rate is given for {name}, which {why}")


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """``NAME=VALUE`` of an option that can be given several times.

    Raises:
        ArgumentError: a value has no equals sign.
    """
    split = [text.partition("=") for text in given]
    for name, sign, value in split:
        if not (name and sign and value):
            raise ArgumentError(f"expected NAME=VALUE after {option}, got {name + sign + value!r}")
    return {name: value for name, _, value in split}


def numbers(given: Mapping[str, str]) -> dict[str, float]:
    """Rates as numbers.

    Raises:
        ArgumentError: one is none, or not positive.
    """
    try:
        found = {name: float(value) for name, value in given.items()}
    except ValueError as error:
        raise ArgumentError(f"expected a number after --rate METHOD=, got {dict(given)}") from error
    if any(not value > 0 for value in found.values()):
        raise ArgumentError(f"rates must be positive, got {found}")
    return found
