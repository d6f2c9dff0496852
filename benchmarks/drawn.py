r"""Where drawn directions come from: forward gradients beside the gradient, and the loss after equal seconds.

    python -m benchmarks.drawn --data-dir FOLDER --out docs/results/drawn.json

On the MLP 784-128-10 and MNIST. Cosines are those of a forward gradient of ten directions, and of activity perturbation
of eight passes, with the gradient of one batch, for each layer's weights: means over batches and draws, at weights that
Adam has trained for some steps. Training has the same initial weights and batches for all, and processor time of one
thread; FGD has the best of its rates, by the loss on the last training batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import jetplane as jp
from jetplane.directions import AbstractDirections
from jetplane.evaluation.inputs import in_span
from jetplane.gradients import ActivityPerturbation, Batch
from jetplane.subspace.sources import Averages, Drawn, PreviousStep

from .measuring import machine
from .tasks import TASKS, Task

STEPS = 200  # of Adam, before cosines are taken
BATCHES, DRAWS, K = 4, 8, 10
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of FGD
LAST = 20  # training batches by whose loss a rate is chosen

Directed = Callable[[int, Callable[[], Tensor], Sequence[Tensor]], AbstractDirections]


def _drawn(**settings: Any) -> Directed:
    def of(step: int, closure: Callable[[], Tensor], params: Sequence[Tensor]) -> AbstractDirections:
        directions = jp.Directions(K, **settings)
        directions.step = step
        return directions

    return of


def _spanned(rank: int) -> Directed:
    return lambda step, closure, params: in_span(K, "gaussian", 0, step, closure, params, range(len(params)), rank)


KINDS: dict[str, Directed] = {
    "Gaussian": _drawn(),
    "Rademacher": _drawn(law="rademacher"),
    "rank one": _drawn(tangents="rank-one"),
    "inputs (AGZO), rank 1": _spanned(1),
    "inputs (AGZO), rank 8": _spanned(8),
    "inputs (AGZO), rank 64": _spanned(64),
}


def forward_gradient(kind: str, step: int, closure: Callable[[], Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """``mean_k (F_k v_k)`` of ten directions."""
    directions = KINDS[kind](step, closure, params)
    plane = jp.evaluate(closure, params, directions, "none")
    return [directions.combine(i, p, plane.slope / K) for i, p in enumerate(params)]


def perturbed(model: nn.Module, step: int, closure: Callable[[], Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The estimate by activity perturbation, without what feedback has learned."""
    batch = Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=step)
    estimator = ActivityPerturbation()
    state = estimator.prepare(batch, {})
    with torch.no_grad():
        return list(estimator.estimate(batch, estimator.measure(batch, state), state).gradient)


def cosines(task: Task) -> dict[str, dict[str, float]]:
    """By estimates and layers."""
    torch.manual_seed(0)
    model = task.model()
    batches = list(islice(task.batches(task.batch, torch.Generator().manual_seed(0)), STEPS + BATCHES))
    adam = torch.optim.Adam(model.parameters())
    for b in batches[:STEPS]:
        adam.zero_grad()
        task.loss(model, b).backward()
        adam.step()
    params, found = list(model.parameters()), {}
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    for kind in (*KINDS, "activity perturbation"):
        rows: dict[str, list[float]] = {name: [] for name in (*names, "all")}
        for n, b in enumerate(batches[STEPS:]):
            exact = torch.autograd.grad(task.loss(model, b), params)
            for draw in range(DRAWS):
                closure, step = functools.partial(task.loss, model, b), n * DRAWS + draw
                if kind in KINDS:
                    g = forward_gradient(kind, step, closure, params)
                else:
                    g = perturbed(model, step, closure, params)
                for (name, _), one, e in zip(model.named_parameters(), g, exact, strict=True):
                    if name in rows:
                        rows[name].append(cosine_similarity(one.flatten(), e.flatten(), 0).item())
                flat = [torch.cat([t.flatten() for t in every]) for every in (g, exact)]
                rows["all"].append(cosine_similarity(*flat, 0).item())
        found[kind] = {name: round(fmean(values), 4) for name, values in rows.items()}
    return found


Maker = Callable[[nn.Module], torch.optim.Optimizer]


def fgd(rate: float, **settings: Any) -> Maker:
    """Forward gradient descent along ten directions."""
    return lambda model: jp.optim.FGD(model.parameters(), rate, K, **settings)


def planes(drawn: Drawn) -> Maker:
    """PlaneSearch by drawn directions alone."""
    return lambda m: jp.optim.PlaneSearch(m.parameters(), subspace=[drawn, Averages(), PreviousStep()])


def trained(task: Task, make: Maker, seconds: float) -> dict[str, float]:
    """Scores after so much processor time of steps; NaN where a run diverges."""
    torch.manual_seed(0)
    model = task.model()
    opt, batches = make(model), task.batches(task.batch, torch.Generator().manual_seed(0))
    spent, steps, losses = 0.0, 0, []
    while spent < seconds:
        b = next(batches)
        begin = time.process_time()
        try:
            losses.append(float(opt.step(functools.partial(task.loss, model, b))))  # type: ignore[arg-type]
        except jp.errors.NonFiniteError:
            return {"train loss": float("inf"), "test loss": float("inf"), "accuracy": 0.0, "steps": steps}
        spent, steps = spent + time.process_time() - begin, steps + 1
    with torch.no_grad():
        loss, accuracy = task.score(model)
    return {"train loss": fmean(losses[-LAST:]), "test loss": loss, "accuracy": accuracy, "steps": steps}


def training(task: Task, seconds: float) -> dict[str, dict[str, float]]:
    """By methods."""
    found: dict[str, dict[str, float]] = {}
    tangents = {
        "Gaussian": {}, "Rademacher": {"law": "rademacher"}, "rank one": {"tangents": "rank-one"},
        "inputs (AGZO), rank 1": {"tangents": "inputs"},
    }  # fmt: skip
    for name, settings in tangents.items():
        rates = {rate: trained(task, fgd(rate, **settings), seconds) for rate in RATES}
        best = min(rates, key=lambda rate: rates[rate]["train loss"])
        found[f"FGD, {name}"] = {"rate": best} | rates[best]
    drawn = {
        "rank one": Drawn(), "inputs (AGZO), rank 1": Drawn(tangents="inputs"),
        "inputs (AGZO), rank 8": Drawn(tangents="inputs", rank=8),
    }  # fmt: skip
    for name, source in drawn.items():
        found[f"PlaneSearch, 64 drawn, {name}"] = trained(task, planes(source), seconds)
    found["PlaneSearch, activity perturbation"] = trained(
        task, lambda m: jp.optim.PlaneSearch(m.parameters(), m), seconds
    )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's files, or JETPLANE_MNIST")
    parser.add_argument("--seconds", type=float, default=8.0, help="of processor time, each run")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS["mlp"](args.data_dir)
    held = {
        "command": f"python -m benchmarks.drawn --data-dir FOLDER --seconds {args.seconds:g}",
        "machine": machine(1) + ", processor time",
        "cosines": cosines(task),
        "training": training(task, args.seconds),
    }
    for part in ("cosines", "training"):
        for name, row in held[part].items():  # type: ignore[union-attr]
            print(f"| {name} | " + " | ".join(f"{k} {v:.4g}" for k, v in row.items()) + " |")
    if args.out:
        args.out.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
