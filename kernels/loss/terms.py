"""Device functions for one block of steps: terms of PPO's loss, their gradients, sums for the statistics.

reference.policy_loss, reference.value_loss and reference.ppo_loss are the specification. A tensor is passed between
these functions as (pointer, row stride), a position as (row, column, inside). `given` says which optional inputs there
are and which gradients are wanted, one bit each: the address of an absent input is valid but never read.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.common.kl_kernel import kl_estimate

# Names of constants are resolved by functions: Triton compares each global constant of a kernel again in every launch.


@triton.constexpr_function
def bit(name):
    """The bit of `given` for an input, an option or a wanted gradient."""
    return {
        "policy": 1,
        "value": 2,
        "mask": 4,
        "value_mask": 8,
        "weights": 16,
        "entropy": 32,
        "ref_logprobs": 64,
        "value_clip": 128,
        "cu_seqlens": 256,
        "mean": 512,  # a step is weighted by 1 / length of its sequence
        "d_logprobs": 1024,
        "d_entropy": 2048,
        "d_values": 4096,
    }[name]


@triton.constexpr_function
def column(name):
    """The column of the partial sums over the counted steps of a program. RATIO_MAX is the only maximum among them."""
    return {
        "COUNT": 0,
        "TERM": 1,
        "APPROX_KL": 2,
        "CLIPPED": 3,
        "RATIO": 4,
        "RATIO_MAX": 5,
        "DUAL_CLIPPED": 6,
        "ENTROPY": 7,
        "KL": 8,
        "VALUE_COUNT": 9,
        "ERROR": 10,
        "VALUE_CLIPPED": 11,
    }[name]


@triton.constexpr_function
def num_columns():
    """A power of two that is not less than the number of columns."""
    return 16


@triton.constexpr_function
def padding():
    """Stored gradients start at multiples of this many elements, so that they can be moved 16 bytes at a time."""
    return 16


@triton.jit
def has(given, NAME: tl.constexpr):
    return (given & bit(NAME)) != 0


@triton.jit
def clamp(x, low, high):
    """torch.clamp, also for NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def precise_exp(x):
    """e^x within 2 ulp: the hardware's base 2 exponential alone loses |x| ulp in the product x log2(e)."""
    x = clamp(x, -1000.0, 1000.0)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(n, -1.42860682030941723e-6, tl.fma(n, -0.693145751953125, x))  # ln 2 in two parts
    return tl.exp(r) * tl.exp2(n)


@triton.jit
def _address(tensor, position):
    ptr, row_stride = tensor
    row, step, _ = position
    return ptr + row * row_stride + step


@triton.jit
def _read(tensor, position, WHOLE: tl.constexpr):
    """Steps of a tensor in fp32; a whole block is read without a mask, hence 16 bytes at a time where contiguous."""
    if WHOLE:
        x = tl.load(_address(tensor, position))
    else:
        x = tl.load(_address(tensor, position), mask=position[2], other=0)
    return x.to(tl.float32)


@triton.jit
def _read_optional(tensor, position, is_given, default, WHOLE: tl.constexpr):
    """The same for a tensor that may be absent. A mask with one value for all steps does not narrow the loads."""
    if WHOLE:
        x = tl.load(_address(tensor, position), mask=is_given, other=default)
    else:
        x = tl.load(_address(tensor, position), mask=position[2] & is_given, other=default)
    return x


@triton.jit
def _load_mask(mask, position, has_mask, WHOLE: tl.constexpr):
    return position[2] & (_read_optional(mask, position, has_mask, 1, WHOLE) != 0)


@triton.jit
def surrogate(logprobs, old, advantages, low, high, dual_clip, log_ratio_clamp):
    """Term, its derivative by the log-probability, log-ratio, ratio, clipped?, dual-clipped?

    dual_clip is infinite if there is none. Sub-gradients at ties as torch.maximum and torch.minimum (a half each) and
    torch.clamp (passes at its bounds).
    """
    log_ratio = logprobs - old
    ratio = precise_exp(clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    clipped_ratio = clamp(ratio, low, high)
    unclipped = -advantages * ratio
    clipped = -advantages * clipped_ratio
    is_clipped = clipped > unclipped
    # The maximum is NaN if either is. The derivative of `clipped` is that of `unclipped` where the ratio is in range.
    term = tl.where((unclipped > clipped) | (unclipped != unclipped), unclipped, clipped)
    tie = (unclipped == clipped) & (ratio != clipped_ratio)
    grad_logprob = tl.where(is_clipped, 0.0, tl.where(tie, 0.5 * unclipped, unclipped))
    bound = -advantages * dual_clip
    is_dual_clipped = (advantages < 0) & (term > bound)
    grad_logprob = tl.where((advantages < 0) & (term == bound), 0.5 * grad_logprob, grad_logprob)
    grad_logprob = tl.where(is_dual_clipped, 0.0, grad_logprob)
    term = tl.where(is_dual_clipped, bound, term)
    grad_logprob = tl.where((log_ratio >= -log_ratio_clamp) & (log_ratio <= log_ratio_clamp), grad_logprob, 0.0)
    return term, grad_logprob, log_ratio, ratio, is_clipped, is_dual_clipped


@triton.jit
def kl_and_gradient(d, log_ratio_clamp, estimator):
    """reference.kl_estimate and its derivative by the log-probability; estimator is an index into KL_ESTIMATORS."""
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    gradient = tl.where(estimator == 0, 1.0, tl.where(estimator == 1, d, sign))
    inverse_ratio = tl.zeros_like(d)
    if estimator == 2:
        inverse_ratio = precise_exp(-clamp(d, -log_ratio_clamp, log_ratio_clamp))
        in_range = (d >= -log_ratio_clamp) & (d <= log_ratio_clamp)
        gradient = 1 - tl.where(in_range, inverse_ratio, 0.0)
    return kl_estimate(d, inverse_ratio, estimator), gradient


@triton.jit
def _squared_error(values, old, returns, clip, has_clip):
    """max((v - R)^2, (clipped v - R)^2), half its derivative by v, clipped?"""
    error = values - returns
    squared = error * error
    move = tl.where(has_clip, values - old, 0.0)
    in_range = (move >= -clip) & (move <= clip)
    # In range old + (v - old) is v: computing the sum would count rounding as clipping.
    clipped_error = tl.where(in_range, values, old + clamp(move, -clip, clip)) - returns
    clipped_squared = clipped_error * clipped_error
    is_clipped = clipped_squared > squared
    tie = (clipped_squared == squared) & (move == move) & (in_range == 0)
    grad_value = tl.where(is_clipped, 0.0, tl.where(tie, 0.5 * error, error))
    squared = tl.where((squared > clipped_squared) | (squared != squared), squared, clipped_squared)
    return squared, grad_value, is_clipped


@triton.jit
def _set_sum(sums, NAME: tl.constexpr, x):
    """The partial sums with the sum of x in the column of that name."""
    return tl.where(tl.arange(0, num_columns()) == column(NAME), tl.sum(x.to(tl.float32)), sums)


@triton.jit
def merge(a, b, index):
    """Two partial sums of the columns `index` become one."""
    return tl.where(index == column("RATIO_MAX"), tl.maximum(a, b), a + b)


@triton.jit
def write_optional(at, x, inside, is_wanted, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, x, mask=is_wanted)
    else:
        tl.store(at, x, mask=inside & is_wanted)


@triton.jit
def _policy_block(sums, tensors, scalars, position, mask, token_weight, gradients, given, WHOLE: tl.constexpr):
    """Add a block's policy term to the partial sums and write its gradients."""
    logprobs_, old_, advantages_, weights_, entropy_, ref_ = tensors
    low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, kl_estimator = scalars
    logprobs = _read(logprobs_, position, WHOLE)
    old = _read(old_, position, WHOLE)
    advantages = _read(advantages_, position, WHOLE)
    term, grad_logprob, log_ratio, ratio, is_clipped, is_dual_clipped = surrogate(
        logprobs, old, advantages, low, high, dual_clip, log_ratio_clamp
    )
    weights = _read_optional(weights_, position, has(given, "weights"), 1.0, WHOLE).to(tl.float32)
    term, grad_logprob = term * weights, grad_logprob * weights
    sums = _set_sum(sums, "TERM", tl.where(mask, term, 0.0))
    sums = _set_sum(sums, "APPROX_KL", tl.where(mask, ratio - 1 - log_ratio, 0.0))
    sums = _set_sum(sums, "CLIPPED", is_clipped & mask)
    sums = _set_sum(sums, "RATIO", tl.where(mask, ratio, 0.0))
    ratio_max = tl.max(tl.where(mask, ratio, 0.0))
    sums = tl.where(tl.arange(0, num_columns()) == column("RATIO_MAX"), ratio_max, sums)
    sums = _set_sum(sums, "DUAL_CLIPPED", is_dual_clipped & mask)
    if has(given, "entropy"):
        sums = _set_sum(sums, "ENTROPY", tl.where(mask, _read(entropy_, position, WHOLE), 0.0))
    d_entropy = tl.where(mask, -entropy_coef * token_weight, 0.0)
    write_optional(gradients[1], d_entropy, position[2], has(given, "d_entropy"), WHOLE)
    if has(given, "ref_logprobs"):
        kl, kl_gradient = kl_and_gradient(logprobs - _read(ref_, position, WHOLE), log_ratio_clamp, kl_estimator)
        sums = _set_sum(sums, "KL", tl.where(mask, kl, 0.0))
        grad_logprob = tl.fma(kl_gradient, kl_coef, grad_logprob)
    d_logprobs = tl.where(mask, grad_logprob * token_weight, 0.0)
    write_optional(gradients[0], d_logprobs, position[2], has(given, "d_logprobs"), WHOLE)
    return sums


@triton.jit
def _value_block(sums, tensors, scalars, position, mask, token_weight, gradients, given, WHOLE: tl.constexpr):
    """Add a block's value term to the partial sums and write its gradient."""
    values_, old_, returns_ = tensors
    value_coef, value_clip = scalars
    has_clip = has(given, "value_clip")
    values = _read(values_, position, WHOLE)
    old = _read_optional(old_, position, has_clip, 0.0, WHOLE).to(tl.float32)
    returns = _read(returns_, position, WHOLE)
    squared, grad_value, is_clipped = _squared_error(values, old, returns, value_clip, has_clip)
    sums = _set_sum(sums, "ERROR", tl.where(mask, 0.5 * squared, 0.0))
    sums = _set_sum(sums, "VALUE_CLIPPED", is_clipped & mask)
    d_values = tl.where(mask, value_coef * grad_value * token_weight, 0.0)
    write_optional(gradients[2], d_values, position[2], has(given, "d_values"), WHOLE)
    return sums


@triton.jit
def block_sums(policy, value, masks, scalars, position, token_weights, gradients, given, WHOLE: tl.constexpr):
    """Partial sums of a block of steps, one per column; the gradients go to memory."""
    sums = tl.zeros((num_columns(),), tl.float32)
    mask = _load_mask(masks[0], position, has(given, "mask"), WHOLE)
    value_mask = mask
    if has(given, "value_mask"):
        value_mask = _load_mask(masks[1], position, True, WHOLE)
    sums = _set_sum(sums, "COUNT", mask)
    sums = _set_sum(sums, "VALUE_COUNT", value_mask)
    if has(given, "policy"):
        sums = _policy_block(sums, policy, scalars[0], position, mask, token_weights[0], gradients, given, WHOLE)
    if has(given, "value"):
        sums = _value_block(sums, value, scalars[1], position, value_mask, token_weights[1], gradients, given, WHOLE)
    return sums


@triton.jit
def gradient_stride(steps):
    """Elements from one stored gradient to the next."""
    return tl.cdiv(steps, padding()) * padding()


@triton.jit
def gradient_addresses(workspace_ptr, index, steps, given):
    """Where the stored gradients of these steps are: after the scales, one after the other, those that are wanted."""
    stride = gradient_stride(steps)
    first = workspace_ptr + padding() + index
    second = first + tl.where(has(given, "d_logprobs"), stride, 0)
    return first, second, second + tl.where(has(given, "d_entropy"), stride, 0)


@triton.jit
def sequence_weight(mask, row, start, end, has_mask, BLOCK: tl.constexpr):
    """1 / number of counted steps of a sequence."""
    count = (end - start).to(tl.float32)
    if has_mask:
        counts = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, BLOCK):
            step = first + tl.arange(0, BLOCK)
            counts += _load_mask(mask, (row, step, step < end), has_mask, False).to(tl.float32)
        count = tl.sum(counts)
    return 1.0 / tl.maximum(count, 1.0)
