"""Compare ways of sampling: the likelihood of the answers, and how different they are from each other.

    python -m ppo_fast.examples.sampling --model DIR --prompts FILE.jsonl [--out DIR]

answers each prompt several times in each way: greedily (for evaluation), and with several temperatures, top-k, top-p
(Holtzman et al. 2020) and min-p (Nguyen et al. 2024). A table and DIR/sampling.png (default: runs/sampling) show the
mean log-likelihood of the answers under the model against their diversity, the share of word pairs that no other answer
to the same prompt has. PPO needs both: without diversity there is nothing to compare, and unlikely answers are noise.
"""

import argparse
import dataclasses
import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from ppo_fast.common.console import announce_imports, console_of, counted, say

if __name__ == "__main__":
    announce_imports()  # before the imports that take seconds

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common.checkpoint import reported, write_file
from ppo_fast.common.device import pick_device, to_device
from ppo_fast.common.errors import UserError, plain_warnings, print_error
from ppo_fast.common.folders import claim
from ppo_fast.common.plots import can_draw
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompt, prompt_ids, read_prompts
from ppo_fast.llm.decoding import CompletionText
from ppo_fast.llm.generate import GenerateOptions, GenerateSampler
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.sample import drop_long_prompts
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.rewards import Fluency, group_diversity, no_repetition


class Way(TypedDict, total=False):
    """Options of SamplingParams; those that are missing have their defaults."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


WAYS: dict[str, Way] = {
    "greedy": {"top_k": 1},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {},
    "temperature 1.3": {"temperature": 1.3},
    "top-k 50": {"top_k": 50},
    "top-k 10": {"top_k": 10},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.8": {"top_p": 0.8},
    "min-p 0.02": {"min_p": 0.02},
    "min-p 0.1": {"min_p": 0.1},
}


@dataclass(frozen=True)
class Found:
    """The answers of one way of sampling, in numbers."""

    likelihood: float  # mean log-likelihood under the model at temperature 1, nats per token
    diversity: float  # share of an answer's word pairs that no other answer to its prompt has
    varied: float  # 1 minus the share of 3-grams that an answer repeats
    tokens: float  # mean length


def compare(
    actor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, object]],
    config: PPOConfig,
    samples: int,
    console: Console,
) -> dict[str, Found]:
    """Each way of sampling on the same prompts, `samples` answers each, from the same seed."""
    prompts = [cast(Prompt, row["prompt"]) for row in rows for _ in range(samples)]  # read_prompts checks them
    ids = prompt_ids(tokenizer, prompts)
    options_of_generate = GenerateOptions.from_config(config)
    sampler = GenerateSampler(actor, tokenizer, options_of_generate, batch_size=config.sample_batch_size)
    judge = Fluency(actor, tokenizer, same_tokens=True)
    found: dict[str, Found] = {}
    with counted(console, "ways of sampling", len(WAYS)) as advance:
        for name, options in WAYS.items():
            torch.manual_seed(config.seed)
            answers = sampler.sample(ids, SamplingParams.from_config(dataclasses.replace(config, **options)))
            texts = CompletionText(tokenizer, ids).decode(answers.ids)
            found[name] = Found(
                likelihood=statistics.mean(judge(prompts, texts, answers.ids)),
                diversity=statistics.mean(group_diversity(prompts, texts)),
                varied=statistics.mean(no_repetition(prompts, texts)),
                tokens=statistics.mean(map(len, answers.ids)),
            )
            advance(len(found))
    return found


def draw(found: dict[str, Found], path: Path, title: str) -> None:
    """Likelihood against diversity, a point for each way; those of one family are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    families: dict[str, list[str]] = {}
    for name in found:
        families.setdefault(name.rpartition(" ")[0] or name, []).append(name)
    for family, names in families.items():
        points = [(found[name].likelihood, found[name].diversity) for name in names]
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=1, label=family)
        for name, point in zip(names, points, strict=True):
            label = name.rpartition(" ")[2] if family != name else "greedy"
            axis.annotate(label, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.1)
    axis.set_xlabel("mean log-likelihood of the answers (nats per token)")
    axis.set_ylabel("diversity: pairs of words no other answer to the prompt has")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    with reported(f"the picture {path} could not be written"):
        write_file(path, picture.getvalue())


def show(found: dict[str, Found], console: Console) -> None:
    """The same as a table."""
    narrow = console.is_terminal and console.width < 70
    table = (
        Table("", "log p", "div.", "varied", "tokens", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        if narrow
        else Table("", "log-likelihood", "diversity", "not repeated", "tokens")
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, x in found.items():
        table.add_row(name, f"{x.likelihood:z.2f}", f"{x.diversity:z.2f}", f"{x.varied:z.2f}", f"{x.tokens:.1f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    plain_warnings()
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.sampling", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a causal language model and tokenizer")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts, as `ppo-fast train` takes them")
    parser.add_argument(
        "--prompt-field", default="prompt", metavar="NAME", help="field of the prompt (default: prompt)"
    )
    parser.add_argument(
        "--out", default="runs/sampling", metavar="DIR", help="folder of sampling.png (default: runs/sampling)"
    )
    parser.add_argument("--count", type=int, default=32, help="prompts to answer, the first of the file (default: 32)")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default: auto)")
    given = parser.parse_args(argv)
    console = console_of(quiet=False)
    try:
        if given.samples < 2 or given.count < 1:
            raise UserError("--samples must be at least 2, and --count at least 1, to compare answers")
        config = PPOConfig(dtype="float32", max_new_tokens=given.max_new_tokens, seed=given.seed, device=given.device)
        if not can_draw():
            raise UserError("the picture needs matplotlib: pip install matplotlib")
        rows = read_prompts(given.prompts, given.prompt_field)[: given.count]
        out = claim(given.out, "the sampling example")
        say(console, f"loading {given.model}")
        actor, tokenizer = load_actor(given.model)
        actor = to_device(actor, pick_device(given.device))
        rows, _ = drop_long_prompts(rows, tokenizer, actor, config)
        say(console, f"answering {len(rows)} prompts in {len(WAYS)} ways, {given.samples} times each")
        found = compare(actor, tokenizer, rows, config, given.samples, console)
        show(found, console)
        draw(found, out / "sampling.png", f"{len(rows)} prompts, {given.samples} answers each")
    except UserError as error:
        print_error(f"sampling: error: {error}")
        return 1
    say(console, f"sampling.png, likelihood against diversity, is in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
