"""The command line: ``jetplane train``, ``compare``, ``demo`` and ``fetch``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import ArgumentError, CheckpointError, JetplaneError, LostRankError, RunFolderError
from .experiments import data as datasets
from .experiments import demo as demonstration
from .experiments import report, together
from .experiments.config import Config, DataName, DescentName, MethodName, ModelName, ScheduleName
from .experiments.train import Run

app = typer.Typer(
    help="Train PyTorch models with forward passes only.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
console = Console()


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("[bold]{task.description:<24}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"),
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
    k: Annotated[int | None, typer.Option(help="Directions per step [default: 1, or 3 for fomoh-kd].")] = None,
    lr: Annotated[float | None, typer.Option(help="Rate [default: one that suits model and method].")] = None,
    schedule: Annotated[ScheduleName, typer.Option(help="Schedule of the rate.")] = "constant",
    descent: Annotated[DescentName, typer.Option(help="How fomoh-kd solves its plane.")] = "saddle-free",
    batch_size: Annotated[int, typer.Option(help="Examples of one step.")] = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights, batches and directions.")] = 0,
    clip: Annotated[float | None, typer.Option(help="Largest step, 0: any [default: 1 for fomoh, fomoh-kd].")] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of MNIST's files [or JETPLANE_MNIST].")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/<what it is>].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder; other options are its own.")] = None,
) -> None:
    """Train a model and keep everything about the run in a folder. With torchrun, on several processes."""
    together.start()
    console.quiet = together.rank() > 0
    folder = out or Path("runs") / f"{data}-{model}-{method}-{seed}"
    if together.restarted() and resume is None and together.by_first(lambda: (folder / "config.json").exists()):
        resume = folder  # a process was lost, and torchrun started all of them again
    if resume is not None:
        run = Run.resume(resume, data_dir)
        _refuse_changes(context, run.config, resume)
    else:
        config = Config(
            data=data, model=model, method=method, k=k, lr=lr, schedule=schedule, descent=descent,
            batch_size=batch_size, epochs=epochs, seed=seed, clip=clip, weight_decay=weight_decay, device=device,
        )  # fmt: skip
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


def _refuse_changes(context: typer.Context, config: Config, folder: Path) -> None:
    """A resumed run keeps its configuration: an option that says otherwise is an error, not ignored."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if hasattr(config, name) and source is not None and source.name == "COMMANDLINE":
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
    out: Annotated[Path | None, typer.Option(help="Folder of the runs [default: runs/demo-<time>].")] = None,
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
def fetch(
    name: Annotated[str, typer.Argument(help="mnist")],
    folder: Annotated[Path, typer.Argument(help="Where to put the files.")],
) -> None:
    """Download a data set and check it."""
    if name != "mnist":
        raise ArgumentError(f"only mnist can be fetched, got {name!r}")
    datasets.fetch_mnist(folder)
    console.print(f"MNIST is in {folder}: use it with --data mnist --data-dir {folder}", soft_wrap=True)


def _show(runs: list[report.Finished]) -> None:
    rows = report.table(runs)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("model", "method") else "right", no_wrap=True)
    for n, row in enumerate(rows):
        last = n + 1 == len(rows) or rows[n + 1]["model"] != row["model"]
        shown.add_row(*row.values(), end_section=last)
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
        together.end()
