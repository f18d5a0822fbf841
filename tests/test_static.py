"""The ahead-of-time gate (bench/static.py), and what Triton would compile: all in processes without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PREAMBLE = """
import json, sys
sys.path[:0] = ["bench", "."]
import static
from triton.backends.compiler import GPUTarget
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def evaluate(script: str):
    """What a script leaves in `result`."""
    done = run("-c", f"{PREAMBLE}\n{script}\nprint(json.dumps(result))")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "archs", [["sm_90"], pytest.param(["sm_80", "sm_100", "sm_120", "gfx942"], marks=pytest.mark.slow)], ids=" ".join
)
def test_a_kernel_does_not_compile_or_spills_or_loads_narrowly(archs):
    done = run("bench/static.py", "--quiet", "--arch", *archs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_gate_lets_spills_narrow_loads_or_an_interpreted_run_pass():
    """The gate itself: the same kernel with 64 rows to two warps spills, and strided loads are not 16 bytes wide."""
    script = """
narrow = next(v for v in static.variants("logprobs") if v.name.endswith("bwd float32 8x64 strided"))
bad = narrow._replace(name="aligned", constexprs=narrow.constexprs | {"ROWS": 64}, num_warps=2)
report = static.cuda_report(static.compile_variant(bad, static.TARGETS["sm_90"]).asm["cubin"], disassemble=True)
result = static.problems(bad, "sm_90", report)
"""
    spills, narrow = evaluate(script)
    assert spills.startswith("spills")
    assert narrow == "has no load of 128 bits"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "bench/static.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1 is set" in done.stderr


KEYS = """
import itertools, torch
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from ppo_fast.kernels import logprobs

keys, backend, combinations = {}, make_backend(static.TARGETS["sm_90"]), 0
def run(kernel, *args, grid, warmup, **kwargs):  # stands for JITFunction.run, which asks a GPU for its backend
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = binder(*args, **kwargs)
    keys.setdefault(f"{kernel.__name__} {V}", set()).add(str((specialization, sorted(options.items()))))
JITFunction.run = run

for B, T, temperature in itertools.product((1, 2, 16, 17), (1, 16, 17, 33), (1, 16, 17, 0.7)):
    for V in (32, 1000, 8000):
        base = torch.zeros(B, T + 2, V, dtype=torch.bfloat16, requires_grad=True)
        logits = base[:, 1:-1] if T % 2 else base[:, 1:-1].contiguous()
        tokens = torch.zeros(B, T + 1, dtype=torch.int64)[:, 1:]
        mask = None if temperature == 17 else torch.ones(B, T, dtype=torch.bool)
        out = logprobs.token_logprobs(logits, tokens, mask, temperature=temperature, with_entropy=T == 16)
        torch.autograd.grad(out[0].sum() if T == 16 else out.sum(), logits)
    combinations += 1
result = [combinations, {name: len(k) for name, k in keys.items()}]
"""


def test_a_new_batch_length_or_temperature_compiles_anew():
    """Liger #146, fla #669: 64 combinations of B, T and temperature, 1, 16 and 17 among them, have one key."""
    combinations, keys = evaluate(KEYS)
    assert combinations >= 50
    assert len(keys) == 6  # two kernels, three tiles
    assert set(keys.values()) == {1}


OFFSETS = """
import re
result = {}
for variant in static.variants("logprobs"):
    if "float16 1x4096" not in variant.name or "bfloat16" in variant.name:
        continue
    ttir = static.compile_variant(variant, static.TARGETS["sm_90"]).asm["ttir"]
    products = re.findall(r"arith\\.muli .*%\\w+_stride_\\w+.*|arith\\.muli %\\w+, %\\w+stride.*", ttir)
    strides = set(re.findall(r"%(\\w+_stride_\\w+): (\\w+)", ttir))
    result[variant.name] = [len(strides), sorted({t for _, t in strides}), [p.split(" loc(")[0] for p in products]]
"""


def test_a_row_offset_is_multiplied_in_32_bits():
    """fla #1080, mamba #1015, triton #832: silent corruption past 2^31 elements. Proven on the IR of every layout."""
    found = evaluate(OFFSETS)
    assert len(found) == 9
    for name, (count, types, products) in found.items():
        assert count >= 7, name
        assert types == ["i64"], name
        assert len(products) >= 6, name  # b and t of logits, tokens and mask
        for product in products:
            assert product.rstrip().endswith("i64") or product.rstrip().endswith("i64>"), f"{name}: {product}"
