"""The command line: ``jetplane train``, ``compare``, ``report``, ``sweep``, ``demo``, ``finetune``, ``adapt``...

Each command imports what it needs when it runs. Help texts and option errors therefore do not import torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .errors import ArgumentError, CheckpointError, JetplaneError, LostRankError, RunFolderError
from .experiments import demo as demonstration
from .experiments.config import (
    SWEEP_EPOCHS,
    SWEEP_SPREAD,
    SWEEP_TRIALS,
    Budget,
    Config,
    DataName,
    ExperimentName,
    ModelName,
    ScheduleName,
)
from .experiments.finetune import options as finetuning
from .experiments.methods import METHODS, DescentName, MethodName

if TYPE_CHECKING:
    from .experiments.report import Finished

DATA_HELP = "Data folder [or set JETPLANE_MNIST or JETPLANE_CIFAR10]."
K_HELP = ", ".join(f"{name} {method.k}" for name, method in METHODS.items() if method.takes_k)
CLIP_HELP = ", ".join(f"{name} {method.clip:g}" for name, method in METHODS.items() if method.clip)

app = typer.Typer(
    help="Train PyTorch models with forward passes only.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode="markdown",  # rich's own markup would take [brackets] for tags
)  # fmt: skip
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"jetplane {importlib.metadata.version('jetplane')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# Options of several commands. Their defaults are those of `Config`.
Schedule = Annotated[ScheduleName, typer.Option(help="Learning rate schedule.")]
Descent = Annotated[DescentName, typer.Option(help="How fomoh-kd solves for the step in its plane.")]
BatchSize = Annotated[int, typer.Option(help="Examples per step.")]
WeightDecay = Annotated[float, typer.Option(help="Decoupled weight decay.")]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, …")]
DataDir = Annotated[Path | None, typer.Option(help=DATA_HELP)]
ConfigFile = typer.Option("--config", help="JSON file of settings, such as best.json of a sweep; options override it.")


SECONDS = 5.0  # between lines of progress


class _Progress(Progress):
    """Bars in a terminal; elsewhere a line at the start of each task and every few seconds."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._said = -math.inf

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        self._said = -math.inf
        return super().add_task(description, *args, **kwargs)

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        if self.disable and time.monotonic() >= self._said + SECONDS:
            self._said, task = time.monotonic(), self._tasks[task_id]
            loss = f", loss {task.fields['loss']}" if task.fields.get("loss") else ""
            self.console.print(f"{task.description}: {task.percentage:.0f} %{loss}", highlight=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("[bold]{task.description:<30}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("loss {task.fields[loss]:>8}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with _Progress(*columns, console=console) as progress:
        yield progress


@app.command()
def train(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Data set.")] = Config.data,
    model: Annotated[ModelName, typer.Option(help="Model.")] = Config.model,
    method: Annotated[MethodName, typer.Option(help="Optimizer.")] = Config.method,
    k: Annotated[int | None, typer.Option(help=f"Directions drawn per step [default: {K_HELP}].")] = Config.k,
    lr: Annotated[float | None, typer.Option(help="Learning rate [default: by data, model and method].")] = Config.lr,
    schedule: Schedule = Config.schedule,
    descent: Descent = Config.descent,
    batch_size: BatchSize = Config.batch_size,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = Config.epochs,
    seed: Annotated[int, typer.Option(help="Seed for weights, batches and directions.")] = Config.seed,
    clip: Annotated[
        float | None, typer.Option(help=f"Largest norm of a step; 0 for no limit [default: {CLIP_HELP}, others 0].")
    ] = Config.clip,
    weight_decay: WeightDecay = Config.weight_decay,
    device: Device = Config.device,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/DATA-MODEL-METHOD-SEED].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to continue with its own settings.")] = None,
    configuration: Annotated[Path | None, ConfigFile] = None,
) -> None:
    """Train a model and save the run in a folder. Start it with torchrun to train on several ranks."""
    from .experiments import launch, report
    from .experiments.train import Run

    if resume is not None and configuration is not None:
        raise ArgumentError("expected --resume or --config, got both: a resumed run keeps its own configuration")
    launch.start()
    console.quiet = launch.rank() > 0
    config = _configured(context, configuration)
    folder = out or Path("runs") / f"{config.data}-{config.model}-{config.method}-{config.seed}"
    if launch.restarted() and resume is None and launch.on_first_rank(lambda: (folder / "config.json").exists()):
        resume = folder  # torchrun has restarted the ranks after one was lost
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
            then = f"continue with: jetplane train --resume {run.folder}"
            console.print(f"stopped after {run.epoch} of {run.config.epochs} epochs; {then}", soft_wrap=True)
            raise typer.Exit(130) from None
    if launch.rank() > 0:
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
    """The configuration of the options; with a file, that of the file with the options that were given."""
    options = {field.name: context.params[field.name] for field in fields(Config) if field.name in context.params}
    return Config(**options) if file is None else Config.of(asdict(Config.load(file)) | _given(context))


def _given(context: typer.Context) -> dict[str, Any]:
    """The settings of a configuration that were given on the command line."""
    sources = {field.name: context.get_parameter_source(field.name) for field in fields(Config)}
    return {
        n: context.params[n] for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"
    }


def _refuse_changes(context: typer.Context, config: Config, folder: Path) -> None:
    """Raise an error if an option differs from the configuration of a resumed run.

    Raises:
        CheckpointError: an option differs.
    """
    for name, value in _given(context).items():
        if value != getattr(config, name):
            was = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise CheckpointError(f"{folder}: a run with {was} cannot continue with {value}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("compare.png"),
) -> None:
    """Plot several runs in one figure, against epochs and seconds. Runs that differ only in the seed share a curve."""
    from .experiments import report

    runs = [report.Finished.read(folder) for folder in folders]
    report.draw(runs, out, "Test loss")
    _show(runs)
    console.print(f"curves  {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the runs [default: runs/demo-TIME].")] = None,
    seed: Annotated[int, typer.Option(help="First seed for weights, batches and directions.")] = Config.seed,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = demonstration.SEEDS,
) -> None:
    """Train logistic regression and a CNN on handwritten digits with several methods, and compare them."""
    from .experiments import report

    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} exists; name another folder with --out")
    each = f"{seeds} seed{'s' if seeds > 1 else ''}"
    console.print(
        f"{len(demonstration.SHOWN)} methods on {len(demonstration.MODELS)} models, {each}, "
        f"{demonstration.EPOCHS} epochs: about {demonstration.MINUTES * seeds / demonstration.SEEDS:.1g} minutes"
    )
    folders: list[Path] = []
    with _progress() as progress:
        for configs in demonstration.plan(seed, seeds):
            task = progress.add_task(f"{configs[0].model}, {configs[0].label}", total=None, loss="")
            here = [folder / f"{config.model}-{config.method}-{config.seed}" for config in configs]
            demonstration.run_apart(
                configs,
                here,
                lambda done, total, loss, task=task: progress.update(
                    task, completed=done, total=total, loss=f"{loss:.4f}"
                ),
            )
            folders += here
    runs = [report.Finished.read(f) for f in folders]
    picture = folder / "curves.png"
    title = f"Forward passes only, and backprop beside them: handwritten digits, 8 × 8; {each}"
    report.draw(runs, picture, title)
    _show(runs)
    console.print(f"curves  {picture.resolve()}", soft_wrap=True)


@app.command()
def finetune(
    model: Annotated[Path, typer.Option(help="Folder of a transformers model, or a .gguf file.")],
    data: Annotated[Path, typer.Option(help="Labelled texts: .csv, .tsv, .tab, .jsonl, or one folder per class.")],
    parameters: Annotated[
        finetuning.ParametersName, typer.Option(help="Which parameters to train.")
    ] = finetuning.Settings.parameters,
    method: Annotated[list[str], typer.Option(help=finetuning.METHODS_HELP)] = finetuning.DEFAULT,
    seconds: Annotated[
        float, typer.Option(help="Seconds of training per method and seed.")
    ] = finetuning.Settings.seconds,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 1,
    trials: Annotated[
        int, typer.Option(help="Trials to search the rate of each other method; 0: published rates.", min=0)
    ] = 0,
    rate: Annotated[list[str] | None, typer.Option(help="METHOD=RATE, to replace a published rate.")] = None,
    blocks: Annotated[
        int, typer.Option(help="Number of last blocks that hold the trained parameters.")
    ] = finetuning.Source.blocks,
    batch: Annotated[int, typer.Option(help="Texts per step.")] = finetuning.Settings.batch,
    micro_batch: Annotated[
        int, typer.Option(help="Texts at a time, for jets and adam-checkpointed.")
    ] = finetuning.Settings.micro_batch,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters.")] = finetuning.Settings.rank,
    target: Annotated[list[str] | None, typer.Option(help=finetuning.TARGETS_HELP)] = None,
    prefix: Annotated[int, typer.Option(help="Number of prefix vectors.")] = finetuning.Settings.prefix,
    test_data: Annotated[Path | None, typer.Option(help="Test texts [default: a part of --data].")] = None,
    text_column: Annotated[str | None, typer.Option(help="Name of the text column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name of the class column.")] = None,
    train: Annotated[int, typer.Option(help="Number of training texts.")] = finetuning.Source.sizes[0],
    dev: Annotated[int, typer.Option(help="Texts that select weights and rates.")] = finetuning.Source.sizes[1],
    test: Annotated[int, typer.Option(help="Number of test texts.")] = finetuning.Source.sizes[2],
    prompt: Annotated[
        str | None, typer.Option(help="Prompt with {text} [default for causal models: '{text}\\nTopic:'].")
    ] = None,
    word: Annotated[list[str] | None, typer.Option(help="CLASS=WORD, the word a causal model predicts.")] = None,
    tokens: Annotated[int, typer.Option(help="Largest number of tokens, prompt included.")] = finetuning.Source.tokens,
    clock: Annotated[finetuning.Clock, typer.Option(help="Clock that measures --seconds.")] = finetuning.Settings.clock,
    cache: Annotated[Path, typer.Option(help="Folder for outputs of the frozen blocks.")] = finetuning.Source.cache,
    out: Annotated[Path | None, typer.Option(help="Result folder [default: runs/finetune-TIME].")] = None,
) -> None:
    """Fine-tune a language model on labelled texts, and compare methods with and without a backward pass."""
    from .experiments.finetune import command

    folder = out or Path("runs") / time.strftime("finetune-%Y%m%d-%H%M%S")
    words, rates = finetuning.pairs(word or [], "--word"), finetuning.pairs(rate or [], "--rate")
    source = finetuning.Source(
        model, data, test_data, text_column, label_column, (train, dev, test), prompt, words, tokens, blocks, cache
    )
    targets = tuple(target or finetuning.TARGETS)
    settings = finetuning.Settings(parameters, rank, prefix, targets, batch, micro_batch, seconds, clock=clock)
    work = finetuning.Comparison(source, settings, method, seeds, trials, finetuning.numbers(rates))
    with _progress() as progress:
        task = progress.add_task("", total=1.0, loss="")

        def observe(what: str, done: float, total: float, loss: float) -> None:
            shown = "" if loss != loss else f"{loss:.4f}"
            progress.update(task, description=what, completed=min(done, total), total=total, loss=shown)

        try:
            command.compare(work, folder, observe)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; with --out {folder} the same command goes on with the methods that are not done",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    _print(command.rows(folder), left=("method",))
    console.print(f"result  {folder / command.RESULT}", soft_wrap=True)


@app.command()
def reproduce(
    name: Annotated[ExperimentName, typer.Argument(help="Experiment.")],
    budget: Annotated[Budget, typer.Option(help="smoke: seconds; hour: an hour on 2 cores; paper: in full.")] = "hour",
    out: Annotated[Path | None, typer.Option(help="Results folder [default: results/NAME-BUDGET].")] = None,
    data_dir: DataDir = None,
    device: Device = Config.device,
    epochs: Annotated[int | None, typer.Option(help="Epochs for logreg, cnn, cifar [default: by budget].")] = None,
) -> None:
    """Run an experiment of the paper. Repeat the command to continue after an interruption."""
    from .experiments.reproduce import experiment, run_experiment

    folder = out or Path("results") / f"{name}-{budget}"
    with _progress() as progress:
        task = progress.add_task(name, total=None, loss="")

        def observe(done: float, total: float, item: str, loss: float) -> None:
            shown = "" if loss != loss else f"{loss:.2e}"
            progress.update(task, completed=done, total=total, description=item.replace("/", " "), loss=shown)

        try:
            run_experiment(experiment(name, budget, data_dir, device, epochs), folder, observe)
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped; repeat the command to continue from the results in {folder}", soft_wrap=True)
            raise typer.Exit(130) from None
    console.print(Markdown((folder / "results.md").read_text()))
    console.print(f"results  {folder}", soft_wrap=True)


@app.command()
def adapt(
    data: Annotated[
        Literal["fashion-mnist", "drawn"], typer.Option(help="Fashion-MNIST, or generated patterns that need no files.")
    ] = "fashion-mnist",
    model: Annotated[Literal["vit", "cnn", "both"], typer.Option(help="Model.")] = "both",
    examples: Annotated[int, typer.Option(help="Test images per corruption.", min=1)] = 192,
    seeds: Annotated[int, typer.Option(help="Number of seeds for images, corruptions and draws.", min=1)] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="Fashion-MNIST folder [or JETPLANE_FASHION_MNIST].")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder [default: runs/adapt-DATA].")] = None,
) -> None:
    """Train 8-bit models, corrupt their test images in fifteen ways, and compare methods of test-time adaptation."""
    from .experiments.adaptation import experiment

    folder = out or Path("runs") / f"adapt-{data}"
    folder.mkdir(parents=True, exist_ok=True)
    images = experiment.Images.fashion_mnist(data_dir) if data == "fashion-mnist" else experiment.Images.drawn()
    methods = experiment.available()
    found: dict[str, Any] = {}
    for name in experiment.TITLES:
        if model not in (name, "both"):
            continue
        console.print(f"{name}: training, or reading {folder / name}.pt", soft_wrap=True)
        trained = experiment.trained(name, images, folder, None if data == "fashion-mnist" else 10)
        setting = experiment.prepared(images, trained)
        runs = found[experiment.TITLES[name]] = []
        with _progress() as progress:
            task = progress.add_task(experiment.TITLES[name], total=seeds * len(experiment.CORRUPTIONS), loss="")
            for seed in range(seeds):
                observe = lambda said: progress.update(task, advance=1, description=said)  # noqa: E731, B023
                runs.append(experiment.run(images, setting, seed, examples, methods, observe=observe))
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    tables = [experiment.table(found), *(f"{name}\n\n{experiment.by_corruption(runs)}" for name, runs in found.items())]
    (folder / "results.md").write_text("\n\n".join(tables) + "\n")
    experiment.draw(found, folder / "adaptation.png")
    for part in tables:
        console.print(Markdown(part))
    if len(methods) < len(experiment.METHODS):
        console.print("FOA is left out because cma is not installed: pip install 'jetplane[adapt]'", markup=False)
    console.print(f"results  {folder}\npicture  {folder / 'adaptation.png'}", soft_wrap=True)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Data set: mnist or cifar10.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the files.")],
) -> None:
    """Download a data set and verify its checksums."""
    from .experiments import data as datasets

    fetches = {"mnist": datasets.fetch_mnist, "cifar10": datasets.fetch_cifar10}
    if name not in fetches:
        raise ArgumentError(f"expected a data set that can be fetched ({' or '.join(fetches)}), got {name!r}")
    fetches[name](folder)
    console.print(f"{name} is in {folder}: use it with --data {name} --data-dir {folder}", soft_wrap=True)


@app.command("report")
def write_report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that contain run folders.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about runs: interactive curves, results, configuration and environment."""
    from .experiments import page

    runs = page.find(folders)
    page.write(runs, out)
    console.print(f"report of {len(runs)} runs  {out}", soft_wrap=True)


@app.command("sweep")
def run_sweep(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Data set.")] = Config.data,
    model: Annotated[ModelName, typer.Option(help="Model.")] = Config.model,
    method: Annotated[MethodName, typer.Option(help="Optimizer.")] = Config.method,
    lr_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help=f"Lowest and highest rate [default: {SWEEP_SPREAD:g} times below and above the method's]."),
    ] = None,
    k_range: Annotated[tuple[int, int] | None, typer.Option(help="Fewest and most directions per step.")] = None,
    clip_range: Annotated[tuple[float, float] | None, typer.Option(help="Range of --clip.")] = None,
    k: Annotated[int | None, typer.Option(help="Fixed number of directions per step.")] = Config.k,
    clip: Annotated[float | None, typer.Option(help="Fixed largest norm of a step; 0: none.")] = Config.clip,
    schedule: Schedule = Config.schedule,
    descent: Descent = Config.descent,
    batch_size: BatchSize = Config.batch_size,
    weight_decay: WeightDecay = Config.weight_decay,
    epochs: Annotated[int, typer.Option(help="Epochs of a trial that is not pruned.")] = SWEEP_EPOCHS,
    trials: Annotated[int, typer.Option(help="Number of trials, earlier calls included.")] = SWEEP_TRIALS,
    seed: Annotated[int, typer.Option(help="Seed for runs and for the search.")] = Config.seed,
    device: Device = Config.device,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Sweep folder [default: runs/sweep-DATA-MODEL-METHOD].")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL [default: SQLite file in folder].")] = None,
    configuration: Annotated[Path | None, ConfigFile] = None,
) -> None:
    """Search the learning rate of a method, and optionally k and clip. Repeat the command to continue the search."""
    import optuna

    from .experiments import sweep

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
            ended = len(study.outcomes())
            console.print(f"stopped after {ended} of {trials} trials; repeat the command to continue", soft_wrap=True)
            raise typer.Exit(130) from None
        progress.update(task, completed=trials)
    study.write()
    _print(study.table(), left=("status",))
    best = study.best()
    if best is None:
        raise ArgumentError(f"{folder}: all trials diverged; try a lower --lr-range in another folder")
    console.print(f"figure  {folder / 'sweep.png'}\ntable   {folder / 'table.md'}", soft_wrap=True)
    console.print(f"best    jetplane train --config {folder / 'best.json'}", soft_wrap=True)


def _show(runs: list[Finished]) -> None:
    from .experiments import report

    rows = report.table(runs)
    ends = [n for n, row in enumerate(rows[1:]) if row["model"] != rows[n]["model"]]
    _print(rows, left=("model", "method"), ends=ends)


def _print(rows: list[dict[str, str]], left: Sequence[str], ends: Sequence[int] = ()) -> None:
    """Print a table; columns not in ``left`` are aligned right, and a line follows each row in ``ends``.

    It is wider than the terminal where words would be cut off otherwise.
    """
    shown = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=name not in left)
    for n, row in enumerate(rows):
        shown.add_row(*row.values(), end_section=n in ends)
    cells = {name: [name, *(row[name] for row in rows)] for name in rows[0]}
    words = [
        max(map(len, (w for cell in c for w in (cell.split() if n in left else [cell])))) for n, c in cells.items()
    ]
    wide = sum(words) + len(words)
    (console if wide <= console.width else Console(width=wide)).print(shown)


def main() -> None:
    """Entry point. Errors of this package are printed in one line, with exit code 2."""
    try:
        app()
    except JetplaneError as error:
        from .experiments import launch

        rank = launch.rank()  # all ranks raise the same error, unless rank 0 is lost
        if rank == 0 or isinstance(error, LostRankError):
            of = f" of rank {rank}" if launch.group() is not None else ""
            Console(stderr=True).print(f"[red bold]error{of}[/] {error}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; continue with jetplane train --resume FOLDER", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        if launch := sys.modules.get(f"{__package__}.experiments.launch"):  # a command that may have started ranks
            launch.end(sys.exc_info()[1])
