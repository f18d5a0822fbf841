"""What must hold in a run whatever it learns, and errors and warnings where it does not.

Three numbers are known in advance. Old log-probabilities and the loss pass through the same code, so the ratio of the
first minibatch of a step is 1. The reference starts as the actor, so the first KL is 0. The sampler draws from the
policy that is trained, so its log-probabilities are the trainer's but for rounding.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ppo_fast.common.errors import InvariantError
from ppo_fast.llm.config import PPOConfig


@dataclass(frozen=True)
class Bound:
    """How far two computations of one token's log-probability may differ by rounding, in nats."""

    mean: float
    p99: float  # 99th percentile over tokens


# The sampler multiplies one token at a time by cached keys, and the trainer all tokens of a pack: every sum has another
# order, and each layer passes on the rounding of those before it. SmolLM2-135M (30 layers, 48 new tokens, on a
# CPU) shows 8e-6 on average and 2e-5 at the 99th percentile in fp32, which is 60 and 180 eps, and 0.027 and 0.12 in
# bf16, which is 3 and 16 eps: there, only the factors of a product are rounded, and sums are fp32
# (bench/results/sampler_gap). TF32 rounds the same factors eight times finer than bf16. The bounds leave room for
# deeper models, larger logits and the tail of a mixture of experts, in which a router's choice can flip: ten times and
# more in fp32, and about three times in bf16. What padding, another head or truncated sampling do is larger: 0.1 to 10
# nats.
ROUNDING = {"float32": Bound(1e-4, 1e-3), "tf32": Bound(0.01, 0.05), "bfloat16": Bound(0.08, 0.4)}
ROUNDING["float16"] = ROUNDING["tf32"]  # as many bits

SAME_CODE = 1e-3  # nats: two passes of the same code give the same bits, unless PyTorch picks other kernels

P99_FACTOR = 5  # the second bound of the 99th percentile, in units of max_sampler_gap, which bounds the mean

CAUSES = (
    "likely causes: padding on the left that the model does not ignore, another dtype in the sampler, sampling warpers"
    " that the log-probabilities include (temperature, top-k, top-p, a repetition penalty), weights of an earlier step,"
    " or another LM head"
)


def rounding_of(config: PPOConfig, device: str, *, frozen_rounded: bool = False) -> Bound:
    """The bound of rounding in the dtype in which a run multiplies matrices on a type of device.

    `frozen_rounded`: one of two models has weights that were rounded to bfloat16 (`frozen_dtype`). A computation in
    bfloat16 rounds them, too, and the other factor of each product: its bound is enough.
    """
    if frozen_rounded:
        return ROUNDING["bfloat16"]
    tf32 = config.tf32 and config.dtype == "float32" and device != "cpu"
    return ROUNDING["tf32" if tf32 else config.dtype]


def check_ratio(stats: Mapping[str, float], bound: Bound) -> None:
    """Raise InvariantError if the ratio of a step's first minibatch, before its update, is not 1 but for rounding.

    Both passes are the same code on the same packs, so what rounding explains is a warning above SAME_CODE already.

    Args:
        stats: ratio_max and approx_kl of the minibatch; nothing is checked without them, while the actor does not
            learn.
        bound: of rounding.
    """
    if "ratio_max" not in stats:
        return
    largest = max(abs(math.log(max(stats["ratio_max"], 1e-30))), math.sqrt(2 * max(stats["approx_kl"], 0.0)))
    if largest <= SAME_CODE:
        return
    text = (
        f"the first ratio of this step is {stats['ratio_max']:.6g} with approx_kl {stats['approx_kl']:.3g}, and not 1:"
        " the pass that learns computes other log-probabilities than the pass before it; likely causes: dropout or"
        " another randomness in the model, or layers that compute something else in training mode"
    )
    if largest > bound.p99:
        raise InvariantError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def check_first_kl(largest: float, bound: Bound) -> None:
    """Raise InvariantError if the reference, which starts as the actor, gives other log-probabilities.

    Args:
        largest: the largest difference of one token's log-probability in the first step of a run, in nats.
        bound: of rounding.
    """
    if not largest <= bound.p99:
        raise InvariantError(
            f"the reference starts as the actor, but a log-probability of the first step differs by {largest:.3g} nats"
            " between them: the KL penalty would pull the actor elsewhere; likely causes: dropout in one of them, or"
            " adapters that the reference lacks"
        )


def gap_problem(metrics: Mapping[str, float], config: PPOConfig, rounding: Bound, *, where: str) -> str | None:
    """What is wrong with the gap between sampler and trainer, if a run must not continue with it.

    A gap that is above rounding, but below `config.max_sampler_gap`, is a warning.

    Args:
        metrics: sampler_gap_mean and sampler_gap_p99 in nats; nothing is checked without them.
        config: its max_sampler_gap is the second bound; None: all is a warning.
        rounding: the first bound.
        where: names the step or the evaluation in the message.
    """
    if "sampler_gap_mean" not in metrics:
        return None
    mean, p99 = metrics["sampler_gap_mean"], metrics["sampler_gap_p99"]
    if mean <= rounding.mean and p99 <= rounding.p99:
        return None
    text = (
        f"the sampler's log-probabilities differ from the trainer's by {mean:.3g} nats per token on average and by"
        f" {p99:.3g} at the 99th percentile in {where}"
    )
    limit = config.max_sampler_gap
    if limit is not None and not (mean < limit and p99 < P99_FACTOR * limit):
        return (
            f"{text}, and max_sampler_gap is {limit:g} ({P99_FACTOR * limit:g} at the 99th percentile): the run would"
            f" learn from samples of another policy; {CAUSES}; max_sampler_gap = none makes this a warning"
        )
    warnings.warn(
        f"{text}, where rounding explains {rounding.mean:g} and {rounding.p99:g}; {CAUSES}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None
