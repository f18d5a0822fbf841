"""The hand-written gradient and Adam of classic RL beside autograd and torch.optim.Adam(fused=True).

    python bench/classic_parts.py    # bench/results/cpu-2core/classic_parts/parts.jsonl, and a table in README.md

The networks are those of `ppo-fast classic --env CartPole-v1` (two MLPs of 2 layers of 64), on one thread. One call of
each way in turn, so that other work on the machine affects all ways alike. A time is that of the processor in this
process, the median over the rounds; the 20th percentile is beside it, which other work changes less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from json_lines import Writer
from static import git

import torch  # isort: skip  # after json_lines, which sets the wait policy

from ppo_fast.classic import ClassicConfig, ClassicTrainer
from ppo_fast.classic.ppo import Batch
from ppo_fast.common.text import markdown_table

OUT = Path(__file__).parent / "results" / "cpu-2core" / "classic_parts"
SIZES = (64, 256, 1024)  # steps in a minibatch; 256 with the default options


def first_steps(trainer: ClassicTrainer, size: int) -> Batch:
    trainer.collect()
    batch, _ = trainer.advantages()
    return Batch(*(x[:size] for x in batch))


def gradients(trainer: ClassicTrainer, part: Batch) -> dict[str, Callable[[], object]]:
    """Forward, loss and gradient of a minibatch."""
    network = trainer.network

    def by_hand() -> None:
        policy, values, activations = network.forward_with_cache(part.observations)
        loss, _ = trainer._loss(part, policy, values, 0.2)
        trainer.backward(loss, policy, values, activations)

    def autograd() -> None:
        policy, values = network(part.observations)
        loss, _ = trainer._loss(part, policy, values, 0.2)
        trainer.backward(loss, policy, values, None)

    return {"by hand": by_hand, "autograd": autograd}


def optimizers(trainer: ClassicTrainer) -> dict[str, Callable[[], object]]:
    """One step of Adam, of the whole network or of one flat tensor."""
    flat = torch.nn.Parameter(trainer.adam.weights.clone())
    flat.grad = trainer.gradient
    parameters = [torch.nn.Parameter(w.detach().clone()) for w in trainer.weights]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    of_flat = torch.optim.Adam([flat], lr=1e-5, eps=1e-5, fused=True)
    of_all = torch.optim.Adam(parameters, lr=1e-5, eps=1e-5, fused=True)
    return {
        "by hand, flat": lambda: trainer.adam.step(trainer.gradient, 1e-5),
        "fused, flat": of_flat.step,
        "fused, each weight": of_all.step,
    }


def updates(trainer: ClassicTrainer, part: Batch) -> dict[str, Callable[[], object]]:
    """A whole minibatch: gradient, clipping, Adam."""
    by_hand, autograd = gradients(trainer, part).values()
    flat = torch.nn.Parameter(trainer.adam.weights)
    flat.grad = trainer.gradient
    fused = torch.optim.Adam([flat], lr=1e-5, eps=1e-5, fused=True)

    def ours() -> None:
        by_hand()
        trainer.optimizer_step(1e-5)

    def both_replaced() -> None:
        autograd()
        torch.nn.utils.clip_grad_norm_([flat], 0.5)
        fused.step()

    def fused_only() -> None:
        by_hand()
        torch.nn.utils.clip_grad_norm_([flat], 0.5)
        fused.step()

    return {"by hand": ours, "by hand, fused Adam": fused_only, "autograd, fused Adam": both_replaced}


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return median and 20th percentile of the time of each way in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 20):
        for name, call in ways.items():
            start = time.process_time()
            call()
            if number >= 20:
                times[name].append(1e6 * (time.process_time() - start))
    return {
        name: (round(statistics.median(found), 2), round(statistics.quantiles(found, n=5)[0], 2))
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    writer = Writer(given.out / "parts.jsonl", git("rev-parse", "HEAD"))
    rows = []
    for size in SIZES:
        trainer = ClassicTrainer(ClassicConfig(rollout_steps=256, quiet=True))
        part = first_steps(trainer, size)
        groups = {"gradient": gradients(trainer, part), "Adam": optimizers(trainer), "update": updates(trainer, part)}
        for group, ways in groups.items():
            load = round(os.getloadavg()[0], 2)
            found = measure(ways, given.rounds)
            writer.add({"part": group, "minibatch": size, "rounds": given.rounds, "load_before": load, "us": found})
            _, ours = next(iter(found.values()))
            rows += [
                [group, str(size), name, f"{median:.0f}", f"{low:.0f}", f"{low / ours:.2f}"]
                for name, (median, low) in found.items()
            ]
    heading = ("part", "minibatch", "way", "median, us", "20th percentile, us", "times ours (of these)")
    table = markdown_table(heading, rows, align="---:")
    print(table)
    (given.out / "README.md").write_text(
        "# Parts of an update of classic RL\n\n"
        "Made by `python bench/classic_parts.py`: processor time, the ways in turn, on one thread of a machine"
        f"\nwith other work (load average {os.getloadavg()[0]:.1f} at the end); raw figures in parts.jsonl.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    main()
