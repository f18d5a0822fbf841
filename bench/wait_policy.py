"""Cost of waiting threads: workloads on quiet cores, beside a busy process, and beside a copy of themselves.

    python bench/wait_policy.py OUT [--rounds N] [--seconds 3] [--workload sampling ...] [--commit HASH]

Each workload runs in a process of its own, under OpenMP's default wait policy ("before") and under that of
ppo_fast/common/threads.py ("after"), which commands, examples, tests and benchmarks set. The conditions are "quiet"
(nothing else runs), "busy" (one other process computes without a pause), "copies" (two processes of the workload, both
measured) and "trio" (three). Policies alternate within a round. The time of a call is the mean over its process; the
table has the median over rounds. OUT gets wait_policy.jsonl, a line for each process as soon as it ends, and README.md,
which `--page` makes again from that record without measuring. Run it on a machine with nothing else to do.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_fast.common.threads import PASSIVE

POLICIES: dict[str, dict[str, str]] = {"before": {}, "after": PASSIVE}
CONDITIONS = {"quiet": 4, "busy": 1, "copies": 2, "trio": 1}  # with their rounds: the first compares single percents
BOUND_QUIET, BOUND_COPIES = 1.02, 2.2


def sampling() -> Callable[[], object]:
    """64 prompts of 32 tokens, 8 sampled tokens each, by a Llama of 14M parameters."""
    import torch
    from transformers import GenerationConfig

    model = small_llama()
    prompts = torch.randint(0, 1000, (64, 32))
    options = GenerationConfig(do_sample=True, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=options)


def small_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16_000, **shape)).eval()


def learn_step() -> Callable[[], object]:
    """An epoch of the losses and gradients of a Llama and its optimizer: 16 sequences of 48 tokens."""
    import torch

    import ppo_fast as ppo

    model = small_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(0, 1000, (16, 48))
    old, advantages = torch.full((16, 48), -9.7), torch.randn(16, 48)

    def call() -> None:
        hidden = model.model(tokens).last_hidden_state
        out = ppo.linear_ppo_loss(hidden, model.lm_head.weight, tokens, old, advantages)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def losses() -> Callable[[], object]:
    """token_logprobs with entropy and ppo_loss, forward and backward: logits [8, 32, 16000]."""
    import torch

    import ppo_fast as ppo

    logits = torch.randn(8, 32, 16_000, requires_grad=True)
    tokens = torch.randint(0, 16_000, (8, 32))
    values = torch.randn(8, 32, requires_grad=True)
    old, old_values, advantages, returns = torch.randn(4, 8, 32).unbind()

    def call() -> None:
        logprobs, entropy = ppo.token_logprobs(logits, tokens, with_entropy=True)
        ppo.ppo_loss(logprobs, values, old, old_values, advantages, returns, entropy=entropy).loss.backward()

    return call


def small_losses() -> Callable[[], object]:
    """ppo_loss, masked_whiten and shape_rewards of 64 x 512 tokens: many short parallel regions."""
    import torch

    import ppo_fast as ppo

    x = torch.randn(7, 64, 512)
    logprobs, values = (x[i].clone().requires_grad_() for i in (0, 1))
    mask = torch.rand(64, 512) > 0.3

    def call() -> None:
        rewards, _ = ppo.shape_rewards(x[2][:, 0], x[3], x[4], mask, kl_coef=0.05)
        advantages = ppo.masked_whiten(rewards, mask)
        ppo.ppo_loss(logprobs, values, x[2], x[3], advantages, x[5], mask).loss.backward()

    return call


def scan() -> Callable[[], object]:
    """gae of 4096 rows of 256 with numba."""
    import torch

    import ppo_fast as ppo

    rewards, values = torch.randn(2, 4096, 256).unbind()
    return lambda: ppo.gae(rewards, values, gamma=0.99, lam=0.95)


def classic() -> Callable[[], object]:
    """A rollout and an update of CartPole: 8 environments, 128 steps, 4 epochs of 4 minibatches."""
    import torch

    from ppo_fast.classic import ClassicConfig, ClassicTrainer

    torch.set_num_threads(1)  # as `ppo-fast classic`
    settings = {"num_envs": 8, "rollout_steps": 128, "minibatches": 4, "epochs": 4, "total_steps": 10**9}
    return ClassicTrainer(ClassicConfig(env="CartPole-v1", quiet=True, eval_episodes=0, **settings)).step


WORKLOADS = {
    "sampling": sampling,
    "learn step": learn_step,
    "losses": losses,
    "small losses": small_losses,
    "gae (numba)": scan,
    "classic": classic,
}


def work(name: str, seconds: float, start_file: Path) -> None:
    """Run the child: prepare, report that it is ready, wait for the start, and print the times of its calls."""
    import torch

    call, calls = WORKLOADS[name](), []
    call()
    call()
    print("ready", flush=True)
    while not start_file.exists():
        time.sleep(0.005)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not calls:
        start = time.perf_counter()
        call()
        calls.append(time.perf_counter() - start)
    found = {"median": statistics.median(calls), "calls": len(calls), "threads": torch.get_num_threads()}
    print(json.dumps(found | {"mean": statistics.fmean(calls)}), flush=True)


def measured(name: str, policy: dict[str, str], condition: str, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The figures of each process of the workload that ran together."""
    environment = {k: v for k, v in os.environ.items() if k not in PASSIVE} | policy
    start_file = folder / "start"
    start_file.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(folder), "--child", name, "--seconds", str(seconds)]
    copies = {"copies": 2, "trio": 3}.get(condition, 1)
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(copies)]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if condition == "busy" else None
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError(f"the workload {name} failed")
        start_file.touch()
        return [json.loads(child.communicate()[0]) for child in children]
    finally:
        for process in (*children, *([busy] if busy else [])):
            process.kill()
            process.wait()
        start_file.unlink(missing_ok=True)


def rows_of(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()[1:]]


def medians(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Seconds of a call by workload, policy and condition: the median over rounds and processes."""
    keys = dict.fromkeys((row["workload"], row["policy"], row["condition"]) for row in rows)
    return {
        key: statistics.median(row["mean"] for row in rows if (row["workload"], row["policy"], row["condition"]) == key)
        for key in keys
    }


def ratios(rows: list[dict[str, Any]], name: str) -> list[float]:
    """After / before of a workload on quiet cores, by round: a machine's speed drifts between rounds."""
    times = {
        (row["round"], row["policy"]): row["mean"]
        for row in rows
        if (row["workload"], row["condition"]) == (name, "quiet")
    }
    return [times[number, "after"] / times[number, "before"] for number, policy in times if policy == "after"]


def page(record: Path) -> str:
    """The table in Markdown."""
    header, rows = json.loads(record.read_text(encoding="utf-8").splitlines()[0]), rows_of(record)
    found, machine = medians(rows), header["machine_info"]
    conditions = [x for x in CONDITIONS if any(row["condition"] == x for row in rows)]
    columns = list(itertools.product(conditions, POLICIES))
    titles = [f"{condition}, {policy}" for condition, policy in columns]
    lines = [
        "# Waiting threads",
        "",
        "Milliseconds of a call (median over rounds of the mean of a process), by `python bench/wait_policy.py OUT`."
        " Before: OpenMP's default wait policy. After: that of ppo_fast/common/threads.py, "
        + " ".join(f"`{name}={value}`" for name, value in PASSIVE.items())
        + ". Quiet: nothing else runs. Busy:"
        " beside one process that computes without a pause. Copies: two processes of it at once; trio: three.",
        "",
        f"{machine['cpu']['brand_raw']}, {os.cpu_count()} cores, torch {machine['versions']['torch']}, commit"
        f" {header['commit_info']['id'][:7]}, {header['datetime'][:10]}, raw figures in wait_policy.jsonl.",
        "",
        "| workload | " + " | ".join(titles) + " | quiet, after / before | copies / quiet, after |",
        "|---|" + "---:|" * (len(titles) + 2),
    ]
    for name in dict.fromkeys(row["workload"] for row in rows):
        cells = [f"{1000 * found[name, policy, condition]:.2f}" for condition, policy in columns]
        quiet = statistics.median(ratios(rows, name))
        copies = found[name, "after", "copies"] / found[name, "after", "quiet"]
        marks = [
            f"{quiet:.3f}" + " (over)" * (quiet > BOUND_QUIET),
            f"{copies:.2f}" + " (over)" * (copies > BOUND_COPIES),
        ]
        lines.append(f"| {name} | " + " | ".join([*cells, *marks]) + " |")
    lines += ["", "Workloads:", ""]
    lines += [f"- {name}: {(make.__doc__ or '').strip()}" for name, make in WORKLOADS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    rounds = ", ".join(f"{count} {condition}" for condition, count in CONDITIONS.items())
    parser.add_argument("--rounds", type=int, default=None, help=f"of each condition (default: {rounds})")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, in each process")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--condition", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--page", action="store_true", help="make README.md from the record, without measuring")
    parser.add_argument("--child", choices=WORKLOADS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        work(given.child, given.seconds, given.out / "start")
        return 0
    from json_lines import Writer  # which sets the policy of this process: not in a child
    from static import git

    from ppo_fast.common.folders import claim

    record = claim(given.out, "bench/wait_policy.py") / "wait_policy.jsonl"
    if not given.page:
        writer = Writer(record, given.commit or git("rev-parse", "HEAD") or "unknown")
        for number in range(given.rounds or max(CONDITIONS.values())):
            conditions = [x for x in given.condition if number < (given.rounds or CONDITIONS[x])]
            for condition, name in itertools.product(conditions, given.workload):
                for policy in sorted(POLICIES, reverse=bool(number % 2)):
                    for found in measured(name, POLICIES[policy], condition, given.seconds, given.out):
                        about = {"workload": name, "policy": policy, "condition": condition, "round": number}
                        writer.add(about | found)
                        print(f"{name:14} {policy:7} {condition:7} {1000 * found['mean']:10.2f} ms", flush=True)
    (given.out / "README.md").write_text(page(record), encoding="utf-8")
    print(f"{record} and {given.out / 'README.md'} are written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
