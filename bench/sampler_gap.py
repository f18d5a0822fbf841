"""The difference by rounding between the log-probabilities of sampler and trainer: one step of a model in a folder.

    python bench/sampler_gap.py --model DIR --name NAME    # bench/results/sampler_gap/NAME.jsonl, in nats per token

The bounds in ppo_fast/llm/invariants.py are explained by these figures. DIR has a model with a chat template.
"""

import argparse
import functools
from pathlib import Path

from json_lines import Writer
from static import git

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.trainer import PPOTrainer

OUT = Path(__file__).parent / "results" / "sampler_gap"
QUESTIONS = (
    "What is 2 + 2?",
    "Tell me a story about a fox who learns to read.",
    "Name three rivers.",
    "Why is the sky blue, and why are sunsets red? Explain it in detail, please.",
)


def nothing(prompts: list, completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def gap(folder: str, dtype: str, answers: int, tokens: int) -> dict[str, float]:
    """sampler_gap_mean, _p99 and _max in nats of the first step in this dtype, and the largest first ratio."""
    actor, tokenizer = load_actor(folder)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
    config = PPOConfig(
        total_steps=1,
        prompts_per_step=answers,
        max_new_tokens=tokens,
        minibatches=1,
        epochs=1,
        dtype=dtype,
        max_sampler_gap=None,
        device="cpu",
        quiet=True,
    )
    metrics = PPOTrainer(config, actor, tokenizer, rows, nothing).step()
    return {name: x for name, x in metrics.items() if "gap" in name or name in ("entropy", "learn/ratio_max")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--name", required=True)
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    size = (arguments.answers, arguments.tokens)
    command = "python bench/sampler_gap.py --model DIR --name {} --answers {} --tokens {}".format(arguments.name, *size)
    writer = Writer(OUT / f"{arguments.name}.jsonl", git("rev-parse", "HEAD"))
    for dtype in ("bfloat16", "float32"):
        about = {"command": command, "model": arguments.name, "answers": size[0], "tokens": size[1], "dtype": dtype}
        writer.measure(about, functools.partial(gap, arguments.model, dtype, *size))
    print(f"the record is {writer.path}")


if __name__ == "__main__":
    main()
