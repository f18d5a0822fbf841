"""glibc keeps the memory that PyTorch frees, so that the next tensors cost no page faults."""

import subprocess
import sys

import pytest

from ppo_fast.common import heap

FAULTS = """
import resource, sys, torch
from ppo_fast.common.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def work():  # the tensors of one update: many are alive together, of few sizes
    return [torch.ones(size << 18) for size in (1, 2, 5, 5, 3, 20) * 8]
work()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has mallopt")
def test_tensors_reuse_the_pages_of_earlier_ones():
    kept = min(faults("kept") for _ in range(3))  # where blocks lie differs a little from process to process
    assert faults("as usual") > 3 * kept


def test_another_c_library_keeps_its_own_way(monkeypatch):
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.keep_freed_memory()
