"""The table of peak memory of a PPO step, by calculation: models of Qwen2.5's sizes on GPUs of 24, 80 and 141 GB.

    python bench/memory_table.py --write    # bench/results/memory/table.md and table.json

Nothing is measured: see ppo_fast/llm/memory.py, and tests/accelerator/test_memory.py, which compares the calculation
with what tensors hold.
"""

import argparse
import datetime
import json
from pathlib import Path

import json_lines  # noqa: F401  # before torch
import torch
import transformers
from static import git
from transformers import Qwen2Config

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.memory import Estimate, estimate
from ppo_fast.llm.models.policy import with_chunk_bytes

OUT = Path(__file__).parent / "results" / "memory"
SHAPES = {  # width, inner width, layers, heads, groups, tied head; from the models' published config.json
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False),
}
GPUS = (24, 80, 141)  # GB, of 10^9 bytes
PROMPT = 256
VARIANTS = {  # of options
    "all weights": {},
    "all weights, shared critic, checkpointing": {"critic": "shared", "gradient_checkpointing": True},
    "LoRA": {"lora_rank": 16},
    "LoRA, checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
}


def model_config(name: str) -> Qwen2Config:
    width, inner, layers, heads, groups, tied = SHAPES[name]
    return Qwen2Config(
        vocab_size=151936 if tied else 152064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )


def config(**options: object) -> PPOConfig:
    return PPOConfig(dtype="bfloat16", max_new_tokens=512, prompts_per_step=64, **options)  # type: ignore[arg-type]


def cells(found: dict[int, Estimate]) -> list[str]:
    """The parts at the peak of the largest GPU, and for each GPU the peak and whether it fits."""
    largest = found[max(found)]
    parts = largest.phases[largest.largest_phase]
    names = ("weights", "weights in bfloat16", "gradients", "optimizer", "activations", "logits")
    cache = largest.phases["last token"]["key-value cache"]
    gib = [f"{x / 2**30:.1f}" for x in (*(parts.get(name, 0) for name in names), cache)]
    peaks = [
        f"{x.peak / 2**30:.1f}" + (" fits" if x.peak <= gb * 10**9 else " does not fit") for gb, x in found.items()
    ]
    return [*gib, *peaks]


def rows() -> dict[tuple[str, str], dict[int, Estimate]]:
    made = {}
    for name in SHAPES:
        for variant, options in VARIANTS.items():
            model, plain = model_config(name), config(**options)
            chunked = {gb: with_chunk_bytes(plain, model.vocab_size, gb * 10**9) for gb in GPUS}
            by_chunk = {c.chunk_bytes: estimate(model, c, PROMPT) for c in chunked.values()}
            made[name, variant] = {gb: by_chunk[c.chunk_bytes] for gb, c in chunked.items()}
    return made


def markdown(made: dict[tuple[str, str], dict[int, Estimate]]) -> str:
    heading = ["model", "trained", "weights", "in bf16", "gradients", "AdamW", "activations", "logits", "KV cache"]
    heading += [f"peak on {gb} GB" for gb in GPUS]
    lines = [heading, ["---"] * 2 + ["---:"] * (len(heading) - 2)]
    lines += [[name, variant, *cells(found)] for (name, variant), found in made.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a PPO step, by calculation.")
    parser.add_argument("--write", action="store_true", help=f"write {OUT}")
    given = parser.parse_args()
    about = {
        "command": "python bench/memory_table.py --write",
        "commit": git("rev-parse", "--short", "HEAD") + (", changed" if git("status", "--porcelain") else ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    made = rows()
    text = markdown(made)
    print(text)
    if given.write:
        write(made, text, about)


def write(made: dict[tuple[str, str], dict[int, Estimate]], text: str, about: dict[str, str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    found = [
        {"model": name, "trained": variant, "gpu_gb": gb, "peak": x.peak, "phases": x.phases}
        for (name, variant), by_gpu in made.items()
        for gb, x in by_gpu.items()
    ]
    OUT.joinpath("table.json").write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    page = f"""# Peak memory of a PPO step, by calculation

Made by `{about["command"]}`. Commit {about["commit"]}, {versions}, {about["date"]}. Calculated by
`ppo_fast/llm/memory.py`, not measured; `tests/accelerator/test_memory.py` compares the calculation with what tensors
hold at small sizes (within 10 %).

`--dtype bfloat16` (autocast on fp32 weights), 64 prompts of up to {PROMPT} tokens, answers of up to 512, packs of 4096
tokens, a critic of its own unless shared, and a reference (with LoRA the actor without its adapters). GiB, at the peak
of the step on the largest GPU; the KV cache is full at the end of sampling, which is not the peak. A GB is 10^9 bytes.
The CUDA context (about 0.5 GiB), workspaces and fragmentation come on top. On a smaller GPU chunks of logits are
smaller.

{text}
"""
    OUT.joinpath("table.md").write_text(page)
    print(f"table.json and table.md are in {OUT}")


if __name__ == "__main__":
    main()
