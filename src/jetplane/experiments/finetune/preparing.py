"""From a person's files to a task: texts, model, tokens, states of the frozen part, classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import texts
from .classifier import TextClassifier
from .frozen import Observer, cached_states
from .language_model import class_tokens, load, tokenize
from .training import Task


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
    sizes: tuple[int, int, int] = texts.SIZES
    prompt: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 64
    blocks: int = 1
    cache: Path = Path("runs/states")


@dataclass(frozen=True)
class Prepared:
    """A task, and what a person wants to know of it.

    Attributes:
        task: see `Task`.
        classes: their names.
        seconds: that the frozen part took, when it ran.
        frozen: how many of the model's blocks are frozen.
    """

    task: Task
    classes: list[str]
    seconds: float
    frozen: int


def prepare(source: Source, observe: Observer = lambda done, total: None) -> Prepared:
    """Read, split, load, run the frozen part unless its states are kept already, and make the classifier.

    Raises:
        DataError, ArgumentError, MissingPackageError: see `texts.read`, `texts.split`, `language_model.load`,
            `language_model.tokenize`, `language_model.class_tokens` and `TextClassifier`.
    """
    examples = texts.read(source.data, source.text_column, source.label_column)
    held = None
    if source.test_data is not None:
        held = texts.read(source.test_data, source.text_column, source.label_column)
    splits = texts.split(examples, held, source.sizes)
    model = load(source.model)
    first = class_tokens(model, splits.classes, source.words) if model.causal else None
    tokens = tokenize(model, splits.texts, source.prompt, source.tokens)
    states = cached_states(model, tokens, source.blocks, source.cache, observe)
    classifier = TextClassifier(model, source.blocks, len(splits.classes), first, states.as_tuple)
    labels = torch.cat([splits.labels(part) for part in ("train", "dev", "test")])
    sizes = len(splits.train), len(splits.dev), len(splits.test)
    return Prepared(
        Task(classifier, states, labels, sizes), splits.classes, states.seconds, model.frozen(source.blocks)
    )
