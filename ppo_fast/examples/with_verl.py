"""One PPO step of verl's own workers on a CPU, with verl's arithmetic and then with ppo_fast's.

    pip install -e ".[train]" verl==0.9.1 tensordict==0.10.0 transformers==5.10.4 fastapi uvicorn
    python -m ppo_fast.examples.with_verl

A tiny Llama of random weights is the actor, another the critic; their answers are random tokens, and the reward is the
share of even digits. What a run with Ray, vLLM and GPUs does between two rollouts happens here in one process: verl's
TrainingWorker computes log-probabilities and values, its core_algos the advantages, and both workers learn. verl has
no platform for a CPU, but takes one that is described to it.
"""

import argparse
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, SupportsFloat, TypeAlias

from ppo_fast.examples.beside import Progress, announce, failed

announce(__name__, "One PPO step of verl's workers on a CPU, with verl's arithmetic and then with ppo_fast's")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

if TYPE_CHECKING:
    from tensordict import TensorDict
    from transformers import PreTrainedTokenizerBase
    from verl.workers.engine_workers import TrainingWorker

PROMPT, ANSWER, BATCH = 6, 8, 16
INSTALL = 'pip install -e ".[train]" verl==0.9.1 tensordict==0.10.0 transformers==5.10.4 fastapi uvicorn'


def use_cpu() -> None:
    """Describe a CPU to verl, before it looks for a GPU, and start a process group of one."""
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class Cpu(PlatformCUDA):
        """The part of verl's device interface that a worker calls; GPU memory, which it logs, is 0."""

        device_name = "cpu"
        device_module = SimpleNamespace(
            get_device_name=lambda: "CPU",
            mem_get_info=lambda: (0, 0),
            **dict.fromkeys(
                ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda: 0
            ),
        )

        def current_device(self) -> str:
            return "cpu"

        def communication_backend_name(self) -> str:
            return "gloo"

        def is_available(self) -> bool:
            return True

    platform_manager.set_platform(Cpu())
    import transformers
    import verl.utils.model

    verl.utils.model.load_valuehead_model = load_critic
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # its FSDP engine is registered for GPUs; the other lines are what Ray tells a worker
    told = {"VERL_ENGINE_DEVICE": "cuda", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def load_critic(local_path: str, torch_dtype: torch.dtype, model_config: object, trust_remote_code: bool) -> object:
    """Replace verl's function of these arguments, which requires flash-attn."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(local_path, dtype=torch_dtype, config=model_config)


def save_model(folder: Path) -> None:
    from ppo_fast.examples.arithmetic import make_model, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer).save_pretrained(folder)


def make_worker(kind: str, folder: Path, loss: object) -> "TrainingWorker":
    """verl's TrainingWorker for a language_model or a value_model, by FSDP2 on one process in fp32."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=4,
        infer_micro_batch_size_per_gpu=8,
    )
    config = TrainingWorkerConfig(
        model_type=kind,
        model_config=HFModelConfig(
            path=str(folder),
            use_remove_padding=False,  # that needs flash-attn
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=engine,
        # AdamW makes whole steps of gradients that are mere rounding; with SGD what is equal stays equal
        optimizer_config=FSDPOptimizerConfig(
            lr=0.1, optimizer="SGD", override_optimizer_config={}, total_training_steps=10
        ),
        checkpoint_config=CheckpointConfig(),
        profiler_config=None,
    )
    torch.manual_seed(0)  # the critic's new head
    worker = TrainingWorker(config)
    worker.reset()
    worker.set_loss_fn(loss)
    return worker


def rollout(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Tensor]:
    """Prompts, and answers of 1 to 8 random tokens, padded on the right."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.tensor(tokenizer([f"{10 + i}+{40 - i}=" for i in range(BATCH)])["input_ids"])
    responses = torch.randint(1, len(tokenizer), (BATCH, ANSWER), generator=draw)
    counted = torch.arange(ANSWER) < torch.randint(1, ANSWER + 1, (BATCH, 1), generator=draw)
    attention = torch.cat([torch.ones_like(prompts), counted.long()], 1)
    return {
        "prompts": prompts,
        "responses": responses.masked_fill(~counted, tokenizer.pad_token_id),
        "input_ids": torch.cat([prompts, responses.masked_fill(~counted, tokenizer.pad_token_id)], 1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": counted.long(),
    }


def step(folder: Path, *, loss_mode: str = "vanilla") -> tuple[dict[str, float], list[Tensor]]:
    """One PPO step as verl's RayPPOTrainer makes it: its metrics, and all weights afterwards."""
    from verl.trainer.ppo import core_algos
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig, CriticConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss, value_loss
    from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

    from ppo_fast.examples.arithmetic import make_tokenizer

    tokenizer = make_tokenizer()
    actor_config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=False,
        ppo_micro_batch_size_per_gpu=4,
        entropy_coeff=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="k3",
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    critic_config = CriticConfig(strategy="fsdp2", use_dynamic_bsz=False, ppo_micro_batch_size_per_gpu=4)
    workers = {
        "actor": make_worker("language_model", folder, partial(ppo_loss, config=actor_config)),
        "critic": make_worker("value_model", folder, partial(value_loss, config=critic_config)),
    }
    batch = rollout(tokenizer)

    def to_verl(names: dict[str, Tensor], **options: object) -> "TensorDict":
        data = left_right_2_no_padding(tu.get_tensordict({name: x.clone() for name, x in names.items()}))
        tu.assign_non_tensor(data, temperature=0.9, pad_token_id=tokenizer.pad_token_id, **options)
        return data

    judged = {}
    for name, wanted in (("actor", "log_probs"), ("critic", "values")):
        data = to_verl(batch, calculate_entropy=True, compute_loss=False)
        judged[wanted] = no_padding_2_padding(tu.get(workers[name].infer_batch(data), wanted), data).float()

    even = torch.tensor([token in "02468" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    mask = batch["response_mask"]
    score = (even[batch["responses"]] * mask).sum(1) / mask.sum(1)
    last = mask.cumsum(1).argmax(1, keepdim=True)
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    old_log_probs = judged["log_probs"] + 0.3 * noise  # as if the actor had learned already: some ratios are clipped
    reward = torch.zeros(mask.shape).scatter(1, last, score.unsqueeze(1))
    advantages, returns = core_algos.compute_gae_advantage_return(reward, judged["values"], mask, 1.0, 0.95)
    batch |= {"old_log_probs": old_log_probs, "ref_log_prob": judged["log_probs"], "values": judged["values"]}
    batch |= {"advantages": advantages * mask, "returns": returns * mask}

    metrics: dict[str, float] = {}
    for name, worker in workers.items():
        data = to_verl(batch, calculate_entropy=name == "actor", global_batch_size=8, mini_batch_size=8, seed=1)
        tu.assign_non_tensor(data, epochs=2, dataloader_kwargs={"shuffle": True}, compute_loss=True)
        for key, found in tu.get(worker.train_mini_batch(data), "metrics").items():
            if not key.startswith(("perf/", "mfu")) and key != "lr":
                numbers = torch.tensor(_flat(found))
                metrics[key if "/" in key else f"{name}/{key}"] = numbers.mean().item()
    weights = [p.detach().full_tensor() for worker in workers.values() for p in worker.engine.module.parameters()]
    return metrics, weights


class _Metric(Protocol):
    """A metric of verl, whose values are aggregated when it is read."""

    def aggregate(self) -> SupportsFloat: ...


_Found: TypeAlias = "SupportsFloat | _Metric | list[_Found] | tuple[_Found, ...]"


def _flat(found: _Found) -> list[float]:
    if isinstance(found, list | tuple):
        return [x for part in found for x in _flat(part)]
    return [float(found.aggregate() if hasattr(found, "aggregate") else found)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_verl", description=str(__doc__).split("\n")[0]
    )
    parser.parse_args(argv)
    try:
        use_cpu()
        from verl.workers import engine_workers  # noqa: F401 - imported before the patch, which looks for every place

        import ppo_fast.examples.arithmetic  # noqa: F401
        from ppo_fast.integrations import verl as fast
    except ImportError as error:
        return failed("with_verl", error, INSTALL)
    progress = Progress("step", 2)
    progress.show(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # engines that are missing
        save_model(Path(folder))
        with open(os.devnull, "w") as nowhere:  # what verl says of memory and schedules
            with redirect_stdout(nowhere):
                plain, plain_weights = step(Path(folder))
            progress.show(1)
            with fast.patch(), redirect_stdout(nowhere):
                ours, weights = step(Path(folder))
    progress.show(2)
    torch.distributed.destroy_process_group()
    print(f"{'':24}{'verl':>12}{'ppo_fast':>12}")
    for name in plain:
        print(f"{name:24}{plain[name]:12.6f}{ours[name]:12.6f}")
    apart = max((a - b).abs().max().item() for a, b in zip(plain_weights, weights, strict=True))
    print(f"largest difference of a weight after the step: {apart:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
