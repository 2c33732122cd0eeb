"""What the tables of hostile files share: a refusal in one line that takes little time and memory, and counts."""

import resource
import time
from collections import Counter

import pytest

from data.sources import load_dataset, source_attributes
from utils import InputError

SECONDS, BYTES = 30, 2**30  # what refusing a file may take at most, beyond imports
LONGEST_LINE = 1200  # characters

_COUNTS = Counter()


def pytest_runtest_logreport(report):
    """Counts the cases that held, by the module of the table, whose docstring is the promise."""
    if report.when == "call" and report.passed and "/hostile/" in report.nodeid:
        _COUNTS[report.nodeid.partition("::")[0].rpartition("/")[2]] += 1


def pytest_terminal_summary(terminalreporter):
    """Prints how many cases of each table held."""
    for module, count in sorted(_COUNTS.items()):
        terminalreporter.write_line(f"hostile: {count} cases held in {module}")


def peak():
    """Most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_line(message):
    """Checks that a message is one line that can be printed."""
    assert message.isprintable(), ascii(message)
    assert 10 < len(message) < LONGEST_LINE, len(message)


@pytest.fixture
def refused():
    """Returns a function that checks that a call is refused in one line, in little time and memory: that line."""

    def check(call, *arguments, error=InputError, **options):
        before, started = peak(), time.monotonic()
        with pytest.raises(error) as caught:
            call(*arguments, **options)
        assert time.monotonic() - started < SECONDS
        assert peak() - before < BYTES
        message = str(caught.value)
        check_line(message)
        return message

    return check


@pytest.fixture
def answered(refused):
    """Returns a function that checks that a call works, or is refused as above; within the same bounds."""

    def check(call, *arguments, error=InputError, **options):
        before, started = peak(), time.monotonic()
        try:
            result = call(*arguments, **options)
        except error as caught:
            check_line(str(caught))
            result = None
        assert time.monotonic() - started < SECONDS
        assert peak() - before < BYTES
        return result

    return check


@pytest.fixture
def loaded(answered):
    """Returns a function that loads a dataset with all that can be asked of it, or sees it refused in a line."""

    def load(name):
        answered(source_attributes, str(name))
        return answered(load_dataset, str(name), simulator_states=True, quiet=True)

    return load
