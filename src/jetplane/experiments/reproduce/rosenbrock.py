"""Rosenbrock's function: paths in 2 dimensions, losses by K in 10 and 100 dimensions.

    f(x) = sum_i (1 - x_i)^2 + 100 (x_{i+1} - x_i^2)^2,    minimum 0 at (1, ..., 1)

Starting points are standard normal, one for each seed and the same for every method, as in the paper's scripts.
FoMoH-KD takes the paper's plain Newton step in its plane, which goes uphill where the plane is indefinite; in 100
dimensions it is compared with the saddle-free step (eigenvalues by absolute value).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from ...errors import NonFiniteError, RescueWarning, SingularPlaneError
from ..config import Budget
from ..methods import METHODS, Settings
from .experiment import Experiment, Progress, WorkItem
from .figures import band, style, tidy
from .results import Results, markdown, pm

FLOOR = 1e-32  # losses below it, which are rounding, count as it: 0 has no logarithm

# dimensions of the function -> (iterations, seeds, dimensions of the planes)
SIZES: dict[str, dict[int, tuple[int, int, list[int]]]] = {
    "smoke": {2: (30, 2, [2]), 10: (15, 2, [2, 5, 10]), 100: (4, 2, [2, 20, 100])},
    "hour": {2: (1000, 10, [2]), 10: (100, 10, list(range(2, 11))), 100: (100, 10, [2, 5, 10, 20, 50, 80, 90, 100])},
    "paper": {2: (1000, 10, [2]), 10: (100, 10, list(range(2, 11))), 100: (100, 10, [2, 5, *range(10, 101, 10)])},
}
FGD_RATE = METHODS["fgd"].rates["rosenbrock"]


def rosenbrock(x: Tensor) -> Tensor:
    """The function of one point x (D,), D at least 2."""
    return ((1 - x[:-1]).square() + 100 * (x[1:] - x[:-1].square()).square()).sum()


def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (D,) and Hessian (D, D) by their formulas."""
    a, b = x[:-1], x[1:]
    gap = b - a.square()
    gradient, hessian = torch.zeros_like(x), x.new_zeros(len(x), len(x))
    gradient[:-1] += -2 * (1 - a) - 400 * a * gap
    gradient[1:] += 200 * gap
    diagonal = hessian.diagonal()
    diagonal[:-1] += 2 - 400 * gap + 800 * a.square()
    diagonal[1:] += 200
    hessian.diagonal(1).copy_(-400 * a)
    hessian.diagonal(-1).copy_(-400 * a)
    return gradient, hessian


def start(dimensions: int, seed: int) -> Tensor:
    """The starting point of a seed."""
    return torch.randn(dimensions, generator=torch.Generator().manual_seed(seed)).double()


def newton_path(x: Tensor) -> Iterator[Tensor]:
    """Newton's iterates with the analytic Hessian."""
    while True:
        gradient, hessian = derivatives(x)
        x = x - torch.linalg.solve(hessian, gradient)
        yield x


def path(x: Tensor, name: str, settings: Settings) -> Iterator[Tensor]:
    """The iterates of a method of the registry."""
    x = x.clone().requires_grad_()
    opt = METHODS[name].build([x], None, settings)
    while True:
        opt.step(lambda: rosenbrock(x))  # type: ignore[arg-type,return-value]
        yield x.detach().clone()


def iterates(dimensions: int, method: str, seed: int, iterations: int, progress: Progress) -> dict[str, Any]:
    """The losses of one method from one starting point, that of the start included; in 2 dimensions also the points.

    Args:
        dimensions: dimensions of the function.
        method: "newton", "fgd", "fomoh", or "fomoh-K" and "saddle-free-K" for planes of K dimensions.
        seed: seed of the start and of the directions.
        iterations: number of iterations. A path that becomes infinite or NaN ends there, and its last finite loss is
            repeated.
        progress: called after every tenth iteration with the fraction done and the loss.
    """
    first = start(dimensions, seed)
    if method == "newton":
        steps = newton_path(first)
    elif method == "fgd":
        steps = path(first, "fgd", Settings(lr=FGD_RATE, k=1, seed=seed))
    elif method == "fomoh":
        steps = path(first, "fomoh", Settings(lr=1.0, k=1, eps=0.0, seed=seed))
    else:
        descent = "saddle-free" if method.startswith("saddle") else "newton"
        steps = path(first, "fomoh-kd", Settings(lr=1.0, k=planes(method), descent=descent, seed=seed))
    points, ended = [first], False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RescueWarning)  # uphill steps are part of the paper's method
        for n in range(1, iterations + 1):
            try:
                points.append(next(steps) if not ended else points[-1])
            except (
                NonFiniteError,
                SingularPlaneError,
                RuntimeError,
            ):  # the last: torch's, singular Hessian
                ended = True
                points.append(points[-1])
            if n % 10 == 0:
                progress(n / iterations, rosenbrock(points[-1]).item())
    metrics: dict[str, Any] = {"loss": [rosenbrock(x).item() for x in points], "ended": ended}
    return metrics | ({"points": [x.tolist() for x in points]} if dimensions == 2 else {})


class Rosenbrock(Experiment):
    """FGD, FoMoH, FoMoH-KD and Newton on Rosenbrock's function.

    Args:
        budget: "hour" takes minutes; "paper" has more values of K in 100 dimensions.
    """

    def __init__(self, budget: Budget) -> None:
        sizes = {
            str(d): {"iterations": t, "seeds": list(range(s)), "planes": ks} for d, (t, s, ks) in SIZES[budget].items()
        }
        self.config = {"experiment": "rosenbrock", "budget": budget, "fgd_rate": FGD_RATE, "sizes": sizes}

    def methods(self, dimensions: int) -> list[str]:
        """The methods that run in a number of dimensions."""
        ks = self.config["sizes"][str(dimensions)]["planes"]
        lines = ["fgd", "fomoh"] if dimensions == 2 else []
        safe = [f"saddle-free-{k}" for k in ks] if dimensions == 100 else []
        return [*lines, *(f"fomoh-{k}" for k in ks), *safe, "newton"]

    def items(self, results: Results) -> list[WorkItem]:
        """A work item for each dimension, method and seed."""
        torch.set_num_threads(1)  # on vectors this small, threads cost more than they give
        items = []
        for d, size in self.config["sizes"].items():
            for method in self.methods(int(d)):
                k = planes(method)
                for seed in size["seeds"]:
                    t = size["iterations"]
                    items.append(
                        WorkItem(
                            f"{d}d/{method}-{seed}",
                            t * (0.1 if method == "newton" else 1 + k * k / 400),
                            lambda progress, d=int(d), m=method, s=seed, t=t: iterates(d, m, s, t, progress),
                        )
                    )
        return items

    def losses(self, results: Results, dimensions: int, method: str) -> np.ndarray:
        """Losses (seeds, iterations + 1), at least `FLOOR`."""
        seeds = self.config["sizes"][str(dimensions)]["seeds"]
        runs = [results.read(f"{dimensions}d/{method}-{seed}")["loss"] for seed in seeds]
        return np.maximum(np.array(runs), FLOOR)

    def report(self, results: Results) -> None:
        """Plot paths over contour lines and losses over iterations; write the tables."""
        sections = [
            "Base-10 logarithms of the loss after the last iteration: mean over starts with its standard error, and "
            "the median; a loss below 1e-32 counts as that. FoMoH-KD takes the paper's plain Newton step in its plane, "
            "uphill where the plane is indefinite; *saddle-free* takes eigenvalues by absolute value. "
            f"Budget {self.config['budget']}, everything else in `configuration.json`."
        ]
        for dimensions in (2, 10, 100):
            rows = []
            for method in self.methods(dimensions):
                end = np.log10(self.losses(results, dimensions, method)[:, -1])
                rows.append(
                    {"method": label(method), "log10 loss": pm(end.tolist(), 2), "median": f"{np.median(end):.2f}"}
                )
            size = self.config["sizes"][str(dimensions)]
            sections += [f"## {dimensions} dimensions, {size['iterations']} iterations", markdown(rows)]
            if dimensions in size["planes"]:
                sections.append(self._agreement_text(results, dimensions))
            name = "paths-2d" if dimensions == 2 else f"loss-{dimensions}d"
            sections.append(f"![{dimensions} dimensions]({name}.png)")
        self._paths(results)
        for dimensions in (10, 100):
            self._curves(results, dimensions)
        results.page("Rosenbrock's function", sections)

    def agreement(self, results: Results, dimensions: int) -> list[tuple[int, float]]:
        """For how many iterations FoMoH-KD with K = D and Newton's method agree.

        Returns:
            For each start the number of iterations in which their losses differ by at most a thousandth (losses below
            1e-20 count as equal), and Newton's largest loss until then.
        """
        found = []
        ours, newton = (self.losses(results, dimensions, m) for m in (f"fomoh-{dimensions}", "newton"))
        for a, b in zip(ours, newton, strict=True):
            apart = (np.abs(a - b) > 1e-3 * b) & (np.maximum(a, b) > 1e-20)
            last = int(apart.argmax()) - 1 if apart.any() else len(a) - 1
            found.append((last, float(b[: last + 1].max())))
        return found

    def _agreement_text(self, results: Results, dimensions: int) -> str:
        iterations = self.config["sizes"][str(dimensions)]["iterations"]
        found = self.agreement(results, dimensions)
        parted = [(n, loss) for n, loss in found if n < iterations]
        text = (
            f"FoMoH-{dimensions}D and Newton: losses within a thousandth of each other for all iterations in "
            f"{len(found) - len(parted)} of {len(found)} starts"
        )
        if parted:  # after a step far away, rounding decides the next iterates
            steps, losses = zip(*parted, strict=True)
            text += (
                f"; in the others for {min(steps)} to {max(steps)}, until Newton's loss had grown to at least "
                f"{min(losses):.0e} and rounding decided"
            )
        if dimensions == 2:
            text += f"; points of their paths at most {self.distance(results):.1e} apart"
        return text + "."

    def distance(self, results: Results) -> float:
        """The largest distance between the iterates of FoMoH-2D and of Newton in 2 dimensions, over all starts."""
        seeds = self.config["sizes"]["2"]["seeds"]
        pairs = [[np.array(results.read(f"2d/{m}-{s}")["points"]) for m in ("fomoh-2", "newton")] for s in seeds]
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    def _paths(self, results: Results) -> None:
        seeds = self.config["sizes"]["2"]["seeds"]
        figure, panels = plt.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True, layout="constrained")
        figure.suptitle("Rosenbrock's function in 2 dimensions: paths from the same starts", fontsize=13)
        for axes, method in zip(panels.flat, self.methods(2), strict=True):
            _contours(axes)
            for seed in seeds:
                points = np.array(results.read(f"2d/{method}-{seed}")["points"])
                axes.plot(*points.T, "-", color=style(seed)["color"], linewidth=1.1, alpha=0.9)
                axes.plot(*points[0], "o", color=style(seed)["color"], markersize=5, zorder=3)
            axes.plot(1, 1, "*", color="black", markersize=13, zorder=4)
            end = np.log10(self.losses(results, 2, method)[:, -1])
            last = "0" if (end <= np.log10(FLOOR)).all() else f"10^({pm(end.tolist(), 1)})"
            tidy(axes, f"{label(method)}: last loss {last}", "", "")
            axes.grid(False)
            axes.set_xlim(-2.6, 2.6)
            axes.set_ylim(-2.6, 4.4)
        for axes in panels[1]:
            axes.set_xlabel("first coordinate")
        for axes in panels[:, 0]:
            axes.set_ylabel("second coordinate")
        results.figure("paths-2d", figure)

    def _curves(self, results: Results, dimensions: int) -> None:
        """Plot losses over iterations, a panel for each descent, and their medians over K."""
        size = self.config["sizes"][str(dimensions)]
        kinds = ["fomoh", "saddle-free"] if dimensions == 100 else ["fomoh"]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.93, len(size["planes"])))
        figure, panels = plt.subplots(1, len(kinds) + 1, figsize=(5.5 * len(kinds) + 6.5, 5), layout="constrained")
        figure.suptitle(
            f"Rosenbrock's function in {dimensions} dimensions, {len(size['seeds'])} starts: "
            "geometric mean with standard error, and median",
            fontsize=13,
        )
        for axes, kind in zip(panels, kinds, strict=False):
            for k, colour in zip(size["planes"], colours, strict=True):
                losses = self.losses(results, dimensions, f"{kind}-{k}")
                band(axes, range(losses.shape[1]), losses, log=True, label=f"K = {k}", color=colour)
            losses = self.losses(results, dimensions, "newton")
            dashed = {"color": "black", "linestyle": (0, (4, 3)), "zorder": 3}
            band(axes, range(losses.shape[1]), losses, log=True, label="Newton", **dashed)
            axes.set_yscale("log")
            tidy(axes, "FoMoH-KD" + (", saddle-free" if kind != "fomoh" else ""), "iterations", "loss")
        panels[-2].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for n, part in enumerate((0.1, 0.3, 1.0)):
            t = max(1, round(part * size["iterations"]))
            for kind, marker in zip(kinds, "os", strict=False):
                medians = [np.median(self.losses(results, dimensions, f"{kind}-{k}")[:, t]) for k in size["planes"]]
                name = f"{t} iterations" + (", saddle-free" if kind != "fomoh" else "")
                line = style(n) | {"linestyle": "-" if kind == "fomoh" else ":"}
                panels[-1].plot(size["planes"], medians, marker=marker, markersize=5, label=name, **line)
        panels[-1].set_yscale("log")
        tidy(panels[-1], "median over starts", "K, dimensions of the plane", "loss")
        panels[-1].legend(frameon=False, fontsize=9)
        results.figure(f"loss-{dimensions}d", figure)


def planes(method: str) -> int:
    """The dimensions of a method's planes; 1 for methods that step along single directions."""
    last = method.rpartition("-")[2]
    return int(last) if last.isdigit() else 1


def label(method: str) -> str:
    """A method as legends and tables name it."""
    if method == "newton":
        return "Newton"
    if method in METHODS:
        return METHODS[method].label()
    return METHODS["fomoh-kd"].label(planes(method)) + (", saddle-free" if method.startswith("saddle") else "")


def _contours(axes: Axes) -> None:
    x, y = np.meshgrid(np.linspace(-2.6, 2.6, 400), np.linspace(-2.6, 4.4, 400))
    z = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    axes.contourf(x, y, np.log10(z + 1e-6), levels=np.arange(-2, 4.6, 0.5), cmap="Greys", alpha=0.35, extend="both")
    axes.contour(x, y, np.log10(z + 1e-6), levels=np.arange(-2, 4.6, 0.5), colors="#999999", linewidths=0.5)
