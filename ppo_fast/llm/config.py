"""Every option of the trainer in one dataclass, each field with its unit and the source of its default; and YAML."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import field_validator
from pydantic.dataclasses import dataclass

from ppo_fast.common.errors import UserError
from ppo_fast.common.options import (
    STRICT,
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    Strings,
    Threads,
    checked_options,
    options,
    plain_value,
    setting,
)

DEFAULT_LAM = 0.95  # of `lam`, without lam_length_alpha
DtypeOption = Literal["float32", "bfloat16", "float16", "auto"]


@checked_options
@dataclass(config=STRICT)
class PPOConfig:
    """Options of `PPOTrainer`. Defaults follow TRL's and OpenAI's PPO for language models where nothing else is named.

    >>> PPOConfig(total_steps=10).total_steps
    10
    >>> PPOConfig(gamma=1.5)
    Traceback (most recent call last):
    ppo_fast.common.errors.UserError: gamma must be in [0, 1], got 1.5
    """

    # The loop
    total_steps: Count = setting(100, "PPO steps: rounds of sample, reward, learn")
    prompts_per_step: Count = setting(64, "prompts sampled in each step, by all processes together")
    samples_per_prompt: Count = setting(1, "responses sampled for each prompt")
    seed: Seed = setting(0, "seed of everything random: data order, sampling, minibatches")

    # Models
    dtype: DtypeOption = setting(
        "auto",
        "compute; trained weights and optimizer stay fp32 (bfloat16: autocast on fp32 master weights; float16: the"
        " same with a loss scale, for GPUs without bfloat16; auto: bfloat16 where a measurement at the start finds it"
        " at least 1.5 times as fast, else float32)",
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "storage of the frozen weights of linear layers (and of embeddings and LM heads that it does not round): the"
        " base of LoRA adapters, the reference, --reward-model;"
        " bfloat16 with another dtype rounds them, and widens one layer at a time; auto: bfloat16 under dtype ="
        " bfloat16, else unchanged (under fsdp unchanged)",
    )
    head_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "operands of the LM head's products, in sampling, scoring and loss alike; its logits are fp32; auto: bfloat16"
        " under dtype = bfloat16, else float32",
    )
    critic: Literal["own", "shared"] = setting("own", "own: a separate backbone; shared: a value head on the actor")
    critic_warmup_steps: NonNegativeInt = setting(0, "number of first steps in which only the critic is trained")
    gradient_checkpointing: bool = setting(False, "recompute layers in backward: less memory, more time")
    lora_rank: NonNegativeInt = setting(
        0, "rank of LoRA adapters for actor and critic, through peft; 0: train all weights"
    )
    lora_alpha: Count = setting(16, "alpha of LoRA: adapters are scaled by alpha / rank")
    lora_targets: str = setting("all-linear", "modules that get adapters: all-linear, or comma-separated names")
    strict: bool = setting(False, "reject a model that cannot be trained on packed rows and hidden states")

    # Sampling
    max_prompt_tokens: Count | None = setting(None, "longer prompts are left out, in tokens; none: the model's limit")
    max_new_tokens: Count = setting(64, "longest response, in tokens")
    temperature: Annotated[float, Ge(1e-06)] = setting(1.0, "sampling temperature; the training pass uses the same")
    top_k: NonNegativeInt = setting(0, "sample from the k most likely tokens only; 0: from all")
    top_p: Annotated[float, Ge(1e-06), Le(1.0)] = setting(
        1.0, "sample from the most likely tokens that have this probability together"
    )
    min_p: Fraction = setting(
        0.0, "sample only from tokens with at least this fraction of the probability of the most likely token"
    )
    stop: Strings = setting((), "texts that end a response, besides the end token; they are part of it")
    sample_batch_size: Count = setting(256, "responses generated together")
    max_sampler_gap: Positive | None = setting(
        0.2,
        "end the run with an error if the sampler's log-probabilities differ from the trainer's by this on average"
        " (nats per token), or by five times this in one token of a hundred; checked in the first step and in"
        " evaluations; none: a warning only",
    )

    # Reward
    kl_coef: NonNegative = setting(0.05, "weight of the KL penalty to the reference; 0: no reference is kept")
    kl_in: Literal["reward", "loss"] = setting(
        "reward", "where the penalty is added: to each token's reward, or to the loss"
    )
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = setting("k1", "estimator of the KL per token in the reward")
    kl_loss_estimator: Literal["k1", "k2", "k3", "abs"] = setting(
        "k2", "estimator of the KL per token in the loss, where only k2 has an unbiased gradient"
    )
    kl_controller: Literal["fixed", "adaptive"] = setting(
        "fixed", "kl_coef is fixed, or is controlled to reach kl_target (Ziegler et al. 2019)"
    )
    kl_target: Annotated[float, Ge(1e-06)] = setting(6.0, "adaptive: target KL per response, in nats")
    kl_horizon: Annotated[float, Ge(1.0)] = setting(
        10000.0, "adaptive: number of responses over which kl_coef may change by a factor"
    )
    score_clip: Positive | None = setting(
        None, "scores are clipped to +- this, before missing_eos_penalty; none: not clipped"
    )
    missing_eos_penalty: NonNegative = setting(0.0, "subtracted from the score of a response that max_new_tokens cut")

    # Advantages
    gamma: Fraction = setting(1.0, "discount per token")
    lam: Fraction | None = setting(
        None, "lambda of GAE (Schulman et al. 2016); none: 0.95, or that of each answer with lam_length_alpha"
    )
    critic_lam: Fraction | None = setting(
        None, "lambda of the critic's targets (decoupled GAE, Yuan et al. 2025, arXiv 2503.01491); none: as lam"
    )
    lam_length_alpha: Positive | None = setting(
        None,
        "lambda of an answer is max(0, 1 - 1 / (this * its sampled tokens)) (VAPO, arXiv 2504.05118, with 0.05); none:"
        " lam for all answers",
    )
    bootstrap_truncated: bool = setting(
        False, "bootstrap a response that max_new_tokens cut with the critic's value of its end (else: with 0)"
    )
    importance_cap: Positive | None = setting(
        None, "policy terms are weighted by min(p_trainer / p_sampler, this), if the sampler returns its probabilities"
    )
    whiten_advantages: bool = setting(True, "normalize advantages to mean 0 and variance 1 over the rollout")

    # Values
    normalize_values: bool = setting(
        True,
        "the critic's head predicts (return - mean) / std with a moving mean and std of the returns (PopArt), and"
        " whitening does not amplify advantages when the scores of a run have become equal",
    )
    value_scale_horizon: Annotated[float, Ge(1.0)] = setting(
        20.0,
        "PPO steps over which that mean and std are averaged (1: those of the last rollout): with 64 answers in each,"
        " the std is known to about 2 %, and follows the policy within a fifth of 100 steps",
    )

    # Learning
    epochs: Count = setting(4, "passes over each rollout")
    minibatches: Count = setting(4, "optimizer steps in each epoch")
    micro_batch_tokens: Count = setting(4096, "tokens in one forward and backward pass; does not change the result")
    target_kl: Positive | None = setting(
        None, "a minibatch with a larger approx_kl (nats per token) ends the actor's part of the step"
    )
    lr: NonNegative = setting(1e-6, "learning rate of the actor (verl's default)")
    critic_lr: NonNegative = setting(1e-5, "learning rate of the critic (verl's default)")
    lr_schedule: Literal["constant", "linear", "cosine"] = setting("linear", "learning rate over the steps of the run")
    warmup_ratio: Fraction = setting(0.03, "fraction of the steps in which the learning rate rises from 0")
    weight_decay: NonNegative = setting(0.0, "weight decay of AdamW, for matrices only: not for norms and biases")
    adam_eps: NonNegative = setting(
        1e-8, "AdamW's epsilon (its authors' value; 1e-5, used in PPO on small networks, slows large models down)"
    )
    adam_beta1: Annotated[float, Ge(0.0), Le(0.9999999)] = setting(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: Annotated[float, Ge(0.0), Le(0.9999999)] = setting(
        0.999, "AdamW's decay of the mean of squared gradients"
    )
    max_grad_norm: Positive | None = setting(
        1.0, "gradients of actor and critic are each clipped to this norm; none: not clipped"
    )

    # Loss (the options of ppo_fast.ppo_loss)
    clip_low: Fraction = setting(0.2, "ratio clipped from below at 1 - this")
    clip_high: NonNegative = setting(0.2, "ratio clipped from above at 1 + this")
    dual_clip: Annotated[float, Gt(1.0)] | None = setting(
        None, "bound c > 1 of the ratio at negative advantages (dual clip)"
    )
    value_clip: Positive | None = setting(
        0.2,
        "clip range of the values per rollout, in units of the std of returns (without normalize_values: of the reward)"
        "; none: not clipped",
    )
    value_coef: NonNegative = setting(0.5, "weight of the value loss")
    entropy_coef: NonNegative = setting(0.0, "weight of the entropy bonus")
    entropy_target: Positive | None = setting(
        None, "target entropy per token, in nats: entropy_coef rises below it and falls above it (He et al. 2025)"
    )
    entropy_step: NonNegative = setting(0.0005, "with entropy_target: change of entropy_coef in each step")
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        setting("token-mean", "how the losses of tokens are reduced to one number")
    )

    # Evaluation, on held-out prompts
    eval_every: NonNegativeInt = setting(
        0, "evaluate every n steps, before the first and after the last; 0: before and after only"
    )
    eval_samples: Count = setting(1, "responses sampled for each held-out prompt in an evaluation")

    eval_greedy: bool = setting(False, "take the most likely tokens for held-out prompts instead of sampling")

    # Machine and output
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    threads: Threads = setting(0, "PyTorch's threads on the CPU, in each process; 0: as many as it chooses")
    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "with several processes under torchrun: ddp, a full model in each; fsdp, weights and optimizer in shards; auto:"
        " ddp",
    )
    gather_for_sampling: bool = setting(
        True, "under fsdp gather the whole weights of the actor for sampling (else: each layer for each token)"
    )
    process_timeout: Positive = setting(
        1800.0, "with several processes: seconds to wait for a process before an error names it"
    )
    backend: Literal["auto", "triton", "torch"] = setting("auto", "implementation of losses and advantages")
    tf32: bool = setting(False, "multiply fp32 matrices in TF32 on a GPU: faster, with 10 bits of mantissa")
    compile_layers: bool = setting(
        False,
        "run the decoder layers under torch.compile in scoring and learning: faster, after a minute of compilation; not"
        " under fsdp",
    )
    chunk_bytes: Count | None = setting(
        None,
        "memory for the logits of one chunk and their gradients, in bytes; none: for 4096 tokens, and on a GPU at most"
        " a sixteenth of its memory",
    )
    check_memory: bool = setting(
        True, "reject a run whose calculated peak memory exceeds that of the GPU (see ppo-fast memory)"
    )
    cudnn_attention: bool = setting(
        False, "allow cuDNN attention in PyTorch, which makes a new plan for each shape (only bench/on_gpu.sh needs it)"
    )
    out: str | None = setting(None, "folder for metrics, TensorBoard events, samples and the model")
    tensorboard: bool = setting(True, "write TensorBoard events to OUT/tensorboard")
    save_every: NonNegativeInt = setting(
        20, "write a checkpoint to OUT/checkpoints every n steps, from which --resume continues; 0: only when stopped"
    )
    keep_checkpoints: Count = setting(2, "number of newest checkpoints to keep; each holds weights and optimizer")
    dump_rollouts: bool = setting(
        False, "write each step's answers, with values, rewards and advantages, to OUT/rollouts, for ppo-fast critic"
    )
    merge_adapters: bool = setting(False, "save a full model instead of its LoRA adapters")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "dtype of the weights in OUT/model and OUT/best; auto: that of the start model's folder, and fp32 for adapters"
        " and models from Python (checkpoints are fp32)",
    )
    show_samples_every: NonNegativeInt = setting(
        10, "show a table of responses every n steps; 0: never, also not for evaluations"
    )
    quiet: bool = setting(False, "print nothing but errors")

    _plain_values = field_validator("*", mode="before")(plain_value)

    def __post_init__(self) -> None:
        """Check combinations of options, after each option by itself; also after an assignment."""
        rollout = self.prompts_per_step * self.samples_per_prompt
        if rollout < self.minibatches:
            raise UserError(
                f"minibatches must be at most prompts_per_step * samples_per_prompt = {rollout}, got {self.minibatches}"
            )
        if self.eval_greedy and self.eval_samples > 1:
            raise UserError(f"eval_greedy gives each prompt one answer, but eval_samples is {self.eval_samples}")
        if self.lam is None and self.lam_length_alpha is None:
            self.__dict__["lam"] = DEFAULT_LAM  # not an assignment, which would check everything again
        if self.lam is not None and self.lam_length_alpha is not None:
            raise UserError(
                f"lam is {self.lam} for all answers, but lam_length_alpha = {self.lam_length_alpha} computes a lambda"
                " for each: set one of them to none"
            )


def options_of(values: Mapping[str, object]) -> PPOConfig:
    """Make a PPOConfig from values as YAML has them: "none" for None, and 1e-6, which is a string in YAML 1.1."""
    converted = dict(values)
    for name, option in options(PPOConfig).items():
        value = values.get(name)
        if value == "none" and option.optional:  # as on the command line
            converted[name] = None
        elif isinstance(value, str) and option.kind is float:
            try:
                converted[name] = float(value)
            except ValueError:
                continue  # PPOConfig names the option and the expected type
    make: Callable[..., PPOConfig] = PPOConfig  # it checks the types of its arguments
    return make(**converted)


def yaml_text(config: PPOConfig, others: Mapping[str, object]) -> str:
    """Return the resolved configuration as YAML: `others` (model, data and rewards of a run) and every option."""
    import yaml

    resolved = {**others, **dataclasses.asdict(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in resolved.items()}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    head = "# Every option of this run. To use them again: ppo-fast train --config THIS_FILE --out ANOTHER_FOLDER\n"
    return head + text
