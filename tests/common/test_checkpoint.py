"""A run that was killed, stopped, or met a full disk is resumed bit for bit.

The runs are separate processes, forked from a server that has imported everything, and end by SIGKILL.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install "ppo_fast[train]"')
pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "ppo_fast[train]"')

from matplotlib.figure import Figure
from support.tiny import save_tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from ppo_fast.cli.commands import main

STEPS = 5
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ppo_fast.cli", "ppo_fast.llm.trainer", "torch.utils.tensorboard", "matplotlib.figure"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, prompts, a reward, and options that use every part of a run's state."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_model(folder / "model")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i} and"}) + "\n" for i in range(7)))
    (folder / "r.py").write_text(
        "import random\nimport numpy as np\n\ndef noisy(prompts, completions):\n"
        "    return [len(set(c)) + random.random() + np.random.rand() for c in completions]\n"
    )
    (folder / "c.yaml").write_text(
        f"model: {folder / 'model'}\nprompts: {folder / 'p.jsonl'}\neval_prompts: {folder / 'p.jsonl'}\n"
        f"reward: {folder / 'r.py'}:noisy\ntotal_steps: {STEPS}\nprompts_per_step: 4\nmax_new_tokens: 4\n"
        "minibatches: 2\nepochs: 2\nlr: 1.0e-3\ncritic_lr: 1.0e-3\ndevice: cpu\nsave_every: 1\neval_every: 2\n"
        "show_samples_every: 2\nkl_controller: adaptive\nkl_horizon: 50\nquiet: true\n"
    )
    return folder


def train(folder: Path, out: str, *arguments: str, die_at: int | None = None, most_bytes: int | None = None) -> None:
    """Run in a child process, which kills itself before its `die_at`-th fsync, rename, new folder or removal."""
    torch.set_num_threads(1)
    Figure.savefig = lambda self, buffer, **_: buffer.write(b"a picture")  # real pictures would take most of the time
    if die_at is not None:
        _count_down(die_at)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with (folder / f"{out}.log").open("a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        status = main(["train", "--config", str(folder / "c.yaml"), "--out", str(folder / out), *arguments])
    os._exit(status)


def _count_down(left: int) -> None:
    def watched(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))


def start(*arguments, **options):
    child = SERVER.Process(target=train, args=arguments, kwargs=options)
    child.start()
    return child


def run(*arguments, **options) -> int:
    child = start(*arguments, **options)
    child.join(120)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


@pytest.fixture(scope="module")
def whole(folder) -> dict:
    """The files of a run that was not interrupted."""
    assert run(folder, "whole") == 0, (folder / "whole.log").read_text()
    begun = time.perf_counter()  # the server has its imports now
    assert run(folder, "whole", "--overwrite") == 0, (folder / "whole.log").read_text()
    return {**left_by(folder / "whole"), "seconds": time.perf_counter() - begun}


def left_by(out: Path) -> dict:
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows],
        "samples": (out / "samples.jsonl").read_text(),
        "events": [(x.step, x.value) for x in events.Scalars("learn/policy_loss")],
        "weights": {name: x.clone() for name, x in model.state_dict().items()},
        "best": (out / "best" / "evaluation.json").read_text(),
        "files": sorted(str(p.relative_to(out)) for p in out.rglob("*") if "tfevents" not in p.name),
    }


def assert_same(out: Path, whole: dict) -> None:
    here = left_by(out)
    for name in ("metrics", "samples", "events", "best", "files"):
        assert here[name] == whole[name], name
    assert all(torch.equal(x, whole["weights"][name]) for name, x in here["weights"].items())


def test_the_whole_run_moves_and_records_every_step(whole):
    assert [row["step"] for row in whole["metrics"]] == list(range(STEPS + 1))
    assert [step for step, _ in whole["events"]] == list(range(1, STEPS + 1))
    assert len({row["score"] for row in whole["metrics"][1:]}) == STEPS
    assert [name for name in whole["files"] if name.startswith("checkpoints/") and name.count("/") == 1] == [
        f"checkpoints/step-{STEPS - 1}",
        f"checkpoints/step-{STEPS}",
    ]
    assert not [name for name in whole["files"] if "unfinished" in name or "outdated" in name]


def test_a_run_killed_at_random_moments_has_the_bits_of_one_that_was_not(folder, whole):
    moments = random.Random(0)
    kills = 0
    for _ in range(200):
        if kills >= 20 and not (folder / "killed").exists():
            break
        child = start(folder, "killed", "--resume")
        child.join(moments.uniform(0.1, 1.0) * whole["seconds"])
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        if child.exitcode == 0:
            assert_same(folder / "killed", whole)
            shutil.rmtree(folder / "killed")  # and once more from the start
        else:
            assert child.exitcode == -signal.SIGKILL, (folder / "killed.log").read_text()
    assert kills >= 20


def test_a_run_killed_at_each_point_of_saving_has_the_bits_of_one_that_was_not(folder, whole):
    """Before every 7th fsync, rename, new folder or removal; all of them would take some minutes."""
    shutil.rmtree(folder / "points", ignore_errors=True)
    assert run(folder, "points", die_at=10_000) == 0, (folder / "points.log").read_text()
    die_at, deaths = 1, 0
    while True:
        shutil.rmtree(folder / "points")
        if run(folder, "points", die_at=die_at) == 0:
            break
        deaths += 1
        assert run(folder, "points", "--resume") == 0, f"{die_at}: {(folder / 'points.log').read_text()}"
        assert_same(folder / "points", whole)
        die_at += 7
    assert deaths >= 15


def wait_for(path: Path, child) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert child.exitcode is None, "the run ended too early"
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_completes_and_saves_the_current_step(folder, whole, name):
    number = signal.Signals[name]
    child = start(folder, name, "--save-every", "0", "--no-quiet")
    wait_for(folder / name / "eval" / "step-2.md", child)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number
    log = (folder / f"{name}.log").read_text()
    assert f"{name}: this step is completed, then the run is saved; once more to stop at once" in log
    (saved,) = (folder / name / "checkpoints").iterdir()
    assert f"stopped by {name} after {saved.name.replace('-', ' ')}; --resume continues it" in log
    assert not (folder / name / "model").exists()
    assert run(folder, name, "--resume", "--no-quiet") == 0
    assert f"continuing after {saved.name.replace('-', ' ')}, from " in (folder / f"{name}.log").read_text()
    assert_same(folder / name, whole)


def test_a_full_disk_leaves_the_checkpoint_before(folder, whole):
    """A limit on the size of files simulates the full disk: writing fails in the middle of a file."""
    child = start(folder, "full", "--save-every", "0")
    wait_for(folder / "full" / "eval" / "step-2.md", child)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    (saved,) = (folder / "full" / "checkpoints").iterdir()
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert run(folder, "full", "--resume", most_bytes=len(before["weights.safetensors"]) + 1000) == 1
    log = (folder / "full.log").read_text()
    step = int(saved.name.removeprefix("step-"))
    assert f"the checkpoint of step {step + 1} could not be written to " in log
    assert f"{saved} is whole, and the run can be resumed from it with --resume" in log
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in (folder / "full" / "checkpoints").iterdir()] == [saved.name]
    assert run(folder, "full", "--resume") == 0
    assert_same(folder / "full", whole)
