"""A pytest plugin for runs that may be cut off: each outcome is written at once, and a second run continues the first.

    PYTHONPATH=bench python -m pytest -p outcomes --outcomes FILE.jsonl [--seconds N] tests

Tests that FILE says have passed or been skipped are not run again. Those for which no time is left are skipped
and written as "left", so that the next run begins with them.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

START = pytest.StashKey[float]()
LEFT = pytest.StashKey[bool]()
KNOWN = pytest.StashKey[int]()
DONE = ("passed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, default=None, help="file for one line of JSON for each test")
    group.addoption("--seconds", type=float, default=None, help="time after which the remaining tests are left out")


def known(path: Path) -> dict[str, str]:
    """Read the last outcome of each test; an incomplete line is ignored."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["test"]] = row["outcome"]
    return found


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[START] = time.monotonic()
    path = session.config.getoption("--outcomes")
    if path is not None and path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--outcomes")
    before = {} if path is None else known(path)
    done = [item for item in items if before.get(item.nodeid) in DONE]
    config.stash[KNOWN] = len(done)
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if before.get(item.nodeid) not in DONE]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Report success for a run in which no test was left to do."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(KNOWN, 0):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[START] > seconds:
        item.stash[LEFT] = True
        pytest.skip(f"the time of {seconds:g} s is spent: run this part again")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    path = item.config.getoption("--outcomes")
    if path is not None and (report.when == "call" or report.outcome != "passed"):
        row = {"test": item.nodeid, "outcome": "left" if item.stash.get(LEFT, False) else report.outcome}
        row["seconds"] = round(report.duration, 3)
        if report.outcome != "passed":
            row["why"] = report.longreprtext[-2000:] if report.failed else str(report.longrepr[-1])
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return report
