"""LSTM, GRU and plain recurrent layers, unrolled: torch has them as operators without a decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..jets import Space
from .registry import register

Cell = Callable[[Any, Sequence[Any], Sequence[Any]], tuple[Any, ...]]  # (input part, state, weights) -> state


def _lstm_cell(gates: Any, state: Sequence[Any], w: Sequence[Any]) -> tuple[Any, ...]:
    h, c = state
    i, f, g, o = torch.add(gates, F.linear(h, w[1], w[3])).chunk(4, -1)
    c = torch.add(torch.mul(torch.sigmoid(f), c), torch.mul(torch.sigmoid(i), torch.tanh(g)))
    h = torch.mul(torch.sigmoid(o), torch.tanh(c))
    return (h if w[4] is None else F.linear(h, w[4])), c


def _gru_cell(gates: Any, state: Sequence[Any], w: Sequence[Any]) -> tuple[Any, ...]:
    (h,) = state
    ri, zi, ni = gates.chunk(3, -1)
    rh, zh, nh = F.linear(h, w[1], w[3]).chunk(3, -1)
    z = torch.sigmoid(torch.add(zi, zh))
    n = torch.tanh(torch.add(ni, torch.mul(torch.sigmoid(torch.add(ri, rh)), nh)))
    return (torch.add(n, torch.mul(z, torch.sub(h, n))),)


def _plain_cell(activation: Callable[[Any], Any]) -> Cell:
    def cell(gates: Any, state: Sequence[Any], w: Sequence[Any]) -> tuple[Any, ...]:
        return (activation(torch.add(gates, F.linear(state[0], w[1], w[3]))),)

    return cell


CELLS: dict[str, Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _plain_cell(torch.tanh),
    "rnn_relu": _plain_cell(torch.relu),
}


def _weights(flat: Sequence[Any], biases: bool, projected: bool) -> list[list[Any]]:
    """The flat list of torch as [w_ih, w_hh, b_ih, b_hh, w_hr] for each layer and direction."""
    per = 2 + 2 * biases + projected
    out = []
    for n in range(0, len(flat), per):
        w = list(flat[n : n + per])
        tail = w.pop() if projected else None
        out.append([*w, *([] if biases else [None, None]), tail])
    return out


def _run(
    cell: Cell, x: Any, initial: Sequence[Any], w: Sequence[Any], sizes: Sequence[int], reverse: bool
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction. ``x`` is packed: rows of all steps, ``sizes[t]`` of them at step t."""
    gates = F.linear(x, w[0], w[2]).split(list(sizes), 0)
    outputs: list[Any] = [None] * len(sizes)
    if reverse:
        state = tuple(s[: sizes[-1]] for s in initial)
        for t in range(len(sizes) - 1, -1, -1):
            if sizes[t] > state[0].shape[0]:  # sequences that end here join
                state = tuple(torch.cat([s, i[s.shape[0] : sizes[t]]]) for s, i in zip(state, initial, strict=True))
            state = cell(gates[t], state, w)
            outputs[t] = state[0]
        return torch.cat(outputs), state
    state = tuple(s[: sizes[0]] for s in initial)
    ended: list[tuple[Any, ...]] = []
    for t, size in enumerate(sizes):
        if size < state[0].shape[0]:  # sequences that ended before this step leave
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        state = cell(gates[t], state, w)
        outputs[t] = state[0]
    parts = [state, *reversed(ended)]
    final = tuple(torch.cat([p[n] for p in parts]) if len(parts) > 1 else state[n] for n in range(len(state)))
    return torch.cat(outputs), final


def _layers(
    kind: str,
    x: Any,
    hx: Sequence[Any],
    flat: Sequence[Any],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    sizes: Sequence[int],
) -> tuple[Any, list[Any]]:
    ways = 2 if bidirectional else 1
    per = 2 + 2 * biases
    weights = _weights(flat, biases, len(flat) == (per + 1) * layers * ways)
    finals: list[tuple[Any, ...]] = []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            n = layer * ways + way
            out, final = _run(CELLS[kind], x, [h[n] for h in hx], weights[n], sizes, way == 1)
            outputs.append(out)
            finals.append(final)
        x = torch.cat(outputs, -1) if ways > 1 else outputs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x, [torch.stack([f[n] for f in finals]) for n in range(len(hx))]


def _enter(kind: str) -> None:
    states = 2 if kind == "lstm" else 1

    @register(f"{kind}.input")
    def _(
        space: Space,
        x: Any,
        hx: Any,
        flat: Sequence[Any],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        x = x.transpose(0, 1) if batch_first else x
        steps, batch = x.shape[:2]
        hx = list(hx) if states == 2 else [hx]
        out, final = _layers(
            kind,
            x.reshape(steps * batch, -1),
            hx,
            flat,
            biases,
            layers,
            dropout,
            train,
            bidirectional,
            [batch] * steps,
        )
        out = out.reshape(steps, batch, -1)
        return (out.transpose(0, 1) if batch_first else out), *final

    @register(f"{kind}.data")
    def _(
        space: Space,
        data: Any,
        batch_sizes: Tensor,
        hx: Any,
        flat: Sequence[Any],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        hx = list(hx) if states == 2 else [hx]
        sizes = [int(n) for n in batch_sizes.tolist()]
        out, final = _layers(kind, data, hx, flat, biases, layers, dropout, train, bidirectional, sizes)
        return out, *final


for _kind in CELLS:
    _enter(_kind)


@register("lstm_cell")
def _(space: Space, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _lstm_cell(F.linear(x, w_ih, b_ih), hx, [w_ih, w_hh, b_ih, b_hh, None])


@register("gru_cell")
def _(space: Space, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _gru_cell(F.linear(x, w_ih, b_ih), [hx], [w_ih, w_hh, b_ih, b_hh, None])[0]


@register("rnn_tanh_cell")
def _(space: Space, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return CELLS["rnn_tanh"](F.linear(x, w_ih, b_ih), [hx], [w_ih, w_hh, b_ih, b_hh, None])[0]


@register("rnn_relu_cell")
def _(space: Space, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return CELLS["rnn_relu"](F.linear(x, w_ih, b_ih), [hx], [w_ih, w_hh, b_ih, b_hh, None])[0]
