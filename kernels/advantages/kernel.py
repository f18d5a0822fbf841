"""reference.shape_rewards and the scan of reference.rlhf_advantages.

The scan is that of gae/kernel.py; each tile computes its rewards from log-probabilities, scores and mask. Whitening
needs the moments of all rows, hence another launch (whiten_kernel.py): the scan stores the moments and sums of the
values that each of its programs wrote.

With TWO_LAMBDAS the returns have a lambda of their own. The same pass carries a second number per row,
z_t = gamma V_t + gamma critic_lam A_t^(critic_lam), whose maps are composed like those of s_t: R_t = r_t + z_{t+1},
while A_t = r_t - V_t + s_{t+1}. Nothing more is read or written per step.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.advantages.whiten_kernel import add_elements, over_lanes
from ppo_fast.kernels.common.kl_kernel import kl_estimate
from ppo_fast.kernels.gae.kernel import apply_map, chain, compose, is_given, row_numbers, row_start, row_tile, step_maps

LOG_RATIO_CLAMP = tl.constexpr(20.0)  # as in reference.kl_estimate


@triton.jit
def _kl(d, kind):
    exponent = tl.where(d > LOG_RATIO_CLAMP, -LOG_RATIO_CLAMP, tl.where(d < -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP, -d))
    return kl_estimate(d, tl.exp(exponent), kind)


@triton.jit
def _clipped(x, clip):
    """Clamped to +-clip; a NaN stays, where minimum and maximum would lose it."""
    return tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))


@triton.jit
def _last_step(masks, T, lowest, inside, W: tl.constexpr):
    """The last counted step of each row if it is not before `lowest`, else something below that.

    From the end backwards, and no further than needed: responses end near the end of their row.
    """
    found = tl.full(inside.shape, -1, tl.int32)
    first = T
    while (first > lowest) & (tl.min(tl.where(inside, found, 0)) < 0):
        first -= W
        t = tl.arange(0, W)[None, :] + first
        mask = tl.load(masks + t, mask=inside[:, None] & (t >= 0), other=0) != 0
        found = tl.maximum(found, tl.max(tl.where(mask, t, -1), 1))
    return found


@triton.jit
def _score_slots(masks, scores_ptr, score_stride, row, inside, T, lowest, per_token, after_last, W: tl.constexpr):
    """Each row's slot for the score and the score; whether the row has a counted step, and whether its slot is beyond.

    The last two only if `lowest` is at most 0.
    """
    last = _last_step(masks, T, lowest, inside, 4 * W)
    slot = tl.where(last >= 0, tl.minimum(last + after_last.to(tl.int32), T - 1), -1)
    present = inside & (last >= 0)
    score = tl.load(scores_ptr + row * score_stride, mask=present & ~per_token, other=0.0)
    return slot, score, present, present & (slot > last)


@triton.jit
def _shaped_tile(
    inputs,  # (R, 1) pointers to the first step of logprobs, ref_logprobs, scores per token, mask
    numbers,  # clip, kl_coef, kind
    per_token,  # whether there are scores per token
    slot,  # (R,): the step of each row's score, -1 for none
    score,  # (R,): clipped
    t,
    here,
):
    """Of a tile: which steps count, rewards, KL, and the scores per token before the clip (or 0)."""
    logprobs, refs, scores, masks = inputs
    clip, kl_coef, kind = numbers
    mask = tl.load(masks + t, mask=here, other=0) != 0
    logprob = tl.load(logprobs + t, mask=here, other=0.0).to(tl.float32)
    d = logprob - tl.load(refs + t, mask=here, other=0.0).to(tl.float32)
    token_scores = tl.where(mask, tl.load(scores + t, mask=here & per_token, other=0.0), 0.0)
    kl = tl.where(mask, _kl(d, kind), 0.0)
    reward = tl.where(mask, tl.fma(-kl_coef, kl, _clipped(token_scores, clip)), 0.0)
    reward = tl.where(t == slot[:, None], reward + score[:, None], reward)
    return mask, reward, kl, token_scores


@triton.jit(do_not_specialize=list(range(18)))
def shape_kernel(
    logprobs_ptr,  # (rows, T), steps contiguous
    refs_ptr,
    mask_ptr,
    scores_ptr,  # (rows,), or (rows, T) if per_token
    rewards_ptr,  # (rows, T) without gaps, as all outputs
    kl_ptr,
    longer_ptr,  # any address if not after_last
    kl_coef: tl.float32,
    clip: tl.float32,
    kind: tl.int32,  # which estimator
    after_last: tl.int32,  # 1 if the score comes after the last counted step
    per_token: tl.int32,
    rows: tl.int32,
    T: tl.int32,
    l_stride: tl.int64,  # from row to row
    ref_stride: tl.int64,
    m_stride: tl.int64,
    score_stride: tl.int64,
    ALIGNED: tl.constexpr,  # T is a multiple of 4, and each row starts at a multiple of 4 elements
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,  # of a program
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    first = tl.program_id(1) * TILES * W
    if ALIGNED:
        T = T // 4 * 4
    has_token_scores = per_token != 0
    masks = row_start(mask_ptr, row * m_stride, ALIGNED)
    inputs = (
        row_start(logprobs_ptr, row * l_stride, ALIGNED),
        row_start(refs_ptr, row * ref_stride, ALIGNED),
        row_start(scores_ptr, row * score_stride, ALIGNED),
        masks,
    )
    slot, score, _present, _beyond = _score_slots(
        masks, scores_ptr, score_stride, row, inside, T, first - 1, has_token_scores, after_last, W
    )
    score = _clipped(score, clip)
    for j in range(tl.minimum(tl.cdiv(T - first, W), TILES)):
        t = tl.arange(0, W)[None, :] + (first + j * W)
        here = inside[:, None] & (t < T)
        numbers = clip, kl_coef, kind
        mask, reward, kl, _scores = _shaped_tile(inputs, numbers, has_token_scores, slot, score, t, here)
        tl.store(row_start(rewards_ptr, row * T, ALIGNED) + t, reward, mask=here)
        tl.store(row_start(kl_ptr, row * T, ALIGNED) + t, kl, mask=here)
        longer = mask | (t == slot[:, None])
        tl.store(row_start(longer_ptr, row * T, ALIGNED) + t, longer, mask=here & (after_last != 0))


@triton.jit
def _lane_sums(x, R: tl.constexpr, W: tl.constexpr):
    """Sums of the four neighbouring steps that a thread holds, (R, W // 4): no exchange between threads."""
    return tl.sum(tl.reshape(x, [R, W // 4, 4]), 2)


@triton.jit
def _shaped_span(
    inputs,  # (R, 1) pointers to the first step of logprobs, ref_logprobs, scores per token, mask
    values,  # likewise
    outputs,  # likewise of advantages, returns, rewards, KL
    numbers,
    per_token,
    slot,
    score,
    first,
    T,
    inside,
    tiles,
    gamma,
    decays,  # gamma lam, and gamma critic_lam
    after,  # s and z after the span
    sums,  # the moments of the advantages, (R, W), and sums of rewards, KL, returns, scores per token, (R, W // 4)
    WRITE: tl.constexpr,
    TWO_LAMBDAS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """gae/kernel.scan_span for shaped rewards. Returns the span's maps and, with WRITE, the sums with this span's."""
    s, z = after
    decay, critic_decay = decays
    n, mean, m2, rewards, kls, returns, scores = sums
    span_a = tl.full([R], 1.0, tl.float32)
    span_b = tl.zeros([R], tl.float32)
    critic_a, critic_b = span_a, span_b
    for j in range(tiles):
        t = tl.arange(0, W)[None, :] + (first + (tiles - 1 - j) * W)
        here = inside[:, None] & (t < T)
        v = tl.load(values + t, mask=here, other=0.0).to(tl.float32)
        mask, r, kl, token_scores = _shaped_tile(inputs, numbers, per_token, slot, score, t, here)
        step = mask | (t == slot[:, None])  # after the last token, the score's slot is a step too
        td_error = r - v
        a, b = step_maps(td_error, v, step, gamma[:, None], decay[:, None])
        following, tile_a, tile_b = row_tile(a, b, apply_map(span_a, span_b, s), R, W)
        critic_following = following
        if TWO_LAMBDAS:
            a, b = step_maps(td_error, v, step, gamma[:, None], critic_decay[:, None])
            entering = apply_map(critic_a, critic_b, z)
            critic_following, critic_tile_a, critic_tile_b = row_tile(a, b, entering, R, W)
            critic_a, critic_b = compose(critic_a, critic_b, critic_tile_a, critic_tile_b)
        if WRITE:
            advantage = tl.where(mask, td_error + following, 0.0)
            value_target = tl.where(step, r + critic_following, 0.0)
            tl.store(outputs[0] + t, advantage, mask=here)
            tl.store(outputs[1] + t, value_target, mask=here)
            tl.store(outputs[2] + t, r, mask=here)
            tl.store(outputs[3] + t, kl, mask=here)
            n, mean, m2 = add_elements(n, mean, m2, advantage, mask)
            rewards += _lane_sums(r, R, W)
            kls += _lane_sums(kl, R, W)
            returns += _lane_sums(value_target, R, W)
            scores += _lane_sums(token_scores, R, W)
        span_a, span_b = compose(span_a, span_b, tile_a, tile_b)
    return (span_a, span_b), (critic_a, critic_b), (n, mean, m2, rewards, kls, returns, scores)


@triton.jit
def _critic_decay(numbers_ptr, present, gamma, critic_lam, rows, row, inside):
    """gamma critic_lam of each row. The lambdas of the critic are the last of the numbers that are given."""
    has_lams = is_given(present, 3)
    before = (present & 1) + ((present >> 1) & 1) + ((present >> 2) & 1)
    lams = tl.load(numbers_ptr + before.to(tl.int64) * rows + row, mask=inside & has_lams, other=0.0)
    return gamma * tl.where(has_lams, lams, critic_lam)


@triton.jit
def _sums_column(sums_ptr):
    """Where the program's column of the results for whiten_kernel.py, (9, programs), begins; from plane to plane."""
    plane = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    return sums_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), plane


@triton.jit
def _store_sums(sums_ptr, sums, row_scores, rows, slots_beyond):
    n, mean, m2, rewards, kls, returns, scores = sums
    at, plane = _sums_column(sums_ptr)
    n_all, mean_all, m2_all = over_lanes(n, mean, m2)
    tl.store(at, n_all)
    tl.store(at + plane, mean_all)
    tl.store(at + 2 * plane, m2_all)
    tl.store(at + 3 * plane, row_scores + tl.sum(scores))
    tl.store(at + 4 * plane, tl.sum(rewards))
    tl.store(at + 5 * plane, tl.sum(kls))
    tl.store(at + 6 * plane, tl.sum(returns))
    tl.store(at + 7 * plane, rows)
    tl.store(at + 8 * plane, n_all + slots_beyond)  # steps: counted ones, and slots after the last of them


@triton.jit(do_not_specialize=list(range(27)))
def advantages_kernel(
    logprobs_ptr,  # (rows, T), steps contiguous
    refs_ptr,
    values_ptr,
    mask_ptr,
    scores_ptr,  # (rows,), or (rows, T) per token
    numbers_ptr,  # (1 to 4, rows): those of bootstrap, gammas, lams, critic_lams that are given
    advantages_ptr,  # (rows, T) without gaps, as the next three
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    maps_ptr,  # (2 or 4, spans, rows): the maps of each span, if there is more than one launch of this kernel
    sums_ptr,  # (9, programs)
    present: tl.int32,  # bits 0 to 4: bootstrap, gammas, lams, critic_lams are given, and scores are per token
    gamma: tl.float32,
    lam: tl.float32,
    critic_lam: tl.float32,
    kl_coef: tl.float32,
    clip: tl.float32,
    kind: tl.int32,  # which estimator
    after_last: tl.int32,  # 1 if the score comes after the last counted step
    rows: tl.int32,
    T: tl.int32,
    l_stride: tl.int64,  # from row to row
    ref_stride: tl.int64,
    v_stride: tl.int64,
    m_stride: tl.int64,
    score_stride: tl.int64,
    TWO_LAMBDAS: tl.constexpr,  # returns by critic_lam; else critic_lam is not used
    WRITE: tl.constexpr,  # False: only compose the maps of all spans but the first, one span in a program
    ALIGNED: tl.constexpr,  # T is a multiple of 4, and each row starts at a multiple of 4 elements
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,  # of a span
):
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    per_token = is_given(present, 4)
    masks = row_start(mask_ptr, row * m_stride, ALIGNED)
    inputs = (
        row_start(logprobs_ptr, row * l_stride, ALIGNED),
        row_start(refs_ptr, row * ref_stride, ALIGNED),
        row_start(scores_ptr, row * score_stride, ALIGNED),
        masks,
    )
    values = row_start(values_ptr, row * v_stride, ALIGNED)
    outputs = (
        row_start(advantages_ptr, row * T, ALIGNED),
        row_start(returns_ptr, row * T, ALIGNED),
        row_start(rewards_ptr, row * T, ALIGNED),
        row_start(kl_ptr, row * T, ALIGNED),
    )
    g, decay, s = row_numbers(numbers_ptr, present, gamma, lam, rows, row, inside, 0)
    critic_decay, z = decay, s
    if TWO_LAMBDAS:
        critic_decay = _critic_decay(numbers_ptr, present, g, critic_lam, rows, row, inside)
    decays = decay, critic_decay
    numbers = clip, kl_coef, kind
    spans = tl.cdiv(T, TILES * W)
    plane = spans.to(tl.int64) * rows
    zeros, none = tl.zeros([R, W], tl.float32), tl.zeros([R, W // 4], tl.float32)
    sums = zeros, zeros, zeros, none, none, none, none
    one_pass = tl.num_programs(1) == 1
    if WRITE:
        first_span = tl.where(one_pass, 0, tl.program_id(1))
        last_span = tl.where(one_pass, spans - 1, tl.program_id(1))
    else:
        first_span = tl.program_id(1) + 1
        last_span = first_span
    slot, score, has_step, beyond = _score_slots(
        masks, scores_ptr, score_stride, row, inside, T, first_span * TILES * W - 1, per_token, after_last, W
    )
    clipped = _clipped(score, clip)
    if WRITE:
        # every span of a row has its score; the program of the first, which reads the whole row, counts it
        counts = has_step & (first_span == 0)
        row_score = tl.sum(tl.where(counts, score, 0.0))
        row_count = tl.sum(counts.to(tl.float32))
        slots_beyond = tl.sum((beyond & counts).to(tl.float32))
        later = spans - 1 - last_span
        own_map = maps_ptr + row + last_span.to(tl.int64) * rows
        s = chain(own_map, rows, plane, later, later, inside, s, False)
        if TWO_LAMBDAS:
            z = chain(own_map + 2 * plane, rows, plane, later, later, inside, z, False)
        for back in range(last_span - first_span + 1):
            first = (last_span - back) * TILES * W
            here = tl.minimum(tl.cdiv(T - first, W), TILES)
            of_policy, of_critic, sums = _shaped_span(
                inputs, values, outputs, numbers, per_token, slot, clipped, first, T, inside, here, g, decays, (s, z),
                sums, True, TWO_LAMBDAS, R, W,
            )  # fmt: skip
            s = apply_map(of_policy[0], of_policy[1], s)
            if TWO_LAMBDAS:
                z = apply_map(of_critic[0], of_critic[1], z)
        _store_sums(sums_ptr, sums, row_score, row_count, slots_beyond)
    else:
        first = first_span * TILES * W
        here = tl.minimum(tl.cdiv(T - first, W), TILES)
        of_policy, of_critic, sums = _shaped_span(
            inputs, values, outputs, numbers, per_token, slot, clipped, first, T, inside, here, g, decays, (s, z),
            sums, False, TWO_LAMBDAS, R, W,
        )  # fmt: skip
        own_map = maps_ptr + row + first_span.to(tl.int64) * rows
        tl.store(own_map, of_policy[0], mask=inside)
        tl.store(own_map + plane, of_policy[1], mask=inside)
        if TWO_LAMBDAS:
            tl.store(own_map + 2 * plane, of_critic[0], mask=inside)
            tl.store(own_map + 3 * plane, of_critic[1], mask=inside)
