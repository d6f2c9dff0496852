"""The part of a language model that trains: its last blocks and a read-out of classes, on states of the frozen part."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .language_model import LanguageModel


class Entrance(nn.Module):
    """Stands in the place of the frozen blocks: whatever comes in, the given states go out."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.states: Tensor | None = None

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None]:
        """The states."""
        return (self.states,) if self.as_tuple else self.states  # type: ignore[return-value]


class TextClassifier(nn.Module):
    """The last blocks of a language model, what pools their output, and a linear layer with an output for each class.

        logits = W pool(blocks(states)) + b

    A causal model is read at its last token; W are the rows of its own read-out for the classes' tokens, and there is
    no b: its logits are those of the classes' words. An encoder is read by the mean over its tokens; W and b are new,
    and zero at first.

    Attributes:
        base: the transformer without its frozen blocks and its table of embeddings.
        blocks: those that are left.
        prefix: vectors in front of the states, as an embedding of their places; None without.
        head: W and b.
    """

    def __init__(
        self, model: LanguageModel, blocks: int, classes: int, tokens: list[int] | None, as_tuple: bool
    ) -> None:
        """Copy the last blocks of a model.

        Args:
            model: it stays as it is.
            blocks: how many of its last blocks are kept.
            classes: number of classes.
            tokens: of each class, for a causal model.
            as_tuple: whether its blocks return tuples.

        Raises:
            ArgumentError: there are not as many blocks.
        """
        super().__init__()
        self.prefix: nn.Embedding | None = None
        frozen = model.frozen(blocks)
        table = model.base.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(table, nn.Embedding)
        width = table.embedding_dim
        # What is copied leaves out the frozen blocks and the table: they are the most of a model.
        left_out = {id(block): nn.Identity() for block in model.blocks[:frozen]}
        self.base = copy.deepcopy(model.base, {id(table): nn.Embedding(1, width), **left_out})  # type: ignore[arg-type]
        self.base.requires_grad_(False)
        name = next(name for name, module in model.base.named_modules() if module is model.blocks)
        every = self.base.get_submodule(name)
        assert isinstance(every, nn.ModuleList)
        self._entrance = Entrance(as_tuple)
        self.blocks = every[frozen:]
        kept = nn.ModuleList([self._entrance, *self.blocks])
        setattr(self.base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], kept)
        self.base.config.num_hidden_layers = len(kept)  # type: ignore[union-attr]
        self.causal = model.causal
        self.head = nn.Linear(width, classes, bias=not model.causal).requires_grad_(False)
        with torch.no_grad():
            if model.readout is not None:
                assert tokens is not None
                self.head.weight.copy_(model.readout[tokens])
            else:
                self.head.weight.zero_()
                self.head.bias.zero_()
        self.eval()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that move."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, classes), from states (N, T, width) that enter the first of the blocks, and their mask (N, T)."""
        place = states
        if self.prefix is not None:
            m = self.prefix.num_embeddings
            numbers = torch.arange(m, device=states.device).expand(len(states), m)
            place, mask = F.pad(states, (0, 0, m, 0)), F.pad(mask, (m, 0), value=1)
            states = torch.cat([self.prefix(numbers), states], 1)
        self._entrance.states = states
        try:
            out = self.base(inputs_embeds=place, attention_mask=mask).last_hidden_state
        finally:
            self._entrance.states = None
        if self.causal:
            last = mask.sum(1) - 1
            return self.head(out[torch.arange(len(out), device=out.device), last])
        kept = mask.unsqueeze(2).to(out.dtype)
        return self.head((out * kept).sum(1) / kept.sum(1))
