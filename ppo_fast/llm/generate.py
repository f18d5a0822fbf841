"""Sampling by the actor's own `generate`, with the log-probability of each token."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.decoding import CompletionText, StopTexts
from ppo_fast.llm.distributed import SINGLE_PROCESS, Distributed
from ppo_fast.llm.models.head import (
    GenerateInfo,
    HeadInfo,
    LanguageModel,
    head_dtype,
    own_generate,
    text_config,
    unwrap_peft,
)
from ppo_fast.llm.models.loading import end_tokens
from ppo_fast.llm.models.modes import autocast, autocast_dtype, head_in
from ppo_fast.llm.packing.attention import cudnn_attention
from ppo_fast.llm.sampler import Completions, SamplingParams


@dataclass(frozen=True)
class GenerateOptions:
    """How the actor's own `generate` computes, which changes what it samples by rounding only.

    Args:
        dtype: of autocast: bfloat16 or float16; float32: none.
        head_dtype: of the operands of the LM head's products, as `head_in` computes them; None: as the model does.
        cudnn_attention: PyTorch may use cuDNN.
        cache: keys and values of earlier tokens are kept; else each pass computes all tokens.
        synced_gpus: all processes take as many forward passes.
        call: what to call instead of actor.generate; under FSDP2 it gathers the weights.
    """

    dtype: str = "float32"
    head_dtype: torch.dtype | None = None
    cudnn_attention: bool = False
    cache: bool = True
    synced_gpus: bool = False
    call: Callable[..., Tensor] | None = None

    @classmethod
    def from_config(cls, config: PPOConfig, *, cache: bool = True, head: HeadInfo | None = None) -> "GenerateOptions":
        """As the options of a run ask for, in one process; `head`: how the trainer computes the model's LM head."""
        rounded = head is not None and head.linear and (config.dtype, head_dtype(config)) != ("float32", torch.float32)
        return cls(
            dtype=config.dtype,
            head_dtype=head_dtype(config) if rounded else None,
            cudnn_attention=config.cudnn_attention,
            cache=cache,
        )


class _Recorder(LogitsProcessor):
    """Records the log-probability of each sampled token, one step later, when the token is known."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.last: Tensor | None = None  # [B, V]
        self.chosen: list[Tensor] = []  # [B] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        self.last = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def note(self, tokens: Tensor) -> None:
        if self.last is not None:
            self.chosen.append(self.last.gather(1, tokens.unsqueeze(1)).squeeze(1))


class _Stop(StoppingCriteria):
    """Ends the rows whose last token completes a stop text, by the function that also cuts the completions."""

    def __init__(self, stops: StopTexts, ends: set[int], rows: int) -> None:
        self.stops = stops
        self.ends = ends
        self.completions: list[list[int]] = [[] for _ in range(rows)]
        self.open = [True] * rows

    def __call__(self, input_ids: Tensor, scores: object, **options: object) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.open[row]:
                ids = self.completions[row]
                ids.append(token)
                self.open[row] = token not in self.ends and not self.stops.completed(row, ids, len(ids))
        return torch.tensor([not x for x in self.open], device=input_ids.device)


class HalfCache(DynamicCache):
    """A KV cache in autocast's dtype.

    Rotary embeddings give fp32 keys under autocast, and transformers stores values in the dtype of keys. Attention
    rounds both anyway: as they come they take twice the memory, and the whole cache is cast for each layer and token.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__(config=text_config(model))
        self.compute_dtype = dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, n, d] of new tokens, and return those of all."""
        keys, values = (x.to(self.compute_dtype) for x in (key_states, value_states))
        return super().update(keys, values, layer_idx, *args, **options)


def cache_options(actor: LanguageModel, dtype: str) -> dict[str, HalfCache]:
    """The argument of `generate` for a cache in the compute dtype; none where the model has its own cache class."""
    model = unwrap_peft(actor)
    supports_dynamic = cast(Callable[[], bool], model._supports_default_dynamic_cache)  # PreTrainedModel lacks it
    own = "mamba" in type(model).__name__.lower() or not supports_dynamic()
    adapters = getattr(actor, "peft_config", {})
    own = own or any(x.is_prompt_learning for x in adapters.values())  # prefix tuning fills the cache itself
    half = autocast_dtype(dtype)
    return {} if half is None or own else {"past_key_values": HalfCache(model, half)}


def _generation_config(
    params: SamplingParams, ends: list[int], pad: int, *, greedy: bool, cache: bool
) -> GenerationConfig:
    """The parameters as transformers names them."""
    options: dict[str, float] = {}
    if not greedy:
        options = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        if params.min_p:
            options["min_p"] = params.min_p
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=cache,
        **options,
    )


@contextmanager
def _replaced_config(actor: LanguageModel, generation: GenerationConfig, *, cache: bool) -> Iterator[None]:
    """Replace the model's own generation config inside this block, and the setting of its cache, if it has one.

    generate() fills what a given config leaves open from the model's: a repetition penalty or top-k saved with the
    model would make samples from another distribution than the one that the loss differentiates.
    """
    model = unwrap_peft(actor)  # peft only passes reading through
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


@torch.no_grad()
def generate(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    options: GenerateOptions = GenerateOptions(),
    greedy: bool = False,
    ends: list[int] | None = None,
) -> Completions:
    """Sample one batch of completions, each up to and with its first end token or stop text.

    Args:
        actor: the model.
        tokenizer: its tokenizer, with a pad token.
        prompts: token ids.
        params: temperature, limits and stop texts.
        options: how it computes.
        greedy: take the likeliest token instead of a sample.
        ends: other end tokens than the actor's.
    """
    pad = tokenizer.pad_token_id
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in prompts]
    # not by tokenizer.pad: those of users' own classes may lack padding_side, or have other names for ids
    input_ids = upload(pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left"), actor.device)
    counted = [torch.ones_like(row) for row in rows]
    attention_mask = upload(pad_sequence(counted, batch_first=True, padding_side="left"), actor.device)
    P = input_ids.shape[1]
    ends = end_tokens(tokenizer, actor) if ends is None else ends
    stops = StopTexts(CompletionText(tokenizer, prompts), params.stop)
    criteria = [_Stop(stops, set(ends), len(prompts))] if params.stop else []
    recorder = _Recorder(params.temperature)
    generation = _generation_config(params, ends, pad, greedy=greedy, cache=options.cache)
    with (
        _replaced_config(actor, generation, cache=options.cache),
        autocast(options.dtype, actor.device),
        head_in(actor, options.head_dtype, keep=not options.synced_gpus) if options.head_dtype else nullcontext(),
        cudnn_attention(enabled=options.cudnn_attention),
    ):
        sequences = (options.call or own_generate(actor))(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=options.synced_gpus,
            **(cache_options(actor, options.dtype) if options.cache else {}),
        )
    recorder.note(sequences[:, -1])
    logprobs = torch.stack(recorder.chosen, 1).tolist()
    found = [_until_end(row, ids, set(ends), stops) for row, ids in enumerate(sequences[:, P:].tolist())]
    return Completions(
        ids=[ids for ids, _ in found],
        ended=[ended for _, ended in found],
        logprobs=[row[: len(ids)] for row, (ids, _) in zip(logprobs, found, strict=True)],
    )


class GenerateSampler:
    """Samples by the actor's own `generate`, with a KV cache and padding on the left, or as `info` says.

    With FSDP2 all processes generate in lockstep.

    Args:
        actor: the model.
        tokenizer: its tokenizer.
        options: how `generate` computes; not given: as the options of the run ask for.
        batch_size: completions that are generated at once; not given: config.sample_batch_size, 256 without a trainer.
        info: whether prompts of different lengths and a cache are used, as detected at load.
        distributed: the processes of the run.
    """

    def __init__(
        self,
        actor: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        options: GenerateOptions | None = None,
        *,
        batch_size: int | None = None,
        info: GenerateInfo = GenerateInfo(),  # noqa: B008
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        self.actor, self.tokenizer = actor, tokenizer
        self.info, self.distributed = info, distributed
        self.given_options, self.given_batch_size = options, batch_size
        self._use(options or GenerateOptions(), batch_size or 256)

    def follow(self, config: PPOConfig) -> None:
        """Use the options of a run where none were given."""
        options = self.given_options or GenerateOptions.from_config(config)
        self._use(options, self.given_batch_size or config.sample_batch_size)

    def _use(self, options: GenerateOptions, batch_size: int) -> None:
        self.batch_size, cache = batch_size, options.cache and self.info.cache
        in_lockstep = self.distributed.strategy == "fsdp"
        self.options = dataclasses.replace(options, cache=cache, synced_gpus=in_lockstep)

    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
        """Completions in batches of `batch_size`, in the order of the prompts."""
        batches = self.info.batches(list(map(len, prompts)), new_tokens=params.max_new_tokens, size=self.batch_size)
        rounds = len(batches)
        if self.options.synced_gpus:
            rounds = int(self.distributed.all_reduce_max(torch.tensor(rounds, device=self.distributed.device)))
        ids: list[list[int]] = [[] for _ in prompts]
        ended, logprobs = [False for _ in prompts], [[0.0] for _ in prompts]
        for number in range(rounds):
            batch = batches[number] if number < len(batches) else []
            asked = [prompts[i] for i in batch or [0]]  # the other processes need this one's part of the weights
            found = generate(self.actor, self.tokenizer, asked, params, options=self.options)
            kept = zip(batch, found.ids, found.ended, found.logprobs or [], strict=False)  # none without a batch
            for i, its_ids, its_end, its_logprobs in kept:
                ids[i], ended[i], logprobs[i] = its_ids, its_end, its_logprobs
        return Completions(ids, ended, logprobs)
