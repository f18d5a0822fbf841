"""Whole states of a sharded model and its AdamW: this project's, and those of torch.distributed.checkpoint.

    torchrun --standalone --nproc-per-node 2 bench/state_dicts.py [--rounds N] [--out FOLDER]

A Llama of 38M parameters with tied embeddings under FSDP2 in two processes on a CPU. Each way gathers whole tensors on
the CPU of the first process, in turn. Besides the time: bytes of the state, where tied weights are one tensor or two,
and what an optimizer that has not stepped yet (the actor's during the critic's warm-up) is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from json_lines import Writer
from static import git

import torch  # isort: skip  # after json_lines, which sets the wait policy

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_fast.common.text import markdown_table
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.optimizer import Optimizer
from ppo_fast.llm.sharding import full_state_dict

OUT = Path(__file__).parent / "results" / "cpu-2core" / "state_dicts"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}


def sharded_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16_000, tie_word_embeddings=True, **SHAPE))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def learn(model: nn.Module, optimizer: Optimizer) -> None:
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def milliseconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, call in ways.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            if number:
                found[name].append(round(1e3 * (time.perf_counter() - start), 2))
    return found


def mebibytes(state: dict[str, Tensor]) -> float:
    """The memory of a state, counting storages that several tensors share once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}
    return round(sum(storages.values()) / 2**20, 1)


def steps_of_new_optimizer(model: nn.Module) -> dict[str, list[float]]:
    """What each way holds as the step counts of an AdamW that has not stepped."""
    found = {}
    optimizer = Optimizer(model, 1e-3, PPOConfig())
    own = optimizer.state_dict()
    found["own"] = sorted({float(x) for key, x in own.items() if key.endswith("/step")})
    library = get_optimizer_state_dict(model, optimizer.adamw, options=WHOLE).get("state", {})
    found["library"] = sorted({float(x["step"]) for x in library.values()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = sharded_model()
    new = steps_of_new_optimizer(model)
    optimizer = Optimizer(model, 1e-3, PPOConfig())
    learn(model, optimizer)
    ways = {
        "model": {"own": lambda: full_state_dict(model), "library": lambda: get_model_state_dict(model, options=WHOLE)},
        "optimizer": {
            "own": optimizer.state_dict,
            "library": lambda: get_optimizer_state_dict(model, optimizer.adamw, options=WHOLE),
        },
    }
    times = {part: milliseconds(calls, given.rounds) for part, calls in ways.items()}
    memory = {name: mebibytes(call()) for name, call in ways["model"].items()}
    if dist.get_rank() == 0:
        writer = Writer(given.out / "state_dicts.jsonl", git("rev-parse", "HEAD"))
        writer.add({"ms": times, "model_mib": memory, "steps_of_new_optimizer": new, "rounds": given.rounds})
        write_page(given.out / "README.md", times, memory, new)
    dist.destroy_process_group()


def write_page(
    page: Path, times: dict[str, dict[str, list[float]]], memory: dict[str, float], new: dict[str, list[float]]
) -> None:
    names = {"own": "llm/sharding.py", "library": "torch.distributed.checkpoint.state_dict"}
    rows = []
    for name, title in names.items():
        model, adam = (f"{statistics.median(times[part][name]):.0f}" for part in ("model", "optimizer"))
        steps = ", ".join(f"{x:g}" for x in new[name]) or "none"
        rows.append([title, model, adam, f"{memory[name]:g}", steps])
    heading = (
        "way",
        "model, ms",
        "AdamW, ms",
        "MiB of the model's state",
        "step counts of an AdamW that has not stepped",
    )
    table = markdown_table(heading, rows, align="---:")
    print(table)
    page.write_text(
        "# Whole states of a sharded model\n\n"
        "Made by `torchrun --standalone --nproc-per-node 2 bench/state_dicts.py`: medians, the two ways in turn; raw\n"
        "figures in state_dicts.jsonl. The library keeps tied weights twice. It also gives an optimizer that has not\n"
        "stepped a step count of 1, which would change Adam's bias correction after `--resume`.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    main()
