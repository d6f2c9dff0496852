"""Files of a run: written atomically, and read without executing code from them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAGIC = b"jetplane-checkpoint-1 "


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: after a crash it has its old or its new content."""
    scratch = path.with_suffix(path.suffix + ".part")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, preceded by a line with their SHA-256 checksum."""
    import torch  # here, as the other files of a run do not need it

    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`.

    Raises:
        CheckpointError: the file is missing or damaged, or is not a checkpoint.
    """
    try:
        head, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not head.startswith(MAGIC):
        raise CheckpointError(f"{path}: not a checkpoint of Jetplane")
    if hashlib.sha256(payload).hexdigest().encode() != head[len(MAGIC) :]:
        raise CheckpointError(f"{path}: damaged: its checksum does not match its content")
    import torch

    try:
        return torch.load(io.BytesIO(payload), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row of metrics; it is on disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of metrics; an incomplete last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_rows(path: Path, epochs: int) -> None:
    """Keep the rows of the first ``epochs`` epochs: those that the checkpoint includes."""
    rows = [row for row in read_rows(path) if row["epoch"] <= epochs]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
