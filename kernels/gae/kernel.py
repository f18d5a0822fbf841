"""reference.gae as a scan of affine maps, for rows, packed sequences and time-major columns.

Backwards in time one number per row is carried, s_t = gamma V_t + gamma lam A_t, all that step t - 1 needs of step t:

    A_t = r_t - V_t + s_{t+1},    s_t = [gamma V_t + gamma lam (r_t - V_t)] + gamma lam s_{t+1} = b_t + a_t s_{t+1}.

A masked step is the identity (a = 1, b = 0), so the counted steps before and after it are treated as adjacent. A
terminated step uses 0, and a truncated one gamma final_values_t, instead of s_{t+1}, and has a = 0. Where a is 0 no
later step may contribute, not even NaN, hence the selects.

A row is cut in spans, and a span in tiles of W steps. The maps of a span's steps are composed from its end on, and
applied to s after the span; s moves from span to span by the composed map. So the arithmetic of a row is the same
whether one program processes all spans or each span has a program of its own, and its bits depend neither on the other
rows nor on their number.
"""

import triton
import triton.language as tl


@triton.jit
def compose(a_later, b_later, a, b):
    """The map of some steps after that of the later ones, in the order that associative_scan needs (later first)."""
    return a * a_later, tl.where(a == 0, b, tl.fma(a, b_later, b))


@triton.jit
def apply_map(a, b, s):
    return tl.where(a == 0, b, tl.fma(a, s, b))


@triton.jit
def step_maps(td_error, values, mask, gamma, decay):
    """(a, b) of each step. td_error includes what replaces s_{t+1} at a cut, where the caller sets a to 0."""
    a = tl.where(mask, decay, 1.0)
    b = tl.where(mask, tl.fma(decay, td_error, gamma * values), 0.0)
    return a, b


@triton.jit
def cut_of(mask, terminated, truncated, final_values, gamma):
    """Whether each step cuts the trace, and what replaces s_{t+1} where it does."""
    end_value = tl.where(truncated & ~terminated, gamma * final_values, 0.0)
    return mask & (terminated | truncated), end_value


@triton.jit
def is_given(present, BIT: tl.constexpr):
    """Whether an optional tensor is given. The pointer of one that is not must be valid, and is never read."""
    return ((present >> BIT) & 1) != 0


@triton.jit
def row_numbers(numbers_ptr, present, gamma, lam, rows, row, inside, FIRST: tl.constexpr):
    """gamma, gamma lam and gamma bootstrap of each row. numbers_ptr has rows of those that are given, in the order
    bootstrap, gammas, lams, as the bits of `present` from FIRST on say."""
    has_bootstrap, has_gammas = is_given(present, FIRST), is_given(present, FIRST + 1)
    has_lams = is_given(present, FIRST + 2)
    bootstrap = tl.load(numbers_ptr + row, mask=inside & has_bootstrap, other=0.0)
    at = numbers_ptr + tl.where(has_bootstrap, rows, 0) + row
    g = tl.where(has_gammas, tl.load(at, mask=inside & has_gammas, other=0.0), gamma)
    at += tl.where(has_gammas, rows, 0)
    decay = g * tl.where(has_lams, tl.load(at, mask=inside & has_lams, other=0.0), lam)
    return g, decay, g * bootstrap


@triton.jit
def pointers(ptr, offset, ALIGNED: tl.constexpr):
    """ptr + offset, where the first of neighbouring elements is at a multiple of 4 elements if ALIGNED."""
    at = ptr + offset
    if ALIGNED:
        BYTES: tl.constexpr = (ptr.dtype.element_ty.primitive_bitwidth + 7) // 8
        at = tl.multiple_of(at, 4 * BYTES)
    return at


@triton.jit
def row_start(ptr, offset, ALIGNED: tl.constexpr):
    """Pointers to the first step of each row, (R, 1)."""
    return pointers(ptr, offset, ALIGNED)[:, None]


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
    a23, b23 = compose(a3, b3, a2, b2)
    a123, b123 = compose(a23, b23, a1, b1)
    a_all, b_all = compose(a123, b123, a0, b0)
    a_all, b_all = tl.associative_scan((tl.gather(a_all, turned, 1), tl.gather(b_all, turned, 1)), 1, compose)
    s_first = apply_map(a_all, b_all, s[:, None])  # s at the first of the four steps, threads turned
    s_next = tl.gather(s_first, tl.broadcast_to(tl.maximum(G - 2 - thread, 0), [R, G]), 1)
    s4 = tl.where(thread == G - 1, s[:, None], s_next)
    s3 = apply_map(a3, b3, s4)
    s2 = apply_map(a2, b2, s3)
    s1 = apply_map(a1, b1, s2)
    following = tl.reshape(tl.join(tl.join(s1, s3), tl.join(s2, s4)), [R, W])
    last = thread == G - 1
    return following, tl.sum(tl.where(last, a_all, 0.0), 1), tl.sum(tl.where(last, b_all, 0.0), 1)


@triton.jit
def chain(own_map, stride, plane, later, most, inside, s, ALIGNED: tl.constexpr):
    """s after a span: the maps of all later spans of its row, the last one first, 16 reads at a time.

    own_map: pointers to a of the span's own map, (R,); stride: from span to span; plane: from a to b; later: the number
    of later spans, of all rows or of each; most: the largest of them.
    """
    done = 0
    while done < most:
        for j in tl.static_range(16):
            distance = later - done - j
            there = (distance > 0) & inside
            a = tl.load(pointers(own_map, distance.to(tl.int64) * stride, ALIGNED), mask=there, other=1.0)
            b = tl.load(pointers(own_map, distance.to(tl.int64) * stride + plane, ALIGNED), mask=there, other=0.0)
            s = tl.where(there, apply_map(a, b, s), s)
        done += 16
    return s


@triton.jit
def scan_span(
    inputs,  # (R, 1) pointers to the first step of rewards, values, final values, mask, terminated, truncated
    outputs,  # likewise of advantages and returns
    first,  # step of the span, of all rows or (R, 1)
    length,  # of all rows or (R, 1)
    inside,  # (R,): whether the row exists
    real,  # (R,): whether its steps count; others are written as 0
    present,
    tiles,  # of the span that have steps
    gamma,
    decay,
    s,  # after the span
    WRITE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Compose a span of R rows, and with WRITE write its advantages and returns. Return the span's map."""
    rewards, values, finals, masks, terminations, truncations = inputs
    has_mask, has_terminated, has_truncated = is_given(present, 0), is_given(present, 1), is_given(present, 2)
    span_a = tl.full([R], 1.0, tl.float32)
    span_b = tl.zeros([R], tl.float32)
    for j in range(tiles):
        t = tl.arange(0, W)[None, :] + (first + (tiles - 1 - j) * W)
        here = inside[:, None] & (t < length)
        read = real[:, None] & (t < length)
        r = tl.load(rewards + t, mask=read, other=0.0).to(tl.float32)
        v = tl.load(values + t, mask=read, other=0.0).to(tl.float32)
        mask = read & (tl.load(masks + t, mask=read & has_mask, other=1) != 0)
        terminated = tl.load(terminations + t, mask=read & has_terminated, other=0) != 0
        truncated = tl.load(truncations + t, mask=read & has_truncated, other=0) != 0
        final = tl.load(finals + t, mask=read & has_truncated, other=0.0).to(tl.float32)
        cut, end_value = cut_of(mask, terminated, truncated, final, gamma[:, None])
        td_error = r - v
        a, b = step_maps(td_error + end_value, v, mask, gamma[:, None], decay[:, None])
        a = tl.where(cut, 0.0, a)
        following, tile_a, tile_b = row_tile(a, b, apply_map(span_a, span_b, s), R, W)
        if WRITE:
            following = tl.where(cut, end_value, following)
            tl.store(outputs[0] + t, tl.where(mask, td_error + following, 0.0), mask=here)
            tl.store(outputs[1] + t, tl.where(mask, r + following, 0.0), mask=here)
        span_a, span_b = compose(span_a, span_b, tile_a, tile_b)
    return span_a, span_b


@triton.jit(do_not_specialize=list(range(19)))
def gae_rows_kernel(
    rewards_ptr,  # (rows, T), steps contiguous, as the next five
    values_ptr,
    final_ptr,
    mask_ptr,
    terminated_ptr,
    truncated_ptr,
    numbers_ptr,  # (1 to 3, rows): those of bootstrap, gammas, lams that are given
    advantages_ptr,  # (rows, T) without gaps
    returns_ptr,
    maps_ptr,  # (2, spans, rows): the map of each span, if there is more than one launch
    present: tl.int32,  # bits 0 to 5: mask, terminated, truncated, bootstrap, gammas, lams are given
    gamma: tl.float32,
    lam: tl.float32,
    rows: tl.int32,
    T: tl.int32,
    r_stride: tl.int64,  # from row to row
    v_stride: tl.int64,
    f_stride: tl.int64,
    flag_stride: tl.int64,  # of mask, terminated and truncated
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
    inputs = (
        row_start(rewards_ptr, row * r_stride, ALIGNED),
        row_start(values_ptr, row * v_stride, ALIGNED),
        row_start(final_ptr, row * f_stride, ALIGNED),
        row_start(mask_ptr, row * flag_stride, ALIGNED),
        row_start(terminated_ptr, row * flag_stride, ALIGNED),
        row_start(truncated_ptr, row * flag_stride, ALIGNED),
    )
    outputs = row_start(advantages_ptr, row * T, ALIGNED), row_start(returns_ptr, row * T, ALIGNED)
    g, decay, s = row_numbers(numbers_ptr, present, gamma, lam, rows, row, inside, 3)
    spans = tl.cdiv(T, TILES * W)
    plane = spans.to(tl.int64) * rows
    if WRITE:
        one_pass = tl.num_programs(1) == 1
        last = tl.where(one_pass, spans - 1, tl.program_id(1))
        later = spans - 1 - last
        s = chain(maps_ptr + row + last.to(tl.int64) * rows, rows, plane, later, later, inside, s, False)
        for back in range(tl.where(one_pass, spans, 1)):
            first = (last - back) * TILES * W
            here = tl.minimum(tl.cdiv(T - first, W), TILES)
            a, b = scan_span(inputs, outputs, first, T, inside, inside, present, here, g, decay, s, True, R, W)
            s = apply_map(a, b, s)
    else:
        span = tl.program_id(1) + 1
        first = span * TILES * W
        here = tl.minimum(tl.cdiv(T - first, W), TILES)
        a, b = scan_span(inputs, outputs, first, T, inside, inside, present, here, g, decay, s, False, R, W)
        own_map = maps_ptr + row + span.to(tl.int64) * rows
        tl.store(own_map, a, mask=inside)
        tl.store(own_map + plane, b, mask=inside)


@triton.jit
def _boundary(cu_ptr, cu_stride, i, rows, total):
    """Where the i-th of rows + 2 sequences starts: the first is what precedes cu_seqlens[0], the last what follows
    cu_seqlens[-1], so that every step belongs to one; both are empty unless cu_seqlens is wrong. In [0, total]."""
    x = tl.load(cu_ptr + (i - 1).to(tl.int64) * cu_stride, mask=(i > 0) & (i < rows + 2), other=0)
    return tl.where(i > rows + 1, total, tl.minimum(tl.maximum(x, 0), total))


@triton.jit(do_not_specialize=list(range(16)))
def gae_packed_kernel(
    rewards_ptr,  # (total,), as the next five
    values_ptr,
    final_ptr,
    mask_ptr,
    terminated_ptr,
    truncated_ptr,
    numbers_ptr,  # (1 to 3, rows): those of bootstrap, gammas, lams that are given
    cu_ptr,  # (rows + 1,)
    advantages_ptr,  # (total,)
    returns_ptr,
    maps_ptr,  # (2, slots): the map of each span
    present: tl.int32,  # as for rows; bit 6: cu_ptr has int64 numbers, of which it reads the lower halves
    gamma: tl.float32,
    lam: tl.float32,
    rows: tl.int32,
    total: tl.int32,
    WRITE: tl.constexpr,  # False: only compose the maps of the spans
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,  # of a span
):
    """A program processes R slots. Sequence i of _boundary has the slots from start // span + i on: at least as many as
    it has spans, whatever the lengths. cu_seqlens may have any content: no address depends on it without a bound."""
    SPAN: tl.constexpr = TILES * W
    cu_stride = tl.where(is_given(present, 6), 2, 1)
    slots = total // SPAN + rows + 2
    slot = tl.program_id(0) * R + tl.arange(0, R)
    low = tl.zeros([R], tl.int32)
    high = low + rows + 1
    halvings = rows + 1
    while halvings > 0:
        middle = (low + high + 1) // 2
        begun = _boundary(cu_ptr, cu_stride, middle, rows, total) // SPAN + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
        halvings //= 2
    start = _boundary(cu_ptr, cu_stride, low, rows, total)
    length = tl.maximum(_boundary(cu_ptr, cu_stride, low + 1, rows, total) - start, 0)
    span = slot - (start // SPAN + low)
    row_spans = tl.cdiv(length, SPAN)
    inside = (slot < slots) & (span >= 0) & (span < row_spans)
    real = inside & (low >= 1) & (low <= rows)
    later = tl.where(inside, row_spans - 1 - span, 0)
    first = tl.where(inside, span * SPAN, 0)
    here = tl.minimum(tl.cdiv(tl.max(tl.where(inside, length - first, 0)), W), TILES)

    inputs = (
        row_start(rewards_ptr, start, False),
        row_start(values_ptr, start, False),
        row_start(final_ptr, start, False),
        row_start(mask_ptr, start, False),
        row_start(terminated_ptr, start, False),
        row_start(truncated_ptr, start, False),
    )
    outputs = row_start(advantages_ptr, start, False), row_start(returns_ptr, start, False)
    g, decay, s = row_numbers(numbers_ptr, present, gamma, lam, rows, low - 1, real, 3)
    own_map = maps_ptr + slot
    if WRITE:
        s = chain(own_map, 1, slots, later, tl.max(later), inside, s, False)
    a, b = scan_span(
        inputs, outputs, first[:, None], length[:, None], inside, real, present, here, g, decay, s, WRITE, R, W
    )
    if not WRITE:
        tl.store(own_map, a, mask=inside)
        tl.store(own_map + slots, b, mask=inside)


@triton.jit
def _load_columns(ptr, stride, t, column, mask, ALIGNED: tl.constexpr, other: tl.constexpr):
    """Step t of each column, (C,)."""
    return tl.load(pointers(ptr, t.to(tl.int64) * stride + column, ALIGNED), mask=mask, other=other)


@triton.jit
def _load_column_step(inputs, strides, t, column, inside, present, ALIGNED: tl.constexpr):
    """Rewards, values, final values, mask, terminated and truncated of step t."""
    rewards, values, finals, masks, terminations, truncations = inputs
    r_stride, v_stride, f_stride, flag_stride = strides
    has_truncated = inside & is_given(present, 2)
    return (
        _load_columns(rewards, r_stride, t, column, inside, ALIGNED, 0.0),
        _load_columns(values, v_stride, t, column, inside, ALIGNED, 0.0),
        _load_columns(finals, f_stride, t, column, has_truncated, ALIGNED, 0.0),
        _load_columns(masks, flag_stride, t, column, inside & is_given(present, 0), ALIGNED, 1),
        _load_columns(terminations, flag_stride, t, column, inside & is_given(present, 1), ALIGNED, 0),
        _load_columns(truncations, flag_stride, t, column, has_truncated, ALIGNED, 0),
    )


@triton.jit
def _scan_columns(
    inputs,  # pointers of rewards, values, final values, mask, terminated, truncated
    strides,  # from step to step, of rewards, values, final values and flags
    outputs,  # pointers of advantages and returns
    out_stride,
    column,
    inside,
    first,  # step of the span
    T,
    present,
    tiles,  # of the span that have steps
    gamma,
    decay,
    s,  # after the span
    WRITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """scan_span for C columns. A thread owns whole columns, so the steps follow each other without any exchange."""
    a_all = tl.full([C], 1.0, tl.float32)
    b_all = tl.zeros([C], tl.float32)
    for j in range(tiles):
        start = first + (tiles - 1 - j) * W
        steps = ()
        for i in tl.static_range(W):  # all reads of a tile before its first write, so that they wait together
            t = start + W - 1 - i
            step = _load_column_step(inputs, strides, t, column, inside & (t < T), present, ALIGNED)
            steps = steps + (step,)  # noqa: RUF005 - Triton compiles no unpacking here
        for i in tl.static_range(W):
            t = start + W - 1 - i
            here = inside & (t < T)
            r, v = steps[i][0].to(tl.float32), steps[i][1].to(tl.float32)
            mask = here & (steps[i][3] != 0)
            final = steps[i][2].to(tl.float32)
            cut, end_value = cut_of(mask, steps[i][4] != 0, steps[i][5] != 0, final, gamma)
            td_error = r - v
            a, b = step_maps(td_error + end_value, v, mask, gamma, decay)
            a = tl.where(cut, 0.0, a)
            if WRITE:
                following = tl.where(cut, end_value, apply_map(a_all, b_all, s))
                at = t.to(tl.int64) * out_stride + column
                advantage = tl.where(mask, td_error + following, 0.0)
                tl.store(pointers(outputs[0], at, ALIGNED), advantage, mask=here)
                tl.store(pointers(outputs[1], at, ALIGNED), tl.where(mask, r + following, 0.0), mask=here)
            a_all, b_all = compose(a_all, b_all, a, b)
    return a_all, b_all


@triton.jit(do_not_specialize=list(range(20)))
def gae_columns_kernel(
    rewards_ptr,  # (T, columns), columns contiguous, as the next five
    values_ptr,
    final_ptr,
    mask_ptr,
    terminated_ptr,
    truncated_ptr,
    numbers_ptr,  # (1 to 3, columns), as for rows
    advantages_ptr,  # (T, columns) without gaps
    returns_ptr,
    maps_ptr,  # (2, spans, columns): the map of each span, if there is more than one launch
    present: tl.int32,  # as for rows
    gamma: tl.float32,
    lam: tl.float32,
    columns: tl.int32,
    T: tl.int32,
    tiles: tl.int32,  # of a span
    r_stride: tl.int64,  # from step to step
    v_stride: tl.int64,
    f_stride: tl.int64,
    flag_stride: tl.int64,  # of mask, terminated and truncated
    WRITE: tl.constexpr,  # False: only compose the maps of all spans but the first, one span in a program
    ALIGNED: tl.constexpr,  # columns is a multiple of 4, and each step starts at a multiple of 4 elements
    C: tl.constexpr,
    W: tl.constexpr,
):
    if ALIGNED:
        columns = columns // 4 * 4
    column = tl.program_id(0) * C + tl.arange(0, C)
    inside = column < columns
    inputs = rewards_ptr, values_ptr, final_ptr, mask_ptr, terminated_ptr, truncated_ptr
    strides = r_stride, v_stride, f_stride, flag_stride
    outputs = advantages_ptr, returns_ptr
    g, decay, s = row_numbers(numbers_ptr, present, gamma, lam, columns, column, inside, 3)
    spans = tl.cdiv(T, tiles * W)
    plane = spans.to(tl.int64) * columns
    if WRITE:
        one_pass = tl.num_programs(1) == 1
        last = tl.where(one_pass, spans - 1, tl.program_id(1))
        later = spans - 1 - last
        own_map = maps_ptr + last.to(tl.int64) * columns + column
        s = chain(own_map, columns, plane, later, later, inside, s, ALIGNED)
        for back in range(tl.where(one_pass, spans, 1)):
            first = (last - back) * tiles * W
            here = tl.minimum(tl.cdiv(T - first, W), tiles)
            a, b = _scan_columns(
                inputs, strides, outputs, columns, column, inside, first, T, present, here, g, decay, s,
                True, ALIGNED, C, W,
            )  # fmt: skip
            s = apply_map(a, b, s)
    else:
        span = tl.program_id(1) + 1
        first = span * tiles * W
        here = tl.minimum(tl.cdiv(T - first, W), tiles)
        a, b = _scan_columns(
            inputs, strides, outputs, columns, column, inside, first, T, present, here, g, decay, s,
            False, ALIGNED, C, W,
        )  # fmt: skip
        own_map = maps_ptr + span.to(tl.int64) * columns + column
        tl.store(pointers(own_map, 0, ALIGNED), a, mask=inside)
        tl.store(pointers(own_map, plane, ALIGNED), b, mask=inside)
