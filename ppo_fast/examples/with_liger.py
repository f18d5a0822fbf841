"""A small Llama learns by PPO without and with Liger's kernels for its layers: both curves, and seconds a step.

    pip install -c constraints.txt -e ".[train]" "liger-kernel==0.8.*"
    python -m ppo_fast.examples.with_liger [--steps N] [--hidden N]

Liger's kernels need a GPU. Random weights; the reward is the share of even digits in the answer. The fused cross
entropy stays off: log-probabilities and loss are ppo_fast's. See ppo_fast/integrations/liger.md.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from ppo_fast.common.errors import print_error
from ppo_fast.examples.beside import Progress, announce, failed

announce(__name__, "A small Llama learns by PPO without and with Liger's kernels for its layers")

import torch  # noqa: E402

if TYPE_CHECKING:
    from ppo_fast.llm.config import PPOConfig

INSTALL = 'pip install -c constraints.txt -e ".[train]" "liger-kernel==0.8.*"'


def even_digits(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def add_liger(model: object) -> None:
    """Replace RMSNorm, SwiGLU and rotary embedding by Liger's, and keep the LM head."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def train(config: "PPOConfig", *, hidden: int, liger: bool, progress: Progress | None = None) -> list[dict[str, float]]:
    """The metrics of each step; the same random weights, prompts and answers with and without Liger."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ppo_fast.examples.arithmetic import make_tokenizer
    from ppo_fast.llm.trainer import PPOTrainer

    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    actor = LlamaForCausalLM(shape)
    if liger:
        add_liger(actor)
    rows = [{"prompt": f"{a}+{b}="} for a in range(10, 30) for b in range(10, 30)]
    trainer = PPOTrainer(config, actor, tokenizer, rows, even_digits)
    curve = []
    for _ in range(config.total_steps):
        curve.append(trainer.step())
        if progress is not None:
            progress.show(progress.done + 1)
    return curve


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_liger", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20, help="PPO steps (default: 20)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model (default: 512)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print_error("with_liger: error: Liger's kernels need a GPU, and torch finds none")
        return 1
    try:
        import liger_kernel  # noqa: F401

        from ppo_fast.common.errors import UserError
        from ppo_fast.llm.config import PPOConfig
    except ImportError as error:
        return failed("with_liger", error, INSTALL)
    config = PPOConfig(
        dtype="float32", total_steps=options.steps, max_new_tokens=16, lr=1e-4, critic_lr=1e-4, quiet=True
    )
    progress = Progress("step", 2 * options.steps)
    progress.show(0)
    try:  # Liger's rotary embedding replaces a function of transformers, so the run without it comes first
        plain, liger = (train(config, hidden=options.hidden, liger=x, progress=progress) for x in (False, True))
    except UserError as error:
        print_error(f"with_liger: error: {error}")
        return 1
    print("step   even digits: plain   Liger     seconds of learning: plain   Liger")
    for without, with_it in zip(plain, liger, strict=True):
        print(
            f"{without['step']:4.0f}{without['score']:21.3f}{with_it['score']:8.3f}"
            f"{without['seconds/learn']:31.3f}{with_it['seconds/learn']:8.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
