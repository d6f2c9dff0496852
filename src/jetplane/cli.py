"""The command line: ``jetplane train``, ``compare``, ``report``, ``sweep``, ``demo``, ``reproduce`` and ``fetch``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import optuna
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import ArgumentError, CheckpointError, JetplaneError, LostRankError, RunFolderError
from .experiments import data as datasets
from .experiments import demo as demonstration
from .experiments import page, report, sweep, together
from .experiments.config import Config, DataName, DescentName, MethodName, ModelName, ScheduleName
from .experiments.reproduce import Budget, ExperimentName, carry_out, experiment
from .experiments.train import Run

DATA_HELP = "Folder of the data [or JETPLANE_MNIST, JETPLANE_CIFAR10]."

app = typer.Typer(
    help="Train PyTorch models with forward passes only.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode="markdown",  # which leaves [brackets] alone
)  # fmt: skip
console = Console()
# Options of several commands.
Schedule = Annotated[ScheduleName, typer.Option(help="Schedule of the rate.")]
Descent = Annotated[DescentName, typer.Option(help="How fomoh-kd solves its plane.")]
BatchSize = Annotated[int, typer.Option(help="Examples of one step.")]
WeightDecay = Annotated[float, typer.Option(help="Decoupled weight decay.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DataDir = Annotated[Path | None, typer.Option(help=DATA_HELP)]
ConfigFile = typer.Option("--config", help="Settings from this JSON file, such as a sweep's best.json; options win.")


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("[bold]{task.description:<30}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("loss {task.fields[loss]:>8}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


@app.command()
def train(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="The data set.")] = "digits",
    model: Annotated[ModelName, typer.Option(help="The model.")] = "logreg",
    method: Annotated[MethodName, typer.Option(help="The optimizer.")] = "fomoh-kd",
    k: Annotated[
        int | None, typer.Option(help="Directions drawn per step [default: 1; fomoh-kd 3, plane-search 0].")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Rate [default: one that suits model and method].")] = None,
    schedule: Schedule = "constant",
    descent: Descent = "saddle-free",
    batch_size: BatchSize = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights, batches and directions.")] = 0,
    clip: Annotated[float | None, typer.Option(help="Largest step, 0: any [default: 1 for fomoh, fomoh-kd].")] = None,
    weight_decay: WeightDecay = 0.0,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/DATA-MODEL-METHOD-SEED].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder; other options are its own.")] = None,
    configuration: Annotated[Path | None, ConfigFile] = None,
) -> None:
    """Train a model and keep everything about the run in a folder. With torchrun, on several processes."""
    if resume is not None and configuration is not None:
        raise ArgumentError("a resumed run has its configuration; expected --resume or --config, got both")
    together.start()
    console.quiet = together.rank() > 0
    config = _configured(context, configuration)
    folder = out or Path("runs") / f"{config.data}-{config.model}-{config.method}-{config.seed}"
    if together.restarted() and resume is None and together.by_first(lambda: (folder / "config.json").exists()):
        resume = folder  # a process was lost, and torchrun started all of them again
    if resume is not None:
        run = Run.resume(resume, data_dir)
        _refuse_changes(context, run.config, resume)
    else:
        run = Run(config, folder, data_dir=data_dir)
    with _progress() as progress:
        task = progress.add_task(run.config.label, total=None, loss="")
        try:
            result = run.train(
                lambda done, total, loss: progress.update(task, completed=done, total=total, loss=f"{loss:.4f}")
            )
        except KeyboardInterrupt:
            progress.stop()
            then = f"go on with: jetplane train --resume {run.folder}"
            console.print(f"stopped after {run.epoch} of {run.config.epochs} epochs; {then}", soft_wrap=True)
            raise typer.Exit(130) from None
    if together.rank() > 0:
        return
    if not run.rows():
        raise ArgumentError(f"the run diverged in its first epoch ({result.get('message')}); try a smaller --lr")
    finished = report.Finished.read(run.folder)
    picture = run.folder / "curves.png"
    report.draw([finished], picture, f"{run.config.label}: {run.config.model} on {run.config.data}")
    _show([finished])
    if result["status"] == "diverged":
        console.print(f"[yellow]diverged[/]: {result['message']}; try a smaller --lr")
    if "ranks" in result:
        console.print(f"{result['ranks']} processes, {result['bytes_per_step']:,} bytes a step from each")
    console.print(f"run folder  {run.folder}\ncurves      {picture}", soft_wrap=True)
    if result["status"] == "diverged":
        raise typer.Exit(2)


def _configured(context: typer.Context, file: Path | None) -> Config:
    """The configuration that options name: all of them, or those that were given, over those of a file."""
    options = {field.name: context.params[field.name] for field in fields(Config) if field.name in context.params}
    return Config(**options) if file is None else Config.of(asdict(Config.load(file)) | _given(context))


def _given(context: typer.Context) -> dict[str, Any]:
    """The settings of a configuration that stand on the command line."""
    sources = {field.name: context.get_parameter_source(field.name) for field in fields(Config)}
    return {
        n: context.params[n] for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"
    }


def _refuse_changes(context: typer.Context, config: Config, folder: Path) -> None:
    """A resumed run keeps its configuration: an option that says otherwise is an error, not ignored."""
    for name, value in _given(context).items():
        if value != getattr(config, name):
            was = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise CheckpointError(f"{folder}: a run with {was} cannot go on with {value}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("compare.png"),
) -> None:
    """Draw runs beside each other, over epochs and over seconds."""
    runs = [report.Finished.read(folder) for folder in folders]
    report.draw(runs, out, "Test loss")
    _show(runs)
    console.print(f"curves  {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the runs [default: runs/demo-TIME].")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and directions.")] = 0,
) -> None:
    """Train logistic regression and a CNN on real digits with every method, and compare."""
    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} exists; name another folder with --out")
    folders = []
    with _progress() as progress:
        for config in demonstration.plan(seed):
            task = progress.add_task(f"{config.model}, {config.label}", total=None, loss="")
            folders.append(folder / f"{config.model}-{config.method}")
            demonstration.run_apart(
                config,
                folders[-1],
                lambda done, total, loss, task=task: progress.update(
                    task, completed=done, total=total, loss=f"{loss:.4f}"
                ),
            )
    runs = [report.Finished.read(f) for f in folders]
    picture = folder / "curves.png"
    report.draw(runs, picture, "Forward passes only, and backprop beside them: handwritten digits, 8 × 8")
    _show(runs)
    console.print(f"curves  {picture.resolve()}", soft_wrap=True)


@app.command()
def reproduce(
    name: Annotated[ExperimentName, typer.Argument(help="The experiment.")],
    budget: Annotated[Budget, typer.Option(help="Seconds, an hour on 2 cores, or all of the paper.")] = "hour",
    out: Annotated[Path | None, typer.Option(help="Results folder [default: results/NAME-BUDGET].")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    epochs: Annotated[int | None, typer.Option(help="Of logreg, cnn and cifar, instead of the budget's.")] = None,
) -> None:
    """Run an experiment of the paper; run it again to go on where it stopped."""
    folder = out or Path("results") / f"{name}-{budget}"
    with _progress() as progress:
        task = progress.add_task(name, total=None, loss="")

        def observe(done: float, total: float, unit: str, loss: float) -> None:
            shown = "" if loss != loss else f"{loss:.2e}"
            progress.update(task, completed=done, total=total, description=unit.replace("/", " "), loss=shown)

        try:
            carry_out(experiment(name, budget, data_dir, device, epochs), folder, observe)
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped; go on with the same command: what {folder} holds is kept", soft_wrap=True)
            raise typer.Exit(130) from None
    console.print(Markdown((folder / "results.md").read_text()))
    console.print(f"results  {folder}", soft_wrap=True)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="mnist or cifar10")],
    folder: Annotated[Path, typer.Argument(help="Where to put the files.")],
) -> None:
    """Download a data set and check it."""
    fetches = {"mnist": datasets.fetch_mnist, "cifar10": datasets.fetch_cifar10}
    if name not in fetches:
        raise ArgumentError(f"only {' and '.join(fetches)} can be fetched, got {name!r}")
    fetches[name](folder)
    console.print(f"{name} is in {folder}: use it with --data {name} --data-dir {folder}", soft_wrap=True)


@app.command("report")
def write_report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one HTML page of runs: interactive curves, results, configuration and environment."""
    runs = page.find(folders)
    page.write(runs, out)
    console.print(f"report of {len(runs)} runs  {out}", soft_wrap=True)


@app.command("sweep")
def run_sweep(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="The data set.")] = "digits",
    model: Annotated[ModelName, typer.Option(help="The model.")] = "logreg",
    method: Annotated[MethodName, typer.Option(help="The optimizer.")] = "fomoh-kd",
    lr_range: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest rate [default: 30 times around its default].")
    ] = None,
    k_range: Annotated[tuple[int, int] | None, typer.Option(help="Vary the directions per step too.")] = None,
    clip_range: Annotated[tuple[float, float] | None, typer.Option(help="Vary the largest step too.")] = None,
    k: Annotated[int | None, typer.Option(help="Directions per step, if they do not vary.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest step, if it does not vary; 0: any.")] = None,
    schedule: Schedule = "constant",
    descent: Descent = "saddle-free",
    batch_size: BatchSize = 128,
    weight_decay: WeightDecay = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training data, of a trial that is not pruned.")] = 10,
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier calls included.")] = 20,
    seed: Annotated[int, typer.Option(help="Of runs and proposals.")] = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Sweep folder [default: runs/sweep-DATA-MODEL-METHOD].")] = None,
    storage: Annotated[str | None, typer.Option(help="URL for Optuna [default: a SQLite file in the folder].")] = None,
    configuration: Annotated[Path | None, ConfigFile] = None,
) -> None:
    """Look for the rate, and k and clip if asked for, of a method. The same command again goes on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = _configured(context, configuration)
    folder = out or Path("runs") / f"sweep-{config.data}-{config.model}-{config.method}"
    study = sweep.Sweep(sweep.Space(config, lr_range, k_range, clip_range), folder, storage, data_dir)
    with _progress() as progress:
        task = progress.add_task("", total=trials, loss="")

        def observe(done: int, tried: Config, step: int, steps: int, loss: float) -> None:
            what = f"trial {done + 1} of {trials}, rate {tried.lr:.3g}"
            progress.update(task, description=what, completed=done + step / steps, loss=f"{loss:.4f}")

        try:
            study.run(trials, observe)
        except KeyboardInterrupt:
            progress.stop()
            over = len(study.outcomes())
            console.print(f"stopped after {over} of {trials} trials; the same command goes on", soft_wrap=True)
            raise typer.Exit(130) from None
        progress.update(task, completed=trials)
    study.write()
    _print(study.table(), left=("status",))
    best = study.best()
    if best is None:
        raise ArgumentError(f"{folder}: no trial finished, all diverged; try a lower --lr-range in another folder")
    console.print(f"figure  {folder / 'sweep.png'}\ntable   {folder / 'table.md'}", soft_wrap=True)
    console.print(f"best    jetplane train --config {folder / 'best.json'}", soft_wrap=True)


def _show(runs: list[report.Finished]) -> None:
    rows = report.table(runs)
    ends = [n for n, row in enumerate(rows[1:]) if row["model"] != rows[n]["model"]]
    _print(rows, left=("model", "method"), ends=ends)


def _print(rows: list[dict[str, str]], left: Sequence[str], ends: Sequence[int] = ()) -> None:
    """A table; columns but those named are aligned to the right, and some rows end a section."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for n, row in enumerate(rows):
        shown.add_row(*row.values(), end_section=n in ends)
    console.print(shown)


def main() -> None:
    """Entry point: errors that a user can mend are one line, and exit code 2."""
    try:
        app()
    except JetplaneError as error:
        rank = together.rank()  # all ranks raise the same, unless the first of them is gone
        if rank == 0 or isinstance(error, LostRankError):
            of = f" of rank {rank}" if together.group() is not None else ""
            Console(stderr=True).print(f"[red bold]error{of}[/] {error}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; go on with jetplane train --resume FOLDER", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        together.end(sys.exc_info()[1])
