"""Every option of the trainer: one dataclass, each field with its unit and where its default comes from; and YAML."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ppo_fast.common.errors import UserError
from ppo_fast.common.options import MAX_SEED, check_setting, plain_value, setting


@dataclass
class PPOConfig:
    """Options of `PPOTrainer`. Defaults follow TRL's and OpenAI's PPO for language models where nothing else is named.

    >>> PPOConfig(total_steps=10).total_steps
    10
    >>> PPOConfig(gamma=1.5)
    Traceback (most recent call last):
    ppo_fast.common.errors.UserError: gamma must lie in [0, 1], got 1.5
    """

    # The loop
    total_steps: int = setting(100, "PPO steps: rounds of sample, reward, learn", 1)
    prompts_per_step: int = setting(64, "prompts sampled in each step, by all processes together", 1)
    samples_per_prompt: int = setting(1, "answers sampled for each prompt", 1)
    seed: int = setting(0, "seed of everything random: data order, sampling, minibatches", 0, MAX_SEED)

    # Models
    dtype: str = setting(
        "float32",
        "compute; weights and optimizer stay fp32 (bfloat16: autocast on fp32 master weights; auto: the faster one,"
        " on a CPU by a measurement at the start)",
        choices=("float32", "bfloat16", "auto"),
    )
    critic: str = setting(
        "own", "own: a backbone of its own; shared: a value head on the actor", choices=("own", "shared")
    )
    critic_warmup_steps: int = setting(0, "first steps in which only the critic learns", 0)
    gradient_checkpointing: bool = setting(False, "recompute layers in backward: less memory, more time")
    lora_rank: int = setting(0, "rank of LoRA adapters for actor and critic, through peft; 0: train all weights", 0)
    lora_alpha: int = setting(16, "LoRA's alpha: adapters are scaled by alpha / rank", 1)
    lora_targets: str = setting("all-linear", "modules that get adapters: all-linear, or names with commas between")
    strict: bool = setting(False, "refuse a model that cannot learn from packed rows and hidden states")

    # Sampling
    max_prompt_tokens: int | None = setting(None, "longer prompts are left out, in tokens; none: the model's limit", 1)
    max_new_tokens: int = setting(64, "longest answer, in tokens", 1)
    temperature: float = setting(1.0, "sampling temperature; the learning pass uses the same", 1e-6)
    top_k: int = setting(0, "sample from the k likeliest tokens only; 0: from all", 0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this probability", 1e-6, 1.0)
    min_p: float = setting(
        0.0, "sample from the tokens with at least this share of the likeliest one's probability only", 0.0, 1.0
    )
    stop: tuple[str, ...] = setting((), "texts that end an answer, besides the end token; they belong to it")
    sample_batch_size: int = setting(256, "answers generated at once", 1)
    max_sampler_gap: float | None = setting(
        0.2,
        "a run ends with an error where the sampler's log-probabilities differ from the trainer's by this on average"
        " (nats per token), or by five times this in one token of a hundred; checked in the first step and in"
        " evaluations; none: a warning only",
        above=0.0,
    )

    # Reward
    kl_coef: float = setting(0.05, "weight of the KL penalty to the reference; 0: no reference is kept", 0.0)
    kl_in: str = setting(
        "reward", "where the penalty stands: in each token's reward, or in the loss", choices=("reward", "loss")
    )
    kl_estimator: str = setting("k1", "estimator of KL per token in the reward", choices=("k1", "k2", "k3", "abs"))
    kl_loss_estimator: str = setting(
        "k2", "and in the loss, where only k2 has an unbiased gradient", choices=("k1", "k2", "k3", "abs")
    )
    kl_controller: str = setting(
        "fixed", "kl_coef stays, or is driven towards kl_target (Ziegler et al. 2019)", choices=("fixed", "adaptive")
    )
    kl_target: float = setting(6.0, "adaptive: KL per answer to aim at, in nats", 1e-6)
    kl_horizon: float = setting(10000.0, "adaptive: answers over which kl_coef may change by a factor", 1.0)
    score_clip: float | None = setting(
        None, "scores are clamped to +- this, before missing_eos_penalty; none: they are not", above=0.0
    )
    missing_eos_penalty: float = setting(0.0, "subtracted from the score of an answer cut by max_new_tokens", 0.0)

    # Advantages
    gamma: float = setting(1.0, "discount per token", 0.0, 1.0)
    lam: float = setting(0.95, "lambda of GAE (Schulman et al. 2016)", 0.0, 1.0)
    bootstrap_truncated: bool = setting(
        False, "an answer cut by max_new_tokens goes on: the critic's value of its end counts (else: worth 0)"
    )
    importance_cap: float | None = setting(
        None, "policy terms are weighted by min(p_trainer / p_sampler, this), if the sampler tells its p", above=0.0
    )
    whiten_advantages: bool = setting(True, "advantages to mean 0 and variance 1 over the rollout")

    # Learning
    epochs: int = setting(4, "passes over each rollout", 1)
    minibatches: int = setting(4, "optimizer steps in each epoch", 1)
    micro_batch_tokens: int = setting(4096, "tokens in one forward and backward pass; does not change the result", 1)
    target_kl: float | None = setting(
        None, "a minibatch with a larger approx_kl (nats per token) ends the actor's part of the step", above=0.0
    )
    lr: float = setting(1e-6, "learning rate of the actor (verl's default)", 0.0)
    critic_lr: float = setting(1e-5, "learning rate of the critic (verl's default)", 0.0)
    lr_schedule: str = setting(
        "linear", "learning rate over the steps of the run", choices=("constant", "linear", "cosine")
    )
    warmup_ratio: float = setting(0.03, "share of the steps in which the learning rate rises from 0", 0.0, 1.0)
    weight_decay: float = setting(0.0, "AdamW's weight decay, of matrices only: not of norms and biases", 0.0)
    adam_eps: float = setting(
        1e-8, "AdamW's epsilon (its authors' value; 1e-5, of PPO on small networks, slows large models down)", 0.0
    )
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean of gradients", 0.0, 0.9999999)
    adam_beta2: float = setting(0.999, "AdamW's decay of the mean of squared gradients", 0.0, 0.9999999)
    max_grad_norm: float | None = setting(
        1.0, "gradients of actor and critic are each clipped to this norm; none: they are not", above=0.0
    )

    # Loss (the options of ppo_fast.ppo_loss)
    clip_low: float = setting(0.2, "ratio clipped from below at 1 - this", 0.0, 1.0)
    clip_high: float = setting(0.2, "ratio clipped from above at 1 + this", 0.0)
    dual_clip: float | None = setting(None, "bound c > 1 of the loss at negative advantages", above=1.0)
    value_clip: float | None = setting(
        0.2, "how far a value moves per rollout before its gradient stops; none: any distance", above=0.0
    )
    value_coef: float = setting(0.5, "weight of the value loss", 0.0)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", 0.0)
    entropy_target: float | None = setting(
        None,
        "entropy per token to hold, in nats: entropy_coef rises below and falls above it (He et al. 2025)",
        above=0.0,
    )
    entropy_step: float = setting(0.0005, "with entropy_target: by how much, each step", 0.0)
    aggregation: str = setting(
        "token-mean",
        "how token losses become one",
        choices=("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    )

    # Evaluation, on held-out prompts
    eval_every: int = setting(
        0, "evaluate every n steps, before the first and after the last; 0: before and after only", 0
    )
    eval_samples: int = setting(1, "answers sampled for each held-out prompt in an evaluation", 1)

    eval_greedy: bool = setting(False, "answer held-out prompts with the likeliest tokens instead of sampling")

    # Machine and output
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    threads: int = setting(0, "PyTorch's threads on the CPU, in each process; 0: as many as it chooses", 0, 4096)
    parallel: str = setting(
        "auto",
        "with several processes under torchrun: ddp, a model in each; fsdp, weights and optimizer divided; auto: ddp",
        choices=("auto", "ddp", "fsdp"),
    )
    gather_for_sampling: bool = setting(
        True,
        "under fsdp each process holds the actor's whole weights while it samples (else: each layer for each token)",
    )
    process_timeout: float = setting(
        1800.0, "with several processes: seconds after which one that does not come is named in an error", above=0.0
    )
    backend: str = setting("auto", "arithmetic of the losses", choices=("auto", "triton", "torch"))
    tf32: bool = setting(False, "multiply fp32 matrices in TF32 on a GPU: faster, with 10 bits of mantissa")
    chunk_bytes: int | None = setting(
        None,
        "memory for the logits of one chunk and their gradients, in bytes; none: for 4096 tokens, and on a GPU at most"
        " a sixteenth of its memory",
        1,
    )
    check_memory: bool = setting(
        True, "refuse a run whose peak memory by calculation is more than the GPU has (see ppo-fast memory)"
    )
    cudnn_attention: bool = setting(
        False, "PyTorch may use cuDNN for attention, which plans anew for each shape (only bench/on_gpu.sh needs it)"
    )
    out: str | None = setting(None, "folder for metrics, TensorBoard events, samples and the model")
    tensorboard: bool = setting(True, "write TensorBoard events to OUT/tensorboard")
    save_every: int = setting(
        20,
        "write a checkpoint to OUT/checkpoints every n steps, from which --resume continues; 0: only when stopped",
        0,
    )
    keep_checkpoints: int = setting(2, "checkpoints to keep, the newest; each holds weights and optimizer", 1)
    merge_adapters: bool = setting(False, "save a full model instead of its LoRA adapters")
    save_dtype: str = setting(
        "auto",
        "dtype of the weights in OUT/model and OUT/best; auto: that of the start model's folder, and fp32 for adapters"
        " and models from Python (checkpoints are fp32)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    show_samples_every: int = setting(10, "show tables of answers every n steps; 0: never, nor of evaluations", 0)
    quiet: bool = setting(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            check_setting(option.name, value, option)
            setattr(self, option.name, plain_value(value))
        rollout = self.prompts_per_step * self.samples_per_prompt
        if rollout < self.minibatches:
            raise UserError(
                f"minibatches must be at most prompts_per_step * samples_per_prompt = {rollout}, got {self.minibatches}"
            )
        if self.eval_greedy and self.eval_samples > 1:
            raise UserError(f"eval_greedy gives each prompt one answer, but eval_samples is {self.eval_samples}")


def options_of(values: dict[str, Any]) -> PPOConfig:
    """A PPOConfig from values as YAML gives them: lists for tuples, and 1e-6, which YAML 1.1 takes for a text."""
    for option in dataclasses.fields(PPOConfig):
        value = values.get(option.name)
        if isinstance(value, list):
            values = {**values, option.name: tuple(value)}
        elif value == "none" and "None" in str(option.type):  # as on the command line
            values = {**values, option.name: None}
        elif isinstance(value, str) and "float" in str(option.type):
            try:
                values = {**values, option.name: float(value)}
            except ValueError:
                continue  # PPOConfig names the option and the type that it wants
    return PPOConfig(**values)


def yaml_text(config: PPOConfig, others: dict[str, Any]) -> str:
    """The resolved configuration as YAML: `others` (model, data and rewards of a run) and every option."""
    import yaml

    resolved = {**others, **dataclasses.asdict(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in resolved.items()}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    head = "# Every option of this run. To use them again: ppo-fast train --config THIS_FILE --out ANOTHER_FOLDER\n"
    return head + text
