"""Teach a small network to write words, letter by letter, with PPO from a reward alone.

    python -m ppo_fast.examples.classic_text [--seed N] [--out DIR]

The environment is ppo_fast/TextGeneration-v0: each action writes one of 28 characters, and a full stop or the 24th
position ends the text. A letter that leads to a word of a list of 80 gains 0.1, a new word 0.5 for each letter, and a
full stop at the end 3. Policy and value are two MLPs; the policy starts as a uniform typist. Half a minute on a laptop.

DIR then holds summary.json, metrics.jsonl, TensorBoard events, checkpoints, and texts.json: what it wrote before and
after.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from ppo_fast.classic import ClassicConfig, ClassicTrainer
from ppo_fast.classic.envs.text_generation import WORDS, Scorer, SumScorer, TextGeneration, WordScorer, sentence_end
from ppo_fast.common.errors import UserError, print_error

MAX_STEPS = 24
TEXTS = 8  # shown before and after


def make_scorer() -> Scorer:
    """Rewards words of three letters or more, since one-letter words are too easy, and a full stop at the end."""
    return SumScorer({WordScorer([word for word in WORDS.split() if len(word) > 2]): 1.0, sentence_end: 3.0})


def make_config(seed: int, out: str, *, total_steps: int, quiet: bool, overwrite: bool = False) -> ClassicConfig:
    return ClassicConfig(
        env="ppo_fast/TextGeneration-v0",
        num_envs=16,
        rollout_steps=64,
        total_steps=total_steps,
        hidden_size=128,
        lr=2e-3,
        entropy_coef=0.03,
        seed=seed,
        out=out,
        quiet=quiet,
        overwrite=overwrite,
    )


def write_texts(trainer: ClassicTrainer, count: int, seed: int) -> list[tuple[str, float]]:
    """Texts that the policy samples, each with the sum of its rewards."""
    env, texts = TextGeneration(MAX_STEPS, make_scorer()), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        (observation, _), total, ended = env.reset(), 0.0, False
        while not ended:
            with torch.no_grad():
                logits = trainer.network.policy(torch.from_numpy(observation[None]))
            action = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            observation, reward, ended, _, _ = env.step(action)
            total += reward
        texts.append((env.text, round(total, 2)))
    return texts


def show(title: str, texts: list[tuple[str, float]]) -> None:
    print(f"{title}, mean reward {np.mean([reward for _, reward in texts]):.2f}")
    for text, reward in texts:
        print(f"  {text:{MAX_STEPS}}  {reward:6.2f}")


def run(config: ClassicConfig) -> dict[str, list[tuple[str, float]]]:
    """Write, learn, write again; the texts of both times."""
    trainer = ClassicTrainer(config, env_kwargs={"max_steps": MAX_STEPS, "scorer": make_scorer()})
    texts = {"before": write_texts(trainer, TEXTS, config.seed)}
    if not config.quiet:
        show("before learning", texts["before"])
    trainer.train()
    texts["after"] = write_texts(trainer, TEXTS, config.seed)
    if not config.quiet:
        show("after learning", texts["after"])
    path = Path(str(config.out)) / "texts.json"
    path.write_text(json.dumps(texts, indent=2) + "\n")
    if not config.quiet:
        print(f"all texts are in {path}")
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.classic_text", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--out", default="runs/classic_text", help="folder of the results (default: runs/classic_text)")
    parser.add_argument("--total-steps", type=int, default=300_000, help="characters in all (default: 300000)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        more = {"quiet": arguments.quiet, "overwrite": arguments.overwrite}
        run(make_config(arguments.seed, arguments.out, total_steps=arguments.total_steps, **more))
    except UserError as error:
        print_error(f"classic_text: error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
