"""Which parameters of a classifier train: adapters, a prefix, whole blocks, norms or the read-out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .classifier import TextClassifier
from .options import PREFIX, RANK, TARGETS, ParametersName


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter of low rank: ``y = W x + b + 2 B A x`` (Hu et al., arXiv 2106.09685).

    A is (rank, in), drawn as torch draws linear layers; B is (out, rank), zero at first. The scale is alpha / rank with
    alpha = 2 rank, as in MeZO's experiments.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        bound = layer.in_features**-0.5
        with torch.no_grad():
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layer(x) + 2 * self.up(self.down(x))


def choose(
    model: TextClassifier, name: ParametersName, seed: int, rank: int = RANK, prefix: int = PREFIX,
    targets: Sequence[str] = TARGETS,
) -> None:  # fmt: skip
    """Let some parameters of a classifier train, add those that are new, and freeze all others.

    An encoder's read-out, which is new, always trains; a causal model's is that of its words and trains with "head"
    alone.

    Args:
        model: is changed.
        name: "lora": adapters of the projections that attention reads, in all blocks that are left. "prefix": vectors
            in front of the states that enter the first of these blocks. "last-blocks": the blocks and the norm after
            them. "norms": the norms in and after them. "head": the read-out alone.
        seed: of what is drawn.
        rank: of adapters.
        prefix: number of vectors.
        targets: names of the layers that get adapters.

    Raises:
        ArgumentError: a number is not positive, or no layer has one of the names.
    """
    if rank < 1 or prefix < 1:
        raise ArgumentError(f"rank and prefix must be at least 1, got {rank} and {prefix}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    if name == "lora":
        _add_adapters(model, rank, targets, generator)
    elif name == "prefix":
        width = model.head.in_features
        model.prefix = nn.Embedding(prefix, width)
        with torch.no_grad():
            model.prefix.weight.normal_(std=0.02, generator=generator)
    elif name == "last-blocks":
        model.blocks.requires_grad_(True)
        for module in _last_norms(model):
            module.requires_grad_(True)
    elif name == "norms":
        for module in [*_norms(model.blocks), *_last_norms(model)]:
            module.requires_grad_(True)
    if name == "head" or not model.causal:
        model.head.requires_grad_(True)


def _add_adapters(model: TextClassifier, rank: int, targets: Sequence[str], generator: torch.Generator) -> None:
    found = [
        (parent, name, layer)
        for parent in model.blocks.modules()
        for name, layer in parent.named_children()
        if name in targets and isinstance(layer, nn.Linear)
    ]
    if not found:
        linear = sorted({n.rpartition(".")[2] for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)})
        raise ArgumentError(
            f"no linear layer of the blocks is named {', '.join(targets)}; the linear layers are "
            f"{', '.join(linear) or 'none'}: name some with --target"
        )
    for parent, name, layer in found:
        setattr(parent, name, LoRALinear(layer, rank, generator))


def _norms(module: nn.Module) -> list[nn.Module]:
    return [
        m for m in module.modules() if "Norm" in type(m).__name__ and any(True for _ in m.parameters(recurse=False))
    ]


def _last_norms(model: TextClassifier) -> list[nn.Module]:
    """The norms that read what the blocks put out: those that are children of the transformer, besides embeddings."""
    return [m for m in model.base.children() if "Norm" in type(m).__name__]
