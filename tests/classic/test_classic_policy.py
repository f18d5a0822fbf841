"""Saved policies, output and files of a classic run, signals and failures."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv  # noqa: E402
from support import given  # noqa: E402

from ppo_fast import classic  # noqa: E402
from ppo_fast.classic import ClassicConfig, ClassicTrainer  # noqa: E402
from ppo_fast.classic.envs.workers import close  # noqa: E402
from ppo_fast.classic.logger import RunLogger  # noqa: E402
from ppo_fast.classic.trainer import Stopped  # noqa: E402
from ppo_fast.common import checkpoint  # noqa: E402
from ppo_fast.common.errors import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]


class Given(given.Given):
    """Episodes of 5 steps, each of which takes some seconds; one of all steps may fail."""

    def __init__(self, observation=None, action=None, seconds=0.0, fails_at=None):
        super().__init__(observation, action)
        self.seconds, self.fails_at, self.total = seconds, fails_at, 0

    def step(self, action):
        time.sleep(self.seconds)
        self.total += 1
        if self.total == self.fails_at:
            raise RuntimeError("the simulator has ended")
        return super().step(action)


def small(**options) -> ClassicConfig:
    defaults = dict(num_envs=2, rollout_steps=16, total_steps=64, hidden_size=8, minibatches=1, epochs=1, quiet=True)
    return ClassicConfig(**{**defaults, "eval_episodes": 0, "tensorboard": False, **options})


def trained(out, observation=None, action=None, **options) -> ClassicTrainer:
    make = functools.partial(Given, observation, action)
    trainer = ClassicTrainer(small(out=str(out), lr=1e-2, **options), envs=SyncVectorEnv([make] * 2))
    trainer.train()
    return trainer


SPACES = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "images": spaces.Box(0, 9, (8, 6, 3), np.uint8),
    "integers": spaces.Box(np.array([0, 1]), np.array([5, 1000]), dtype=np.int32),
    "discrete": spaces.Discrete(5, start=-2),
}
ACTIONS = {
    "discrete": spaces.Discrete(4, start=3),
    "box": spaces.Box(5, 9, (2, 2), np.int64),
    "several": spaces.MultiDiscrete([2, 3], start=[0, 7]),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", SPACES)
def test_a_loaded_policy_acts_as_the_trainer(tmp_path, observation, action):
    space, actions = SPACES[observation], ACTIONS[action]
    normalize = observation == "vector"
    trainer = trained(tmp_path, space, actions, normalize_observations=normalize, hidden_layers=1, shared=True)
    policy = classic.load(tmp_path)
    space.seed(1)
    batch = np.stack([space.sample() for _ in range(20)])
    wanted = trainer.act(batch)
    assert np.array_equal(policy.act(batch), wanted)
    assert policy.act(batch).dtype == wanted.dtype
    assert all(actions.contains(policy.act(x)) for x in batch)
    assert np.array_equal(policy.act(batch[3]), wanted[3])
    if normalize:
        assert trainer.observation_rms.count > 50
        assert policy.rms.count == trainer.observation_rms.count


def test_a_policy_is_loaded_from_a_folder_or_a_checkpoint_named_by_its_steps(tmp_path):
    trainer = trained(tmp_path, save_every=1)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name == f"step-{trainer.global_step}"
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {p.name for p in newest.parent.iterdir()} == {f"step-{row['step']:.0f}" for row in rows[-2:]}
    weights = [classic.load(x).network.policy_head.weights[0] for x in (tmp_path, str(newest), newest.parent)]
    assert all(torch.equal(x, trainer.network.policy_head.weights[0]) for x in weights)


@pytest.mark.parametrize("action", ACTIONS)
def test_sampled_actions_follow_the_policy_and_the_generator(tmp_path, action):
    trained(tmp_path, action=ACTIONS[action])
    policy, batch = classic.load(tmp_path), np.zeros((4000, 3), np.float32)
    first, second = (policy.act(batch, sample=True, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, policy.act(batch, sample=True))
    out = policy.network.policy(torch.zeros(1, 3))[0].detach()
    if action == "box":  # in half widths, before rounding; actions at the bounds are left out
        shares = torch.distributions.Normal(7 + 2 * out[0], 2 * policy.network.log_std[0].detach().exp())
        assert (first[:, 0, 0] <= 6).mean() == pytest.approx(shares.cdf(torch.tensor(6.5)).item(), abs=0.04)
    else:
        first = first.reshape(4000, -1)[:, 0]
        n = policy.decoder.sizes[0]
        counts = np.bincount(first - first.min(), minlength=n) / 4000
        np.testing.assert_allclose(counts, out[:n].softmax(-1), atol=0.04)  # five standard deviations


@pytest.mark.parametrize("observation", [np.zeros(4), np.zeros((2, 2, 3)), 0.0, np.zeros((3, 4)), "abc"])
def test_an_observation_of_another_shape_is_named(tmp_path, observation):
    trained(tmp_path)
    with pytest.raises(UserError, match=r"the policy takes observations \[3\] or batches of them, got"):
        classic.load(tmp_path).act(observation)


def test_a_policy_names_the_wrapper_for_composite_observations(tmp_path):
    trained(tmp_path)
    for observation in ({"a": np.zeros(3)}, (0, 1, 2)):
        with pytest.raises(UserError, match=r"takes what gymnasium\.wrappers\.FlattenObservation makes"):
            classic.load(tmp_path).act(observation)


def test_folders_without_a_policy_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing", __file__):
        with pytest.raises(UserError, match="holds no policy of ppo-fast classic: give OUT of a run"):
            classic.load(folder)
    foreign = checkpoint.write(tmp_path / "other" / "checkpoints", 3, {"actor": {"x": torch.zeros(1)}}, {}, keep=1)
    for folder in (foreign, tmp_path / "other"):
        with pytest.raises(UserError, match="step-3 is not a checkpoint that this version of ppo-fast classic wrote"):
            classic.load(folder)


def test_a_damaged_policy_is_named(tmp_path):
    trained(tmp_path)
    folder = checkpoint.newest(tmp_path / "checkpoints")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors is not as it was written"):
        classic.load(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged: model\.safetensors is missing"):
        classic.load(tmp_path)


def test_a_policy_of_other_options_is_named(tmp_path):
    trained(tmp_path)
    saved = checkpoint.read(checkpoint.newest(tmp_path / "checkpoints"))
    for change in ({"hidden_size": 9}, {"no_such_option": 1}):
        state = {**saved.state, "config": {**saved.state["config"], **change}}
        checkpoint.write(tmp_path / "x", 1, saved.tensors, state, keep=1)
        with pytest.raises(UserError, match="is not a checkpoint that this version"):
            classic.load(tmp_path / "x")


# Output and files


def test_an_earlier_run_is_replaced_on_request_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trained(tmp_path, tensorboard=True)
    first = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"already holds a run; .* --resume, or replace it with --overwrite"):
        trained(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == first
    trainer = trained(tmp_path, total_steps=32, overwrite=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == trainer.updates_done < len(first.splitlines())
    assert [x.name for x in (tmp_path / "checkpoints").iterdir()] == [f"step-{trainer.global_step}"]
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_whose_metrics_are_damaged_is_replaced(tmp_path):
    trained(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n')
    trainer = trained(tmp_path, overwrite=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == trainer.updates_done


def test_a_link_to_a_folder_elsewhere_is_replaced_and_the_folder_is_kept(tmp_path):
    """Users may keep checkpoints on a larger disk."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    trained(out)
    (out / "checkpoints").rename(elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    trained(out, overwrite=True)
    assert not (out / "checkpoints").is_symlink()
    assert classic.load(out)
    assert sorted(elsewhere.rglob("*")) == before
    assert not list(out.glob("*.outdated"))


def test_a_run_writes_curves_and_prints_where_its_files_are(tmp_path, capsys):
    trained(tmp_path, quiet=False)
    assert (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert out.startswith("observations: 3 numbers; actions: Discrete(2); policy and value: one MLP of 2 layers of 8")
    last = out.strip().splitlines()[-2:]
    assert last[0].startswith("metrics.jsonl, checkpoints, summary.json, config.json and learning_curves.png are in")
    assert f"ppo_fast.classic.load('{tmp_path}').act(observation)" in last[1]


@pytest.mark.parametrize("name", ["config.json", "learning_curves.png", "checkpoints"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_not_overwritten(tmp_path, name, overwrite):
    if name == "checkpoints":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"files that ppo_fast did not write, such as {name}"):
        trained(tmp_path, overwrite=overwrite)
    assert [x.name for x in tmp_path.iterdir()] == [name]


def test_a_run_without_matplotlib_has_no_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppo_fast.classic.logger.can_draw", lambda: False)
    trained(tmp_path, quiet=False)
    assert not (tmp_path / "learning_curves.png").exists()
    assert "learning_curves.png" not in capsys.readouterr().out


def test_a_run_without_a_folder_reports_that_nothing_was_saved(capsys):
    ClassicTrainer(small(quiet=False), envs=SyncVectorEnv([Given])).train()
    assert "nothing was saved: --out FOLDER" in capsys.readouterr().out


def test_progress_is_shown_within_a_rollout(monkeypatch, capsys):
    monkeypatch.setattr("ppo_fast.classic.logger.FIRST_LINE", 0.1)
    envs = SyncVectorEnv([functools.partial(Given, seconds=0.01)] * 2)
    config = small(rollout_steps=50, total_steps=100, quiet=False)
    ClassicTrainer(config, envs=envs).train()
    line = next(x for x in capsys.readouterr().out.splitlines() if "left" in x)
    assert re.match(r"\d\d?/100 steps  \d+/s  \d+ s left$", line)  # in the first rollout: no metrics yet


def test_progress_is_shown_within_an_evaluation(monkeypatch, capsys):
    monkeypatch.setattr("ppo_fast.classic.logger.FIRST_LINE", 0.1)
    monkeypatch.setattr("ppo_fast.classic.logger.LINES_EVERY", 0.1)
    envs = SyncVectorEnv([functools.partial(Given, seconds=0.01)] * 2)
    ClassicTrainer(small(eval_episodes=10, quiet=False), envs=envs).train()
    assert re.search(r"^evaluation: [1-9] of 10 episodes$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("columns", "start"),
    [(80, r"\[##########\.{10}\] 500/1000 steps  \d+/s  \d+ s left"), (40, r"500/1000 steps  \d+/s")],
)
def test_a_terminal_gets_one_line_that_fits_in_with_a_bar_where_there_is_room(monkeypatch, capsys, columns, start):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("ppo_fast.common.console.Output.isatty", lambda self: True, raising=False)
    with RunLogger(small(quiet=False, total_steps=1000), 0, lambda: 500) as log:
        log.log_metrics({"step": 400, "entropy": 0.5, "return": 10.0})
        log.log_progress()
        log.log_progress()
        log.info("a sentence")
    out = capsys.readouterr().out
    first, second = re.findall(r"\r(.*?)\x1b\[K", out)[:2]
    assert re.match(start, first)
    assert len(first) <= columns - 1
    assert len(second) <= columns - 1
    assert out.endswith("\x1b[K\na sentence\n")


def test_a_closed_output_does_not_end_a_run(tmp_path):
    command = [sys.executable, "-m", "ppo_fast.cli", "classic", "--total-steps", "2000", "--out", str(tmp_path / "x")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith(
        "PPO on CartPole-v1: 2000 steps of 8 environments; PyTorch uses 1 thread"
    )
    process.stdout.close()
    assert process.stderr.read().count("\n") <= 1  # that it cannot print: stdout is closed
    assert process.wait() == 0
    assert (tmp_path / "x" / "summary.json").exists()


# Signals and failures


def stop_command(out: Path, number: int, *options: str) -> tuple[int, str]:
    """Exit status and stderr of a command whose whole process group gets a signal after an update."""
    command = [sys.executable, "-W", "ignore", "-m", "ppo_fast.cli", "classic", "--env", "Acrobot-v1"]
    command += ["--num-envs", "2", "--rollout-steps", "64", "--total-steps", "1000000", "--no-tensorboard"]
    command += ["--out", str(out), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, began = out / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        os.killpg(process.pid, 0)
    return process.returncode, errors


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups and signals of POSIX")
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_saves_the_run(tmp_path, number, vectorization):
    status, errors = stop_command(tmp_path / "x", number, "--vectorization", vectorization)
    assert status == 128 + number
    saved = checkpoint.newest(tmp_path / "x" / "checkpoints")
    assert saved is not None
    assert re.fullmatch(
        rf"ppo-fast: {number.name}: stopped after update (\d+); {re.escape(str(saved))} is the checkpoint of update \1,"
        r" from which --resume continues\n",
        errors,
    )
    assert classic.load(tmp_path / "x").act(np.zeros(6)) in (0, 1, 2)


def stopped_by(number: int, trainer: ClassicTrainer) -> Stopped:
    step = trainer.step

    def stop():
        if trainer.updates_done == 2:
            signal.raise_signal(number)
        return step()

    trainer.step = stop
    with pytest.raises(Stopped) as caught:
        trainer.train()
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_without_a_folder_reports_that_nothing_was_saved(number):
    trainer = ClassicTrainer(small(total_steps=10**6), envs=SyncVectorEnv([Given]))
    stopped = stopped_by(number, trainer)
    assert stopped.number == number
    assert str(stopped) == f"{number.name}: stopped after update 3; nothing was saved, because out is not set"


def test_a_long_rollout_is_given_up_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("ppo_fast.classic.trainer.GRACE", 0.2)

    class Slow(Given):
        def step(self, action):
            if self.total == 20:
                signal.raise_signal(signal.SIGTERM)
            self.seconds = 0.05 if self.total >= 20 else 0.0
            return super().step(action)

    trainer = ClassicTrainer(small(rollout_steps=500, out=str(tmp_path)), envs=SyncVectorEnv([Slow, Slow]))
    began = time.monotonic()
    with pytest.raises(Stopped, match=r"SIGTERM: stopped after update 0; .*step-0 is the checkpoint of update 0"):
        trainer.train()
    assert 0.2 < time.monotonic() - began < 5
    resumed = small(rollout_steps=500, out=str(tmp_path), resume=True)
    assert ClassicTrainer(resumed, envs=SyncVectorEnv([Given] * 2)).train()["steps"] >= 64


class DyingWorker(Given):
    """A process of AsyncVectorEnv that gets the signal of its parent, and has no handler of this project."""

    def __init__(self, number):
        super().__init__()
        self.number, self.parent = number, os.getppid()

    def step(self, action):
        if self.total == 40:
            os.kill(self.parent, self.number)
            os.kill(os.getpid(), self.number)
        return super().step(action)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*[Ww]orker")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_processes_of_the_users_environments_saves_the_run(tmp_path, number):
    assert threading.current_thread() is threading.main_thread()
    envs = AsyncVectorEnv([functools.partial(DyingWorker, number), Given])
    trainer = ClassicTrainer(small(total_steps=10**6, out=str(tmp_path)), envs=envs)
    message = rf"{number.name}: stopped after update (\d); .*step-\d+ is the checkpoint of update \1,"
    with pytest.raises(Stopped, match=message):
        trainer.train()
    close(envs)
    assert not any(process.is_alive() for process in envs.processes)
    envs = AsyncVectorEnv([Given, Given])
    resumed = ClassicTrainer(small(total_steps=200, out=str(tmp_path), resume=True), envs=envs)
    assert resumed.train()["steps"] >= 200
    envs.close()


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_checkpoint_is_written_when_an_environment_fails(tmp_path, save_every):
    def trainer(**options) -> ClassicTrainer:
        fails_at = None if options.get("resume") else 90
        envs = SyncVectorEnv([functools.partial(Given, fails_at=fails_at), Given])
        return ClassicTrainer(small(total_steps=250, out=str(tmp_path), save_every=save_every, **options), envs=envs)

    failed = trainer()
    with pytest.raises(RuntimeError, match="the simulator has ended"):
        failed.train()
    assert failed.updates_done >= 4
    saved = checkpoint.read(checkpoint.newest(tmp_path / "checkpoints"))
    assert saved.state["updates"] == failed.updates_done - (failed.updates_done % 2 if save_every else 0)
    if not save_every:
        assert torch.equal(saved.tensors["model"]["policy_head.weights.0"], failed.network.policy_head.weights[0])
    assert trainer(resume=True).train()["steps"] >= 250


def test_a_killed_process_of_the_environments_does_not_delay_the_end(tmp_path):
    envs = AsyncVectorEnv([Given, Given])
    trainer = ClassicTrainer(small(total_steps=10**6, out=str(tmp_path)), envs=envs)
    step = trainer.step

    def kill():
        if trainer.updates_done == 2:
            envs.processes[0].kill()
            envs.processes[0].join()
        return step()

    trainer.step = kill
    with pytest.raises((OSError, EOFError)):
        trainer.train()
    assert checkpoint.newest(tmp_path / "checkpoints") is not None
    began = time.monotonic()
    close(envs)
    assert time.monotonic() - began < 5
