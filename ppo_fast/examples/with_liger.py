"""A small Llama learns by PPO without and with Liger's kernels for its layers: both curves, and seconds a step.

    python -m ppo_fast.examples.with_liger [--steps N] [--hidden N]

Liger's kernels need a GPU. Random weights; the reward is the share of even digits in the answer. The fused cross
entropy stays off: log-probabilities and loss are ppo_fast's. See ppo_fast/integrations/liger.md.
"""

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_fast.config import PPOConfig
from ppo_fast.errors import UserError
from ppo_fast.examples.arithmetic import make_tokenizer
from ppo_fast.trainer import PPOTrainer

INSTALL = "pip install liger-kernel"


def even_digits(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def add_liger(model: LlamaForCausalLM) -> None:
    """RMSNorm, SwiGLU and rotary embedding by Liger, and nothing at the LM head."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise UserError(f"this example needs liger-kernel: {INSTALL} ({error})") from error
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def train(config: PPOConfig, *, hidden: int, liger: bool) -> list[dict[str, float]]:
    """The metrics of each step; the same random weights, prompts and answers with and without Liger."""
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
    return [trainer.step() for _ in range(config.total_steps)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_liger", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20, help="PPO steps (default: 20)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model (default: 512)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("with_liger: error: Liger's kernels need a GPU, and torch finds none", file=sys.stderr)
        return 1
    config = PPOConfig(total_steps=options.steps, max_new_tokens=16, lr=1e-4, critic_lr=1e-4, quiet=True)
    try:  # Liger's rotary embedding replaces a function of transformers, so the run without it comes first
        curves = {name: train(config, hidden=options.hidden, liger=name == "Liger") for name in ("plain", "Liger")}
    except UserError as error:
        print(f"with_liger: error: {error}", file=sys.stderr)
        return 1
    print("step   even digits: plain   Liger     seconds of learning: plain   Liger")
    for plain, liger in zip(*curves.values(), strict=True):
        print(
            f"{plain['step']:4.0f}{plain['score']:21.3f}{liger['score']:8.3f}"
            f"{plain['seconds/learn']:31.3f}{liger['seconds/learn']:8.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
