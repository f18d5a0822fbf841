"""reference.gae in loops over time compiled by numba, for a CPU.

Backwards in time one number per row is carried, s_t = gamma V_t + gamma lam A_t (see eager.py). The loops are C
callbacks: no numba thread pool (its default one aborts the process when two Python threads enter it, or after a
fork) and no array boxing; a call releases the GIL, so plain Python threads divide the rows. The caller checks that
every tensor may be read by address (memory.addressable).

Bytes: every input is read once and both outputs are written once.
"""

import functools
from functools import lru_cache

import numba
import torch
from numba import types
from torch import Tensor

from ppo_fast.kernels.common.numba_loops import Array, Compiled, IndexArray, c_function
from ppo_fast.kernels.common.numba_threads import in_threads, split_rows

# Bits of `options`: which of the optional tensors are there.
_MASK, _TERMINATED, _TRUNCATED, _BOOTSTRAP, _GAMMAS, _LAMS, _PACKED = (1 << bit for bit in range(7))
_CRITIC_LAMS = _PACKED << 1
_BLOCK = 1024  # columns at a time, so that the scratch stays in the first-level cache
_FEW_ROWS = 8  # below this the loop over rows is too short to be vectorised


@numba.njit(forceinline=True, fastmath={"contract"}, error_model="numpy")
def _step(
    kind: int,  # a constant where it is called: _MASK, _TERMINATED, or 0 for neither
    rewards: Array,
    values: Array,
    flags: Array,
    advantages: Array,
    returns: Array,
    r_at: int,
    v_at: int,
    flag_at: int,
    out_at: int,
    g: float,
    decay: float,
    s: float,  # of the next counted step
) -> float:
    """Write one step of one row and return its s."""
    zero = g - g
    r, v, flag = rewards[r_at], values[v_at], False
    if kind != 0:
        flag = flags[flag_at] != 0
    following = zero if kind == _TERMINATED and flag else s
    counted = kind != _MASK or flag
    advantages[out_at] = (r - v) + following if counted else zero
    returns[out_at] = r + following if counted else zero
    # Written so that only one multiply-add depends on the step before.
    s_here = (g * v + decay * (r - v)) + decay * following
    return s_here if counted else s


@numba.njit(forceinline=True, fastmath={"contract"}, error_model="numpy")
def _one_or_two_rows(
    kind: int,
    rewards: Array,
    values: Array,
    flags: Array,
    advantages: Array,
    returns: Array,
    T: int,
    row: int,
    other: int,  # the row after it; the same row if there is none
    r_row: int,
    v_row: int,
    flag_row: int,
    o_row: int,
    g0: float,
    g1: float,
    d0: float,  # gamma lam
    d1: float,
    s0: float,  # gamma times the value after the row
    s1: float,
) -> None:
    """A step needs the result of the one after it; the processor computes a second row meanwhile."""
    r0, v0, f0, o0 = row * r_row, row * v_row, row * flag_row, row * o_row
    if row == other:
        for t in range(T - 1, -1, -1):
            s0 = _step(kind, rewards, values, flags, advantages, returns, r0 + t, v0 + t, f0 + t, o0 + t, g0, d0, s0)
    else:
        r1, v1, f1, o1 = other * r_row, other * v_row, other * flag_row, other * o_row
        for t in range(T - 1, -1, -1):
            s0 = _step(kind, rewards, values, flags, advantages, returns, r0 + t, v0 + t, f0 + t, o0 + t, g0, d0, s0)
            s1 = _step(kind, rewards, values, flags, advantages, returns, r1 + t, v1 + t, f1 + t, o1 + t, g1, d1, s1)


def _scan_rows(
    rewards: Array,  # (rows, T) with the strides below; (total,) if packed
    values: Array,
    mask: Array,
    terminated: Array,
    truncated: Array,
    final_values: Array,
    advantages: Array,
    returns: Array,
    bootstrap: Array,  # (rows,)
    gammas: Array,  # (rows,)
    lams: Array,  # (rows,)
    cu_seqlens: IndexArray,  # (rows + 1,)
    state: Array,  # this and the next are for _scan_columns
    incoming: Array,
    gamma: float,
    lam: float,
    T: int,
    first_row: int,
    last_row: int,
    options: int,
    r_row: int,
    r_step: int,
    v_row: int,
    v_step: int,
    m_row: int,
    m_step: int,
    e_row: int,
    e_step: int,
    c_row: int,
    c_step: int,
    f_row: int,
    f_step: int,
    o_row: int,
    o_step: int,
) -> None:
    """One row after the other, backwards in time: for rows that are contiguous, few, or packed."""
    zero = gamma - gamma  # of the kernel's float type
    plain = options & (_MASK | _TERMINATED | _TRUNCATED)
    flag_step = m_step if plain == _MASK else (e_step if plain == _TERMINATED else 1)
    general = first_row  # the first row for the general loop
    one_kind = plain in (0, _MASK, _TERMINATED) and not options & _PACKED
    if one_kind and r_step == 1 and v_step == 1 and o_step == 1 and flag_step == 1:
        general = last_row
    for row in range(first_row, general, 2):
        other = min(row + 1, last_row - 1)
        g0, g1, d0, d1 = gamma, gamma, lam, lam
        if options & _GAMMAS:
            g0, g1 = gammas[row], gammas[other]
        if options & _LAMS:
            d0, d1 = lams[row], lams[other]
        s0, s1 = zero, zero
        if options & _BOOTSTRAP:
            s0, s1 = g0 * bootstrap[row], g1 * bootstrap[other]
        d0, d1 = g0 * d0, g1 * d1
        if plain == _MASK:
            _one_or_two_rows(
                _MASK,
                rewards,
                values,
                mask,
                advantages,
                returns,
                T,
                row,
                other,
                r_row,
                v_row,
                m_row,
                o_row,
                g0,
                g1,
                d0,
                d1,
                s0,
                s1,
            )
        elif plain == _TERMINATED:
            _one_or_two_rows(
                _TERMINATED,
                rewards,
                values,
                terminated,
                advantages,
                returns,
                T,
                row,
                other,
                r_row,
                v_row,
                e_row,
                o_row,
                g0,
                g1,
                d0,
                d1,
                s0,
                s1,
            )
        else:
            _one_or_two_rows(
                0,
                rewards,
                values,
                mask,
                advantages,
                returns,
                T,
                row,
                other,
                r_row,
                v_row,
                m_row,
                o_row,
                g0,
                g1,
                d0,
                d1,
                s0,
                s1,
            )
    for row in range(general, last_row):
        g, decay = gamma, lam
        if options & _GAMMAS:
            g = gammas[row]
        if options & _LAMS:
            decay = lams[row]
        decay = g * decay
        base_row, start, stop = row, 0, T
        if options & _PACKED:
            base_row, start, stop = 0, cu_seqlens[row], cu_seqlens[row + 1]
        s = zero
        if options & _BOOTSTRAP:
            s = g * bootstrap[row]
        for t in range(stop - 1, start - 1, -1):
            counted = True
            if options & _MASK:
                counted = mask[base_row * m_row + t * m_step] != 0
            cut, end_value = False, zero
            if options & _TRUNCATED:  # noqa: SIM102
                if truncated[base_row * c_row + t * c_step] != 0:
                    cut, end_value = True, g * final_values[base_row * f_row + t * f_step]
            if options & _TERMINATED:  # noqa: SIM102
                if terminated[base_row * e_row + t * e_step] != 0:
                    cut, end_value = True, zero
            r, v = rewards[base_row * r_row + t * r_step], values[base_row * v_row + t * v_step]
            following = end_value if cut else s
            out = base_row * o_row + t * o_step
            advantages[out] = (r - v) + following if counted else zero
            returns[out] = r + following if counted else zero
            # Written so that only one multiply-add depends on the step before.
            s_here = (g * v + decay * (r - v)) + decay * following
            s = s_here if counted else s


def _scan_columns(
    rewards: Array,
    values: Array,
    mask: Array,
    terminated: Array,
    truncated: Array,
    final_values: Array,
    advantages: Array,
    returns: Array,
    bootstrap: Array,
    gammas: Array,
    lams: Array,
    cu_seqlens: IndexArray,  # unused: packed rows are never time-major
    state: Array,  # (_BLOCK,) scratch: s_t
    incoming: Array,  # (_BLOCK,) scratch: what replaces s_{t + 1} after the cuts, then s_t of a counted step
    gamma: float,
    lam: float,
    T: int,
    first_row: int,
    last_row: int,
    options: int,
    r_row: int,
    r_step: int,
    v_row: int,
    v_step: int,
    m_row: int,
    m_step: int,
    e_row: int,
    e_step: int,
    c_row: int,
    c_step: int,
    f_row: int,
    f_step: int,
    o_row: int,
    o_step: int,
) -> None:
    """All rows of a block at each step: for time-major tensors, where neighbouring rows are adjacent in memory.

    Short loops with few arrays each: LLVM does not vectorise a loop with too many pointers that may overlap.
    """
    zero = gamma - gamma
    for low in range(first_row, last_row, _BLOCK):
        high = min(low + _BLOCK, last_row)
        width = high - low
        for n in range(width):
            state[n] = zero
        if options & _BOOTSTRAP:
            for n in range(width):
                state[n] = (gammas[low + n] if options & _GAMMAS else gamma) * bootstrap[low + n]
        for back in range(T):
            t = (T - 1 - back) ^ (options >> 8)
            for n in range(width):
                incoming[n] = state[n]
            if options & _TRUNCATED:
                for n in range(low, high):
                    if truncated[n * c_row + t * c_step] != 0:
                        g = gammas[n] if options & _GAMMAS else gamma
                        incoming[n - low] = g * final_values[n * f_row + t * f_step]
            if options & _TERMINATED:
                for n in range(width):
                    ended = terminated[(low + n) * e_row + t * e_step] != 0
                    incoming[n] = zero if ended else incoming[n]
            for n in range(width):
                v, r = values[(low + n) * v_row + t * v_step], rewards[(low + n) * r_row + t * r_step]
                advantages[(low + n) * o_row + t * o_step] = (r - v) + incoming[n]
            for n in range(width):
                r = rewards[(low + n) * r_row + t * r_step]
                returns[(low + n) * o_row + t * o_step] = r + incoming[n]
            for n in range(width):
                g = gammas[low + n] if options & _GAMMAS else gamma
                decay = g * (lams[low + n] if options & _LAMS else lam)
                v, advantage = values[(low + n) * v_row + t * v_step], advantages[(low + n) * o_row + t * o_step]
                incoming[n] = g * v + decay * advantage
            if options & _MASK:
                for n in range(width):
                    before, here = state[n], incoming[n]
                    state[n] = here if mask[(low + n) * m_row + t * m_step] != 0 else before
                for n in range(width):
                    advantage = advantages[(low + n) * o_row + t * o_step]
                    counted = mask[(low + n) * m_row + t * m_step] != 0
                    advantages[(low + n) * o_row + t * o_step] = advantage if counted else zero
                for n in range(width):
                    value = returns[(low + n) * o_row + t * o_step]
                    counted = mask[(low + n) * m_row + t * m_step] != 0
                    returns[(low + n) * o_row + t * o_step] = value if counted else zero
            else:
                for n in range(width):
                    state[n] = incoming[n]


@numba.njit(forceinline=True, fastmath={"contract"}, error_model="numpy")
def _step_of_two_lambdas(
    rewards: Array,
    values: Array,
    mask: Array,
    advantages: Array,
    returns: Array,
    at: int,
    g: float,
    decay: float,
    critic_decay: float,
    s: float,  # of the next counted step, with lam and with critic_lam
    z: float,
) -> tuple[float, float]:
    """Write one step of one row and return its s and z."""
    zero = g - g
    r, v, counted = rewards[at], values[at], mask[at] != 0
    advantages[at] = (r - v) + s if counted else zero
    returns[at] = r + z if counted else zero
    s_here = (g * v + decay * (r - v)) + decay * s
    z_here = (g * v + critic_decay * (r - v)) + critic_decay * z
    return (s_here, z_here) if counted else (s, z)


def _scan_two_lambdas(
    rewards: Array,  # (rows, T) without gaps
    values: Array,
    mask: Array,
    advantages: Array,
    returns: Array,
    bootstrap: Array,  # (rows,)
    gammas: Array,
    lams: Array,
    critic_lams: Array,
    gamma: float,
    lam: float,
    critic_lam: float,
    T: int,
    first_row: int,
    last_row: int,
    options: int,
) -> None:
    """_scan_rows with a mask, for advantages with lam and returns with critic_lam: two rows at once, as there."""
    zero = gamma - gamma
    for row in range(first_row, last_row, 2):
        other = min(row + 1, last_row - 1)
        g0, g1 = gamma, gamma
        if options & _GAMMAS:
            g0, g1 = gammas[row], gammas[other]
        d0, d1 = g0 * lam, g1 * lam
        if options & _LAMS:
            d0, d1 = g0 * lams[row], g1 * lams[other]
        c0, c1 = g0 * critic_lam, g1 * critic_lam
        if options & _CRITIC_LAMS:
            c0, c1 = g0 * critic_lams[row], g1 * critic_lams[other]
        s0, s1 = zero, zero
        if options & _BOOTSTRAP:
            s0, s1 = g0 * bootstrap[row], g1 * bootstrap[other]
        z0, z1 = s0, s1
        a, b = row * T, other * T
        if row == other:
            for t in range(T - 1, -1, -1):
                s0, z0 = _step_of_two_lambdas(rewards, values, mask, advantages, returns, a + t, g0, d0, c0, s0, z0)
        else:
            for t in range(T - 1, -1, -1):
                s0, z0 = _step_of_two_lambdas(rewards, values, mask, advantages, returns, a + t, g0, d0, c0, s0, z0)
                s1, z1 = _step_of_two_lambdas(rewards, values, mask, advantages, returns, b + t, g1, d1, c1, s1, z1)


@lru_cache(maxsize=4)
def _compiled(columns: bool, double: bool) -> Compiled:
    """The C function, and the numba object that keeps its machine code alive."""
    real = types.float64 if double else types.float32
    floats, flags = types.CPointer(real), types.CPointer(types.uint8)
    pointers = (floats, floats, flags, flags, flags, *[floats] * 6, types.CPointer(types.int64), floats, floats)
    # "contract" only fuses a multiply with an add: NaN and infinity keep their meaning.
    return c_function(
        _scan_columns if columns else _scan_rows, [*pointers, real, real, *[types.int64] * 18], {"contract"}
    )


@lru_cache(maxsize=2)
def _compiled_two_lambdas(double: bool) -> Compiled:
    real = types.float64 if double else types.float32
    floats, flags = types.CPointer(real), types.CPointer(types.uint8)
    pointers = (floats, floats, flags, *[floats] * 6)
    return c_function(_scan_two_lambdas, [*pointers, *[real] * 3, *[types.int64] * 4], {"contract"})


# What `ppo-fast compile` compiles
ALL = [
    *(functools.partial(_compiled, columns, double) for columns in (False, True) for double in (False, True)),
    *(functools.partial(_compiled_two_lambdas, double) for double in (False, True)),
]


def gae(
    rewards: Tensor,  # [rows, T], or [T, rows] if time is 0; any strides, fp32 or fp64; [1, total] with cu_seqlens
    values: Tensor,  # of the same dtype, as are all floating tensors here
    advantages: Tensor,  # outputs, with equal strides
    returns: Tensor,
    gamma: float | Tensor,  # or [rows], contiguous
    lam: float | Tensor,
    mask: Tensor | None,  # bool or any 0/1 dtype, as the other flags
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,  # [rows], contiguous
    final_values: Tensor | None,
    cu_seqlens: Tensor | None,  # [S + 1] int64, contiguous
    time: int,
) -> None:
    """Write advantages and returns, as eager.py describes them."""
    rows, T = rewards.shape if time else reversed(rewards.shape)
    steps = rows * T
    pointers = [
        rewards.data_ptr(),
        values.data_ptr(),
        0,
        0,
        0,
        0,
        advantages.data_ptr(),
        returns.data_ptr(),
        0,
        0,
        0,
        0,
    ]
    strides = [*rewards.stride(), *values.stride(), 0, 0, 0, 0, 0, 0, 0, 0, *advantages.stride()]
    options, kept = 0, [rewards, values, advantages, returns]
    for slot, bit, flag in ((2, _MASK, mask), (3, _TERMINATED, terminated), (4, _TRUNCATED, truncated)):
        if flag is not None:
            x = flag if flag.dtype is torch.bool else flag != 0
            options, pointers[slot], strides[2 * slot : 2 * slot + 2] = options | bit, x.data_ptr(), x.stride()
            kept.append(x)
    if final_values is not None:
        pointers[5], strides[10:12] = final_values.data_ptr(), final_values.stride()
        kept.append(final_values)
    by_row = ((8, _BOOTSTRAP, bootstrap), (9, _GAMMAS, gamma), (10, _LAMS, lam), (11, _PACKED, cu_seqlens))
    for slot, bit, numbers in by_row:
        if isinstance(numbers, Tensor):
            options, pointers[slot] = options | bit, numbers.data_ptr()
            kept.append(numbers)
    if not time:
        strides[::2], strides[1::2] = strides[1::2], strides[::2]
    if cu_seqlens is not None:
        rows = len(cu_seqlens) - 1
    columns = rows > _FEW_ROWS and strides[-2] == 1 and cu_seqlens is None
    double = values.dtype is torch.float64
    scan, _ = _compiled(columns, double)
    scalars = (0.0 if options & _GAMMAS else gamma, 0.0 if options & _LAMS else lam, T)
    parts = split_rows(rows, steps, cu_seqlens)
    workers, block_bytes = len(parts) - 1, _BLOCK * (8 if double else 4)
    scratch = torch.empty(workers * 2 * block_bytes, dtype=torch.uint8, device="cpu") if columns else None
    scratch_ptr = 0 if scratch is None else scratch.data_ptr()

    def work(share: int, _kept: object = (kept, scratch)) -> None:  # an interrupted caller must not free them
        state = scratch_ptr + 2 * share * block_bytes
        scan(*pointers, state, state + block_bytes, *scalars, parts[share], parts[share + 1], options, *strides)

    in_threads(work, workers, workers)


def gae_of_two_lambdas(
    rewards: Tensor,  # [rows, T] without gaps, fp32 or fp64
    values: Tensor,  # of the same dtype, as are all floating tensors here
    mask: Tensor,  # bool
    gamma: float | Tensor,  # or [rows], contiguous, as the next two
    lam: float | Tensor,
    critic_lam: float | Tensor,
    bootstrap: Tensor | None,  # [rows], contiguous
) -> tuple[Tensor, Tensor]:
    """Return the advantages of lam and the returns of critic_lam. Every input is read once."""
    rows, T = rewards.shape
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    options, pointers = 0, [x.data_ptr() for x in (rewards, values, mask, advantages, returns)]
    scalars = []
    by_row = ((_BOOTSTRAP, bootstrap), (_GAMMAS, gamma), (_LAMS, lam), (_CRITIC_LAMS, critic_lam))
    for bit, x in by_row:
        options |= bit if isinstance(x, Tensor) else 0
        pointers.append(x.data_ptr() if isinstance(x, Tensor) else 0)
        scalars.append(0.0 if x is None or isinstance(x, Tensor) else x)
    scan, _ = _compiled_two_lambdas(values.dtype is torch.float64)
    parts = split_rows(rows, rewards.numel())
    workers = len(parts) - 1

    def work(share: int, _kept: object = (rewards, values, mask, by_row)) -> None:  # as in gae
        scan(*pointers, *scalars[1:], T, parts[share], parts[share + 1], options)

    in_threads(work, workers, workers)
    return advantages, returns
