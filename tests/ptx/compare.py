"""The same inputs in the PTX interpreter and, where there is one, on a GPU.

    python tests/ptx/compare.py [--architecture sm_90] [--dtype float32 bfloat16 float16] [operation ...]

Prints for each operation and dtype the error against fp64 in the interpreter and, on a machine with a GPU, on the GPU
too, with the bound that `ppo-fast doctor` has for it, and the largest difference between the two. They may differ by
rounding where the code uses approximate instructions (ex2, lg2, div, ...), whose bits depend on the hardware. Exits
with 1 if an error is above its bound or the interpreter reports an issue. Without --architecture it is that of the GPU.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
from ptx.emulator import ARCHITECTURES, Emulator, poisoned_allocations  # noqa: E402

from ppo_fast import doctor  # noqa: E402
from ppo_fast.kernels import reference  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest distance of two lists of results, NaN where only one of them has it."""
    found = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double().cpu(), y.double().cpu()
        different = ~((x == y) | (x.isnan() & y.isnan()))
        if different.any():
            distance = (x - y)[different].abs().max().item()
            found = max(found, distance) if distance == distance else float("nan")
    return found


def rounded(inputs: doctor.Inputs, dtype: torch.dtype) -> doctor.Inputs:
    return {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in inputs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help=f"default: all of {', '.join(doctor.CHECKS)}")
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    own = "sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else "sm_90"
    architecture = options.architecture or (own if own in ARCHITECTURES else "sm_90")
    print(f"interpreted: {architecture}; GPU: {torch.cuda.get_device_name() if gpu else 'none'}")
    columns = "".join(f"{column:>13}" for column in ("interpreted", "bound", "GPU", "difference"))
    print(f"{'operation':18} {'dtype':9}{columns} {'issues':>7}")
    failed = False
    for name in options.operations or doctor.CHECKS:
        for label in options.dtype:
            dtype = DTYPES[label]
            inputs = rounded(doctor.make_inputs(torch.device("cpu")), dtype)
            truth = doctor.results(name, reference, inputs, torch.float64)
            eager = doctor.results(name, reference, inputs, dtype)
            emulator = Emulator(architecture)
            with emulator.installed(), poisoned_allocations():
                found = doctor.results(name, doctor.ppo, inputs, dtype, backend="triton")
            error, bound, passed = doctor.compare(found, eager, truth)
            cells = [f"{error:12.2e}", f"{bound:12.2e}", f"{'-':>12}", f"{'-':>12}"]
            if gpu:
                moved = {key: x.cuda() for key, x in inputs.items()}
                there = doctor.results(name, doctor.ppo, moved, dtype, backend="triton")
                error, _, right = doctor.compare([x.cpu() for x in there], eager, truth)
                passed = passed and right
                cells[2:] = [f"{error:12.2e}", f"{difference(there, found):12.2e}"]
            verdict = "" if passed else "  WRONG"
            print(f"{name:18} {label:9} {' '.join(cells)} {sum(emulator.issues.values()):7}{verdict}")
            for issue in emulator.issues:
                print(f"    {issue}")
            failed = failed or bool(emulator.issues) or not passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
