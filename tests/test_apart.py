"""Functions in processes of their own."""

import os

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
