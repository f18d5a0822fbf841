"""The device code of advantages.py: reference.shape_rewards, masked_whiten and rlhf_advantages.

The scan is that of gae_kernels.py, over rewards that never exist in memory before they are used: each tile makes them
from log-probabilities, scores and mask. Whitening needs the moments of all rows, hence another launch, which
whiten_kernels.py has; the scan leaves the moments and sums of what each of its programs wrote.
"""

import triton
import triton.language as tl

from ppo_fast.kernels.gae_kernels import (
    APPLY,
    COMPOSE,
    TILES,
    WALK,
    _padded_place,
    apply,
    chain,
    load_row_number,
    load_step,
    place_of,
    row_tile,
    step_maps,
    then,
)
from ppo_fast.kernels.whiten_kernels import add_elements, over_lanes

SEARCH = tl.constexpr(4)  # tiles in which the last counted step is looked for at once
LOG_RATIO_CLAMP = tl.constexpr(20.0)  # as in reference.kl_estimate
SHAPING = ["kl_coef", "clip", "kind", "behind", "T", "l_stride", "ref_stride", "score_stride", "m_stride", "out_stride"]
SCANNING = ["gamma", "lam", "rows", "spans", "parts", "v_stride"]


@triton.jit
def _kl(d, kind):
    """reference.kl_estimate. All four cost less than a variant of the kernel for each would."""
    exponent = tl.where(d > LOG_RATIO_CLAMP, -LOG_RATIO_CLAMP, tl.where(d < -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP, -d))
    k3 = tl.exp(exponent) - 1.0 + d
    return tl.where(kind == 0, d, tl.where(kind == 1, 0.5 * d * d, tl.where(kind == 2, k3, tl.abs(d))))


@triton.jit
def _clipped(x, clip):
    """Clamped to +-clip; a NaN stays, where minimum and maximum would lose it."""
    return tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))


@triton.jit
def _last_counted(mask, T, lowest, inside, W: tl.constexpr):
    """The last counted step of each row if it is not before `lowest`, else something below that.

    From the end backwards, and no further than needed: answers end near the end of their row.
    """
    found = tl.full(inside.shape, -1, tl.int32)
    first = T
    while (first > lowest) & (tl.min(tl.where(inside, found, 0)) < 0):
        first -= W
        t = tl.arange(0, W)[None, :] + first
        here = inside[:, None] & (t >= 0)
        counted = here & (load_step(mask, t, here, False) != 0)
        found = tl.maximum(found, tl.max(tl.where(counted, t, -1), 1))
    return found


@triton.jit
def _shaped_tile(
    tensors,  # (pointer, place) of logprobs, ref_logprobs, scores, mask
    numbers,  # clip, kl_coef, kind
    slot,  # (R,): the step of each row's score, -1 for none
    score,  # (R,): clipped
    t,
    here,
    TOKEN_SCORES: tl.constexpr,
):
    """Of a tile: which steps count, rewards, KL, and the scores per token before the clip (or 0)."""
    logprobs, refs, scores, mask = tensors
    clip, kl_coef, kind = numbers
    counted = here & (load_step(mask, t, here, False) != 0)
    d = load_step(logprobs, t, here, False).to(tl.float32) - load_step(refs, t, here, False).to(tl.float32)
    kl = tl.where(counted, _kl(d, kind), 0.0)
    reward = tl.where(counted, -kl_coef * kl, 0.0)
    token_scores = tl.zeros_like(kl)
    if TOKEN_SCORES:
        token_scores = tl.where(counted, load_step(scores, t, here, False).to(tl.float32), 0.0)
        reward += _clipped(token_scores, clip)
    else:
        reward = tl.where(t == slot[:, None], reward + score[:, None], reward)
    return counted, reward, kl, token_scores


@triton.jit
def _score_places(mask, scores_ptr, score_stride, row, inside, T, lowest, behind, W: tl.constexpr, TOKEN: tl.constexpr):
    """Each row's slot for the score and the score; whether the row has a counted step, and whether its slot is beyond.

    The last two only if `lowest` is at most 0.
    """
    last = _last_counted(mask, T, lowest, inside, SEARCH * W)
    slot = tl.where(last >= 0, tl.minimum(last + behind, T - 1), -1)
    score = tl.zeros(slot.shape, tl.float32)
    if not TOKEN:
        score = tl.load(scores_ptr + row * score_stride, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
    present = inside & (last >= 0)
    return slot, score, present, present & (slot > last)


@triton.jit(do_not_specialize=[*SHAPING, "rows"])
def _shape_kernel(
    logprobs_ptr,  # (rows, T)
    refs_ptr,
    scores_ptr,  # (rows,), or (rows, T)
    mask_ptr,
    rewards_ptr,  # (rows, T) without gaps, as all outputs
    kl_ptr,
    longer_ptr,  # or None
    kl_coef,
    clip,
    kind,  # which estimator
    behind,  # 1 if the score comes after the last counted step
    rows,
    T,
    l_stride,  # from row to row
    ref_stride,
    score_stride,
    m_stride,
    out_stride,
    TOKEN_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,  # T and all strides are multiples of 4
    R: tl.constexpr,
    W: tl.constexpr,
):
    SPAN: tl.constexpr = TILES * W
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    first = tl.program_id(1) * SPAN
    if ALIGNED:
        T = T // 4 * 4
    mask = mask_ptr, place_of(m_stride, row, 0, ALIGNED, False)
    tensors = (
        (logprobs_ptr, place_of(l_stride, row, 0, ALIGNED, False)),
        (refs_ptr, place_of(ref_stride, row, 0, ALIGNED, False)),
        (scores_ptr, place_of(score_stride, row, 0, ALIGNED and TOKEN_SCORES, False)),
        mask,
    )
    slot, score, _present, _beyond = _score_places(
        mask, scores_ptr, score_stride, row, inside, T, first - 1, behind, W, TOKEN_SCORES
    )
    score = _clipped(score, clip)
    out_row, _step = place_of(out_stride, row, 0, ALIGNED, False)
    for j in range(tl.minimum(tl.cdiv(T - first, W), TILES)):
        t = tl.arange(0, W)[None, :] + (first + j * W)
        here = inside[:, None] & (t < T)
        counted, reward, kl, _tokens = _shaped_tile(tensors, (clip, kl_coef, kind), slot, score, t, here, TOKEN_SCORES)
        at = out_row[:, None] + t
        tl.store(rewards_ptr + at, reward, mask=here)
        tl.store(kl_ptr + at, kl, mask=here)
        if longer_ptr is not None:
            tl.store(longer_ptr + at, counted | (t == slot[:, None]), mask=here)


@triton.jit
def _shaped_span(
    tensors,  # (pointer, place) of logprobs, ref_logprobs, scores, mask
    values,
    outputs,  # pointers of advantages, returns, rewards, kl
    out_row,
    numbers,
    slot,
    score,
    first,
    T,
    inside,
    tiles,
    gamma,
    decay,
    s,
    sums,  # the moments of the advantages (R, W); sums (R,) of rewards, KL, returns, scores per token
    WRITE: tl.constexpr,
    TOKEN_SCORES: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """gae_kernels.scan_span for shaped rewards. Returns the span's map and, where WRITE is set, the longer sums."""
    n, mean, m2, rewards, kls, returns, scores = sums
    span_a = tl.full([R], 1.0, tl.float32)
    span_b = tl.zeros([R], tl.float32)
    for j in range(tiles):
        t = tl.arange(0, W)[None, :] + (first + (tiles - 1 - j) * W)
        here = inside[:, None] & (t < T)
        counted, r, kl, token_scores = _shaped_tile(tensors, numbers, slot, score, t, here, TOKEN_SCORES)
        v = load_step(values, t, here, False).to(tl.float32)
        step = counted | (t == slot[:, None])  # behind the last token, the score's slot is a step too
        td_error = r - v
        a, b, _cut, _end = step_maps(td_error, v, step, None, None, None, gamma[:, None], decay[:, None])
        following, tile_a, tile_b = row_tile(a, b, apply(span_a, span_b, s), R, W)
        if WRITE:
            at = out_row[:, None] + t
            advantage = tl.where(counted, td_error + following, 0.0)
            value_target = tl.where(step, r + following, 0.0)
            tl.store(outputs[0] + at, advantage, mask=here)
            tl.store(outputs[1] + at, value_target, mask=here)
            tl.store(outputs[2] + at, r, mask=here)
            tl.store(outputs[3] + at, kl, mask=here)
            n, mean, m2 = add_elements(n, mean, m2, advantage, counted)
            rewards += tl.sum(r, 1)  # over the steps at once: sums per lane would take four times the registers
            kls += tl.sum(kl, 1)
            returns += tl.sum(value_target, 1)
            if TOKEN_SCORES:
                scores += tl.sum(token_scores, 1)
        span_a, span_b = then(span_a, span_b, tile_a, tile_b)
    return span_a, span_b, n, mean, m2, rewards, kls, returns, scores


@triton.jit
def _sums_place(sums_ptr):
    """What the program leaves for whiten_kernels.py: (9, programs). Where its column begins, and the next plane."""
    plane = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    return sums_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), plane


@triton.jit
def _store_rows(sums_ptr, score, present, TOKEN_SCORES: tl.constexpr):
    """What is known before the scan, which needs the registers."""
    at, plane = _sums_place(sums_ptr)
    if not TOKEN_SCORES:
        tl.store(at + 7 * plane, tl.sum(tl.where(present, score, 0.0)))
    tl.store(at + 8 * plane, tl.sum(present.to(tl.float32)))


@triton.jit
def _store_sums(sums_ptr, sums, slots_beyond, TOKEN_SCORES: tl.constexpr):
    n, mean, m2, rewards, kls, returns, scores = sums
    at, plane = _sums_place(sums_ptr)
    n_all, mean_all, m2_all = over_lanes(n, mean, m2)
    tl.store(at, n_all)
    tl.store(at + plane, mean_all)
    tl.store(at + 2 * plane, m2_all)
    tl.store(at + 3 * plane, tl.sum(rewards))
    tl.store(at + 4 * plane, tl.sum(kls))
    tl.store(at + 5 * plane, tl.sum(returns))
    tl.store(at + 6 * plane, n_all + slots_beyond)  # steps: counted ones, and slots behind the last of them
    if TOKEN_SCORES:
        tl.store(at + 7 * plane, tl.sum(scores))


@triton.jit(do_not_specialize=[*SHAPING, *SCANNING])
def _advantages_kernel(
    logprobs_ptr,  # (rows, T)
    refs_ptr,
    scores_ptr,  # (rows,), or (rows, T)
    values_ptr,
    mask_ptr,
    bootstrap_ptr,  # (rows,) or None, as the next two
    gammas_ptr,
    lams_ptr,
    advantages_ptr,  # (rows, T) without gaps, as all outputs
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    maps_ptr,  # (2, spans, rows): the map of each span
    sums_ptr,  # (9, programs)
    gamma,
    lam,
    kl_coef,
    clip,
    kind,  # which estimator
    behind,  # 1 if the score comes after the last counted step
    rows,
    T,
    spans,
    l_stride,  # from row to row
    ref_stride,
    score_stride,
    v_stride,
    m_stride,
    out_stride,
    MODE: tl.constexpr,
    TOKEN_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,  # T and all strides are multiples of 4
    R: tl.constexpr,
    W: tl.constexpr,
):
    SPAN: tl.constexpr = TILES * W
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place, maps = _padded_place(rows, T, spans, row, SPAN)
    span, inside, steps_left = place[3], place[4], place[5]
    mask = mask_ptr, place_of(m_stride, row, 0, ALIGNED, False)
    tensors = (
        (logprobs_ptr, place_of(l_stride, row, 0, ALIGNED, False)),
        (refs_ptr, place_of(ref_stride, row, 0, ALIGNED, False)),
        (scores_ptr, place_of(score_stride, row, 0, ALIGNED and TOKEN_SCORES, False)),
        mask,
    )
    values = values_ptr, place_of(v_stride, row, 0, ALIGNED, False)
    out_row, _step = place_of(out_stride, row, 0, ALIGNED, False)
    outputs = advantages_ptr, returns_ptr, rewards_ptr, kl_ptr
    g = load_row_number(gammas_ptr, gamma, row, inside)
    decay = g * load_row_number(lams_ptr, lam, row, inside)
    s = g * load_row_number(bootstrap_ptr, 0.0, row, inside)
    if MODE == COMPOSE and TOKEN_SCORES:  # no slot, and only the launches that leave sums ask which rows are empty
        slot, score = tl.full([R], -1, tl.int32), tl.zeros([R], tl.float32)
    else:
        slot, score, present, beyond = _score_places(
            mask, scores_ptr, score_stride, row, inside, T, span * SPAN - 1, behind, W, TOKEN_SCORES
        )
        if MODE != COMPOSE:
            # every span of a row knows its score; the first, which has seen the whole row, counts it
            _store_rows(sums_ptr, score, present & (span == 0), TOKEN_SCORES)
            slots_beyond = tl.sum((beyond & (span == 0)).to(tl.float32))
    numbers = clip, kl_coef, kind
    clipped = _clipped(score, clip)
    zeros, none = tl.zeros([R, W], tl.float32), tl.zeros([R], tl.float32)
    n, mean, m2, rewards, kls, returns, scores = zeros, zeros, zeros, none, none, none, none
    if MODE == WALK:
        for back in range(spans):
            first = (spans - 1 - back) * SPAN
            tiles = tl.minimum(tl.cdiv(T - first, W), TILES)
            sums = n, mean, m2, rewards, kls, returns, scores
            a, b, n, mean, m2, rewards, kls, returns, scores = _shaped_span(
                tensors, values, outputs, out_row, numbers, slot, clipped, first, T, inside, tiles, g, decay, s, sums,
                True, TOKEN_SCORES, R, W,
            )  # fmt: skip
            s = apply(a, b, s)
    else:
        tiles = tl.minimum(tl.cdiv(steps_left, W), TILES)
        if MODE == APPLY:
            s = chain(maps_ptr, maps, span, s)
        sums = n, mean, m2, rewards, kls, returns, scores
        a, b, n, mean, m2, rewards, kls, returns, scores = _shaped_span(
            tensors, values, outputs, out_row, numbers, slot, clipped, span * SPAN, T, inside, tiles, g, decay, s, sums,
            MODE == APPLY, TOKEN_SCORES, R, W,
        )  # fmt: skip
    if MODE == COMPOSE:
        at = maps_ptr + maps[0] + span * maps[1]
        tl.store(at, a, mask=inside)
        tl.store(at + maps[2], b, mask=inside)
    else:
        sums = n, mean, m2, rewards, kls, returns, scores
        _store_sums(sums_ptr, sums, slots_beyond, TOKEN_SCORES)
