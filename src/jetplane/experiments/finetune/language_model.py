"""A transformers model from disk, and texts as its tokens: prompts and the words that stand for classes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, DataError, MissingPackageError

PLACE = "{text}"  # of the text in a prompt
PROMPT = PLACE + "\nTopic:"  # of a causal model, by default


class Tokens(NamedTuple):
    """Texts as tokens, padded at the right.

    Attributes:
        ids: (N, T) in int64.
        mask: (N, T) in int64, one where a token is.
    """

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LanguageModel:
    """A pretrained model.

    Attributes:
        path: where it came from.
        base: the transformer, without what predicts tokens; in float32, in eval mode.
        tokenizer: its tokenizer.
        readout: the weights of what predicts tokens, (vocabulary, width); None for an encoder.
    """

    path: Path
    base: nn.Module
    tokenizer: Any
    readout: Tensor | None

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token. Its classes are words then; an encoder's are outputs of a new layer."""
        return self.readout is not None

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the transformer, in their order."""
        return _blocks(self.base)

    def frozen(self, blocks: int) -> int:
        """How many blocks come before the last ``blocks``.

        Raises:
            ArgumentError: none would be left before them, or none is asked for.
        """
        total = len(self.blocks)
        if not 1 <= blocks < total:
            raise ArgumentError(f"expected from 1 to {total - 1} of the {total} blocks to train in, got {blocks}")
        return total - blocks


def load(path: Path) -> LanguageModel:
    """Load a model from a folder that transformers wrote, or from a GGUF file (its weights become float32).

    Raises:
        DataError: there is no such model, or it cannot be read.
        MissingPackageError: transformers, or what it needs for this file, is not installed.
    """
    transformers = _transformers()
    if not path.exists():
        raise DataError(
            f"{path}: no such model; expected a folder with config.json, a tokenizer and weights, as "
            "save_pretrained writes it, or a .gguf file"
        )
    gguf = path.suffix == ".gguf"
    if gguf and importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("transformers needs the package gguf to read GGUF files: pip install gguf")
    where: dict[str, Any] = {"gguf_file": path.name} if gguf else {}
    source = str(path.parent if gguf else path)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        causal = gguf or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model = kind.from_pretrained(source, dtype=torch.float32, **where)
    except Exception as error:  # of transformers and of each format's own reader, which have types of their own
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: transformers cannot load it: {what}") from error
    base = model.base_model if causal else model
    readout = model.get_output_embeddings().weight.detach() if causal else None
    base.config.use_cache = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return LanguageModel(path, base.eval().requires_grad_(False), tokenizer, readout)


def tokenize(model: LanguageModel, texts: Sequence[str], prompt: str | None, length: int) -> Tokens:
    """Texts in their prompt, as at most ``length`` tokens each.

    What is too long loses the end of its text; a causal model's prompt stays whole, so that its last token is the one
    before the answer.

    Args:
        model: whose tokenizer.
        texts: N of them.
        prompt: with `PLACE` where the text goes; None for `PROMPT`, and for an encoder for the text alone.
        length: tokens.

    Raises:
        ArgumentError: the prompt has no place for the text, or does not leave eight tokens for it.
    """
    prompt = (PROMPT if model.causal else PLACE) if prompt is None else prompt
    before, place, after = prompt.partition(PLACE)
    if not place:
        raise ArgumentError(f"expected {PLACE} in the prompt where the text goes, got {prompt!r}")
    tokenizer = model.tokenizer
    if model.causal:
        head, tail = (_plain(tokenizer, part) if part else [] for part in (before, after))
        room = length - len(head) - len(tail)
        if room < 8:
            raise ArgumentError(f"the prompt {prompt!r} leaves {room} of {length} tokens for the text; raise --tokens")
        rows = [head + _plain(tokenizer, text)[:room] + tail for text in texts]
    else:
        whole = [before + text + after for text in texts]
        rows = tokenizer(whole, truncation=True, max_length=length)["input_ids"]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return Tokens(ids, mask)


def class_tokens(model: LanguageModel, classes: Sequence[str], words: Mapping[str, str] | None = None) -> list[int]:
    """The token that stands for each class: the first of its word, which is its name unless ``words`` has another.

    Raises:
        ArgumentError: a word is for no class, or two classes begin with the same token.
    """
    words = words or {}
    if unknown := set(words) - set(classes):
        raise ArgumentError(
            f"--word names classes that do not exist: {sorted(unknown)}; there are {', '.join(classes)}"
        )
    firsts = [_plain(model.tokenizer, " " + words.get(name, name))[0] for name in classes]
    for i, first in enumerate(firsts):
        if first in firsts[:i]:
            pair = classes[firsts.index(first)], classes[i]
            raise ArgumentError(
                f"the words of the classes {pair[0]} and {pair[1]} begin with the same token: give one of them another "
                f"word, --word {pair[1]}=WORD"
            )
    return firsts


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _blocks(base: nn.Module) -> nn.ModuleList:
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ArgumentError(f"{type(base).__name__} has no list of blocks (torch.nn.ModuleList) to split at")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError("fine-tuning needs transformers: pip install 'jetplane[cli,finetune]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
