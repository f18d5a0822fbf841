"""Teach a small Llama to add: supervised by a careless teacher, then by PPO from a reward alone.

    python -m ppo_fast.examples.arithmetic [--seed N] [--out DIR]

1. A Llama of 0.1 million weights and a tokenizer of 14 tokens are made from scratch; nothing is downloaded.
2. Supervised learning imitates a teacher who adds two-digit numbers but omits the carry seven times in ten: the model
   learns to add and to omit carries, and solves about 42 % of held-out problems, those without a carry.
3. PPO: the model samples answers, and a Python function returns 1 for a right one and 0 for a wrong one. PPO corrects
   the omitted carries, of which the supervised data has right examples as well.
4. The same 1024 problems, which neither phase has used, are answered greedily before and after PPO.

DIR then holds summary.json, learning_curves.png, metrics.jsonl, samples.jsonl, TensorBoard events, and model/, which
AutoModelForCausalLM.from_pretrained loads. On a GPU the same command uses the Triton kernels.
"""

import argparse
import sys
import time
from typing import TypedDict

from ppo_fast.common.console import announce_imports, console_of, counted, say

if __name__ == "__main__":
    announce_imports()  # before the imports that take seconds

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_fast.common.device import pick_device
from ppo_fast.common.errors import UserError, plain_warnings, print_error
from ppo_fast.common.folders import claim
from ppo_fast.examples.exact import say_files, until_good, write_results
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import GenerateOptions, generate
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

SEED = 0
TEST_PROBLEMS = 1024
VALIDATION_PROBLEMS = 512
CARELESS = 0.7  # how often the teacher omits the carry
SUPERVISED_STEPS = 400
SUPERVISED_BATCH = 256
SUPERVISED_LR = 4e-3
GOOD_ENOUGH = 0.99  # of the validation problems, twice in a row: PPO stops early
ANSWER_TOKENS = 4  # three digits and the end token
PROMPT_TOKENS = 6  # "12+34="


def problem(a: int, b: int) -> dict:
    """The prompt, the right answer, and the answer without the carry from the units."""
    carry = 10 if a % 10 + b % 10 >= 10 else 0
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "careless": str(a + b - carry)}


def make_problems(seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """6075 sums of two two-digit numbers, three in five with a carry, as test, validation and training problems."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    generator = torch.Generator().manual_seed(seed)
    problems = [problem(*pairs[i]) for i in torch.randperm(len(pairs), generator=generator).tolist()]
    carried = [p for p in problems if p["answer"] != p["careless"]]
    easy = [p for p in problems if p["answer"] == p["careless"]][: len(carried) * 2 // 3]
    both = carried + easy
    shuffled = [both[i] for i in torch.randperm(len(both), generator=generator).tolist()]
    held_out = TEST_PROBLEMS + VALIDATION_PROBLEMS
    return shuffled[:TEST_PROBLEMS], shuffled[TEST_PROBLEMS:held_out], shuffled[held_out:]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, an end token and a pad token."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "+", "=", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict], config: PPOConfig
) -> float:
    """Share of problems whose greedy answer is right to the last digit and then ends."""
    prompts = tokenizer([problem["prompt"] for problem in problems])["input_ids"]
    answers = generate(
        model,
        tokenizer,
        prompts,
        SamplingParams.from_config(config),
        options=GenerateOptions.from_config(config),
        greedy=True,
    ).ids
    right = tokenizer([problem["answer"] for problem in problems])["input_ids"]
    return sum(a == [*r, tokenizer.eos_token_id] for a, r in zip(answers, right, strict=True)) / len(problems)


def imitate_careless_teacher(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict], console: Console
) -> None:
    """Cross entropy on the teacher's answers; the learning rate rises for 50 steps and then falls to a tenth."""

    def answers(field: str) -> torch.Tensor:
        texts = [p["prompt"] + p[field] + "<end>" for p in problems]
        return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"].to(model.device)

    right, careless = answers("answer"), answers("careless")
    optimizer = torch.optim.AdamW(model.parameters(), lr=SUPERVISED_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.9 * step / SUPERVISED_STEPS)
    )
    with counted(console, "supervised steps", SUPERVISED_STEPS) as advance:
        for step in range(1, SUPERVISED_STEPS + 1):
            batch = torch.randint(len(problems), (SUPERVISED_BATCH,))
            forgets = (torch.rand(SUPERVISED_BATCH, 1) < CARELESS).to(model.device)
            ids = torch.where(forgets, careless[batch], right[batch])
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, -100)
            targets[:, : PROMPT_TOKENS - 1] = -100
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                advance(step, f"loss {loss.item():.3f}")


def right_or_wrong(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """The reward of PPO: 1 for the right number, 0 for any other text."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def ppo_config(seed: int, out: str, *, total_steps: int, quiet: bool, device: str) -> PPOConfig:
    return PPOConfig(
        dtype="float32",  # autocast costs more than bfloat16 gains in matrices of this width
        total_steps=total_steps,
        prompts_per_step=1024,
        max_new_tokens=ANSWER_TOKENS,
        missing_eos_penalty=1.0,
        sample_batch_size=1024,
        epochs=4,
        minibatches=4,
        micro_batch_tokens=4096,
        lr=1e-3,
        critic_lr=1e-3,
        warmup_ratio=0.05,
        kl_coef=0.0,
        entropy_coef=0.02,
        seed=seed,
        out=out,
        quiet=quiet,
        device=device,
    )


def main(argv: list[str] | None = None) -> int:
    plain_warnings()
    parser = argparse.ArgumentParser(prog="python -m ppo_fast.examples.arithmetic", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of everything random (default: {SEED})")
    parser.add_argument("--out", default="runs/arithmetic", help="folder of the results (default: runs/arithmetic)")
    parser.add_argument("--ppo-steps", type=int, default=60, help="most PPO steps (default: 60)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    arguments = parser.parse_args(argv)
    try:
        config = ppo_config(
            arguments.seed,
            arguments.out,
            total_steps=arguments.ppo_steps,
            quiet=arguments.quiet,
            device=arguments.device,
        )
        run(config)
    except UserError as error:
        print_error(f"arithmetic: error: {error}")
        return 1
    return 0


class Summary(TypedDict):
    """The contents of summary.json."""

    exact_match_before: float
    exact_match_after: float
    seconds: float
    seconds_supervised: float
    supervised_steps: int
    ppo_steps: int
    test_problems: int
    seed: int
    device: str


def run(config: PPOConfig) -> Summary:
    """Both phases; the summary that is also written to OUT/summary.json."""
    start = time.perf_counter()
    seed, out = config.seed, claim(str(config.out), "the arithmetic example")
    console = console_of(quiet=config.quiet)
    say(
        console,
        "a teacher who forgets the carry: supervised learning imitates him, then PPO learns from right and wrong",
    )
    torch.manual_seed(seed)
    test, validation, training = make_problems(seed)
    tokenizer = make_tokenizer()
    model = nn.Module.to(make_model(tokenizer), pick_device(config.device))
    imitate_careless_teacher(model, tokenizer, training, console)
    before = exact_match(model, tokenizer, test, config)
    supervised_seconds = time.perf_counter() - start

    good_enough = until_good(
        console, lambda: exact_match(model, tokenizer, validation, config), every=5, enough=GOOD_ENOUGH
    )
    trainer = PPOTrainer(config, model, tokenizer, training, right_or_wrong)
    history = trainer.train(good_enough)
    after = exact_match(model, tokenizer, test, config)
    summary: Summary = {
        "exact_match_before": before,
        "exact_match_after": after,
        "seconds": time.perf_counter() - start,
        "seconds_supervised": supervised_seconds,
        "supervised_steps": SUPERVISED_STEPS,
        "ppo_steps": len(history),
        "test_problems": len(test),
        "seed": seed,
        "device": str(model.device),
    }
    write_results(out, summary, history, f"PPO on two-digit addition, seed {seed}")
    console.print(table(summary))
    say_files(console, out)
    return summary


def table(summary: Summary) -> Table:
    """The table of the README: exact match, steps and seconds before and after PPO."""
    table = Table(title=f"{summary['test_problems']} unseen problems, answered greedily", title_justify="left")
    table.add_column("")
    table.add_column("before PPO", justify="right")
    table.add_column("after PPO", justify="right")
    shares = (summary["exact_match_before"], summary["exact_match_after"])
    table.add_row("exact match", *(f"{100 * share:.1f} %" for share in shares))
    table.add_row("steps", f"{summary['supervised_steps']} supervised", f"{summary['ppo_steps']} of PPO")
    seconds = summary["seconds_supervised"], summary["seconds"] - summary["seconds_supervised"]
    table.add_row("seconds", *(f"{x:.0f}" for x in seconds))
    return table


if __name__ == "__main__":
    sys.exit(main())
