"""A critic that is fitted before PPO explains returns of held-out answers, and a run starts from it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.critic_fit import CriticFit, FitRow, split_by_prompt
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.critic_folder import load_critic
from ppo_fast.llm.models.critic_origin import ORIGIN
from ppo_fast.llm.models.value_head import PENALTIES, fit_linear
from ppo_fast.llm.rollout_files import RecordedRollout, read_rollouts, write_rollout
from ppo_fast.llm.trainer import PPOTrainer

PROMPTS = [f"{word} {number}" for number in range(10) for word in ("yes", "no", "maybe", "hello there")]
SMALL = {"prompts_per_step": 16, "max_new_tokens": 2, "minibatches": 2, "device": "cpu", "quiet": True}


def of_prompt(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that a critic can learn: the end of the prompt decides it, but for the length of the answer."""
    return [100.0 + 3.0 * int(p[-1]) + 0.1 * len(c) for p, c in zip(prompts, completions, strict=True)]


def fitting(given: Critic | None = None, recorded: list[RecordedRollout] | None = None, **options) -> CriticFit:
    config = PPOConfig(**{**SMALL, "critic_lr": 3e-3, "epochs": 8, "lr_schedule": "constant", **options})
    rows = None if recorded else [{"prompt": text} for text in PROMPTS]
    return CriticFit(config, tiny_llama(), byte_tokenizer(), critic=given, rows=rows, recorded=recorded or ())


def fitted(fit: CriticFit, **options) -> list[FitRow]:
    answers = fit.answers(of_prompt if fit.prompts is not None else None, count=160)
    return fit.fit(answers, **{"held_out": 0.3, **options})  # ten prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has recorded its rollouts."""
    out = tmp_path_factory.mktemp("run")
    options = {**SMALL, "total_steps": 4, "dump_rollouts": True, "out": str(out), "tensorboard": False}
    rows = [{"prompt": text} for text in PROMPTS]
    PPOTrainer(PPOConfig(**options), tiny_llama(), byte_tokenizer(), rows, of_prompt).train()
    return out


@pytest.mark.parametrize("normalize_values", [True, False])
@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_fitted_critic_explains_returns_of_prompts_that_it_has_not_seen(critic: str, normalize_values: bool):
    fit = fitting(critic=critic, normalize_values=normalize_values)
    seen: list[FitRow] = []
    rows = fitted(fit, after=seen.append)
    assert rows == seen
    epochs = [f"epoch {n}" for n in range(1, 9)] if critic == "own" else []
    assert [row.phase for row in rows] == ["start", "value head", *epochs]
    assert rows[0].explained_variance == pytest.approx(0, abs=1e-6)
    assert rows[1].explained_variance > 0.2, "the last byte of the prompt is in the state before the first token alone"
    if critic == "own":
        assert rows[-1].explained_variance > (0.6 if normalize_values else rows[1].explained_variance)
    scale = fit.policy.critic.value_mean.item(), fit.policy.critic.value_std.item()
    assert scale == (pytest.approx((113.5, 8.6), rel=0.1) if normalize_values else (0.0, 1.0))


def test_the_actor_is_not_changed():
    for critic in ("own", "shared"):
        fit = fitting(critic=critic, epochs=1)
        before = [p.clone() for p in fit.policy.actor.parameters()]
        fitted(fit)
        assert all(torch.equal(a, b) for a, b in zip(before, fit.policy.actor.parameters(), strict=True))
        assert all(p.grad is None for p in fit.policy.parameters())


def test_answers_of_a_run_are_fitted_to_their_rewards(run: Path):
    recorded = read_rollouts(run / "rollouts")
    fit = fitting(recorded=recorded, gamma=0.5)
    answers = fit.answers()
    assert len(answers.rollout) == 4 * 16
    assert answers.batches == 4
    row, some = 16 + 3, recorded[1]
    length = some.rollout.completion_lengths[3]
    expected, following = [], 0.0
    for reward in reversed(some.rewards[3, :length].tolist()):
        following = reward + 0.5 * following
        expected.insert(0, following)
    torch.testing.assert_close(answers.returns[row, :length], torch.tensor(expected))
    assert fitted(fit)[-1].explained_variance > 0.3


def test_a_fit_is_the_same_whenever_it_is_made(run: Path):
    recorded = read_rollouts(run / "rollouts")
    first, second = (fitted(fitting(recorded=recorded, epochs=2)) for _ in range(2))
    assert first == second


def test_a_run_starts_from_the_critic(tmp_path: Path):
    for critic in ("own", "shared"):
        fit = fitting(critic=critic, out=str(tmp_path / critic))
        rows = fitted(fit)
        fit.save(tmp_path / critic, rows)
        assert [json.loads(x) for x in (tmp_path / critic / "fit.jsonl").read_text().splitlines()] == [
            dataclasses.asdict(row) for row in rows
        ]
        config = PPOConfig(**{**SMALL, "total_steps": 1, "critic": critic, "seed": 5, "lr": 0.0, "lam": 1.0})
        rows = [{"prompt": text} for text in PROMPTS]
        given, _ = load_critic(tmp_path / critic)
        trainer = PPOTrainer(config, tiny_llama(), byte_tokenizer(), rows, of_prompt, critic=given)
        assert trainer.step()["explained_variance"] > 0.25


def test_a_given_critic_keeps_its_head_at_the_start(run: Path):
    recorded = read_rollouts(run / "rollouts")
    first = fitting(recorded=recorded)
    last = fitted(first)[-1]
    again = fitting(first.policy.critic, recorded=recorded, epochs=1, critic_lr=0.0)
    rows = fitted(again)
    assert [row.phase for row in rows] == ["start", "epoch 1"]
    assert rows[0].explained_variance == pytest.approx(last.explained_variance, abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"lora_rank": 2}, {"gradient_checkpointing": True}])
def test_options_of_models_have_their_effect(run: Path, options: dict):
    if "lora_rank" in options:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    rows = fitted(fitting(recorded=read_rollouts(run / "rollouts"), epochs=2, **options))
    assert rows[-1].explained_variance > 0.2


def test_rows_are_held_out_by_prompt():
    prompts = [(i % 7,) for i in range(50)]
    kept, held = split_by_prompt(prompts, 0.3, seed=1)
    assert sorted(kept + held) == list(range(50))
    assert len({prompts[i] for i in held}) == 2
    assert not {prompts[i] for i in kept} & {prompts[i] for i in held}
    assert split_by_prompt(prompts, 0.3, seed=2) != (kept, held)
    with pytest.raises(UserError, match="all 3 answers are to one prompt, which leaves none to hold out"):
        split_by_prompt([(1,)] * 3, 0.1, seed=0)
    with pytest.raises(UserError, match="must be between 0 and 1, got 1"):
        split_by_prompt(prompts, 1.0, seed=0)


def test_least_squares_finds_the_line_and_ignores_noise():
    torch.manual_seed(0)
    x = torch.randn(400, 30) * torch.logspace(-3, 3, 30) + 5
    x[:, 7] = 3.0  # constant
    truth = torch.randn(30) / torch.logspace(-3, 3, 30)
    y = x @ truth - 2
    folds = [[(x[i::4], y[i::4])] for i in range(4)]
    weight, bias = fit_linear(folds)
    torch.testing.assert_close(x @ weight + bias, y, rtol=1e-6, atol=1e-3)  # fp32 of numbers up to 1e4
    assert weight[7] == 0
    noise = 10 * torch.randn(400)
    weight, bias = fit_linear([[(x[i::4], noise[i::4])] for i in range(4)])
    plain = torch.linalg.lstsq(torch.cat([x, torch.ones(400, 1)], 1).double(), noise.double()[:, None]).solution
    fresh = torch.randn(400, 30) * torch.logspace(-3, 3, 30) + 5
    fresh[:, 7] = 3.0
    ours, theirs = fresh @ weight + bias, (torch.cat([fresh, torch.ones(400, 1)], 1).double() @ plain).squeeze(1)
    assert (ours - noise.mean()).square().mean() < 0.5 * (theirs - noise.mean()).square().mean()


def test_a_shared_value_head_is_the_minimum_of_the_penalised_loss(run: Path):
    """There the gradient of the squared error is -2 p s^2 w, with one p for all weights, and 0 for the bias."""
    fit = fitting(recorded=read_rollouts(run / "rollouts"), critic="shared")
    answers = fit.answers()
    fit.fit(answers)
    kept, _ = split_by_prompt(answers.prompts(), 0.1, seed=0)
    critic = fit.policy.critic
    parts = [(x, critic.normalize(pack.gather(answers.returns))) for pack, x in fit.states_of(answers, kept)]
    x, y = (torch.cat(some).double() for some in zip(*parts, strict=True))
    weight, bias = critic.head.weight.detach().double().squeeze(0), critic.head.bias.detach().double()
    residual = x @ weight + bias - y
    assert residual.square().mean() < 0.7 * y.var()
    assert residual.mean().abs() < 1e-6
    gradient = 2 * (x * residual[:, None]).mean(0)
    penalties = -gradient / (2 * x.var(0, correction=0) * weight)
    chosen = min(PENALTIES, key=lambda p: abs(p - penalties.median().item()))
    torch.testing.assert_close(penalties, torch.full_like(penalties, chosen), rtol=1e-2, atol=0)  # the head is fp32


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compile_layers needs the C\+\+ compiler no-such-compiler: install it"):
        fitting(compile_layers=True)


def test_recorded_answers_that_cannot_be_used_are_rejected(run: Path, tmp_path: Path):
    (recorded,) = read_rollouts(run / "rollouts" / "step-2.safetensors")
    with pytest.raises(UserError, match="step 2 are of a run that started with another model: give that one as"):
        fitting(recorded=[dataclasses.replace(recorded, model="0123456789abcdef")])
    with pytest.raises(UserError, match="step 2 have tokens of another tokenizer: give the model with which"):
        fitting(recorded=[dataclasses.replace(recorded, tokenizer="0123456789abcdef")])
    damaged = dataclasses.replace(recorded.rollout, tokens=recorded.rollout.tokens + 258)
    with pytest.raises(UserError, match=r"step 2 are damaged: they have the token \d+, but the model has the"):
        fitting(recorded=[dataclasses.replace(recorded, rollout=damaged)])
    scores = recorded.rollout.scores
    for some, first in (([], 0), ([*scores[:3], float("nan"), *scores[4:]], 3)):
        without = dataclasses.replace(recorded, rollout=dataclasses.replace(recorded.rollout, scores=some))
        (read,) = read_rollouts(write_rollout(tmp_path, without))
        with pytest.raises(UserError, match=f"step 2 have no score, answer {first} is the first: give rollouts"):
            fitting(recorded=[read])
    one = dataclasses.replace(recorded.rollout, tokens=recorded.rollout.tokens.clone())
    one.tokens[:, : -one.completion_width] = 65
    one.prompt_lengths = [3] * len(one)
    with pytest.raises(UserError, match="all 16 answers are to one prompt"):
        fitted(fitting(recorded=[dataclasses.replace(recorded, rollout=one)]))
    equal = dataclasses.replace(recorded, rewards=torch.zeros_like(recorded.rewards))
    with pytest.raises(UserError, match="have the return 0, so there is nothing to fit: check that the reward"):
        fitted(fitting(recorded=[equal]))
    with pytest.raises(UserError, match="or to answers sampled to prompts: give recorded or rows"):
        CriticFit(PPOConfig(**SMALL), tiny_llama(), byte_tokenizer())
    with pytest.raises(UserError, match="answers that are sampled need a reward"):
        fitting().answers()


REWARD = """
def of_prompt(prompts, completions):
    return [100.0 + 3.0 * int(p[-1]) + 0.1 * len(c) for p, c in zip(prompts, completions)]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return tmp_path


def command(name: str, folder: Path, *more: str, sampled: bool = True, **changed: str) -> list[str]:
    options = {"model": str(folder / "model"), "prompts-per-step": "16", "max-new-tokens": "2", "device": "cpu"}
    if sampled:
        options |= {"prompts": str(folder / "prompts.jsonl"), "reward": f"{folder / 'rewards.py'}:of_prompt"}
    options.update(changed)
    return [name, *(part for key, value in options.items() for part in (f"--{key}", value)), *more]


def test_the_command_fits_to_samples_and_to_rollouts_and_train_starts_from_it(folder: Path, capsys):
    own, shared, out = folder / "own", folder / "shared", folder / "run"
    fit = {"critic-lr": "3e-3", "epochs": "3"}
    assert main(command("critic", folder, "--answers", "64", out=str(own), **fit)) == 0
    shown = capsys.readouterr().out
    assert "64 answers to 40 prompts; the returns of their" in shown
    assert "start: explained variance on held-out answers" in shown
    assert "epoch 3: explained variance on held-out answers" in shown
    assert f"ppo-fast train --critic-model {own} --critic own starts from it" in shown
    last = json.loads((own / "fit.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "epoch 3"
    assert last["explained_variance"] > 0.3

    steps = {"total-steps": "2", "out": str(out)}
    assert main(command("train", folder, "--dump-rollouts", **steps, **{"critic-model": str(own)})) == 0
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["explained_variance"] > 0.3
    rollouts = {"rollouts": str(out / "rollouts"), "critic": "shared"}
    assert main(command("critic", folder, sampled=False, out=str(shared), **rollouts)) == 0
    assert "32 answers to" in capsys.readouterr().out
    given = {"critic-model": str(shared), "critic": "shared", "out": str(folder / "third"), "total-steps": "1"}
    assert main(command("train", folder, **given)) == 0

    assert main(command("critic", folder, sampled=False, out=str(shared), **rollouts)) == 1
    assert "already holds a critic: choose another --out, or replace it with --overwrite" in capsys.readouterr().err
    assert main(command("critic", folder, "--overwrite", sampled=False, out=str(shared), **rollouts)) == 0


def test_bad_input_of_the_command_is_one_sentence(folder: Path, capsys):
    def message(*more: str, name: str = "critic", sampled: bool = True, **changed: str) -> str:
        given = {"out": str(folder / "out"), **changed}
        assert main(command(name, folder, *more, sampled=sampled, **given)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--rollouts sample needs --prompts" in message(sampled=False)
    assert "there is no such file or folder" in message(sampled=False, rollouts=str(folder / "absent"))
    not_one = message(sampled=False, rollouts=str(folder / "model" / "model.safetensors"))
    assert "is not a file of rollouts: give one that a run with dump_rollouts wrote" in not_one
    assert "holds files that ppo_fast did not write" in message(out=str(folder / "model"))
    assert "share of held-out prompts must be between 0 and 1, got 0.0" in message("--held-out", "0", "--answers", "4")
    assert "answers must be at least 1, got 0" in message("--answers", "0")
    absent = {"model": str(folder / "absent")}  # nothing is loaded or sampled before
    assert "share of held-out prompts must be between 0 and 1, got nan" in message("--held-out", "nan", **absent)
    assert "answers must be at least 1, got -1" in message("--answers", "-1", **absent)
    assert "--reward, --reward-model, or both" in message(sampled=False, prompts=str(folder / "prompts.jsonl"))
    assert main(command("critic", folder)) == 1
    assert "--out is missing" in capsys.readouterr().err

    critic = folder / "critic"
    assert main(command("critic", folder, "--answers", "16", "--epochs", "1", out=str(critic))) == 0
    tiny_llama(258, seed=1).save_pretrained(folder / "other")
    byte_tokenizer().save_pretrained(folder / "other")
    capsys.readouterr()
    other = {"model": str(folder / "other"), "critic-model": str(critic)}
    assert "belongs to another model: give the model that it was trained with" in message(name="train", **other)
    assert "belongs to another model" in message(**other)
    origin = json.loads((critic / ORIGIN).read_text())
    (critic / ORIGIN).write_text(json.dumps(origin | {"tokenizer": "0"}))
    assert "belongs to another tokenizer" in message(name="train", **{"critic-model": str(critic)})
