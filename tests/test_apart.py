"""Functions in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jetplane.errors import DataError, JetplaneError
from jetplane.experiments.apart import call_apart


def test_errors_of_a_process_come_back_as_they_are():
    with pytest.raises(DataError, match="told"):
        call_apart(failing, "told")
    told = []
    assert call_apart(reporting, 3, observe=lambda *progress: told.append(progress)) == 6 and told == [(1, "one")]
    with pytest.raises(JetplaneError, match="exit code 3"):
        call_apart(dying)


def failing(message, report):
    raise DataError(message)


def reporting(number, report):
    report(1, "one")
    return 2 * number


def dying(report):
    os._exit(3)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at processes in /proc")
def test_a_process_ends_with_its_parent(tmp_path):
    told = tmp_path / "pid"
    imports = "from jetplane.experiments.apart import call_apart; from tests.test_apart import waiting"
    code = f"{imports}; call_apart(waiting, {str(told)!r})"
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    try:
        child = until(lambda: told.exists() and told.read_text())
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: not alive(child))


def until(condition, seconds: float = 60.0):
    """What a condition gives once it holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    return False


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waiting(path, report):
    scratch = Path(path).with_suffix(".part")
    scratch.write_text(str(os.getpid()))
    scratch.replace(path)
    time.sleep(300)
