"""Weights are those that the user specified: what is loaded from a folder, trained, and shared between models."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.loading import load_actor, source_dtype
from ppo_fast.llm.models.reward_model import RewardModel, load_reward_model
from ppo_fast.llm.models.weights import check_finite, stored_dtype
from ppo_fast.llm.preferences.reward_model import Pair, train_reward_model
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": "ab"}, {"prompt": "cde"}]


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def trainer_of(actor=None, *, rewards=length, own_critic=None, reference=None, **options) -> PPOTrainer:
    small = dict(total_steps=1, prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=4, quiet=True, device="cpu")
    actor = tiny_llama() if actor is None else actor
    config = PPOConfig(**{**small, **options})
    return PPOTrainer(config, actor, byte_tokenizer(), ROWS, rewards, critic=own_critic, reference=reference)


def reward_model(labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": labels})).eval()


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def changed(folder: Path, change) -> Path:
    """A copy of a folder whose weights went through a function."""
    other = folder.with_name(folder.name + "-changed")
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    save_file(change(weights), other / "model.safetensors", metadata={"format": "pt"})
    return other


def tied() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "tie_word_embeddings": True}))


# Folders


def test_missing_weights_are_rejected(tmp_path):
    folder = saved(tiny_llama().model, tmp_path / "backbone")
    with pytest.raises(UserError, match=r"the model in .*backbone lacks lm_head.weight, which would start at random"):
        load_actor(folder)
    whole = saved(tiny_llama(), tmp_path / "whole")
    cut = changed(whole, lambda weights: {name: x for name, x in weights.items() if "layers.1.mlp" not in name})
    with pytest.raises(UserError, match=r"lacks model.layers.1.mlp.down_proj.weight and 2 others"):
        load_actor(cut)


def test_a_tied_head_counts_as_present(tmp_path):
    model = tied()
    folder = saved(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    actor, _ = load_actor(folder)
    assert actor.lm_head.weight is actor.model.embed_tokens.weight
    assert torch.equal(actor.lm_head.weight, model.lm_head.weight)
    backbone, _ = load_actor(saved(model.model, tmp_path / "backbone"))
    assert torch.equal(backbone.lm_head.weight, model.lm_head.weight)
    neither = changed(folder, lambda weights: {n: x for n, x in weights.items() if "embed_tokens" not in n})
    with pytest.raises(UserError, match="lacks "):
        load_actor(neither)


def test_surplus_weights_are_rejected(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "model")
    more = changed(folder, lambda weights: {**weights, "model.layers.2.mlp.up_proj.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"does not describe, model.layers.2.mlp.up_proj.weight: the files belong"):
        load_actor(more)
    classifier = saved(reward_model(), tmp_path / "classifier")
    with pytest.raises(UserError, match=r"lacks lm_head.weight"):
        load_actor(classifier)


def test_the_value_head_of_a_language_model_is_rejected(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "model")
    more = changed(folder, lambda weights: {**weights, "v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(UserError, match=r"does not describe, v_head.summary.weight: .* such as one with a value head"):
        load_actor(more)


def test_buffers_that_older_versions_saved_are_left_out(tmp_path):
    folder = saved(tiny_gpt2(), tmp_path / "gpt2")
    names = ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "gpt_neox.layers.0.attention.bias")
    old = {name: torch.ones(1) for name in (*names, "gpt_neox.layers.0.attention.rotary_emb.inv_freq")}
    load_actor(changed(folder, lambda weights: {**weights, **old}))


def test_weights_of_another_size_are_rejected(tmp_path, capfd):
    folder = saved(tiny_llama(), tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"another size than .*, lm_head.weight and 20 others \(\[258, 32\] instead"):
        load_actor(folder)
    assert "MISMATCH" not in capfd.readouterr().err, "the table of transformers says the same again"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(tmp_path, value):
    folder = saved(tiny_llama(), tmp_path / "model")

    def spoil(weights):
        weights["model.norm.weight"][3] = value
        return weights

    with pytest.raises(UserError, match=r"the model in .* has NaN or infinite values in model.norm.weight"):
        load_actor(changed(folder, spoil))
    scores = saved(reward_model(), tmp_path / "rm")
    with pytest.raises(UserError, match=r"the reward model in .* has NaN or infinite values in model.norm.weight"):
        load_reward_model(changed(scores, spoil))


def test_weights_from_python_that_are_not_finite_are_rejected():
    actor = tiny_llama()
    with torch.no_grad():
        actor.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the actor has NaN or infinite values in model.layers.0.mlp.up_proj.weight"):
        trainer_of(actor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_the_largest_numbers_of_a_dtype_count_as_finite(dtype):
    model = torch.nn.Linear(2, 2, bias=False)
    bound = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    model.weight = torch.nn.Parameter(torch.full((2, 2), bound, dtype=torch.float64).to(dtype), requires_grad=False)
    check_finite(model, "the model")
    model.weight = torch.nn.Parameter(torch.full((2, 2), torch.nan).to(dtype), requires_grad=False)
    with pytest.raises(UserError, match="has NaN"):
        check_finite(model, "the model")


def test_a_damaged_folder_is_named(tmp_path):
    whole = save_tiny_model(tmp_path / "whole")

    def folder(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    cut = folder("cut")
    os.truncate(cut / "model.safetensors", 50_000)
    empty = folder("empty")
    (empty / "model.safetensors").write_bytes(b"")
    absent = folder("absent")
    (absent / "model.safetensors").unlink()
    kind = folder("kind")
    (kind / "config.json").write_text((kind / "config.json").read_text().replace(": 2,", ': "two",'))
    no_json = folder("no_json")
    (no_json / "config.json").write_text("{")
    for damaged in (cut, empty, absent, kind, no_json):
        with pytest.raises(UserError, match=f"cannot load the model in {damaged}: ") as error:
            load_actor(damaged)
        assert "\n" not in str(error.value)
    tokenizer = folder("tokenizer")
    (tokenizer / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=f"cannot load the tokenizer in {tokenizer}: "):
        load_actor(tokenizer)


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_a_pickle_is_rejected_unread(tmp_path):
    folder = save_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    for load in (load_actor, load_reward_model):
        with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, .* use_safetensors=False"):
            load(folder)


def test_a_folder_of_adapters_is_rejected_with_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapters: merge them into their model"):
        load_actor(tmp_path)


def test_a_reward_model_without_its_scoring_layer_is_rejected(tmp_path):
    model = tiny_llama()
    model.config.num_labels = 1
    with pytest.raises(UserError, match=r"the reward model in .* lacks score.weight, .*: give a folder of a sequence"):
        load_reward_model(saved(model, tmp_path / "lm"))
    with pytest.raises(UserError, match="has 2 outputs; one score is expected"):
        load_reward_model(saved(reward_model(labels=2), tmp_path / "two"))


def test_the_dtype_of_a_folder_is_that_of_most_weights(tmp_path):
    folder = saved(tiny_llama().bfloat16(), tmp_path / "half")
    assert stored_dtype(folder) == torch.bfloat16
    mixed = changed(folder, lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"].float()})
    assert stored_dtype(mixed) == torch.bfloat16
    tiny_llama().half().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert stored_dtype(tmp_path / "shards") == torch.float16
    actor, _ = load_actor(folder)
    assert (actor.dtype, source_dtype(actor)) == (torch.float32, torch.bfloat16)
    assert source_dtype(tiny_llama()) is None


# What is trained


def test_an_actor_in_half_precision_is_rejected():
    with pytest.raises(UserError, match=r"the actor would be trained in bfloat16 \(model.embed_tokens.weight\)"):
        trainer_of(tiny_llama().bfloat16())


def test_a_critic_in_half_precision_is_rejected_or_made_fp32(tmp_path):
    with pytest.raises(UserError, match=r"the critic would be trained in float16 \(backbone.embed_tokens.weight\)"):
        trainer_of(own_critic=Critic(tiny_llama().model.half(), 32))
    folder = saved(reward_model().bfloat16(), tmp_path / "rm")
    kept, _ = load_reward_model(folder)
    assert kept.dtype == torch.bfloat16
    critic = Critic.from_reward_model(kept)
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert kept.dtype == torch.bfloat16, "the reward model itself stays as it is"
    loaded, _ = load_reward_model(folder, dtype=torch.float32)
    assert loaded.dtype == torch.float32
    trainer = trainer_of(own_critic=critic, critic_lr=1e-5, lr_schedule="constant", warmup_ratio=0.0)
    before = trainer.critic.backbone.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.step()
    moved = trainer.critic.backbone.layers[0].mlp.up_proj.weight != before
    assert moved.float().mean() > 0.5, "small updates round to nothing"


def test_a_reward_model_in_half_precision_is_not_trained():
    pairs = [Pair("a", "b", "c")]
    with pytest.raises(UserError, match="the reward model would be trained in bfloat16"):
        train_reward_model(reward_model().bfloat16(), byte_tokenizer(), pairs)


def test_an_actor_without_trainable_weights_is_rejected():
    with pytest.raises(UserError, match="all weights of the actor are frozen"):
        trainer_of(tiny_llama().requires_grad_(False))
    quantised = tiny_llama()
    quantised.is_quantized = True
    with pytest.raises(UserError, match="quantised and cannot be trained"):
        trainer_of(quantised)


def test_lora_gives_adapters_to_a_critic_from_a_reward_model():
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    trainer = trainer_of(lora_rank=2, own_critic=Critic.from_reward_model(reward_model()), critic_lr=1e-3)
    trained = {name for name, p in trainer.critic.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert any("lora_" in name for name in trained)
    trainer.step()


def test_a_shared_critic_and_a_given_backbone_exclude_each_other():
    critic = Critic.from_reward_model(reward_model())
    with pytest.raises(UserError, match="critic = shared, but a critic with a backbone of its own is given"):
        trainer_of(own_critic=critic, critic="shared")


# Models that share weights


def test_a_reference_that_shares_trained_weights_is_rejected():
    actor = tiny_llama()
    message = "the reference shares model.embed_tokens.weight with the actor, which is trained"
    with pytest.raises(UserError, match=message):
        trainer_of(actor, reference=actor)
    other = tiny_llama(seed=1)
    other.model.embed_tokens = actor.model.embed_tokens
    with pytest.raises(UserError, match=message):
        trainer_of(actor, reference=other)
    trainer_of(actor, reference=copy.deepcopy(actor))


def test_a_view_of_trained_weights_counts_as_shared():
    actor, reference = tiny_llama(), tiny_llama(seed=1)
    reference.lm_head.weight.data = actor.lm_head.weight.data[:]
    with pytest.raises(UserError, match=r"the reference shares lm_head.weight with the actor"):
        trainer_of(actor, reference=reference)


def test_a_critic_on_the_actors_own_backbone_is_rejected():
    actor = tiny_llama()
    with pytest.raises(UserError, match=r"the critic shares backbone.embed_tokens.weight with the actor"):
        trainer_of(actor, own_critic=Critic(actor.model, 32))
    trainer_of(actor, own_critic=Critic.shared(actor), critic="shared")


def test_a_reward_model_that_shares_trained_weights_is_rejected():
    model = reward_model()
    rewards = {"rm": RewardModel(model, byte_tokenizer())}
    message = r"the model of the reward rm shares model.embed_tokens.weight with the critic, which is trained"
    with pytest.raises(UserError, match=message):
        trainer_of(rewards=rewards, own_critic=Critic.from_reward_model(model.requires_grad_(True)))
    actor = tiny_llama()
    model.model = actor.model
    with pytest.raises(UserError, match=r"the model of the reward rm shares .* with the actor"):
        trainer_of(actor, rewards=rewards)


def test_two_frozen_models_may_share_their_weights():
    model = reward_model().requires_grad_(False)
    reference = tiny_llama(seed=1).requires_grad_(False)
    model.model = reference.model
    trainer_of(rewards={"rm": RewardModel(model, byte_tokenizer())}, reference=reference).step()


# The folder of the finished model


@pytest.mark.parametrize(
    ("source", "option", "expected", "note"),
    [
        ("bfloat16", "auto", "bfloat16", "the trained fp32 weights are rounded to bfloat16 when the model is saved"),
        ("bfloat16", "float32", "float32", "the model is saved in float32; the start model is in bfloat16"),
        ("float32", "auto", "float32", None),
        ("float32", "float16", "float16", "the model is saved in float16; the start model is in float32"),
    ],
)
def test_the_model_is_saved_in_the_dtype_of_its_folder_or_of_the_option(tmp_path, source, option, expected, note):
    start = tied().to(getattr(torch, source))
    folder = saved(start, tmp_path / "start")
    actor, tokenizer = load_actor(folder)
    options = PPOConfig(
        total_steps=1, prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=4, quiet=True, device="cpu",
        out=str(tmp_path / "run"), save_dtype=option, tensorboard=False, save_every=1, eval_every=1, lr=1e-3,
    )  # fmt: skip
    trainer = PPOTrainer(options, actor, tokenizer, ROWS, length, eval_rows=ROWS)
    trainer.train()
    for name in ("model", "best"):
        weights = load_file(tmp_path / "run" / name / "model.safetensors")
        assert {x.dtype for x in weights.values()} == {getattr(torch, expected)}
        assert "lm_head.weight" not in weights, "tied weights are stored once"
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["dtype"] == expected
    trained = trainer.actor.model.norm.weight.detach()
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(stored, trained.to(stored.dtype))
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-1" / "weights.safetensors")
    assert {x.dtype for x in kept.values()} == {torch.float32}
    told = [x for x in trainer.notes if "saved in" in x or "rounded" in x]
    assert ([x.split("; save_dtype")[0] for x in told]) == ([] if note is None else [note])


def test_adapters_are_saved_in_fp32_unless_asked_otherwise(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    folder = saved(tiny_llama().bfloat16(), tmp_path / "start")
    for option, merge, expected in (
        ("auto", False, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
    ):
        actor, tokenizer = load_actor(folder)
        out = tmp_path / f"{option}-{merge}"
        options = PPOConfig(
            total_steps=1, prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=4, quiet=True, device="cpu",
            out=str(out), save_dtype=option, merge_adapters=merge, lora_rank=2, tensorboard=False, save_every=0,
        )  # fmt: skip
        PPOTrainer(options, actor, tokenizer, ROWS, length).train()
        (file,) = (out / "model").glob("*.safetensors")
        assert {x.dtype for x in load_file(file).values()} == {expected}


def test_a_generation_config_that_cannot_be_saved_is_rejected_before_the_first_step(tmp_path):
    folder = save_tiny_model(tmp_path / "m")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False, "temperature": 0.6}))
    actor, tokenizer = load_actor(folder)
    actor.generation_config.pad_token_id = 256  # transformers checks a changed config more strictly
    options = PPOConfig(out=str(tmp_path / "run"), quiet=True, device="cpu")
    with pytest.raises(UserError) as error:
        PPOTrainer(options, actor, tokenizer, ROWS, length)
    assert str(error.value) == (
        "the generation config could not be saved after the training (`temperature`: `do_sample` is not set to `True`):"
        " correct it (generation_config.json, or actor.generation_config in Python)"
    )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_cannot_be_saved_is_rejected_before_the_first_step(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()

    def fail(*arguments, **options):
        raise NotImplementedError("no files")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    options = PPOConfig(out=str(tmp_path / "run"), quiet=True, device="cpu")
    with pytest.raises(UserError, match=r"the tokenizer could not be saved after the training \(no files\)"):
        PPOTrainer(options, tiny_llama(), tokenizer, ROWS, length)


def test_merging_what_cannot_be_merged_is_rejected_before_the_first_step(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    actor = peft.get_peft_model(tiny_llama(), prefix)
    options = PPOConfig(out=str(tmp_path / "run"), quiet=True, device="cpu", merge_adapters=True)
    with pytest.raises(UserError, match="adapters of this kind cannot be merged"):
        PPOTrainer(options, actor, byte_tokenizer(), ROWS, length)
    trainer = PPOTrainer(options, tiny_llama(), byte_tokenizer(), ROWS, length)
    assert "merge_adapters has no effect: the actor has no adapters" in trainer.notes
