"""Labelled texts from a person's own files, and their parts for training, choosing and testing."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ArgumentError, DataError, JetplaneWarning, warn_user
from .options import SIZES

LABEL_NAMES = ("label", "class", "category", "sentiment", "topic", "author")  # of columns, where none is named
TEXT_NAMES = ("text", "content", "sentence", "review", "quote")
LEAST = 8  # texts in each part
DELIMITERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}  # what may stand between columns


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    label: str
    text: str


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Attributes:
        classes: the names of all classes, sorted.
        train: what is trained on.
        dev: what chooses among weights and rates.
        test: what the result is measured on, once.
    """

    classes: list[str]
    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @property
    def texts(self) -> list[str]:
        """All texts: those of ``train``, ``dev`` and ``test`` in this order."""
        return [example.text for example in (*self.train, *self.dev, *self.test)]

    def labels(self, part: str) -> torch.Tensor:
        """The places of a part's classes in ``classes``, (N,) in int64."""
        place = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([place[example.label] for example in getattr(self, part)])


def read(path: Path, text_column: str | None = None, label_column: str | None = None) -> list[Example]:
    r"""Read labelled texts.

    Args:
        path: a table whose first line names the columns (``.csv``, with commas, semicolons or tabs, whichever the first
            line has most of; with tabs ``.tsv``; Orange's ``.tab``, with two lines of types and roles after it), lines
            of JSON (``.jsonl``), or a folder that has a folder of ``.txt`` files for each class. In UTF-8, or in UTF-16
            with its mark; what is neither is replaced, with a warning.
        text_column: name of the column, or key, of the texts; None for the first of `TEXT_NAMES` that is there.
        label_column: likewise of the classes, `LABEL_NAMES`.

    Raises:
        DataError: there is no such file, it is none of these, a column is missing, or a row has too few or too many.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "own.csv").write_text("label,text\ngood,what a day\nbad,it rains\n")
    >>> [example.label for example in read(folder / "own.csv")]
    ['good', 'bad']
    """
    if path.is_dir():
        found = _read_folder(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder of labelled texts")
    elif path.suffix in DELIMITERS:
        found = _read_table(path, text_column, label_column)
    elif path.suffix == ".jsonl":
        found = _read_lines(path, text_column, label_column)
    else:
        kinds = ", ".join([*DELIMITERS, ".jsonl"])
        raise DataError(
            f"{path}: expected a file that ends in one of {kinds}, or a folder with a folder for each class"
        )
    named = [Example(example.label.strip(), example.text) for example in found]
    kept = [example for example in named if example.label and example.text.strip()]
    if not kept:
        raise DataError(f"{path}: expected texts with labels, found none")
    return kept


def split(
    examples: Sequence[Example],
    held: Sequence[Example] | None = None,
    sizes: tuple[int, int, int] = SIZES,
    seed: int = 0,
) -> Splits:
    """Draw the parts at random; where there are fewer texts than asked for, all parts shrink alike.

    Args:
        examples: texts for training and dev, and for test if ``held`` is None.
        held: texts for test.
        sizes: of train, dev and test.
        seed: of the draw. It is none of a run's: all runs have the same parts.

    Raises:
        ArgumentError: a size is not positive.
        DataError: a part would have fewer than `LEAST` texts, or there are fewer than two classes, or fewer than two
            texts of a class on average.
    """
    if min(sizes) < 1:
        raise ArgumentError(f"sizes of train, dev and test must be positive, got {sizes}")
    classes = sorted({example.label for example in examples})
    if len(classes) < 2:
        raise DataError(f"expected texts of at least two classes, got {classes}: is the label column the right one?")
    if 2 * len(classes) > len(examples):
        raise DataError(
            f"expected several texts of each class, got {len(classes)} classes of {len(examples)} texts: is the label "
            "column the right one?"
        )
    unknown = {example.label for example in held or ()} - set(classes)
    if unknown:
        raise DataError(f"the test texts have classes that the training texts lack: {sorted(unknown)}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
    own = sizes if held is None else sizes[:2]
    counts = [size * min(len(examples), sum(own)) // sum(own) for size in own]
    parts = [[shuffled.pop() for _ in range(count)] for count in counts]
    if held is not None:
        parts.append([held[i] for i in torch.randperm(len(held), generator=generator)[: sizes[2]].tolist()])
    if min(map(len, parts)) < LEAST:
        raise DataError(
            f"too few texts: train, dev and test would have {', '.join(str(len(part)) for part in parts)}, expected at "
            f"least {LEAST} each; label more, or give smaller --train, --dev and --test"
        )
    return Splits(classes, *parts)


def _read_folder(path: Path) -> list[Example]:
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise DataError(f"{path}: expected a folder for each class with .txt files in it, found none")
    return [Example(file.parent.name, _decoded(file)) for file in files]


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        where = content.count(b"\n", 0, error.start) + 1
        warn_user(
            f"{path}: not in UTF-8 (line {where} is the first): what cannot be read is replaced by U+FFFD; save it as "
            "UTF-8",
            JetplaneWarning,
        )
        return content.decode(encoding, errors="replace")


def _read_table(path: Path, text_column: str | None, label_column: str | None) -> list[Example]:
    csv.field_size_limit(sys.maxsize)
    whole = _decoded(path)
    delimiter = max(DELIMITERS[path.suffix], key=whole.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(whole, newline=""), delimiter=delimiter)
    rows = [(lines.line_num, row) for row in lines if row]
    if not rows:
        raise DataError(f"{path}: is empty; expected a first line that names the columns")
    (_, columns), numbered = rows[0], rows[3 if path.suffix == ".tab" else 1 :]
    other = [(line, len(row)) for line, row in numbered if len(row) != len(columns)]
    if other:
        raise DataError(
            f"{path}: {len(other)} of {len(numbered)} rows have another number of columns than the {len(columns)} that "
            f"the first line names; line {other[0][0]} has {other[0][1]}. Put texts that contain {delimiter!r} into "
            "quotes"
        )
    body = [row for _, row in numbered]
    text, label = (
        columns.index(_column(path, columns, given, usual, option))
        for given, usual, option in (
            (text_column, TEXT_NAMES, "--text-column"), (label_column, LABEL_NAMES, "--label-column")
        )
    )  # fmt: skip
    return [Example(row[label], row[text]) for row in body]


def _read_lines(path: Path, text_column: str | None, label_column: str | None) -> list[Example]:
    try:
        rows = [json.loads(line) for line in _decoded(path).splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path}: a line is not JSON ({error})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a JSON object in each line")
    keys = list(rows[0])
    text = _column(path, keys, text_column, TEXT_NAMES, "--text-column")
    label = _column(path, keys, label_column, LABEL_NAMES, "--label-column")
    there = [(row.get(label), row.get(text)) for row in rows]
    return [Example(str(a), str(b)) for a, b in there if a is not None and b is not None]


def _column(path: Path, columns: Sequence[str], given: str | None, usual: Sequence[str], option: str) -> str:
    wanted = usual if given is None else (given,)
    for name in wanted:
        for column in columns:
            if column == name or (given is None and column.lower() == name):
                return column
    raise DataError(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(columns)}: name one with {option}")
