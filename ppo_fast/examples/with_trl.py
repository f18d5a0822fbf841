"""TRL's GRPO trains a tiny Llama of random weights, with ppo_fast's log-probabilities and fused LM head inside.

    pip install -c constraints.txt -e ".[train]" "trl==1.16.*"
    python -m ppo_fast.examples.with_trl [--steps N] [--plain]

`--plain` leaves TRL as it is, to compare. Nothing is downloaded. The reward is the share of even digits in an answer.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from ppo_fast.examples.beside import Progress, failed

INSTALL = 'pip install -c constraints.txt -e ".[train]" "trl==1.16.*"'


def even_digits(completions: list[str], **_: object) -> list[float]:
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def train(steps: int, folder: Path) -> list[dict[str, float]]:
    """Return TRL's log of each step. The model is saved and loaded, as a downloaded one would be."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from ppo_fast.examples.arithmetic import make_model, make_tokenizer

    progress = Progress("step", steps)

    class Shown(TrainerCallback):
        def on_step_end(self, args: object, state: TrainerState, control: object, **options: object) -> None:
            progress.show(state.global_step)

    set_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "model")
    options = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-3,
        beta=0.01,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=even_digits,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(10, 30) for b in range(10, 30)]}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # thirty numbers a step
    trainer.add_callback(Shown())
    progress.show(0)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_trl", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps (default: 40)")
    parser.add_argument("--plain", action="store_true", help="TRL as it is")
    options = parser.parse_args(argv)
    inside = "as it is" if options.plain else "with ppo_fast's log-probabilities and fused LM head inside"
    print(f"{options.steps} steps of TRL's GRPO on a tiny Llama, {inside}", flush=True)
    try:
        import ppo_fast.examples.arithmetic  # noqa: F401
        from ppo_fast.integrations import trl as fast
    except ImportError as error:
        return failed("with_trl", error, INSTALL)
    if not options.plain:
        fast.patch()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = train(options.steps, Path(folder))
    if not options.plain:
        fast.unpatch()
    few = min(5, len(rows))
    before, after = (sum(row["reward"] for row in part) / few for part in (rows[:few], rows[-few:]))
    print(
        f"even digits: {before:.2f} in the first {few} steps, {after:.2f} in the last {few};"
        f" {len(rows)} steps in {time.perf_counter() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
