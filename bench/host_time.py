"""Host microseconds of each operation on the Triton backend, without a GPU: launches are stubbed.

    python bench/host_time.py [--against af7e9b2] [--rounds 7] [--write]

Everything that the host does before a kernel starts is measured: argument checks, allocations, autograd, and Triton's
own binding of arguments. Compilation and the driver are left out, and so are matrix products. The table also has the
time of the bare launches of each operation, the same kernels with the same arguments, one `kernel[grid](...)` after the
other; and for a backward that of the engine: torch.autograd.grad through an autograd.Function for the same leaves that
only returns tensors it has. --against measures another commit, too, in processes that alternate with those of this
tree. --write keeps table and raw samples in bench/results/host/.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "host"
CALLS = 300  # of one operation in one round; their median counts


class Stubs:
    """A replacement of JITFunction.run that binds the arguments as Triton does, and starts nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime import jit

        self.jit, self.backend = jit, make_backend(GPUTarget("cuda", 90, 32))
        self.caches: dict[Any, Any] = {}
        self.launches: list[tuple[Any, tuple, Any, dict[str, Any]]] | None = None
        self.kernel = Kernel()
        stubs = self

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Kernel:
            if stubs.launches is not None:
                stubs.launches.append((function, args, grid, dict(kwargs)))
            kwargs["debug"] = kwargs.get("debug", function.debug)
            cache = stubs.caches.get(function)
            if cache is None:
                binder = jit.create_function_from_signature(function.signature, function.params, stubs.backend)
                cache = stubs.caches[function] = ({}, {}, binder)
            kernels, keys, binder = cache
            bound, specialization, options = binder(*args, **kwargs)
            key = jit.compute_cache_key(keys, specialization, options)
            kernel = kernels.get(key)
            if kernel is None:
                kernel = kernels[key] = stubs.kernel
            for (name, _), (value, namespace) in function.used_global_vals.items():
                if namespace.get(name) != value:
                    raise RuntimeError(f"{name} has changed")
            if callable(grid):
                grid = grid(bound)
            kernel.launch_metadata(grid, 0, *bound.values())
            kernel.run(*grid, 0, None, None, None, None, None, *bound.values())
            return kernel

        jit.JITFunction.run = run


class Kernel:
    """A compiled kernel whose launch does nothing."""

    def launch_metadata(self, *args: Any) -> None: ...

    def run(self, *args: Any) -> None: ...


def pretend_gpu() -> None:
    """Make the Triton backend accept CPU tensors, checks read no values, and matrix products do nothing."""
    from ppo_fast.kernels.common import launch
    from ppo_fast.kernels.linear import chunks as linear_chunks
    from ppo_fast.ops import advantages, checks, linear, logprobs, losses

    launch.interpreting = lambda: True
    for module in (advantages, linear, logprobs, losses):
        module.uses_triton = lambda *args: True
    checks.readable = lambda x: False
    linear_chunks._mm = lambda a, b, out, **options: None


def operations() -> dict[str, tuple[Callable[[], Any], tuple[Any, ...]]]:
    """Name -> (call, the tensors that its result is differentiated by). Small: a CPU computes what is not stubbed."""
    import torch

    import ppo_fast as ops

    torch.manual_seed(0)
    B, T, V, D = 4, 16, 128, 16
    N, low = B * T, torch.bfloat16
    mask = torch.rand(B, T) > 0.3
    tokens = torch.randint(0, V, (B, T))
    logits = torch.randn(B, T, V, dtype=low, requires_grad=True)
    logprobs, values, entropy = (torch.randn(B, T, requires_grad=True) for _ in range(3))
    old, advantages, returns, old_values, ref, rewards = torch.randn(6, B, T).unbind()
    long_rewards, long_values, scores = torch.randn(8, 8192), torch.randn(8, 8192), torch.randn(B)
    hidden, weight = (torch.randn(n, D, dtype=low, requires_grad=True) for n in (N, V))
    flat = {"tokens": tokens.flatten(), "old": old.flatten(), "advantages": advantages.flatten()}
    flat_mask, counted = mask.flatten(), int(mask.sum())
    lengths = torch.arange(0, N + 1, T)
    ppo = (logprobs, values, old, old_values, advantages, returns, mask)
    linear = (hidden, weight, flat["tokens"], flat["old"], flat["advantages"])
    grid = {"ref_logprobs": ref, "kl_coef": 0.1, "aggregation": "seq-mean-token-mean"}
    return {
        "token_logprobs": (lambda: ops.token_logprobs(logits, tokens, mask), (logits,)),
        "token_logprobs, entropy": (
            lambda: ops.token_logprobs(logits, tokens, mask, with_entropy=True)[0],
            (logits,),
        ),
        "policy_loss": (lambda: ops.policy_loss(logprobs, old, advantages, mask).loss, (logprobs,)),
        "value_loss": (lambda: ops.value_loss(values, old_values, returns, mask).loss, (values,)),
        "ppo_loss": (lambda: ops.ppo_loss(*ppo, entropy=entropy, entropy_coef=0.01).loss, (logprobs, values, entropy)),
        "ppo_loss, by sequence": (
            lambda: ops.ppo_loss(*ppo, aggregation="seq-mean-token-mean").loss,
            (logprobs, values),
        ),
        "gae": (lambda: ops.gae(rewards, old_values, mask=mask), ()),
        "gae, packed": (lambda: ops.gae(rewards.flatten(), old_values.flatten(), cu_seqlens=lengths), ()),
        "gae, time-major": (lambda: ops.gae(rewards, old_values, terminated=mask, time_major=True), ()),
        "gae, two launches": (lambda: ops.gae(long_rewards, long_values), ()),
        "shape_rewards": (lambda: ops.shape_rewards(scores, old, ref, mask), ()),
        "masked_whiten": (lambda: ops.masked_whiten(advantages, mask), ()),
        "rlhf_advantages": (lambda: ops.rlhf_advantages(scores, old, ref, old_values, mask), ()),
        "linear_logprobs, no gradient": (
            lambda: ops.linear_logprobs(hidden.detach(), weight.detach(), flat["tokens"], with_entropy=True),
            (),
        ),
        "linear_logprobs, mask": (
            lambda: ops.linear_logprobs(hidden, weight, flat["tokens"], flat_mask, with_entropy=True)[0],
            (hidden, weight),
        ),
        "linear_ppo_loss": (lambda: ops.linear_ppo_loss(*linear).loss, (hidden, weight)),
        "linear_ppo_loss, denominator": (
            lambda: ops.linear_ppo_loss(*linear, denominator=100.0).loss,
            (hidden, weight),
        ),
        "linear_ppo_loss, mask": (lambda: ops.linear_ppo_loss(*linear, flat_mask).loss, (hidden, weight)),
        "linear_ppo_loss, mask and count": (
            lambda: ops.linear_ppo_loss(*linear, flat_mask, num_counted=counted).loss,
            (hidden, weight),
        ),
        "linear_ppo_loss, by sequence": (
            lambda: ops.linear_ppo_loss(hidden.view(B, T, D), weight, tokens, old, advantages, mask, **grid).loss,
            (hidden, weight),
        ),
    }


def median_us(call: Callable[[], Any]) -> float:
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    return statistics.median(samples) / 1e3


def launches_of(stubs: Stubs, call: Callable[[], Any]) -> list[tuple[Any, tuple, Any, dict[str, Any]]]:
    stubs.launches = []
    call()
    found, stubs.launches = stubs.launches, None
    return found


def bare_us(found: list[tuple[Any, tuple, Any, dict[str, Any]]]) -> float:
    """Time of the launches alone."""

    def call() -> None:
        for function, args, grid, kwargs in found:
            function[grid](*args, **kwargs)

    return median_us(call) if found else 0.0


def engine_us(leaves: tuple[Any, ...]) -> float:
    """Measure a backward that computes nothing: PyTorch's overhead for any function with these leaves."""
    import torch

    ready = tuple(torch.zeros_like(x) for x in leaves)

    class Ready(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(leaves[0])
            ctx.set_materialize_grads(False)
            return torch.empty(())

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            _ = ctx.saved_tensors
            return ready

    outputs, upstream = iter([Ready.apply(*leaves) for _ in range(CALLS)]), torch.ones(())
    return median_us(lambda: torch.autograd.grad(next(outputs), leaves, upstream))


def measure_here() -> dict[str, dict[str, float]]:
    """Operation and direction -> host time, launches, torch operations and the time of the bare launches."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: collections.Counter[str] = collections.Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    stubs = Stubs()
    pretend_gpu()
    found = {}
    for name, (call, leaves) in operations().items():
        call()
        with Count() as count:
            call()
        started = launches_of(stubs, call)
        row = {"us": median_us(call), "bare_us": bare_us(started), "launches": len(started)}
        found[name] = row | {"torch": sum(n for op, n in count.found.items() if op not in FREE)}
        if not leaves:
            continue
        outputs = [call() for _ in range(CALLS + 3)]
        upstream = torch.ones_like(outputs[0])
        pending = iter(outputs)

        def backward(pending: Any = pending, leaves: Any = leaves, upstream: torch.Tensor = upstream) -> None:
            torch.autograd.grad(next(pending), leaves, upstream)

        backward()
        with Count() as count:
            backward()
        started = launches_of(stubs, backward)
        row = {"us": median_us(backward), "bare_us": bare_us(started), "launches": len(started)}
        row["engine_us"] = engine_us(leaves)
        found[f"{name}, backward"] = row | {"torch": sum(n for op, n in count.found.items() if op not in FREE)}
    return found


# Operations that start no kernel on a GPU.
FREE = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "select",
    "slice",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
)
FREE += ("reshape", "as_strided", "unbind", "split", "permute", "empty", "empty_like", "new_empty", "empty_strided")
FREE += ("_reshape_alias", "lift_fresh", "new_empty_strided", "diff", "promote_types", "result_type", "is_same_size")


def measure_tree(tree: Path) -> dict[str, dict[str, float]]:
    """Measure in a separate process, with the package of that tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(samples: dict[str, list[dict[str, dict[str, float]]]], against: str | None) -> str:
    """Medians over the rounds."""

    def median(tree: str, name: str, what: str) -> float:
        return statistics.median(round_[name].get(what, 0.0) for round_ in samples[tree] if name in round_)

    columns = ["operation", "launches", "torch operations", "host us", "bare launches us", "ratio to bare", "engine us"]
    columns += [f"{against} us", f"ratio to {against}", "ratio without engine"] if against else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in samples["this"][0]:
        us, bare = median("this", name, "us"), median("this", name, "bare_us")
        cells = [name, *(f"{median('this', name, what):.0f}" for what in ("launches", "torch"))]
        engine = median("this", name, "engine_us")
        cells += [f"{us:.1f}", f"{bare:.1f}", f"{us / bare:.2f}" if bare else "-", f"{engine:.1f}" if engine else "-"]
        if against:
            before, engine_before = median(against, name, "us"), median(against, name, "engine_us")
            without = (us - engine) / (before - engine_before)
            cells += [f"{before:.1f}", f"{us / before:.2f}", f"{without:.2f}" if engine else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here()))
        return 0
    samples: dict[str, list[dict[str, dict[str, float]]]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"this": ROOT}
        if options.against:
            trees[options.against] = Path(folder) / "other"
            git("worktree", "add", "--detach", str(trees[options.against]), options.against)
        try:
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    samples[name].append(measure_tree(tree))
        finally:
            if options.against:
                git("worktree", "remove", "--force", str(trees[options.against]))
    shown = table(samples, options.against)
    print(shown)
    if options.write:
        import torch
        import triton

        RESULTS.mkdir(parents=True, exist_ok=True)
        record = {
            "commit": git("rev-parse", "--short", "HEAD") + (", changed" if git("status", "--porcelain") else ""),
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
            "command": f"python bench/host_time.py --against {options.against} --rounds {options.rounds} --write",
            "samples": samples,
        }
        (RESULTS / "host.json").write_text(json.dumps(record), encoding="utf-8")
        (RESULTS / "README.md").write_text(page(record, shown), encoding="utf-8")
        print(f"host.json and README.md are in {RESULTS}")
    return 0


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    keys = {line.split(":")[0].strip(): line.split(":")[1] for line in reversed(lines) if ":" in line}
    return " ".join(
        [platform.machine(), *(keys.get(key, "").strip() for key in ("model name", "cpu family\t", "model\t"))]
    )


def page(record: dict[str, Any], shown: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# Host time of each operation

Made by `{record["command"]}`. Commit {record["commit"]}, {versions}, {record["processor"]}, {record["date"]}.

Launches are stubbed (see `bench/host_time.py`): microseconds of the host on the Triton backend, with Triton's own
binding of arguments, without the driver and without matrix products. Medians over {len(record["samples"]["this"])}
rounds, in processes that alternate. Torch operations are those that start a kernel on a GPU.

{shown}
"""


if __name__ == "__main__":
    sys.exit(main())
