"""OUT/critic: what a run has learned about values is saved, and another run starts from it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.critic_folder import VALUE_HEAD, load_critic
from ppo_fast.llm.models.critic_origin import ORIGIN, check_origin
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("abc", "one two", "x", "hello")]
OPTIONS = {"total_steps": 1, "prompts_per_step": 4, "minibatches": 1, "max_new_tokens": 4, "quiet": True}


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [
        float(len(prompt) + sum(c.isalpha() for c in text)) for prompt, text in zip(prompts, completions, strict=True)
    ]


def different(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(number) for number in range(len(completions))]


def trained(out: Path, actor: torch.nn.Module, given: Critic | None = None, **options: object) -> PPOTrainer:
    config = PPOConfig(**OPTIONS | {"critic_lr": 1e-2, "out": str(out)} | options)
    trainer = PPOTrainer(config, actor, byte_tokenizer(), ROWS, letters, critic=given)
    trainer.train()
    return trainer


def values_of(critic: Critic, actor: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 19).view(2, 8)
    backbone = actor.base_model if critic.backbone is None else critic.backbone
    with torch.no_grad():
        return critic(backbone(input_ids=ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_saved_critic_has_the_values_of_the_run(tmp_path: Path, make, lora_rank: int):
    if lora_rank:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    trainer = trained(tmp_path, make(), lora_rank=lora_rank)
    critic, _ = load_critic(tmp_path / "critic")
    expected = values_of(trainer.policy.critic, trainer.actor)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(values_of(critic, trainer.actor), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in critic.parameters())


def test_a_run_continues_with_the_critic_of_another(tmp_path: Path):
    first = trained(tmp_path / "first", tiny_llama())
    critic, _ = load_critic(tmp_path / "first" / "critic")
    second = trained(tmp_path / "second", tiny_llama(), critic)
    row = first.recorded[0]
    assert row["value"] == pytest.approx(row["value_mean"]), "a new value head starts at zero"
    assert second.recorded[0]["value"] != pytest.approx(second.recorded[0]["value_mean"])


def test_the_value_head_of_a_shared_critic_is_saved_alone(tmp_path: Path):
    trainer = trained(tmp_path / "first", tiny_llama(), critic="shared")
    folder = tmp_path / "first" / "critic"
    assert sorted(file.name for file in folder.iterdir()) == [ORIGIN, VALUE_HEAD]
    critic, _ = load_critic(folder)
    assert torch.equal(critic.head.weight, trainer.policy.critic.head.weight)
    second = trained(tmp_path / "second", trainer.actor, critic, critic="shared")
    assert second.recorded[0]["value"] != pytest.approx(second.recorded[0]["value_mean"])
    with pytest.raises(UserError, match="a value head without a backbone: it needs critic = shared"):
        trained(tmp_path / "third", tiny_llama(), load_critic(folder)[0])
    wide = Critic(None, 48)
    with pytest.raises(
        UserError, match=r"the given value head reads 48 numbers, but a hidden state of the actor has \d+"
    ):
        trained(tmp_path / "fourth", tiny_llama(), wide, critic="shared")


def test_a_damaged_value_head_is_named(tmp_path: Path):
    trained(tmp_path, tiny_llama())
    folder = tmp_path / "critic"
    good = load_file(folder / VALUE_HEAD)
    damaged = {
        "its weight is": good | {"weight": torch.zeros(2, 8)},
        "NaN or infinite": good | {"bias": torch.tensor([torch.nan])},
        "cannot read the value head": {"weight": good["weight"]},
        "reads 8 numbers": good | {"weight": torch.zeros(1, 8)},
        r"mean = 0.0, std = 0.0: it needs one number each, and std > 0": good
        | {"mean": torch.tensor(0.0), "std": torch.tensor(0.0)},
        r"mean = 0.0, std = -1.0": good | {"mean": torch.tensor(0.0), "std": torch.tensor(-1.0)},
        "has NaN or infinite": good | {"mean": torch.tensor(torch.inf)},
        r"std = \[1.0, 1.0\]": good | {"std": torch.ones(2)},
        "cannot read the value head in": {name: x for name, x in good.items() if name != "std"},
    }
    for message, head in damaged.items():
        save_file(head, folder / VALUE_HEAD)
        with pytest.raises(UserError, match=message) as error:
            load_critic(folder)
        assert "\n" not in str(error.value)
    (folder / VALUE_HEAD).write_bytes(b"no file of safetensors")
    with pytest.raises(UserError, match="cannot read the value head"):
        load_critic(folder)


def test_the_scale_of_values_is_saved(tmp_path: Path):
    trainer = trained(tmp_path, tiny_llama())
    critic, _ = load_critic(tmp_path / "critic")
    for name in ("value_mean", "value_std"):
        assert torch.equal(getattr(critic, name), getattr(trainer.critic, name)), name
    assert critic.value_std not in (0.0, 1.0)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_the_critic_of_the_best_model_is_saved_beside_it(tmp_path: Path, critic: str):
    """The best model is not the last one: the score of the held-out prompt falls after step 1."""
    save_tiny_model(tmp_path / "start")
    actor, tokenizer = load_actor(tmp_path / "start")
    scores, values = iter([1.0, 3.0, 2.0, 1.0]), {}

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [next(scores)] if prompts == ["held out"] else different(prompts, completions)

    def note(trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        values[trainer.steps_done] = values_of(trainer.policy.critic, trainer.actor)

    changes = {"lr": 1e-3, "critic_lr": 1e-2, "total_steps": 3, "eval_every": 1, "save_dtype": "float32"}
    config = PPOConfig(**OPTIONS | changes | {"out": str(tmp_path / "run"), "critic": critic})
    PPOTrainer(config, actor, tokenizer, ROWS, reward, eval_rows=[{"prompt": "held out"}]).train(note)
    best, its_tokenizer = load_actor(tmp_path / "run" / "best")
    saved, _ = load_critic(tmp_path / "run" / "best" / "critic")
    check_origin(tmp_path / "run" / "best" / "critic", best, its_tokenizer)
    torch.testing.assert_close(values_of(saved, best), values[1], rtol=1e-5, atol=1e-6)
    assert (values[1] - values[3]).abs().max() > 1e-3
    assert saved.value_std.item() != 1.0


def test_a_head_without_a_scale_predicts_in_units_of_the_reward(tmp_path: Path):
    trainer = trained(tmp_path, tiny_llama(), critic="shared")
    file = tmp_path / "critic" / VALUE_HEAD
    save_file({name: x for name, x in load_file(file).items() if name in ("weight", "bias")}, file)
    critic, _ = load_critic(tmp_path / "critic")
    assert (critic.value_mean.item(), critic.value_std.item()) == (0.0, 1.0)
    hidden = torch.randn(3, critic.head.in_features)
    assert torch.equal(critic(hidden), trainer.critic.normalized(hidden))


def test_a_folder_without_a_critic_is_rejected(tmp_path: Path):
    save_tiny_model(tmp_path / "actor")
    with pytest.raises(UserError, match="sequence classifier"):
        load_critic(tmp_path / "actor")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load_critic(tmp_path / "absent")


def test_without_weights_the_critic_has_the_same_layout(tmp_path: Path):
    trained(tmp_path, tiny_llama())
    whole, _ = load_critic(tmp_path / "critic")
    empty, _ = load_critic(tmp_path / "critic", weights=False)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    layouts = [[(n, p.shape, p.dtype) for n, p in model.named_parameters()] for model in (whole, empty)]
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_critic_is_accepted_with_the_models_of_its_run_and_with_no_other(tmp_path: Path, critic: str, dtype):
    save_tiny_model(tmp_path / "start")
    tiny_llama(258).to(dtype).save_pretrained(tmp_path / "start")
    actor, tokenizer = load_actor(tmp_path / "start")
    start = copy.deepcopy(actor)
    config = PPOConfig(**OPTIONS | {"lr": 1e-2, "out": str(tmp_path / "run"), "critic": critic})
    PPOTrainer(config, actor, tokenizer, ROWS, different).train()
    folder = tmp_path / "run" / "critic"
    trained_, its_tokenizer = load_actor(tmp_path / "run" / "model")
    for model in (start, trained_):
        check_origin(folder, model, its_tokenizer)
    if dtype == torch.bfloat16:
        with pytest.raises(UserError, match="belongs to another model"):
            check_origin(folder, actor, tokenizer)  # as before it was rounded: no folder has it
    with pytest.raises(UserError, match="belongs to another model: give the model that it was trained with"):
        check_origin(folder, tiny_llama(seed=1), tokenizer)
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        check_origin(folder, start, byte_tokenizer(pad=False))
    (folder / ORIGIN).write_text("{}")
    with pytest.raises(UserError, match=r"origin\.json was not written by ppo-fast"):
        check_origin(folder, start, tokenizer)
    (folder / ORIGIN).unlink()
    check_origin(folder, tiny_llama(seed=1), tokenizer)


def test_the_critic_of_a_run_with_adapters_fits_any_model_of_its_tokenizer(tmp_path: Path):
    pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    trained(tmp_path, tiny_llama(), lora_rank=2)
    check_origin(tmp_path / "critic", tiny_llama(seed=1), byte_tokenizer())
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        check_origin(tmp_path / "critic", tiny_llama(), byte_tokenizer(pad=False))
