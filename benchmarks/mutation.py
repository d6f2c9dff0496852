"""Mutation testing: which small changes of the core no test notices.

    scripts/mutate                                # installs cosmic-ray beside the project, then all modules
    scripts/mutate subspace/descent.py --sample 50

Mutations are those of cosmic-ray (MIT licence): another operator, comparison or constant, a negated condition, a loop
that does not run; and floating-point constants halved. Each mutant is written into a copy of the tree, where the tests
of its module run until the first failure. They run in a fork of a process that has imported torch, since the import
takes longer than many tests. Annotations, which are not evaluated, and decorators are left alone. A mutant counts as
killed by time if its tests take ten times as long as without it.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import difflib
import importlib
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/jetplane"
COPIED = ("src", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")

# module -> its tests; the examples in its own docstrings run as well
MODULES: dict[str, tuple[str, ...]] = {
    "subspace/descent.py": ("test_descent.py",),
    "subspace/search.py": ("test_search.py",),
    "subspace/sources.py": ("test_sources.py",),
    "gradients/feedback.py": ("test_feedback.py",),
    "gradients/perturbation.py": ("test_activity.py",),
    "gradients/residual.py": ("test_residual.py",),
    "gradients/residual_blocks.py": ("test_residual.py",),
    "gradients/active_outputs.py": ("test_effects.py", "test_activity.py"),
    "directions/base.py": ("test_compositions.py",),
    "directions/laws.py": ("test_laws.py",),
    "directions/random.py": (
        "test_directions.py",
        "test_laws.py::test_directions_are_streams_by_seed_step_parameter_and_direction",
        "test_laws.py::test_kept_entries_are_coins_of_the_stream",
        "test_tangents.py::test_the_mean_of_v_v_is_the_identity",
        "test_sharded.py::test_a_part_is_drawn_as_the_whole",
    ),
    "directions/compositions.py": (
        "test_compositions.py",
        "test_tangents.py::test_tangents_beyond_the_limit_are_drawn_again",
    ),
    "directions/unit.py": ("test_compositions.py",),
    "evaluation/audit.py": ("test_audit.py",),
    "jets/coefficients.py": ("test_coefficients.py",),
    "jets/pairs.py": ("test_pairs.py",),
    "jets/calculus.py": ("test_pairs.py", "test_planes.py", "test_property.py"),
    "jets/jet.py": ("test_jet.py", "test_writes.py", "test_kinds.py::TestSubclasses", "test_transforms_graph.py"),
    "jets/structured.py": ("test_compositions.py", "test_tangents.py"),
}
# One or two counterparts of each operator: all pairs would take days and tell little more.
OPERATORS = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul"),
    *("BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitOr", "LShift_RShift", "RShift_LShift"),
)
COMPARISONS = (
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
    *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
)
OTHERS = (
    *("ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Invert_Not"),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop"),
)
NAMES = (
    *(f"ReplaceBinaryOperator_{name}" for name in OPERATORS),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISONS),
    *OTHERS,
)
NOT_COMPILED = "not compile and not traces"  # tests of compiled code, which take seconds each, are left out
PATIENCE, SHORTEST = 10.0, 30.0  # a mutant's time limit: times that of the tests, and seconds at least


@dataclass(frozen=True)
class Mutant:
    """A change of a module.

    Attributes:
        line: where it is.
        operator: cosmic-ray's.
        occurrence: which of the operator's places in the module.
    """

    line: int
    operator: Any
    occurrence: int

    def code(self, source: str) -> str:
        """The changed module."""
        return importlib.import_module("cosmic_ray.mutating").mutate_code(source, self.operator, self.occurrence)

    def change(self, source: str) -> str:
        """The lines that differ, before and after."""
        lines = difflib.ndiff(source.splitlines(), self.code(source).splitlines())
        return "  ->  ".join(line[2:].strip() for line in lines if line[:2] in ("- ", "+ "))


# --- mutants ----------------------------------------------------------------------------------------------


def mutation_operators() -> list[Any]:
    """Those of cosmic-ray that are named above, and halved floating-point constants."""
    provided = importlib.import_module("cosmic_ray.operators.provider").OperatorProvider()
    base = importlib.import_module("cosmic_ray.operators.operator").Operator
    number = importlib.import_module("parso.python.tree").Number

    class Halved(base):
        def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
            if isinstance(node, number) and isinstance(value := ast.literal_eval(node.value), float) and value:
                yield node.start_pos, node.end_pos

        def mutate(self, node: Any, index: int) -> Any:
            return number(f"{node.prefix}{ast.literal_eval(node.value) / 2!r}", node.start_pos)

        @classmethod
        def examples(cls) -> tuple[Any, ...]:
            return ()

    return [*(provided[name]() for name in NAMES), Halved()]


def skipped(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations and decorators begin and end, as (line, column)."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    parts += [part for node in nodes for part in getattr(node, "decorator_list", ())]
    return [
        ((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0))
        for part in parts
        if isinstance(part, ast.expr)
    ]


def mutants(source: str) -> list[Mutant]:
    """All of a module, in the order of its lines."""
    tree = importlib.import_module("cosmic_ray.ast")
    left_alone, nodes, found = skipped(source), list(tree.ast_nodes(tree.get_ast(source))), []
    for operator in mutation_operators():
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for n, (start, _) in enumerate(places):
            if not any(first <= tuple(start) < last for first, last in left_alone):
                found.append(Mutant(start[0], operator, n))
    return sorted(found, key=lambda m: m.line)


# --- tests ------------------------------------------------------------------------------------------------


def forked(work: Callable[[], int], seconds: float, output: Path) -> int | None:
    """The exit code of work in a fork; None if it takes longer, after which it is ended with all that it started."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        code = 3
        try:
            code = work()
        except BaseException:  # noqa: B036 - the end of this process, which must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tests_of(tree: Path, module: str) -> Callable[[], int]:
    """Runs the tests of a module in a copy of the tree; 0 if they pass."""

    def run() -> int:
        import pytest

        os.chdir(tree)
        sys.path[:0] = [str(tree / "src"), str(tree)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        own = [str(tree / "tests" / name) for name in MODULES[module]]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--doctest-modules", "-k", NOT_COMPILED]
        return int(pytest.main([*options, str(tree / PACKAGE / module), *own]))

    return run


@dataclass
class Tally:
    """What became of a module's mutants."""

    module: str
    killed: int = 0
    late: int = 0
    survivors: list[Mutant] | None = None
    seconds: float = 0.0


def examined(module: str, tree: Path, sample: int | None, seed: int) -> Tally:
    """All mutants of a module, or some drawn at random, against its tests."""
    path, run, output = tree / PACKAGE / module, tests_of(tree, module), tree / "output.txt"
    source = path.read_text()
    start = time.monotonic()
    if forked(run, 3600, output) != 0:
        last = "\n".join(output.read_text().splitlines()[-30:])
        raise SystemExit(f"{module}: its tests fail without a change\n{last}")
    limit = max(SHORTEST, PATIENCE * (time.monotonic() - start))
    chosen = mutants(source)
    if sample is not None and sample < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, sample), key=lambda m: m.line)
    tally, survivors = Tally(module), []
    for n, mutant in enumerate(chosen):
        path.write_text(mutant.code(source))
        code = forked(run, limit, output)
        if code is None:
            tally.late += 1
        elif code == 0:
            survivors.append(mutant)
            print(f"{PACKAGE}/{module}:{mutant.line}: {mutant.change(source)}", flush=True)
        else:
            tally.killed += 1
        print(f"{module}: {n + 1} of {len(chosen)}, {len(survivors)} survive", end="\r", file=sys.stderr, flush=True)
    path.write_text(source)
    tally.survivors, tally.seconds = survivors, time.monotonic() - start
    return tally


def table(tallies: list[Tally]) -> str:
    lines = ["| module | mutants | killed | of them by time | survived | killed, % | seconds |", "|---|" + "--:|" * 6]
    for t in tallies:
        dead, alive = t.killed + t.late, len(t.survivors or [])
        share = f"{100 * dead / (dead + alive):.0f}" if dead + alive else "-"
        lines.append(f"| {t.module} | {dead + alive} | {dead} | {t.late} | {alive} | {share} | {t.seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Mutate, print the survivors as they are found, and a table at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(MODULES)} [default: all]")
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tools", type=Path, help="folder that cosmic-ray is installed in, if not with the project")
    args = parser.parse_args()
    unknown = [name for name in args.modules if name not in MODULES]
    missing = [name for name in MODULES if not (ROOT / PACKAGE / name).is_file()]
    if unknown or missing:
        parser.error(f"no such module: {', '.join(unknown or missing)}; {__file__} lists them in MODULES")
    if args.tools:
        sys.path.append(str(args.tools))  # behind everything that the project itself needs
    sys.dont_write_bytecode = True  # a mutant of the same second and size would be taken for the one before
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("hypothesis", "numpy", "pytest", "torch", "torch.testing._internal.common_methods_invocations"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            of = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(of, tree / name, ignore=ignored) if of.is_dir() else shutil.copy(of, tree / name)
        by_content = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(tree / "src", quiet=2, invalidation_mode=by_content)
        tallies = [examined(name, tree, args.sample, args.seed) for name in args.modules or MODULES]
    print(table(tallies))


if __name__ == "__main__":
    main()
