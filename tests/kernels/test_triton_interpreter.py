"""Triton's interpreter as the tests set it up (TRITON_INTERPRET=1), in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch, triton, triton.language as tl
from support import triton_interpreter
if {fixed}:
    triton_interpreter.round_fma_once()

@triton.jit
def kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.arange(0, 2))
    tl.store(y_ptr + tl.arange(0, 2), tl.fma(x, x, -1.0 - 2.0**-11))

x, y = torch.full((2,), 1 + 2.0**-12), torch.zeros(2)
kernel[(1,)](x, y)
print(y.tolist()[0])
"""


def result(tmp_path: Path, *, fixed: bool) -> float:
    """(1 + 2^-12)^2 - (1 + 2^-11) in the interpreter; exactly 2^-24."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fixed=fixed))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_fma_rounds_once_in_tritons_interpreter(tmp_path):
    assert result(tmp_path, fixed=True) == 2.0**-24


def test_fma_of_an_untouched_interpreter_rounds_twice(tmp_path):
    """If this fails, Triton has fixed its interpreter, and triton_interpreter.py can go."""
    assert result(tmp_path, fixed=False) == 0.0
