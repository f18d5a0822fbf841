import os
import subprocess
import sys

import pytest

from ppo_fast.common.errors import print_error

LINES = """
from ppo_fast.common.errors import print_error
for _ in range(1000):
    print_error("a line of one of several processes")
"""


def test_lines_of_several_processes_stay_whole_without_buffers(tmp_path):
    together = tmp_path / "stderr"
    with together.open("ab") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        started = [subprocess.Popen([sys.executable, "-c", LINES], stderr=file, env=environment) for _ in range(4)]
        assert [process.wait() for process in started] == [0] * 4
    assert together.read_text().splitlines() == ["a line of one of several processes"] * 4000


def test_a_closed_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", None)
    print_error("a line without a reader")
