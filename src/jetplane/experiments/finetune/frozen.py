"""What the frozen blocks put out for each text: computed once, kept on disk, read for a batch at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import DataError
from .. import store
from .language_model import LanguageModel, Tokens

SENTENCES = 32  # texts that run at a time
Observer = Callable[[int, int], None]  # (texts done, texts in all)


@dataclass(frozen=True)
class States:
    """The states that enter the first block that trains.

    Attributes:
        path: the file: float32 numbers, in the order of texts, tokens and features.
        mask: (N, T), which tokens there are.
        width: features of a token.
        as_tuple: whether the model's blocks return tuples.
        seconds: that it took to compute them.
    """

    path: Path
    mask: Tensor
    width: int
    as_tuple: bool
    seconds: float

    def read(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, t, width) and mask (n, t) of some texts, t the most tokens that one of them has.

        The file is read, not mapped, so that it takes no memory beyond the batch.

        Raises:
            DataError: the file is too short.
        """
        mask = self.mask[texts]
        longest = int(mask.sum(1).max())
        numbers = np.empty((len(texts), longest, self.width), np.float32)
        size = self.mask.shape[1] * self.width * numbers.itemsize
        with open(self.path, "rb", buffering=0) as file:
            for n, text in enumerate(texts.tolist()):
                file.seek(text * size)
                if file.readinto(memoryview(numbers[n]).cast("B")) != numbers[n].nbytes:  # type: ignore[arg-type]
                    raise DataError(
                        f"{self.path}: too short for text {text} of {len(self.mask)}; delete it and run again"
                    )
        return torch.from_numpy(numbers), mask[:, :longest]


def cached_states(
    model: LanguageModel, tokens: Tokens, blocks: int, folder: Path, observe: Observer = lambda done, total: None
) -> States:
    """The states before the last ``blocks`` blocks: from the folder if they are there, else computed and put there.

    They belong to the weights of the frozen blocks, the tokens and ``blocks``: a checksum of all of them is in the
    file's name. What an interrupted run has computed is continued.

    Raises:
        ArgumentError: there are not as many blocks.
    """
    frozen = model.blocks[: model.frozen(blocks)]
    mark = hashlib.sha256(repr((blocks, tuple(tokens.ids.shape))).encode())
    for part in (tokens.ids, tokens.mask, *frozen.parameters()):
        mark.update(part.detach().contiguous().numpy().data)
    name = f"{mark.hexdigest()[:16]}.states"
    path, notes = folder / name, folder / f"{name}.json"
    if not (path.exists() and notes.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        facts = _compute(model, tokens, model.blocks[len(frozen)], path, observe)
        store.write_atomically(notes, json.dumps(facts).encode())
    facts = json.loads(notes.read_text())
    return States(path, tokens.mask, facts["width"], facts["as_tuple"], facts["seconds"])


class _Reached(Exception):
    """The block that the states enter is reached; what follows need not run."""


def _compute(model: LanguageModel, tokens: Tokens, entered: nn.Module, path: Path, observe: Observer) -> dict[str, Any]:
    found: list[Tensor] = []
    kinds: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def after(module: nn.Module, args: Any, out: Any) -> None:
        kinds.append(isinstance(out, tuple))

    hooks = [
        entered.register_forward_pre_hook(before, with_kwargs=True), model.blocks[0].register_forward_hook(after)
    ]  # fmt: skip
    start, scratch = time.perf_counter(), path.with_suffix(".part")

    def states_of(chosen: Tensor) -> Tensor:
        ids, mask = tokens.ids[chosen], tokens.mask[chosen]
        longest = int(mask.sum(1).max())
        found.clear()
        with contextlib.suppress(_Reached):
            model.base(input_ids=ids[:, :longest], attention_mask=mask[:, :longest])
        (states,) = found
        return F.pad(states.float(), (0, 0, 0, ids.shape[1] - longest))

    try:
        scratch.touch()
        with open(scratch, "r+b") as file, torch.inference_mode():
            parts = torch.arange(len(tokens.ids)).split(SENTENCES)
            first = states_of(parts[0])
            size = first[0].numel() * first.element_size() * SENTENCES
            done = scratch.stat().st_size // size  # parts that were written whole
            file.seek(done * size)
            for n, chosen in enumerate(parts[done:], done):
                file.write((states_of(chosen) if n else first).numpy().data)
                observe(int(chosen[-1]) + 1, len(tokens.ids))
    finally:
        for hook in hooks:
            hook.remove()
    if scratch.exists():  # another process may have been faster
        scratch.replace(path)
    return {"width": first.shape[2], "as_tuple": kinds[0], "seconds": time.perf_counter() - start}
