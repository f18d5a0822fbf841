"""The device code of gae.py: reference.gae as a scan of affine maps, for rows of any length and for time-major columns.

Backwards in time one number per row is carried, s_t = gamma V_t + gamma lam A_t, all that step t tells step t - 1:

    A_t = r_t - V_t + s_{t+1},    s_t = [gamma V_t + gamma lam (r_t - V_t)] + gamma lam s_{t+1} = b_t + a_t s_{t+1}.

A masked step is the identity (a = 1, b = 0), so its neighbours see each other's value and trace at once; a terminated
step takes 0 and a truncated one gamma final_values_t in place of s_{t+1}, and has a = 0. Where a is 0 nothing of the
later step may come through, not even NaN, hence the selects.

A row is cut in tiles (scanned at once) and spans of TILES tiles. A span's steps are first composed to one map, then
applied to s behind the span. So the arithmetic of a row is the same whether one program walks all spans or several
programs take one each, and its bits depend neither on the other rows nor on how many there are.
"""

import triton
import triton.language as tl

TILES = tl.constexpr(4)  # tiles in a span
CHAIN = tl.constexpr(16)  # maps of later spans that are read at once
INTEGERS = ["rows", "T", "spans", "search", *(f"{x}_stride" for x in ("r", "v", "m", "e", "c", "f", "out"))]

# What a launch does: walk all spans of its rows; or only compose its span; or apply its span, after all are composed.
WALK = tl.constexpr(0)
COMPOSE = tl.constexpr(1)
APPLY = tl.constexpr(2)


@triton.jit
def then(a_later, b_later, a, b):
    """The map of a step after that of the later ones, as associative_scan wants it (later ones first)."""
    return a * a_later, tl.where(a == 0, b, tl.fma(a, b_later, b))


@triton.jit
def apply(a, b, s):
    return tl.where(a == 0, b, tl.fma(a, s, b))


@triton.jit
def _then_exclusive(a_later, b_later, x_later, y_later, a, b, x, y):
    """`then` for maps (a, b), carrying along (x, y): the same without the earliest step of each side."""
    full_a, full_b = then(a_later, b_later, a, b)
    past_a, past_b = then(a_later, b_later, x, y)
    return full_a, full_b, past_a, past_b


@triton.jit
def step_maps(td_error, values, counted, terminated, truncated, final_values, gamma, decay):
    """(a, b) of each step, whether it is cut, and what stands for s_{t+1} where it is. Flags may be None."""
    end_value = tl.zeros_like(td_error)
    cut = tl.zeros(td_error.shape, tl.int1)
    if truncated is not None:
        cut = truncated
        end_value = tl.where(truncated, gamma * final_values, 0.0)
    if terminated is not None:
        cut = cut | terminated
        end_value = tl.where(terminated, 0.0, end_value)
    a = tl.where(counted, tl.where(cut, 0.0, decay), 1.0)
    b = tl.where(counted, tl.fma(decay, td_error + end_value, gamma * values), 0.0)
    return a, b, cut, end_value


@triton.jit
def row_tile(a, b, s, R: tl.constexpr, W: tl.constexpr):
    """s_{t+1} at each step of a tile (R, W) whose rows are followed by s (R,); and the tile's map, (R,) each.

    A thread holds four neighbouring steps and a warp the rest of the row (W <= 128): no shared memory, no barrier.
    The scan over threads runs forwards over a turned copy: reverse=True is slow and has been wrong (triton#4362).
    """
    G: tl.constexpr = W // 4
    thread = tl.arange(0, G)[None, :]
    turned = tl.broadcast_to(G - 1 - thread, [R, G])
    a02, a13 = tl.split(tl.reshape(a, [R, G, 2, 2]))
    a0, a2 = tl.split(a02)
    a1, a3 = tl.split(a13)
    b02, b13 = tl.split(tl.reshape(b, [R, G, 2, 2]))
    b0, b2 = tl.split(b02)
    b1, b3 = tl.split(b13)
    a23, b23 = then(a3, b3, a2, b2)
    a123, b123 = then(a23, b23, a1, b1)
    a_all, b_all = then(a123, b123, a0, b0)
    a_all, b_all = tl.associative_scan((tl.gather(a_all, turned, 1), tl.gather(b_all, turned, 1)), 1, then)
    s_first = apply(a_all, b_all, s[:, None])  # s at the first of the four steps, threads turned
    behind = tl.gather(s_first, tl.broadcast_to(tl.maximum(G - 2 - thread, 0), [R, G]), 1)
    s4 = tl.where(thread == G - 1, s[:, None], behind)
    s3 = apply(a3, b3, s4)
    s2 = apply(a2, b2, s3)
    s1 = apply(a1, b1, s2)
    following = tl.reshape(tl.join(tl.join(s1, s3), tl.join(s2, s4)), [R, W])
    last = thread == G - 1
    return following, tl.sum(tl.where(last, a_all, 0.0), 1), tl.sum(tl.where(last, b_all, 0.0), 1)


@triton.jit
def _column_tile(a, b, s, U: tl.constexpr):
    """row_tile for a tile (U, C) with the latest step first."""
    ones = tl.full(a.shape, 1.0, tl.float32)
    a_all, b_all, a_past, b_past = tl.associative_scan((a, b, ones, ones - 1.0), 0, _then_exclusive)
    earliest = tl.arange(0, U)[:, None] == U - 1
    following = apply(a_past, b_past, s[None, :])
    return following, tl.sum(tl.where(earliest, a_all, 0.0), 0), tl.sum(tl.where(earliest, b_all, 0.0), 0)


@triton.jit
def load_row_number(ptr, number, row, inside):
    """A number per row: read, or the same for all rows where there is no pointer."""
    if ptr is not None:
        x = tl.load(ptr + row, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.zeros(row.shape, tl.float32) + number
    return x


@triton.jit
def wide(x, COLUMNS: tl.constexpr):
    """One number per row in the shape of a tile: (R, W), or (W, R) for columns."""
    if COLUMNS:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def place_of(stride, row, offset, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """(offset of each row, step stride). stride: from row to row, or for columns from step to step.

    A pointer that may be None stays with the caller: Triton 3.6 does not return None from a function.
    """
    if ALIGNED:
        stride = stride // 4 * 4
    if COLUMNS:
        return row, stride
    else:
        return row * stride + offset, 1


@triton.jit
def load_step(tensor, t, inside, COLUMNS: tl.constexpr):
    ptr, place = tensor
    start, step = place
    return tl.load(ptr + (wide(start, COLUMNS) + t * step), mask=inside, other=0)


@triton.jit
def _packed_place(cu_ptr, rows, slots, search, slot, SPAN: tl.constexpr):
    """Which span of which packed row each slot is. Returns the same as _padded_place.

    Row i has the slots from cu[i] // SPAN + i on: never fewer than it has spans, whatever the lengths.
    """
    low = tl.zeros(slot.shape, tl.int64)
    high = low + rows - 1
    for _ in range(search):
        middle = (low + high + 1) // 2
        begun = tl.load(cu_ptr + middle).to(tl.int64) // SPAN + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    start = tl.load(cu_ptr + low).to(tl.int64)
    length = (tl.load(cu_ptr + low + 1).to(tl.int64) - start).to(tl.int32)
    first_slot = start // SPAN + low
    span = (slot - first_slot).to(tl.int32)
    row_spans = tl.cdiv(length, SPAN)
    inside = span < row_spans
    steps = tl.max(tl.where(inside, length - span * SPAN, 0))
    later = tl.where(inside, row_spans - 1 - span, 0)
    return (low, start, length[:, None], span, inside, steps), (first_slot, 1, slots.to(tl.int64), later, tl.max(later))


@triton.jit
def _padded_place(rows, T, spans, row, SPAN: tl.constexpr):
    """(row, offset of its first step, its length, the span, is there such a row, steps from the span on) and
    (where its maps start, from span to span, from a to b, later spans, the most of them)."""
    span = tl.program_id(1)
    later = spans - 1 - span
    place = row, tl.zeros(row.shape, tl.int64), T, span, row < rows, T - span * SPAN
    return place, (row, rows, spans.to(tl.int64) * rows, tl.zeros(row.shape, tl.int32) + later, later)


@triton.jit
def chain(maps_ptr, maps, span, s):
    """s behind a span: the maps of all later spans of its row, from the last one on, CHAIN reads at a time."""
    first_map, stride, plane, later, most = maps
    done = 0
    while done < most:
        for j in tl.static_range(CHAIN):
            distance = later - done - j
            there = distance > 0
            at = maps_ptr + first_map + (span + distance).to(tl.int64) * stride
            a = tl.load(at, mask=there, other=1.0)
            b = tl.load(at + plane, mask=there, other=0.0)
            s = tl.where(there, apply(a, b, s), s)
        done += CHAIN
    return s


@triton.jit
def scan_span(
    tensors,  # (pointer or None, place) of rewards, values, mask, terminated, truncated, final values, outputs
    returns_ptr,
    first,  # step of the span
    length,  # of the row
    inside,  # is there such a row
    tiles,  # of the span that have steps in them
    gamma,
    decay,
    s,  # behind the span
    WRITE: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Composes a span of R rows, and where WRITE is set writes its advantages and returns. Returns the span's map."""
    rewards, values, mask, terminations, truncations, finals, outputs = tensors
    span_a = tl.full([R], 1.0, tl.float32)
    span_b = tl.zeros([R], tl.float32)
    for j in range(tiles):
        if COLUMNS:  # the latest step first
            t = (first + (tiles - j) * W - 1 - tl.arange(0, W)).to(tl.int64)[:, None]
        else:
            t = tl.arange(0, W)[None, :] + (first + (tiles - 1 - j) * W)
        here = wide(inside, COLUMNS) & (t < length)
        r = load_step(rewards, t, here, COLUMNS).to(tl.float32)
        v = load_step(values, t, here, COLUMNS).to(tl.float32)
        counted, terminated, truncated, final_values = here, None, None, None
        if mask[0] is not None:
            counted = here & (load_step(mask, t, here, COLUMNS) != 0)
        if terminations[0] is not None:
            terminated = load_step(terminations, t, here, COLUMNS) != 0
        if truncations[0] is not None:
            truncated = load_step(truncations, t, here, COLUMNS) != 0
            final_values = load_step(finals, t, here, COLUMNS).to(tl.float32)
        td_error = r - v
        a, b, cut, end_value = step_maps(
            td_error, v, counted, terminated, truncated, final_values, wide(gamma, COLUMNS), wide(decay, COLUMNS)
        )
        s_in = apply(span_a, span_b, s)
        if COLUMNS:
            following, tile_a, tile_b = _column_tile(a, b, s_in, W)
        else:
            following, tile_a, tile_b = row_tile(a, b, s_in, R, W)
        if WRITE:
            following = tl.where(cut, end_value, following)
            out_start, out_step = outputs[1]
            at = wide(out_start, COLUMNS) + t * out_step
            tl.store(outputs[0] + at, tl.where(counted, td_error + following, 0.0), mask=here)
            tl.store(returns_ptr + at, tl.where(counted, r + following, 0.0), mask=here)
        span_a, span_b = then(span_a, span_b, tile_a, tile_b)
    return span_a, span_b


@triton.jit(do_not_specialize=["gamma", "lam", *INTEGERS])
def _gae_kernel(
    rewards_ptr,  # (rows, T), steps contiguous; (T, rows), rows contiguous; or (total,) with cu_seqlens
    values_ptr,
    mask_ptr,
    terminated_ptr,
    truncated_ptr,
    final_ptr,
    bootstrap_ptr,  # (rows,)
    gammas_ptr,  # (rows,)
    lams_ptr,  # (rows,)
    cu_ptr,  # (rows + 1,)
    advantages_ptr,  # as rewards, without gaps
    returns_ptr,
    maps_ptr,  # (2, spans, rows), or (2, slots) if packed: the map of each span
    gamma,
    lam,
    rows,
    T,
    spans,  # of a row, or all slots if packed
    search,  # halvings that find one of the packed rows
    r_stride,  # strides of a row, or for columns of a step; 0 if packed
    v_stride,
    m_stride,
    e_stride,
    c_stride,
    f_stride,
    out_stride,
    MODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,  # T and all strides are multiples of 4
    R: tl.constexpr,
    W: tl.constexpr,
):
    SPAN: tl.constexpr = TILES * W
    slot = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if ALIGNED:
        T = T // 4 * 4
    if cu_ptr is not None:
        place, maps = _packed_place(cu_ptr, rows, spans, search, slot, SPAN)
    else:
        place, maps = _padded_place(rows, T, spans, slot, SPAN)
    row, offset, length, span, inside, steps = place
    tensors = (
        (rewards_ptr, place_of(r_stride, row, offset, ALIGNED, COLUMNS)),
        (values_ptr, place_of(v_stride, row, offset, ALIGNED, COLUMNS)),
        (mask_ptr, place_of(m_stride, row, offset, ALIGNED, COLUMNS)),
        (terminated_ptr, place_of(e_stride, row, offset, ALIGNED, COLUMNS)),
        (truncated_ptr, place_of(c_stride, row, offset, ALIGNED, COLUMNS)),
        (final_ptr, place_of(f_stride, row, offset, ALIGNED, COLUMNS)),
        (advantages_ptr, place_of(out_stride, row, offset, ALIGNED, COLUMNS)),
    )
    g = load_row_number(gammas_ptr, gamma, row, inside)
    decay = g * load_row_number(lams_ptr, lam, row, inside)
    s = g * load_row_number(bootstrap_ptr, 0.0, row, inside)
    if MODE == WALK:
        for back in range(spans):
            first = (spans - 1 - back) * SPAN
            tiles = tl.minimum(tl.cdiv(T - first, W), TILES)
            a, b = scan_span(tensors, returns_ptr, first, T, inside, tiles, g, decay, s, True, COLUMNS, R, W)
            s = apply(a, b, s)
    else:
        tiles = tl.minimum(tl.cdiv(steps, W), TILES)
        first = span * SPAN
        if cu_ptr is not None:
            first = first[:, None]
        if MODE == APPLY:
            s = chain(maps_ptr, maps, span, s)
        a, b = scan_span(tensors, returns_ptr, first, length, inside, tiles, g, decay, s, MODE == APPLY, COLUMNS, R, W)
        if MODE == COMPOSE:
            at = maps_ptr + maps[0] + span * maps[1]
            tl.store(at, a, mask=inside)
            tl.store(at + maps[2], b, mask=inside)
