"""Other projects' ways to evaluate a plane. None is needed; each is named by an option or variable.

Every peer gets what suits it: its own layers, its preferred layout of weights, tangents prepared outside
the timed part.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from .problems import EMBEDDING, HEADS, INPUTS, LAYERS, SEQUENCE, VOCABULARY, WIDTH, Problem
from .ways import Result, Run, Way


def pairs(k: int) -> list[tuple[int, int]]:
    """Directions i <= j of each entry of the upper triangle."""
    return [(i, j) for i in range(k) for j in range(i, k)]


def symmetric(k: int, values: Tensor) -> Tensor:
    """The matrix with this upper triangle."""
    out = values.new_zeros(k, k)
    rows, columns = torch.tensor(pairs(k)).T
    out[rows, columns] = values
    out[columns, rows] = values
    return out


# --- the paper's own code --------------------------------------------------------------------


def _fomoh_modules() -> tuple[Any, Any]:
    source = os.environ.get("FOMOH_SRC")
    if not source:
        raise RuntimeError("FOMOH_SRC does not name the paper's code")
    sys.path.insert(0, os.path.join(source, "src"))
    return importlib.import_module("fomoh.nn"), importlib.import_module("fomoh.layers")


def _transposed(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and name not in ("token.weight", "position")  # its layers keep (in, out)


def _fomoh_gpt(nn: Any, layers: Any, problem: Problem) -> Any:
    """That project has no transformer: this one is put together from its tensor type."""
    names = list(problem.params)
    mask: Tensor = problem.model.mask  # pyright: ignore[reportAssignmentType]
    size = EMBEDDING // HEADS

    class Stack(nn.Model):
        def __call__(self, x: Any, v1: list[Tensor], v2: list[Tensor]) -> Any:
            p = dict(zip(names, self.convert_params_to_htorch(v1, v2), strict=True))
            tokens = x.real
            n = len(tokens)

            def affine(h: Any, name: str) -> Any:
                y = h.matmul(p[name + ".weight"])
                return y + p[name + ".bias"] if name + ".bias" in p else y

            def norm(h: Any, name: str) -> Any:
                return layers.layer_norm(h, p[name + ".weight"], p[name + ".bias"])

            h = p["token.weight"][tokens] + p["position"]
            for i in range(LAYERS):
                block = f"blocks.{i}."
                qkv = affine(norm(h, block + "norm1"), block + "attention.qkv")
                qkv = qkv.reshape(n, SEQUENCE, 3, HEADS, size)
                query, key, value = (qkv[:, :, s].transpose(1, 2) for s in range(3))
                scores = query.matmul(key.transpose(2, 3)) * (1 / math.sqrt(size)) + mask
                mixed = scores.softmax(-1).matmul(value).transpose(1, 2).reshape(n, SEQUENCE, EMBEDDING)
                h = h + affine(mixed, block + "attention.out")
                u = affine(norm(h, block + "norm2"), block + "up")
                gate = (math.sqrt(2 / math.pi) * (u + 0.044715 * (u * u * u))).tanh() + 1.0
                h = h + affine(u * gate * 0.5, block + "down")
            return affine(norm(h, "norm"), "head").reshape(n * SEQUENCE, VOCABULARY)

    return Stack()


def _fomoh(problem: Problem, vectorized: bool) -> Run:
    nn, layers = _fomoh_modules()
    if problem.name == "logreg":
        model = nn.LogisticRegressionModel(INPUTS, 10)
    elif problem.name == "mlp":
        model = nn.DenseModel([INPUTS, WIDTH, WIDTH, 10])
    elif problem.name == "cnn":
        model = nn.CNNModel()
    elif vectorized:
        raise NotImplementedError("the batched form is not put together for this model")
    else:
        model = _fomoh_gpt(nn, layers, problem)
    own_names = list(model.named_params) or [n.replace(".", "_") for n in problem.params]
    tangents: list[Tensor] = []
    for own, (name, p) in zip(own_names, problem.params.items(), strict=True):
        value, t = p.detach(), problem.tangents[name]
        if _transposed(name, value):
            value, t = value.t().contiguous(), t.mT.contiguous()
        model.add_param(own, value)
        tangents.append(t)
    # Its logistic regression ends in log-probabilities, its other models in logits.
    probabilities = problem.name == "logreg"
    order = pairs(problem.k)
    diagonal = [n for n, (i, j) in enumerate(order) if i == j]

    def evaluated(x: Any, y: Any, v1: list[Tensor], v2: list[Tensor]) -> Any:
        out = model(x, v1, v2)
        return nn.nll_loss(out if probabilities else out.logsoftmax(-1), y)

    def one_by_one() -> Result:
        x, y = nn.htorch(problem.x), nn.htorch(problem.y)
        losses = [evaluated(x, y, [t[i] for t in tangents], [t[j] for t in tangents]) for i, j in order]
        slope = torch.stack([losses[n].eps1 for n in diagonal])
        curvature = torch.stack([loss.eps1eps2 for loss in losses])
        return losses[0].real, slope, symmetric(problem.k, curvature)

    def together() -> Result:
        rows, columns = torch.tensor(order).T
        x, y = nn.htorch(problem.x[None]), nn.htorch(problem.y[None])
        loss = evaluated(x, y, [t[rows] for t in tangents], [t[columns] for t in tangents])
        return loss.real[0], loss.eps1[diagonal], symmetric(problem.k, loss.eps1eps2)

    return together if vectorized else one_by_one


# --- jet-for-pytorch -------------------------------------------------------------------------


def _jet_for_pytorch(problem: Problem) -> Run:
    if os.environ.get("JET_PATH"):
        sys.path.insert(0, os.environ["JET_PATH"])
    jet = importlib.import_module("jet").jet
    names = list(problem.params)
    values = tuple(p.detach() for p in problem.params.values())

    def loss(*params: Tensor) -> Tensor:
        out = functional_call(problem.model, dict(zip(names, params, strict=True)), (problem.x,))
        return F.cross_entropy(out, problem.y)

    taylor = jet(loss, values)
    zeros = tuple(torch.zeros_like(p) for p in values)
    k, order = problem.k, pairs(problem.k)
    rows, columns = torch.tensor(order).T
    off = rows != columns
    along = vmap(lambda *v: taylor(*zip(values, v, zeros, strict=True)))

    def run() -> Result:  # jets go along one direction: mixed terms by polarisation
        with torch.no_grad():
            directions = [t[rows] + t[columns] * off.view(-1, *[1] * (t.dim() - 1)) for t in tangents]
            value, first, second = along(*directions)
            own = second[~off]
            second = torch.where(off, (second - own[rows] - own[columns]) / 2, second)
            return value[0], first[~off], symmetric(k, second)

    tangents = list(problem.tangents.values())
    return run


PEERS: dict[str, Way] = {
    "fomoh": lambda problem: _fomoh(problem, False),
    "fomoh batched": lambda problem: _fomoh(problem, True),
    "jet-for-pytorch": _jet_for_pytorch,
}
JAX_PEERS = ("jax jvp", "jax jvp unrolled", "jax jet")  # in jax_peer.py, run by a Python of its own
