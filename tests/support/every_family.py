"""A tiny model of every causal family that transformers builds, composite ones included."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from support.tiny import byte_tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.head import without_cache
from ppo_fast.llm.trainer import PPOTrainer

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 20_000_000  # parameters of a tiny model

TOKENS = dict(vocab_size=258, bos_token_id=None, eos_token_id=256, pad_token_id=257)
# The options of all families, of which each takes those that it knows. Windows, chunks and original lengths are short:
# sequences of the tests lie on both sides.
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    head_dim=8,
    initializer_range=0.3,
    n_embd=32,
    n_layer=4,
    n_head=4,
    n_positions=256,
    n_inner=64,
    d_model=32,
    n_layers=4,
    n_heads=4,
    max_seq_len=256,
    ffn_dim=64,
    word_embed_proj_dim=32,
    num_layers=4,
    attention_types=[[["global", "local"], 2]],
    window_size=8,
    sliding_window=8,
    attention_chunk_size=8,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    rotary_dim=4,
    ffn_hidden_size=64,
    shared_expert_intermediate_size=32,
    decoder_layers=4,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    multi_query=True,
    new_decoder_architecture=False,
    alibi=False,
    use_sliding_window=True,
    max_window_layers=2,
    query_pre_attn_scalar=8,
    original_max_position_embeddings=64,
    state_size=8,
    mamba_d_state=8,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_expand=2,
    mamba_n_groups=1,
    n_groups=1,
    num_heads=8,
    chunk_size=4,
    mamba_chunk_size=4,
    expand=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    hidden_dim=64,
    embedding_size=32,
    kv_channels=8,
    first_k_dense_replace=1,
    n_shared_experts=1,
    rotary_pct=0.5,
    partial_rotary_factor=0.5,
    index_head_dim=8,
    index_n_heads=2,
    index_topk=128,
    vocab_size_per_layer_input=258,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    laurel_rank=8,
    is_decoder=True,
    block_size=4,
)
# Families that some of these options do not fit, and what they take instead; None: left as it is by default.
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
FITTING: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            x: {"rope_type": "default", "rope_theta": 1e4} for x in ("full_attention", "sliding_attention")
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": {"attention_chunk_size": None},
    "gemma4_unified_text": {"attention_chunk_size": None},
    "dots3_note_text": {"attention_chunk_size": None},
    "mpt": {"hidden_size": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "num_layers": 2, "num_hidden_layers": None},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_decoder_attention_heads": 4},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attention_head_size": 8},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "qk_head_dim": None, "head_dim": None},
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
TEXT_PARTS = ("text_config", "decoder_config", "language_config", "llm_config")
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"bos_token_id": 0},
    {"bos_token_id": 0, "head_dim": None},
    {"pad_token_id": 1},
    {"num_kv_shared_layers": None},
    {"num_hidden_layers": None},
    {"head_dim": None, "num_key_value_heads": None},
)

# Families whose rows were packed and whose head was linear from the start: this must stay so.
FAST = frozenset(
    [
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "beam",
        "biogpt",
        "bitnet",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ctrl",
        "diffllama",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jetmoe",
        "kolibri1",
        "laguna",
        "lfm2",
        "llama",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
        "vaultgemma",
    ]
)


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # transformers has an error of its own for a value that differs between layers
        return False


def config_of(kind: str, **other: Any) -> PreTrainedConfig:
    """The configuration of a family, of the text part alone where it is composite."""
    config_type = CONFIG_MAPPING[kind]
    default = config_type()
    renamed = getattr(config_type, "attribute_map", {})
    wanted = {**SIZES, **TOKENS, **FITTING.get(kind, {}), **other}
    known = {k: v for k, v in wanted.items() if k in TOKENS or k in renamed or _has(default, k)}
    chosen = {k: v for k, v in known.items() if v is not None or k == "bos_token_id"}
    if is_composite(kind):
        (part,) = set(TEXT_PARTS) & set(config_type.sub_configs)
        text = config_of(getattr(default, part).model_type, **other).to_dict()
        return config_type(**{part: text if part in TEXT_PARTS else VISION for part in config_type.sub_configs})
    return config_type(**{k: v for k, v in chosen.items() if not (k in renamed and renamed[k] in chosen)})


def is_composite(kind: str) -> bool:
    """Check whether a family has a configuration of several parts, one of them for text."""
    return not set(TEXT_PARTS).isdisjoint(CONFIG_MAPPING[kind].sub_configs)


def _attempts(kind: str) -> Iterator[PreTrainedModel]:
    for variant in VARIANTS:
        torch.manual_seed(0)
        try:
            config = config_of(kind, **variant)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size} parameters")
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(input_ids=torch.arange(5).unsqueeze(0), **without_cache(model))
        except Exception:  # of several classes: the options do not fit this family
            continue
        yield model


def build(kind: str) -> PreTrainedModel | None:
    """A tiny model of a family, by the first of VARIANTS that fits it; None if none does."""
    return next(_attempts(kind), None)


PROMPTS = ("ab", "The quick brown fox jumps", "hello wor", "x" * 40)


@dataclass
class Outcome:
    """The results of one step of PPO with a model, or the error with which it is rejected."""

    error: str | None = None
    linear: bool = False
    packed: bool = False
    batched: bool = True
    left_padding: bool = True
    cache: bool = True
    gap: float = 0.0  # of the log-probabilities of the answers to those of the model's own forward, one by one
    sampler_gap: float = 0.0
    ratio: float = 1.0  # the largest of the first update
    warnings: tuple[str, ...] = ()


def outcome_of(model: PreTrainedModel, **options: Any) -> Outcome:
    """One step with weights that do not change, and the same log-probabilities by the model's own forward."""
    small: dict[str, Any] = {
        "total_steps": 1,
        "prompts_per_step": len(PROMPTS),
        "minibatches": 1,
        "epochs": 1,
        "max_new_tokens": 24,
        "micro_batch_tokens": 512,
        "kl_coef": 0.05,
        "lr": 0.0,
        "critic_lr": 0.0,
        "device": "cpu",
        "quiet": True,
        "tensorboard": False,
    }
    config = PPOConfig(**{**small, **options})
    rows = [{"prompt": text} for text in PROMPTS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = PPOTrainer(
                config, model, byte_tokenizer(), rows, lambda prompts, completions: [1.0] * len(prompts)
            )
        except UserError as error:
            return Outcome(error=str(error))
        metrics = trainer.step()
    policy, rollout, experience = trainer.policy, trainer.last_rollout, trainer.last_experience
    assert rollout is not None
    assert experience is not None
    gap = 0.0
    first = rollout.tokens.shape[1] - rollout.completion_width
    for row, answer in enumerate(rollout.completion_ids):
        ids = rollout.tokens[row, first - rollout.prompt_lengths[row] : first + len(answer)]
        own = own_logprobs(trainer.actor, ids, len(answer))
        gap = max(gap, (own - experience.logprobs[row, : len(answer)]).abs().max().item())
    return Outcome(
        linear=policy.head.linear,
        packed=policy.head.packed,
        batched=policy.head.batched,
        left_padding=policy.generate_info.left_padding,
        cache=policy.generate_info.cache,
        gap=gap,
        sampler_gap=metrics["sampler_gap_max"],
        ratio=metrics["learn/ratio_max"],
        warnings=tuple(str(x.message) for x in caught if x.category is UserWarning),
    )


@torch.no_grad()
def own_logprobs(model: Any, ids: Tensor, answer: int) -> Tensor:
    """[answer] log-probabilities of a sequence's last tokens, by the model's own forward."""
    logits = model(input_ids=ids.unsqueeze(0), **without_cache(model)).logits[0].float().log_softmax(-1)
    return logits[-answer - 1 : -1].gather(1, ids[-answer:].unsqueeze(1)).squeeze(1)
