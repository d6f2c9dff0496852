"""From a person's files to a task: texts, model, tokens, states of the frozen part, classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import texts
from .classifier import TextClassifier
from .frozen import Observer, cached_states
from .language_model import class_tokens, load, tokenize
from .options import Source
from .training import Task


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
