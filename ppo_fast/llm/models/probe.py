"""Detects at load how to compute each model of a run: which attention, which rows, and the source of its logits.

Expected values come from the model's own forward, one sequence at a time. They are compared with the values of the run,
computed by its own functions: the LM head on hidden states, packed rows, rows padded on the right. The first choice
whose values are equal up to rounding is taken; the last choice is the model's own forward, one sequence at a time. Each
choice but the first gives one warning.

Models are compared in their own precision, and again under the autocast of the run. If a fast path of attention fails,
the next one is tried before packed rows are rejected.

The sequences have PROBE_LENGTHS, and lengths on both sides of every window, chunk and original length that the
configuration names, up to the longest of the run: a model may compute differently there, for a whole batch even
(longrope takes its frequencies by the longest sequence).
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.models.frozen import is_plain_linear
from ppo_fast.llm.models.head import (
    HeadInfo,
    accepts,
    decoder_of,
    head_of,
    hidden_states,
    input_embedding,
    model_logits,
    model_name,
    text_config,
    unwrap_peft,
)
from ppo_fast.llm.models.head import without_cache as no_cache
from ppo_fast.llm.models.modes import autocast_dtype
from ppo_fast.llm.packing import flash
from ppo_fast.llm.packing.attention import packed_attention
from ppo_fast.llm.packing.pack import split_minibatches
from ppo_fast.llm.packing.rollout import Rollout

PROBE_LENGTHS = (5, 3, 1)

# Bounds for values of one formula in two orders of summation, in units of what they change when each entry of the
# embeddings changes by one unit in the last place. Two orders differ by 0.2 to 1.3 of it (Llama and GPT-2 of 24 to 96
# layers in fp32 on a CPU), however deep the model is; attention that leaks from one sequence to the next differs by
# more than 100000 of it in fp32 and by 7 to 300 in half precision.
# A router of experts may choose another expert where two scores are equal up to rounding. A change of the embeddings
# by one unit has the same effect, so the bound of such a model is larger by itself.
FP32_BOUND, HALF_BOUND = 32, 4

# In fp32 a bound above this share of the largest value decides nothing: the model amplifies rounding (it selects keys
# or experts whose scores are equal, or is a long recurrence).
UNDECIDED = 0.1

# Values of a model that is not causal differ by at least this share of the largest: far more than by rounding, or by
# an expert that is chosen or not by rounding.
NOT_CAUSAL = 0.01

# Names of lengths in a configuration at which a model may change how it computes.
NAMED = re.compile(r"window|chunk|block|original_max|top_?k|compress|stride|floor_scale|local_attention")
# A probe takes at most this share of a step's passes, or as many operations as take 10 seconds at this rate.
SHARE_OF_STEP, SECONDS = 0.05, 10
RATES = {"cpu": 3e10}  # FLOP/s in fp32; a slow machine of the kind, so that the choice does not depend on the machine
ACCELERATOR_RATE = 1e13
PASSES = 8  # of each checked sequence through a model: expected, nudged, packed or padded; in two precisions

CALL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Reach:
    """The extent of a run: the longest sequence, and the passes of tokens through models in a step."""

    longest: int = max(PROBE_LENGTHS)
    step_passes: float = 0.0


@dataclass(frozen=True)
class ModelHeads:
    """The result of the probe for each model of a run. Boundaries and `batched` are common to all, like the packs."""

    actor: HeadInfo
    critic: HeadInfo | None = None
    reference: HeadInfo | None = None


@torch.no_grad()
def detect_heads(
    actor: nn.Module,
    critic: nn.Module | None,
    reference: nn.Module | None,
    *,
    strict: bool = False,
    dtype: str = "float32",
    device: torch.device | None = None,
    reach: Reach = Reach(),
) -> ModelHeads:
    """Detect how to compute every model of a run.

    Args:
        actor: a language model.
        critic: the critic's own backbone.
        reference: the frozen language model.
        strict: raise UserError instead of a warning.
        dtype: of the run's autocast; float32: none.
        device: of the run, if the models are not there yet.
        reach: the longest sequences, and the work of a step.
    """
    flash.reset()
    autocast = autocast_dtype(dtype)
    models = {"actor": actor, "critic": critic, "reference": reference}
    said: set[tuple[object, ...]] = set()
    found: dict[str, HeadInfo] = {}
    for role, model in models.items():
        if model is None:
            continue
        head, problems = _probe(model, autocast, device, reach)
        found[role] = head
        # a critic or reference of the actor's family has the same problems, which are reported once
        key = (type(text_config(model)), head)
        if key not in said:
            for problem in problems:
                warn_or_raise(problem, strict)
        said.add(key)
    batched = all(head.batched for head in found.values())
    boundaries = tuple(sorted({b for head in found.values() for b in head.boundaries}))
    heads = {role: dataclasses.replace(x, batched=batched, boundaries=boundaries) for role, x in found.items()}
    return ModelHeads(heads["actor"], heads.get("critic"), heads.get("reference"))


@torch.no_grad()
def detect_head(
    model: nn.Module,
    *,
    strict: bool = False,
    dtype: str = "float32",
    device: torch.device | None = None,
    reach: Reach = Reach(),
) -> HeadInfo:
    """Detect how to compute one model; arguments as in `detect_heads`."""
    return detect_heads(model, None, None, strict=strict, dtype=dtype, device=device, reach=reach).actor


@torch.no_grad()
def detect_unpacked_head(model: nn.Module, *, strict: bool = False) -> HeadInfo:
    """Detect how to compute the logits of a model for rows that are not packed.

    Attention is not tested, and the result of `detect_heads` for it is kept.
    """
    with exact_products():
        head, problem = _linear_head(model, _sequences(model, PROBE_LENGTHS))
    if problem is not None:
        warn_or_raise(problem, strict)
    return head


class _Products(Protocol):
    """The settings of the matrix products of a backend."""

    fp32_precision: str


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute fp32 products without TF32 or bf16, whatever the user has set: fp32 is compared with fp32."""
    settings: list[_Products] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]  # missing in the stub
    before = [x.fp32_precision for x in settings]
    # PyTorch has two interfaces to this setting, and raises an error where one is read that differs from the other
    older = _older_precision()
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for x in settings:
        x.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for x, precision in zip(settings, before, strict=True):
            x.fp32_precision = precision


def _older_precision() -> str | None:
    """Return the setting of the older interface; None if only the newer one has been used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def warn_or_raise(reason: str, strict: bool) -> None:
    if strict:
        raise UserError(f"{reason} (strict = true makes this an error)")
    warnings.warn(reason, stacklevel=5)


# Lengths


def named_lengths(model: nn.Module, longest: int) -> list[int]:
    """List lengths in the model's configuration that a sequence of `longest` tokens exceeds."""
    return sorted({n for n in _integers(text_config(model).to_dict(), named=False) if 1 < n < longest})


def _integers(entry: object, *, named: bool) -> Iterator[int]:
    """List integers below a key that matches NAMED."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            yield from _integers(value, named=named or bool(NAMED.search(str(key))))
    elif isinstance(entry, list | tuple):
        for value in entry:
            yield from _integers(value, named=named)
    elif named and isinstance(entry, int) and not isinstance(entry, bool):
        yield entry


def _check_selection(model: nn.Module, longest: int) -> None:
    """Reject sequences that are longer than the number of tokens that sparse attention selects (DeepSeek 3.2).

    Scores of several tokens are exactly 0, and the shape of the batch determines which of them are selected: sampling
    and training would compute different models.

    Raises:
        UserError: a sequence may be longer.
    """
    selected = getattr(text_config(model), "index_topk", None)
    if selected is not None and longest > selected:
        raise UserError(
            f"this {model_name(model)} attends to {selected} selected tokens (index_topk), and which ones depends on"
            f" the batch: a prompt and its answer must have at most {selected} tokens together, not {longest}; lower"
            " max_prompt_tokens or max_new_tokens"
        )


def affordable(model: nn.Module, named: list[int], reach: Reach, device: torch.device) -> list[int]:
    """Select the named lengths, from the shortest on, that the probe has time to check.

    It counts operations, not seconds: two runs make the same choices.
    """
    operations = 2.0 * sum(p.numel() for p in model.parameters())
    limit = max(
        SHARE_OF_STEP * reach.step_passes, SECONDS * RATES.get(device.type, ACCELERATOR_RATE) / max(operations, 1.0)
    )
    passes, checked = 0.0, []
    for length in named:
        passes += 2 * length * PASSES
        if passes > limit:
            break
        checked.append(length)
    return checked


def _sequences(model: nn.Module, lengths: Sequence[int]) -> Rollout:
    """Make sequences of these lengths, as a rollout whose completions are everything but the first token."""
    embedding = input_embedding(model)
    ids = (torch.arange(sum(lengths)) * 7919 + 1) % embedding.shape[0]
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, part in zip(tokens, ids.split(list(lengths)), strict=True):
        row[: len(part)] = part
    return Rollout.from_lengths(tokens, [1] * len(lengths), [n - 1 for n in lengths], device=embedding.device)


def _rows(sequences: Rollout) -> list[Tensor]:
    """[1, L] each"""
    lengths = [1 + n for n in sequences.completion_lengths]
    moved = sequences.tokens.to(sequences.device)
    return [row[:length].unsqueeze(0) for row, length in zip(moved, lengths, strict=True)]


# Rounding


def _computed(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model computes: that of autocast where it is on, else that of its embeddings."""
    weight = input_embedding(model)
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def in_full_precision(model: nn.Module) -> bool:
    """Check whether a model computes in fp32."""
    return _computed(model) == torch.float32


def rounding_bound(model: nn.Module, compute: Callable[[], Tensor], own: Tensor) -> float:
    """Estimate by how much two orders of summation may change the values of `compute`: see FP32_BOUND.

    Products of 9 rows and of 5, 3 and 1 use different kernels, and each layer propagates the rounding of those before
    it. Neither depth nor width determines the result; the model itself does.
    """
    eps = torch.finfo(_computed(model)).eps

    def nudge(module: nn.Module, arguments: object, out: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(out.numel(), device=out.device).view(out.shape) * 2654435761 // 128 % 2)
        return out * (1 + eps * sign.to(out.dtype))

    hook = unwrap_peft(model).get_input_embeddings().register_forward_hook(nudge)
    try:
        moved = (compute().float() - own.float()).abs().max().item()
    finally:
        hook.remove()
    factor = FP32_BOUND if in_full_precision(model) else HALF_BOUND
    return factor * moved + 2 * eps * own.float().abs().max().item()


def _differ(a: Tensor, b: Tensor, bound: float) -> bool:
    return a.shape != b.shape or not bool((a.float() - b.float()).abs().max() <= bound)  # a NaN differs


# The LM head

TAIL = max(PROBE_LENGTHS)  # tokens of a sequence whose logits are compared: those of a long one are large


def _last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute logits [up to TAIL, V] by the model's own forward."""
    fewer = {"logits_to_keep": TAIL} if ids.shape[1] > TAIL and accepts(model, "logits_to_keep") else {}
    return model(input_ids=ids, **no_cache(model), **fewer).logits[0, -TAIL:]


def _linear_head(model: nn.Module, sequences: Rollout) -> tuple[HeadInfo, str | None]:
    """Check whether the logits are softcap(scale (h W^T + b)), and return the reason if they are not."""
    config = text_config(model)
    scaling = getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    rows = _rows(sequences)

    def own_forward() -> Tensor:
        return torch.cat([_last_logits(model, row) for row in rows])

    own = own_forward()
    reason = _why_not_linear(model, rows, own, rounding_bound(model, own_forward, own), softcap, scale)
    if reason is None:
        return HeadInfo(linear=True, packed=False, softcap=softcap, logit_scale=scale), None
    problem = f"{reason}: log-probabilities come from the model's own logits, which takes more memory"
    return HeadInfo(linear=False, packed=False), problem


def _why_not_linear(
    model: nn.Module, rows: list[Tensor], own: Tensor, bound: float, softcap: float | None, scale: float
) -> str | None:
    name, head = model_name(model), head_of(model)
    if not is_plain_linear(head):
        return f"the LM head of this {name} is a {type(head).__name__}, not a plain linear layer"
    try:
        decoder = decoder_of(model)
        states = [decoder(input_ids=row, **no_cache(decoder)).last_hidden_state[0, -TAIL:] for row in rows]
        # not head(...): the losses read its weights, and would miss what a hook does
        hidden = torch.cat(states)
        logits = nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias).float() * scale
    except UserError as error:
        return str(error)
    except CALL_ERRORS as error:
        return f"the hidden states of this {name} do not fit its LM head ({first_line(error)})"
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if _differ(logits.to(own.dtype), own, bound):
        return f"the logits of this {name} are not its LM head times its hidden states"
    return None


# Rows


def _compute(model: nn.Module, sequences: Rollout, head: HeadInfo) -> Tensor:
    """Compute the values [total, X] of a run for the sequences: hidden states, or the model's own logits."""
    found: dict[int, Tensor] = {}
    with packed_attention(model) if head.packed else nullcontext():
        (packs,) = split_minibatches(
            sequences,
            list(range(len(sequences))),
            minibatches=1,
            max_tokens=head.tokens_per_pack(sequences.tokens.numel()),
            regime=head.regime,
        )
        for pack in packs:
            if head_of(model) is None:
                out = hidden_states(model, pack, head)
            elif head.linear:
                out = hidden_states(decoder_of(model), pack, head)
            else:
                every = torch.arange(sum(pack.lengths), device=pack.tokens.device)
                out = model_logits(model, dataclasses.replace(pack, logit_positions=every), head)
            found |= zip(pack.sequences, out.split(pack.lengths), strict=True)
    return torch.cat([found[i] for i in range(len(sequences))])


def _why_not(model: nn.Module, sequences: Rollout, head: HeadInfo, expected: Tensor, bound: float) -> str | None:
    """Compare the values of this choice with those of one sequence at a time; return the difference, or None."""
    rows = "packed rows" if head.packed else "padded rows"
    try:
        out = _compute(model, sequences, head)
    except CALL_ERRORS as error:
        return f"this {model_name(model)} does not take {rows} ({first_line(error)})"
    if _differ(out, expected, bound):
        what = "logits" if head_of(model) is not None and not head.linear else "hidden states"
        return f"this {model_name(model)} gives other {what} on {rows} than one by one"
    return None


def _choose(
    model: nn.Module, sequences: Rollout, head: HeadInfo, choices: list[HeadInfo]
) -> tuple[HeadInfo, str | None]:
    """Return the first choice whose values are right, or the model's own forward, and the reason if not the first."""
    single = dataclasses.replace(head, packed=False, batched=False, boundaries=())
    expected = _compute(model, sequences, single)
    bound = rounding_bound(model, lambda: _compute(model, sequences, single), expected)
    largest = expected.float().abs().max().item()
    if in_full_precision(model) and bound > UNDECIDED * largest:
        return single, (
            f"this {model_name(model)} amplifies rounding, so that its values by other rows cannot be compared (one"
            f" unit in the last place of its embeddings changes {largest:.3g} by {bound / FP32_BOUND:.1g})"
        )
    reason = None
    for packed in (True, False):
        fitting = [x for x in choices if x.packed is packed]
        while fitting:
            problems: list[str] = []
            for choice in fitting:
                problem = _why_not(model, sequences, choice, expected, bound)
                if problem is None:
                    return choice, reason or (problems[0] if problems else None)
                problems.append(problem)
            if not packed or not flash.reject(problems[0]):
                reason = reason or problems[0]
                break
    return single, reason


def _check_causal(model: nn.Module, head: HeadInfo) -> None:
    """Reject a model whose tokens depend on later ones: it has no probability of a next token.

    Raises:
        UserError: its values of a sequence depend on the tokens after it.
    """
    single = dataclasses.replace(head, packed=False, batched=False)
    whole, part = (_compute(model, _sequences(model, [n]), single) for n in PROBE_LENGTHS[:2])
    if _differ(part, whole[: len(part)], NOT_CAUSAL * whole.float().abs().max().item()):
        raise UserError(
            f"this {model_name(model)} is not causal: its values for a token depend on later tokens; a model of this"
            " kind may need is_decoder = true in its config.json"
        )


# One model


def _probe(
    model: nn.Module, autocast: torch.dtype | None, device: torch.device | None, reach: Reach
) -> tuple[HeadInfo, list[str]]:
    """Return how to compute a model, and the notes that a run must report about it."""
    _check_selection(model, reach.longest)
    here = next(model.parameters()).device
    named = named_lengths(model, reach.longest)
    checked = affordable(model, named, reach, device or here)
    around = {min(n, reach.longest) for b in checked for n in (b, b + 2)} - set(PROBE_LENGTHS)
    sequences = _sequences(model, [*PROBE_LENGTHS, *sorted(around)])
    under_autocast = torch.autocast(here.type, dtype=autocast, enabled=autocast is not None)
    head, problem = HeadInfo(linear=True, packed=False), None
    with exact_products():
        flash.clear_decisions()
        if head_of(model) is not None:
            head, problem = _linear_head(model, sequences)
            if problem is None and autocast is not None:
                with under_autocast:
                    head, problem = _linear_head(model, sequences)
        problems = [] if problem is None else [problem]
        _check_causal(model, head)
        if len(checked) < len(named):
            problems.append(
                f"this {model_name(model)} may compute sequences of more than {named[len(checked)]} tokens differently,"
                " and the probe has no time to check them: it learns from one sequence at a time, which takes more"
                " time; shorter prompts and answers avoid this"
            )
            return dataclasses.replace(head, batched=False), problems
        found, reason = _choose(model, sequences, head, _choices(head, checked))
        if found.packed:
            for asked in flash.requests():
                flash.decide_and_warn(
                    dataclasses.replace(asked, dtype=autocast or asked.dtype, device=device or asked.device)
                )
        if autocast is not None and found.batched:
            slower = [dataclasses.replace(found, packed=False)] if found.packed else []
            with under_autocast:
                found, later = _choose(model, sequences, head, [found, *slower])
            reason = reason or later
    if reason is not None:
        problems.append(f"{reason}: {_consequence(found)}")
    return found, problems


def _choices(head: HeadInfo, boundaries: list[int]) -> list[HeadInfo]:
    """List the choices: packed rows, then padded ones.

    In each, all sequences are together, or those on the two sides of one boundary, or of any boundary, are separate.
    """
    apart = [(), *((b,) for b in boundaries), *([tuple(boundaries)] if len(boundaries) > 1 else [])]
    return [dataclasses.replace(head, packed=packed, boundaries=b) for packed in (True, False) for b in apart]


def _consequence(head: HeadInfo) -> str:
    if not head.batched:
        return "it learns from one sequence at a time, which takes more time"
    if head.boundaries:
        lengths = " and of ".join(str(b) for b in head.boundaries)
        rows = "packed" if head.packed else "padded"
        return f"sequences of at most {lengths} tokens are {rows} separately from longer ones, which takes more time"
    return "it learns from padded rows, which takes more time"
