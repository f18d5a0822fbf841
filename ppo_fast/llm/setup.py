"""The steps by which `PPOTrainer` begins: checks of its arguments, of the processes and of the memory."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from ppo_fast.common.device import choose_dtype, has_weights, total_memory
from ppo_fast.common.errors import UserError
from ppo_fast.common.heap import keep_freed_memory
from ppo_fast.common.lock import absolute
from ppo_fast.common.threads import set_threads
from ppo_fast.llm.checks import notes_on_rewards
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import prompt_ids, prompts_of, with_all_fields
from ppo_fast.llm.distributed import Distributed
from ppo_fast.llm.generate import GenerateOptions, GenerateSampler
from ppo_fast.llm.hashes import rows_hash, tokenizer_hash
from ppo_fast.llm.memory import CannotEstimate, check_fits, why_unknown, with_adapters_of
from ppo_fast.llm.models.build import Models
from ppo_fast.llm.models.head import LanguageModel, input_embedding, unwrap_peft
from ppo_fast.llm.models.loading import check_language_model, check_others, check_tokenizer, end_tokens
from ppo_fast.llm.models.policy import Policy, with_chunk_bytes
from ppo_fast.llm.models.probe import Reach, named_lengths
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.models.weights import weights_hash
from ppo_fast.llm.reward.fingerprint import reward_fingerprint
from ppo_fast.llm.reward.scoring import RewardFunction
from ppo_fast.llm.sample import drop_long_prompts
from ppo_fast.llm.sampler import Sampler, check_sampler

Rows = list[dict[str, object]]


def check_arguments(
    models: Models, tokenizer: PreTrainedTokenizerBase, config: PPOConfig, sampler: Sampler | None
) -> None:
    """Reject models, tokenizers and samplers that cannot be used, before anything is changed."""
    check_language_model(models.actor)
    check_tokenizer(tokenizer, models.actor)
    check_others(tokenizer, config, models.critic, models.reference)
    if config.dump_rollouts and config.out is None:
        raise UserError("dump_rollouts needs out, the folder of the run, in which rollouts are written")
    if sampler is not None:
        check_sampler(sampler)


def prepare_process(config: PPOConfig) -> PPOConfig:
    """Seed all generators, set threads, precision and malloc; return the options with an absolute `out`."""
    transformers.set_seed(config.seed)  # torch, and numpy and random, which rewards may use
    if config.out is not None:  # a reward that changes the working directory must not move it
        config = dataclasses.replace(config, out=str(absolute(config.out)))
    set_threads(config.threads)
    keep_freed_memory()
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    return config


def check_compiler(config: PPOConfig, distributed: Distributed) -> None:
    """Reject layers that cannot be compiled here, before anything is computed."""
    if not config.compile_layers:
        return
    if distributed.strategy == "fsdp":
        raise UserError("compile_layers does not work under fsdp: leave it out, or use --parallel ddp")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as PyTorch takes it
    if distributed.device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"compile_layers needs the C++ compiler {compiler}: install it, or name another one in CXX")


def decide_dtype(config: PPOConfig, distributed: Distributed) -> tuple[PPOConfig, list[str]]:
    """The options with the dtype that `auto` becomes, the same in all processes, and notes."""
    dtype, note = distributed.run_on_main(lambda: choose_dtype(config.dtype, distributed.device))
    return dataclasses.replace(config, dtype=dtype), [note] if note else []


def check_processes(
    distributed: Distributed,
    models: Models,
    sampler: Sampler | None,
    rows: Rows,
    eval_rows: Rows | None,
    reward_weights: dict[str, float],
) -> None:
    """Reject processes that differ in what all of them compute with, and an actor without weights."""
    if distributed.size > 1:
        distributed.check_equal(
            {
                "the prompts or their order": rows_hash(rows),
                "the held-out prompts or their order": rows_hash(eval_rows or []),
                "the rewards": list(reward_weights),
                "the weights of the rewards": reward_weights,
            }
        )
        given = {"a critic": models.critic, "a reference": models.reference, "a sampler": sampler}
        has = {f"whether there is {name}": x is not None for name, x in given.items()}
        distributed.check_equal(has | {"whether the actor has adapters": is_adapted(models.actor)})
    if not has_weights(models.actor) and (distributed.is_main or distributed.strategy != "fsdp"):
        raise UserError(
            "the actor has no weights: load it with weights; under parallel = fsdp all processes but the first can"
            " do without"
        )


@dataclass(frozen=True)
class RunHashes:
    """Hashes of what a run starts with, as far as it needs them: for checkpoints, and to compare processes."""

    start_model: str = ""
    tokenizer: str = ""
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)  # by name


def hash_run(
    config: PPOConfig,
    distributed: Distributed,
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: dict[str, RewardFunction],
) -> tuple[RunHashes, list[str]]:
    """The hashes of a run, and notes on rewards that differ between processes. Collective.

    Raises:
        UserError: the tokenizer differs between processes.
    """
    start_model = ""
    if config.out is not None:
        start_model = distributed.run_with_weights(lambda: weights_hash(actor), of=actor)
    if config.out is None and distributed.size == 1:
        return RunHashes(), []
    tokenizer_ = tokenizer_hash(tokenizer, end_tokens(tokenizer, actor))
    code = {name: reward_fingerprint(f, weights_hash) for name, f in rewards.items()}
    distributed.check_equal({"the tokenizer, the chat template or the end tokens": tokenizer_})
    return RunHashes(start_model, tokenizer_, code), notes_on_rewards(distributed.all_gather_object(code))


def usable_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, models: Models, config: PPOConfig) -> tuple[Rows, int]:
    """Rows that have the same fields and whose prompts leave room for a completion, and how many were left out."""
    others = (models.critic_backbone(), models.reference)
    return drop_long_prompts(with_all_fields(rows), tokenizer, models.actor, config, *others)


def check_memory(
    config: PPOConfig, distributed: Distributed, models: Models, tokenizer: PreTrainedTokenizerBase, rows: Rows
) -> list[str]:
    """Reject a run that needs more memory than the GPU has, before the models are moved there; return notes.

    A critic or reference that is given, which may be of any size, is not counted.
    """
    actor, capacity = models.actor, total_memory(distributed.device)
    if capacity is None or not config.check_memory:
        return []
    reason = why_unknown(actor)
    if reason is not None:
        return [f"the peak memory is not calculated: {reason}"]
    weight = input_embedding(actor)
    config = with_chunk_bytes(config, weight.shape[0], capacity)
    config = config if models.critic is None else dataclasses.replace(config, critic="shared")
    config = config if models.reference is None else dataclasses.replace(config, kl_coef=0.0)
    if is_adapted(actor):
        config = with_adapters_of(actor, config)
    longest = max(map(len, prompt_ids(tokenizer, prompts_of(rows))))
    try:
        check_fits(
            unwrap_peft(actor).config,
            config,
            longest,
            capacity,
            parameters=sum(p.numel() for p in actor.parameters()),
            processes=distributed.size if distributed.strategy == "fsdp" else 1,
            dtype=weight.dtype,
        )
    except CannotEstimate as error:
        return [str(error)]
    return []


def reach_of(
    config: PPOConfig,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    eval_rows: Callable[[], Rows],
) -> Reach:
    """How long the run's sequences become, and how much a step computes; counted only if a model's configuration
    names a length that sequences may exceed."""
    given = [x for x in (models.actor, models.reference, models.critic_backbone()) if x is not None]
    if not any(named_lengths(model, sys.maxsize) for model in given):
        return Reach()
    prompts = prompt_ids(tokenizer, prompts_of(rows + eval_rows()))
    longest = max(map(len, prompts)) + config.max_new_tokens
    sequences = config.prompts_per_step * config.samples_per_prompt
    # sampling and old log-probabilities are one pass each, an update is three
    return Reach(longest, sequences * longest * (2.0 + 3 * config.epochs))


def own_sampler(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, config: PPOConfig, distributed: Distributed
) -> GenerateSampler:
    """The sampler that calls the actor's own `generate`."""
    options = GenerateOptions.from_config(config, head=policy.head)
    return GenerateSampler(
        policy.actor,
        tokenizer,
        dataclasses.replace(options, call=policy.generate),
        batch_size=config.sample_batch_size,
        info=policy.generate_info,
        distributed=distributed,
    )
