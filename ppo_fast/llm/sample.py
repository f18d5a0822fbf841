"""Sample: prompts are answered, by the actor's own `generate` or by another engine, and become a rollout."""

import math
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppo_fast.common.device import upload
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import columns, prompt_ids
from ppo_fast.llm.decoding import AnswerText, StopTexts
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.models.head import Sampling, text_config, unwrap_peft
from ppo_fast.llm.models.loading import end_tokens
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.packing.attention import cudnn_attention
from ppo_fast.llm.packing.rollout import Rollout


@dataclass
class Answers:
    """What a sampler returns, one entry for each prompt."""

    ids: list[list[int]]  # the answers' tokens, with the end token where there is one; at least one each
    ended: list[bool]  # False: cut by max_new_tokens
    logprobs: list[list[float]] | None = None  # of each token at the sampling temperature, before top-k and top-p


class Sampler(Protocol):
    """Anything that answers prompts: the actor's own `generate` (`GenerateSampler`), vLLM, a server.

    An engine with weights of its own must take over the actor's before it answers: `sample` is called once a step, and
    the actor has been trained since. How far its log-probabilities are from the trainer's is logged as sampler_gap.
    """

    def sample(self, prompts: list[list[int]], config: PPOConfig) -> Answers:
        """Answers to prompts, given as token ids, in their order."""
        ...


def respond(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    config: PPOConfig,
    device: torch.device,
    *,
    vocabulary: int | None = None,
) -> Rollout:
    """Answers each row's prompt `samples_per_prompt` times. The sampler's tokens must be below `vocabulary`."""
    columns_ = columns(rows, config.samples_per_prompt)
    prompts = prompt_ids(tokenizer, columns_["prompt"])
    answers = _checked(_ask(sampler, [list(ids) for ids in prompts], config), prompts, config, vocabulary)
    texts = AnswerText(tokenizer, prompts)
    P, T = max(map(len, prompts)), max(map(len, answers.ids))
    pad = tokenizer.pad_token_id
    padded = [
        [pad] * (P - len(prompt)) + prompt + answer + [pad] * (T - len(answer))
        for prompt, answer in zip(prompts, answers.ids, strict=True)
    ]
    logprobs = None
    if answers.logprobs is not None:
        logprobs = upload(torch.tensor([row + [0.0] * (T - len(row)) for row in answers.logprobs]), device)
    return Rollout(
        tokens=torch.tensor(padded),
        prompt_lengths=list(map(len, prompts)),
        answer_lengths=list(map(len, answers.ids)),
        ended=answers.ended,
        completions=texts.decode(answers.ids),
        raw_completions=texts.decode(answers.ids, clean=False),
        columns=columns_,
        logprobs=logprobs,
        device=device,
    )


def _ask(sampler: Sampler, prompts: list[list[int]], config: PPOConfig) -> Answers:
    """The sampler's answers. An error of a sampler from outside is reported with its place."""
    if isinstance(sampler, GenerateSampler):
        return sampler.sample(prompts, config)
    try:
        answers = sampler.sample(prompts, config)
    except UserError:
        raise
    except Exception as error:  # user code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        raise UserError(f"the sampler raised {type(error).__name__}: {error} ({place})") from error
    if not isinstance(answers, Answers):
        raise UserError(f"the sampler must return ppo_fast.llm.sample.Answers, got {type(answers).__name__}")
    return answers


def _checked(answers: Answers, prompts: list[list[int]], config: PPOConfig, vocabulary: int | None) -> Answers:
    """The answers in Python's lists and numbers. Refuses what another engine may get wrong."""
    if answers.logprobs is None and config.importance_cap is not None:
        raise UserError("importance_cap needs the sampler's log-probabilities (Answers.logprobs), which are missing")
    counts = {"ids": len(answers.ids), "ended": len(answers.ended)}
    if answers.logprobs is not None:
        counts["logprobs"] = len(answers.logprobs)
    for name, count in counts.items():
        if count != len(prompts):
            raise UserError(f"the sampler returned {count} {name} for {len(prompts)} prompts")
    checked = Answers(
        ids=[_token_ids(ids, row, vocabulary) for row, ids in enumerate(answers.ids)],
        ended=[bool(x) for x in answers.ended],
        logprobs=None if answers.logprobs is None else [_logprobs(x, row) for row, x in enumerate(answers.logprobs)],
    )
    for row, ids in enumerate(checked.ids):
        if not 1 <= len(ids) <= config.max_new_tokens:
            raise UserError(
                f"the sampler returned {len(ids)} tokens for prompt {row}; 1 to max_new_tokens={config.max_new_tokens}"
                " are expected"
            )
        if checked.logprobs is not None and len(checked.logprobs[row]) != len(ids):
            raise UserError(
                f"the sampler returned {len(checked.logprobs[row])} logprobs for the {len(ids)} tokens of prompt {row}"
            )
    return checked


def _token_ids(ids: Any, row: int, vocabulary: int | None) -> list[int]:
    """An answer's tokens, which may come in an array or a tensor."""
    try:
        found = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise UserError(
            f"the sampler returned {ids!r:.60} for prompt {row}: a list of token ids is expected"
        ) from error
    outside = [i for i in found if i < 0 or (vocabulary is not None and i >= vocabulary)]
    if outside:
        last = "" if vocabulary is None else f"; the model's are 0 to {vocabulary - 1}"
        raise UserError(f"the sampler returned the token id {outside[0]} for prompt {row}{last}")
    return found


LARGEST_LOGPROB = 1e-3  # rounding


def _logprobs(values: Any, row: int) -> list[float]:
    """An answer's log-probabilities. vLLM reports None or NaN for a token that it could not score."""
    found = list(values.tolist() if hasattr(values, "tolist") else values)
    for place, x in enumerate(found):
        if x is None or not -math.inf < float(x) <= LARGEST_LOGPROB:
            raise UserError(
                f"the sampler returned {x!r} as log-probability of token {place} of the answer to prompt {row}: a"
                " finite number of at most 0 is expected; logprobs = None, if the engine cannot score each token"
            )
    return [float(x) for x in found]


class GenerateSampler:
    """The actor's own `generate`, with a KV cache and padding on the left, or as `sampling` says.

    With FSDP2 all processes generate in step, through `call`, which gathers the weights.
    """

    def __init__(
        self,
        actor: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        distributed: Distributed = SINGLE_PROCESS,
        call: Callable[..., Any] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        self.actor = actor
        self.tokenizer = tokenizer
        self.distributed = distributed
        self.call = call
        self.sampling = sampling

    def sample(self, prompts: list[list[int]], config: PPOConfig) -> Answers:
        """Answers in batches of config.sample_batch_size, in the order of the prompts."""
        in_step = self.distributed.strategy == "fsdp"
        batches = self.sampling.batches(
            list(map(len, prompts)), new_tokens=config.max_new_tokens, size=config.sample_batch_size
        )
        rounds = len(batches)
        if in_step:
            rounds = int(self.distributed.all_reduce_max(torch.tensor(rounds, device=self.distributed.device)))
        answered: dict[int, tuple[list[int], bool, list[float]]] = {}
        for round_ in range(rounds):
            batch = batches[round_] if round_ < len(batches) else []
            some = generate(
                self.actor,
                self.tokenizer,
                [prompts[i] for i in batch or [0]],  # the others still need this process's part of the weights
                config,
                call=self.call,
                synced_gpus=in_step,
                cache=self.sampling.cache,
            )
            assert some.logprobs is not None
            answered |= zip(batch, zip(some.ids, some.ended, some.logprobs, strict=True), strict=False)
        ids, ended, logprobs = zip(*(answered[i] for i in range(len(prompts))), strict=True)
        return Answers(list(ids), list(ended), list(logprobs))


class _Recorder(LogitsProcessor):
    """Notes the log-probability of each sampled token, one step late: only then is it known which it was."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.last: Tensor | None = None  # [B, V]
        self.chosen: list[Tensor] = []  # [B] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.note(input_ids[:, -1])
        self.last = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def note(self, tokens: Tensor) -> None:
        if self.last is not None:
            self.chosen.append(self.last.gather(1, tokens.unsqueeze(1)).squeeze(1))


class _Stop(StoppingCriteria):
    """Ends the rows whose last token completes a stop text, by the function that also cuts the answers."""

    def __init__(self, stops: StopTexts, ends: set[int], rows: int) -> None:
        self.stops = stops
        self.ends = ends
        self.answers: list[list[int]] = [[] for _ in range(rows)]
        self.open = [True] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:  # type: ignore[override]
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.open[row]:
                answer = self.answers[row]
                answer.append(token)
                self.open[row] = token not in self.ends and not self.stops.completed(row, answer, len(answer))
        return torch.tensor([not x for x in self.open], device=input_ids.device)


class HalfCache(DynamicCache):
    """A KV cache in autocast's dtype.

    Rotary embeddings give fp32 keys under autocast, and transformers stores values in the dtype of keys. Attention
    rounds both anyway: as they come they take twice the memory, and the whole cache is cast for each layer and token.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(config=text_config(model))
        self.compute_dtype = dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, G, n, d] of new tokens, and returns those of all."""
        keys, values = (x.to(self.compute_dtype) for x in (key_states, value_states))
        return super().update(keys, values, layer_idx, *args, **options)


def cache_options(actor: Any, config: PPOConfig) -> dict[str, Any]:
    """The argument of `generate` for a cache in the compute dtype; none where the model brings a cache of its own."""
    model: Any = unwrap_peft(actor)
    own = "mamba" in type(model).__name__.lower() or not model._supports_default_dynamic_cache()
    adapters = getattr(actor, "peft_config", {})
    own = own or any(x.is_prompt_learning for x in adapters.values())  # prefix tuning fills the cache itself
    if config.dtype != "bfloat16" or own:
        return {}
    return {"past_key_values": HalfCache(model, torch.bfloat16)}


@torch.no_grad()
def generate(
    actor: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: PPOConfig,
    *,
    greedy: bool = False,
    call: Callable[..., Any] | None = None,
    synced_gpus: bool = False,
    cache: bool = True,
    ends: list[int] | None = None,
) -> Answers:
    """One batch of answers, each up to and with its first end token or stop text.

    `call` takes the place of actor.generate; `synced_gpus`: all processes take as many forward passes; without `cache`
    each pass computes all tokens; `ends`: other end tokens than the actor's.
    """
    P = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    input_ids = upload(torch.tensor([[pad] * (P - len(ids)) + ids for ids in prompts]), actor.device)
    attention_mask = upload(torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts]), actor.device)
    ends = end_tokens(tokenizer, actor) if ends is None else ends
    how: dict[str, Any] = {}
    if not greedy:
        how = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        if config.min_p:
            how["min_p"] = config.min_p
    generation = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=cache,
        **how,
    )
    stops = StopTexts(AnswerText(tokenizer, prompts), config.stop)
    criteria = [_Stop(stops, set(ends), len(prompts))] if config.stop else []
    recorder = _Recorder(config.temperature)
    with (
        _generation_config(actor, generation, cache=cache),
        autocast(config.dtype, actor.device),
        cudnn_attention(enabled=config.cudnn_attention),
    ):
        sequences = (call or actor.generate)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=synced_gpus,
            **(cache_options(actor, config) if cache else {}),
        )
    recorder.note(sequences[:, -1])
    logprobs = torch.stack(recorder.chosen, 1).tolist()
    answers = [_until_end(row, ids, set(ends), stops) for row, ids in enumerate(sequences[:, P:].tolist())]
    return Answers(
        ids=[ids for ids, _ in answers],
        ended=[ended for _, ended in answers],
        logprobs=[row[: len(ids)] for row, (ids, _) in zip(logprobs, answers, strict=True)],
    )


@contextmanager
def _generation_config(actor: Any, generation: GenerationConfig, *, cache: bool) -> Iterator[None]:
    """Puts the model's own generation config aside, and the setting of its cache, if it has one.

    generate() fills what a given config leaves open from the model's: a repetition penalty or top-k saved with the
    model would make samples from another distribution than the one that the loss differentiates.
    """
    model: Any = unwrap_peft(actor)  # peft only passes reading through
    configs = [c for c in {id(c): c for c in (model.config, text_config(model))}.values() if hasattr(c, "use_cache")]
    own, before = model.generation_config, [c.use_cache for c in configs]
    model.generation_config = generation
    for config in configs:
        config.use_cache = cache
    try:
        yield
    finally:
        model.generation_config = own
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


def _until_end(row: int, ids: list[int], ends: set[int], stops: StopTexts) -> tuple[list[int], bool]:
    """The tokens up to and with the first end token, or the one that completes a stop text; and whether there is one.

    Padding, which may be the end token, can follow it.
    """
    for length, token in enumerate(ids, start=1):
        if token in ends or (stops.stop and stops.completed(row, ids, length)):
            return ids[:length], True
    return ids, False


def drop_long_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, actor: Any, config: PPOConfig, *others: Any
) -> tuple[list[dict[str, Any]], int]:
    """The rows whose prompt leaves room for an answer, and how many were left out.

    The limit is max_prompt_tokens, and what the positions of the models allow: `others` are critic and reference.
    """
    limits = [config.max_prompt_tokens]
    known = [getattr(text_config(x), "max_position_embeddings", None) for x in (actor, *others) if x is not None]
    positions = min((x for x in known if x is not None and x > 0), default=None)  # XLNet, which has no limit, says -1
    if positions is not None:
        limits.append(positions - config.max_new_tokens)
    limit = min((x for x in limits if x is not None), default=None)
    lengths = [len(ids) for ids in prompt_ids(tokenizer, [row["prompt"] for row in rows])]
    for row, length in zip(rows, lengths, strict=True):
        if length == 0:
            raise UserError(f"the tokenizer turns the prompt {row['prompt']!r} into no token at all")
    if limit is None:
        return rows, 0
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    if not kept:
        raise UserError(
            f"every prompt is longer than {limit} tokens (the shortest has {min(lengths)}): raise max_prompt_tokens, or"
            f" lower max_new_tokens={config.max_new_tokens} (the model has {positions} positions)"
        )
    return kept, len(rows) - len(kept)
