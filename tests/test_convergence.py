"""What the convergence benchmark makes of runs: the best rate of a sweep, times to a target, files put together."""

from pathlib import Path

import pytest

from benchmarks import convergence, learning_curves


def curve(method: str, points: list[tuple[float, float, float]], **settings: object) -> object:
    rows = [
        {"seconds": t, "steps": i, "epochs": i, "forwards": i, "train": loss, "loss": loss, "measure": accuracy}
        for i, (t, loss, accuracy) in enumerate(points)
    ]
    return learning_curves.LearningCurve(method, 0, 0.1, rows=rows, budget=points[-1][0], **settings)


OURS = curve("plane-search", [(0, 2.0, 0.1), (1, 0.5, 0.8), (4, 0.2, 0.9)])


@pytest.mark.parametrize(
    ("least", "tried"),
    [(1.0, 5), (0.3, 5), (9.0, 6), (1e3, 8)],  # inside of the grid, at its ends, and beyond what is tried
)
def test_a_sweep_takes_the_best_and_goes_on_past_an_end(least: float, tried: int) -> None:
    rate, outcomes = convergence.sweep(1.0, lambda rate: abs(rate - least))
    assert len(outcomes) == tried
    assert outcomes[f"{rate:g}"] == min(outcomes.values())


def test_a_sweep_in_which_all_diverge_stays_at_the_stated_rate() -> None:
    rate, outcomes = convergence.sweep(0.02, lambda rate: float("inf"))
    assert (rate, len(outcomes)) == (0.02, 5)


def test_times_sooner_are_ratios_of_seconds() -> None:
    rival = curve("rival", [(0, 2.0, 0.1), (10, 0.6, 0.7), (100, 0.4, 0.85)])
    (line,) = [x for x in learning_curves.targets("task", [OURS, rival]).splitlines() if x.startswith("| rival")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["100 s", "0.4", "4 s", "25", "85.0 %", "4 s", "25"]
    (line,) = [x for x in learning_curves.targets("task", [OURS, rival], at=10).splitlines() if x.startswith("| rival")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["10 s", "0.6", "1 s", "10", "70.0 %", "1 s", "10"]


def test_a_target_that_is_missed_is_said_to_be() -> None:
    rival = curve("rival", [(0, 2.0, 0.1), (1, 0.1, 0.95)])
    assert learning_curves.targets("task", [OURS, rival]).count("not reached") == 2


def test_a_run_says_nothing_of_times_that_it_did_not_reach() -> None:
    assert OURS.at(2)["seconds"] == 1
    assert OURS.at(10) is None


def test_files_are_put_together_and_the_later_run_counts(tmp_path: Path) -> None:
    again = curve("plane-search", [(0, 2.0, 0.1), (8, 0.1, 0.95)])
    rival = curve("rival", [(0, 2.0, 0.1)], sweep={"0.1": 2.0}, sweep_seconds=1.0, memory=7)
    learning_curves.save({"task": [OURS, rival]}, "one machine", tmp_path / "1.json")
    learning_curves.save({"task": [again], "other": [rival]}, "one machine", tmp_path / "2.json")
    machines, found = learning_curves.load([tmp_path / "1.json", tmp_path / "2.json"])
    assert machines == ["one machine"]
    assert found == {"task": [again, rival], "other": [rival]}
    assert learning_curves.merged({"task": [OURS, rival]}, {"task": [again]}) == {"task": [rival, again]}


def test_a_measure_that_is_the_loss_is_called_so():
    rows = [{"measure": 2.0, "loss": 2.0}, {"measure": 1.0, "loss": 1.0}]
    same = learning_curves.LearningCurve("a", 0, 0.1, rows=rows, budget=1.0)
    other = learning_curves.LearningCurve("a", 0, 0.1, rows=[*rows, {"measure": 1.0, "loss": 3.0}], budget=1.0)
    assert learning_curves.held_out([same]) == "held-out loss"
    assert learning_curves.held_out([same, other]) == "held-out error"
