"""Distributions of tangents: convergence of forward gradient descent on a quadratic, compared with theory.

The loss is ``f = sum_i a_i theta_i^2 / 2``. One step with rate eta and momentum beta,

    theta+ = theta - eta mean_k (g . v_k) v_k + beta (theta - theta-),    g_i = a_i theta_i,

takes the second moments ``m_i = E theta_i^2``, ``c_i = E theta_i theta-_i`` and ``p_i = E theta-_i^2`` to

    m_i+ = (1 + beta)^2 m_i - 2 beta (1 + beta) c_i + beta^2 p_i - 2 eta a_i ((1 + beta) m_i - beta c_i)
           + eta^2 ((1 - 1/K) a_i^2 m_i + (q sum_j a_j^2 m_j + (kappa - q) a_i^2 m_i) / K)
    c_i+ = (1 + beta - eta a_i) m_i - beta c_i,    p_i+ = m_i

with ``kappa = E v_i^4`` and ``q = E v_i^2 v_j^2``. This recursion is linear, and exact for every law here. Its spectral
radius is the asymptotic factor of the expected loss in one step. Without momentum, at ``eta = step_scale / L``, it is
at most ``1 - mu / (L (d + kappa - 1))`` for one direction, with equality where all a_i are one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt

from ... import optim
from ...directions import KURTOSIS, step_scale
from ..config import Budget
from .experiment import Experiment, Progress, WorkItem
from .figures import band, style, tidy
from .results import Results, markdown, pm

SIZES = {  # parameters, iterations, seeds
    "smoke": (10, 60, 3),
    "hour": (30, 300, 40),
    "paper": (30, 300, 200),
}
CONDITION = 10.0  # condition number of the second quadratic
MOMENTA = (0.0, 0.5, 0.9)
LAWS = tuple(sorted(KURTOSIS, key=lambda law: (KURTOSIS[law], law)))


def curvatures(kind: str, size: int) -> np.ndarray:
    """The a_i (size,): all one ("round"), or log-spaced from 1 / CONDITION to 1."""
    return np.ones(size) if kind == "round" else np.geomspace(1 / CONDITION, 1, size)


def recursion(law: str, a: np.ndarray, rate: float, momentum: float = 0.0, k: int = 1) -> np.ndarray:
    """The matrix (3 D, 3 D) that maps the moments (m, c, p) to those after one step."""
    d = len(a)
    off = d / (d + 2) if law == "sphere" else 1.0
    fourth = 3 * d / (d + 2) if law == "sphere" else KURTOSIS[law]
    one, zero, along = np.eye(d), np.zeros((d, d)), np.diag(a)
    noise = (1 - 1 / k) * along**2 + (off * np.tile(a**2, (d, 1)) + (fourth - off) * along**2) / k
    m = (1 + momentum) ** 2 * one - 2 * rate * (1 + momentum) * along + rate**2 * noise
    c = -2 * momentum * (1 + momentum) * one + 2 * rate * momentum * along
    return np.block([
        [m, c, momentum**2 * one],
        [(1 + momentum) * one - rate * along, -momentum * one, zero],
        [one, zero, zero],
    ])  # fmt: skip


def predicted(law: str, a: np.ndarray, rate: float, momentum: float, steps: int) -> np.ndarray:
    """The expected losses (steps + 1,) from theta = theta- = (1, ..., 1)."""
    step, moments, losses = recursion(law, a, rate, momentum), np.ones(3 * len(a)), []
    for _ in range(steps + 1):
        losses.append(a @ moments[: len(a)] / 2)
        moments = step @ moments
    return np.array(losses)


def spectral_radius(matrix: np.ndarray) -> float:
    """The largest absolute value of an eigenvalue."""
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def best_rate(law: str, a: np.ndarray, momentum: float) -> float:
    """Of 80 rates around that of `step_scale`, the one whose recursion has the smallest spectral radius."""
    rates = step_scale(law, len(a)) * np.geomspace(0.02, 10, 80)
    return float(min(rates, key=lambda rate: spectral_radius(recursion(law, a, rate, momentum))))


def descend(law: str, a: np.ndarray, rate: float, momentum: float, steps: int, seed: int) -> list[float]:
    """Losses (steps + 1,) of `jetplane.optim.FGD` from theta = (1, ..., 1)."""
    scales = torch.tensor(a)
    theta = torch.ones(len(a), dtype=torch.float64, requires_grad=True)
    opt = optim.FGD([theta], lr=rate, momentum=momentum, law=law, seed=seed)

    def loss() -> torch.Tensor:
        return (scales * theta.square()).sum() / 2

    losses = [opt.step(loss).item() for _ in range(steps)]
    return [*losses, loss().item()]


class Laws(Experiment):
    """Forward gradient descent with each law at the rate of `step_scale`, and with momentum at the best rate.

    Args:
        budget: decides the number of seeds.
    """

    def __init__(self, budget: Budget) -> None:
        size, steps, seeds = SIZES[budget]
        runs = [
            {"kind": kind, "law": law, "momentum": 0.0, "rate": step_scale(law, size)}
            for kind in ("round", "stretched")
            for law in LAWS
        ]
        stretched = curvatures("stretched", size)
        runs += [
            {"kind": "ball", "law": "rademacher", "momentum": m, "rate": best_rate("rademacher", stretched, m)}
            for m in MOMENTA
        ]
        self.config = {
            "experiment": "laws", "budget": budget, "size": size, "steps": steps, "seeds": seeds, "runs": runs,
        }  # fmt: skip

    def items(self, results: Results) -> list[WorkItem]:
        """A work item for each law, momentum and quadratic, with all seeds."""
        torch.set_num_threads(1)  # on vectors this small, threads cost more than they give
        return [
            WorkItem(_name(run), 1.0, lambda progress, run=run: self._work(run, progress))
            for run in self.config["runs"]
        ]

    def _work(self, run: dict[str, Any], progress: Progress) -> list[list[float]]:
        a, seeds, losses = self._curvatures(run), self.config["seeds"], []
        for seed in range(seeds):
            losses.append(descend(run["law"], a, run["rate"], run["momentum"], self.config["steps"], seed))
            progress((seed + 1) / seeds, losses[-1][-1])
        return losses

    def _curvatures(self, run: dict[str, Any]) -> np.ndarray:
        return curvatures("round" if run["kind"] == "round" else "stretched", self.config["size"])

    def measured(self, results: Results, run: dict[str, Any]) -> tuple[list[float], float]:
        """Factor of the mean loss in a step (jackknife values, one for each seed), and that of the expected loss."""
        losses = np.array(results.read(_name(run)))[:, -1]
        a, steps = self._curvatures(run), self.config["steps"]
        first = a.sum() / 2
        left_out = (losses.sum() - losses) / (len(losses) - 1)
        whole = (losses.mean() / first) ** (1 / steps)
        values = len(losses) * whole - (len(losses) - 1) * (left_out / first) ** (1 / steps)
        expected = predicted(run["law"], a, run["rate"], run["momentum"], steps)[-1]
        return values.tolist(), float((expected / first) ** (1 / steps))

    def report(self, results: Results) -> None:
        """Plot losses over iterations and their exact expectation, measured factors and those of theory."""
        groups = {k: [r for r in self.config["runs"] if r["kind"] == k] for k in ("round", "stretched", "ball")}
        figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
        size = self.config["size"]
        figure.suptitle(
            f"Forward gradient descent on a quadratic of {size} parameters, one direction a step", fontsize=13
        )
        titles = {
            "round": "all curvatures 1, rate of the rule",
            "stretched": f"curvatures {1 / CONDITION:g} to 1, rate of the rule",
            "ball": f"heavy ball, signs, curvatures {1 / CONDITION:g} to 1, best rate",
        }
        for axes, (kind, runs) in zip(panels.flat, groups.items(), strict=False):
            for n, run in enumerate(runs):
                losses = np.array(results.read(_name(run)))
                x = np.arange(losses.shape[1])
                name = run["law"] if kind != "ball" else f"momentum {run['momentum']:g}"
                line: dict[str, Any] = style(n) | {"linestyle": "-"}
                band(axes, x, losses, label=name, **line)
                exact = predicted(run["law"], self._curvatures(run), run["rate"], run["momentum"], len(x) - 1)
                axes.plot(x, exact, color=line["color"], linestyle=(0, (2, 2)), linewidth=1.2)
            axes.set_yscale("log")
            axes.plot([], [], color="#555555", linestyle=(0, (2, 2)), linewidth=1.2, label="expected")
            tidy(axes, titles[kind], "iterations", "mean loss")
            axes.legend(frameon=False, fontsize=9)
        rows = self._rates(results, panels[1, 1], groups)
        results.figure("laws", figure)
        results.page(
            "Laws of the tangents",
            [
                "Factor by which the mean loss shrinks in a step, over all steps (jackknife over "
                f"{self.config['seeds']} seeds, standard error), beside that of the expected loss by the exact "
                "recursion of second moments, and the bound 1 - μ / (L (d + κ₄ - 1)) of the step rule. "
                f"Budget {self.config['budget']}, everything else in `configuration.json`.",
                markdown(rows),
                "![laws](laws.png)",
            ],
        )

    def _rates(self, results: Results, axes: Any, groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
        rows = []
        for n, (kind, runs) in enumerate(groups.items()):
            for run in runs:
                values, expected = self.measured(results, run)
                a = self._curvatures(run)
                bound = 1 - a.min() * step_scale(run["law"], len(a)) if kind != "ball" else None
                rows.append({
                    "law": run["law"], "curvatures": f"{a.min():g} to {a.max():g}", "momentum": f"{run['momentum']:g}",
                    "rate": f"{run['rate']:.4f}", "measured": pm(values, 5), "expected": f"{expected:.5f}",
                    "bound": "-" if bound is None else f"{bound:.5f}",
                })  # fmt: skip
            if kind == "ball":
                continue
            place = np.arange(len(runs)) + (n - 0.5) * 0.24
            measured = [self.measured(results, run) for run in runs]
            means = np.array([np.mean(values) for values, _ in measured])
            errors = np.array([np.std(values, ddof=1) / len(values) ** 0.5 for values, _ in measured])
            colour = style(n)["color"]
            name = "all 1" if kind == "round" else f"{1 / CONDITION:g} to 1"
            axes.errorbar(
                place,
                1 - means,
                errors,
                fmt="o",
                color=colour,
                markersize=5,
                capsize=3,
                label=f"curvatures {name}: measured",
            )
            axes.plot(place, [1 - e for _, e in measured], "_", color="black", markersize=16, markeredgewidth=1.6)
        axes.plot([], [], "_", color="black", markersize=12, markeredgewidth=1.6, label="expected")
        axes.set_xticks(
            range(len(LAWS)), [f"{law}\nκ₄ = {1.0 if law == 'sphere' else KURTOSIS[law]:g}" for law in LAWS]
        )
        tidy(axes, "relative decrease of the loss in a step", "", "1 - factor of a step")
        axes.tick_params(axis="x", labelsize=8.5)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        return rows


def _name(run: dict[str, Any]) -> str:
    return f"{run['kind']}-{run['law']}-{run['momentum']:g}"
