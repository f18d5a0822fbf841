"""Processes that start alike, wait for each other by name, and stop together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.several import CPU, ROWS, SMALL, command, ended, fill_folder, judge, options, run, torchrun
from support.tiny import byte_tokenizer, tiny_llama
from torch import nn
from transformers import BartConfig, BartForCausalLM

from ppo_fast.cli import commands as cli
from ppo_fast.cli import train
from ppo_fast.common import checkpoint
from ppo_fast.common import signals as interrupt
from ppo_fast.common.device import derived_seed
from ppo_fast.common.errors import UserError
from ppo_fast.common.signals import stop_requests
from ppo_fast.llm.barrier import MonitoredBarrier
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import peer_failure
from ppo_fast.llm.hashes import rows_hash
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.reward.isolation import isolated
from ppo_fast.llm.sharding import to_full_tensor
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.rewards import Pool

posix = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path) -> Iterator[Any]:
    if request.param == "hash":
        yield dist.HashStore()
    elif request.param == "file":
        yield dist.FileStore(str(tmp_path / "store"), -1)
    else:
        yield dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What each function returned, or the UserError that it raised."""
    found: list[Any] = [None] * len(functions)

    def call(i: int) -> None:
        try:
            found[i] = functions[i]()
        except UserError as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a barrier hangs"
    return found


def barriers(store: Any, size: int, limit: float = 20.0) -> list[MonitoredBarrier]:
    return [MonitoredBarrier(store, rank, size, limit) for rank in range(size)]


def test_processes_leave_a_meeting_after_all_have_arrived_and_get_the_signal_of_any(store):
    log: list[tuple[int, int]] = []

    def attend(barrier: MonitoredBarrier) -> list[str]:
        told = []
        for number in range(4):
            time.sleep(0.02 * barrier.rank)
            log.append((number, barrier.rank))
            brings = "SIGTERM" if (number, barrier.rank) == (2, 1) else ""
            told.append(barrier(f"step {number}", signal=brings))
        return told

    found = in_threads(*[lambda m=m: attend(m) for m in barriers(store, 3)])
    assert found == [["", "", "SIGTERM", ""]] * 3
    assert [number for number, _ in log] == sorted(number for number, _ in log)
    keys = [f"ppo_fast/barrier/{n}/{key}" for n in range(4) for key in ("arrived", "all", "signal")]
    left = {key for key in keys if store.check([key])}
    assert left == {"ppo_fast/barrier/3/arrived", "ppo_fast/barrier/3/all"}, "old barriers are removed"


def test_a_late_process_is_named_and_does_not_find_the_meeting_complete(store):
    first, second, third = barriers(store, 3)
    first.limit = second.limit = 0.3
    in_threads(*[lambda m=m: m("step 7") for m in (first, second, third)])
    begun = time.monotonic()
    for error in in_threads(lambda: first("the rewards of step 8"), lambda: second("the rewards of step 8")):
        assert isinstance(error, UserError)
        assert "rank 2, last seen after 'step 7'" in str(error) or "has ended with an error" in str(error)
    assert time.monotonic() - begun < 5
    with pytest.raises(UserError, match=r"rank [01] has ended with an error"):
        third("the rewards of step 8")


def test_a_process_that_failed_ends_the_wait_of_the_others_at_once(store):
    first, second = barriers(store, 2, limit=60.0)

    def fail() -> None:
        time.sleep(0.2)
        second.failed()

    begun = time.monotonic()
    error, _ = in_threads(lambda: first("step 1"), fail)
    assert str(error) == "rank 1 has ended with an error; the reason is in its own message"
    assert time.monotonic() - begun < 5


def test_processes_that_no_longer_answer_are_named(store, monkeypatch):
    monkeypatch.setattr("ppo_fast.llm.barrier.SILENCE", 0.3)
    three = barriers(store, 3)
    in_threads(*[lambda m=m: m("step 4") for m in three])
    assert in_threads(three[0].lost, three[1].lost) == ["rank 2, last seen after 'step 4'"] * 2
    assert three[2].lost() == "", "all have announced themselves now"


def test_only_errors_of_collective_operations_are_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr("ppo_fast.llm.distributed._barriers", [])
    gloo = "[/src/gloo/gloo/transport/tcp/{}] "
    for error, expected in [
        (RuntimeError(gloo.format("pair.cc:553") + "Connection closed by peer [127.0.0.1]:1453"), "has ended"),
        (RuntimeError(gloo.format("unbound_buffer.cc:81") + "Timed out waiting 4000ms for recv"), "process_timeout"),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), "has ended"),
        (dist.DistBackendError("Watchdog caught collective operation timeout: ran for 6 ms"), "process_timeout"),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), "has ended"),
        (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"), None),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), None),
        (RuntimeError("the judge's server: timeout"), None),
        (RuntimeError("Broken pipe"), None),
    ]:
        found = peer_failure(error)
        assert (expected in found) if expected else found == "", str(error)


def trainer_of(config: PPOConfig, **changes: Any) -> PPOTrainer:
    given = {"actor": tiny_llama(258), "tokenizer": byte_tokenizer(), "rows": ROWS, "rewards": judge, **changes}
    return PPOTrainer(config, **given)


def message_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except UserError as error:
        return str(error)
    return "no error"


def other_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def disagreements(parallel: str) -> dict[str, str]:
    """The error of this process for each part in which rank 1 differs from rank 0."""
    other = os.environ["RANK"] == "1"
    config = options(parallel=parallel)

    def option(**changes: Any) -> Callable[[], Any]:
        return lambda: trainer_of(dataclasses.replace(config, **changes) if other else config)

    def part(name: str, mine: Any, theirs: Any) -> Callable[[], Any]:
        return lambda: trainer_of(config, **{name: theirs if other else mine})

    def length(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(x)) for x in completions]

    def weighted(weight: float) -> PPOTrainer:
        return trainer_of(config, reward_weights={"judge": weight})

    cases: dict[str, Callable[[], Any]] = {
        "seed": option(seed=1),
        "target_kl": option(target_kl=0.1),  # None in rank 0
        "parallel": option(parallel={"ddp": "fsdp", "fsdp": "ddp"}[parallel]),
        "prompts_per_step": option(prompts_per_step=1, minibatches=1),
        "process_timeout": option(process_timeout=77.0),
        "the prompts or their order": part("rows", ROWS, ROWS[::-1]),
        "the held-out prompts or their order": part("eval_rows", None, ROWS[:3]),
        "the rewards": part("rewards", {"judge": judge}, {"judge": judge, "length": length}),
        "the weights of the rewards": lambda: weighted(2.0 if other else 1.0),
        "the tokenizer": part("tokenizer", byte_tokenizer(), other_tokenizer()),
        "whether there is a critic": part("critic", None, Critic.from_actor(tiny_llama(258))),
        "whether there is a reference": part("reference", None, tiny_llama(258)),
        "the weights of the actor": part("actor", tiny_llama(258), tiny_llama(258, seed=1)),
        "the weights of the critic": part(
            "critic", Critic.from_actor(tiny_llama(258)), Critic.from_actor(tiny_llama(258, seed=1))
        ),
        "the weights of the reference": part("reference", tiny_llama(258), tiny_llama(258, seed=1)),
    }
    return {name: message_of(make) for name, make in cases.items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_part_in_which_processes_differ_is_named_in_all_of_them(tmp_path, parallel):
    first, second = run(tmp_path, disagreements, parallel)
    assert first == second
    for name, message in first.items():
        assert message.startswith(f"the processes do not agree on {name}"), message
        assert "in rank 0 and" in message
        assert "in rank 1;" in message


def agreed(folder: Path) -> list[list[str]]:
    """Notes of runs whose processes differ in nothing that counts."""
    rank = int(os.environ["RANK"])

    def mine(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(rank)] * len(prompts)

    shuffled = {f"tag {i}" for i in (range(9) if rank else range(8, -1, -1))}
    rows = [{**row, "tags": shuffled} for row in ROWS]
    configs = [options(quiet=bool(rank), out=str(folder / f"of-{rank}")), options()]
    parts: list[dict[str, Any]] = [{"rows": rows}, {"rewards": {"mine": mine}}]
    return [trainer_of(config, **changes).notes for config, changes in zip(configs, parts, strict=True)]


def test_paths_quiet_and_the_order_of_sets_may_differ_and_other_code_of_a_reward_is_a_note(tmp_path):
    for plain, other_code in run(tmp_path, agreed, tmp_path):
        assert not any("differ between processes" in note for note in plain)
        assert "the code or the options of the reward 'mine' differ between processes" in other_code


def test_rows_with_sets_have_one_hash_under_each_hash_seed():
    code = "from ppo_fast.llm.hashes import rows_hash as f; print(f([{'a': set('hello'), 'b': [{'x', 1}]}]))"
    here = rows_hash([{"a": set("hello"), "b": [{"x", 1}]}])
    environment = {**os.environ, "PYTHONHASHSEED": "4", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == here
    assert here != rows_hash([{"a": set("help"), "b": [{"x", 1}]}])


def seeding(prompts: list[str], completions: list[str]) -> list[float]:
    torch.manual_seed(7)
    return [0.0] * len(prompts)


def streams(out: str) -> dict[str, list[list[int]]]:
    """Answers of all processes to one prompt, in training with two seeds, in evaluation, and after a resume."""
    rows, found = [{"prompt": "ab"}] * 8, {}
    still = {"lr": 0.0, "critic_lr": 0.0, "kl_coef": 0.0, "prompts_per_step": 8, "minibatches": 1, "epochs": 1}
    warnings.simplefilter("ignore")
    for seed in (0, 1):
        config = options(**still, seed=seed, out=f"{out}/{seed}", save_every=1, lr_schedule="constant")
        trainer = trainer_of(config, rows=rows, rewards=seeding, eval_rows=rows)
        resumed = trainer.resume()
        if not resumed:
            assert trainer.evaluator is not None
            found[f"evaluation, seed {seed}"] = trainer.evaluator.run(1, 0.0).rollout.completion_ids
        start = trainer.steps_done

        def keep(trainer: PPOTrainer, _: Any, seed: int = seed, start: int = start) -> bool:
            assert trainer.last_rollout is not None
            found[f"step {trainer.steps_done}, seed {seed}, {trainer.distributed.size}"] = (
                trainer.last_rollout.completion_ids
            )
            return trainer.steps_done - start == 2

        trainer.train(keep)
    return found


def test_no_two_processes_seeds_or_steps_sample_the_same(tmp_path):
    found, _ = run(tmp_path, streams, str(tmp_path), size=2)
    found |= run(tmp_path, streams, str(tmp_path), size=3)[0]  # goes from step 3 on
    assert len(found) == 2 + 4 + 2
    answers = [tuple(ids) for rows in found.values() for ids in rows]
    assert len(set(answers)) == len(answers) == 8 * 8


def test_derived_seeds_differ_for_all_parts_also_where_the_last_are_zero():
    parts = [(s, r) for s in range(40) for r in range(40)]
    parts += [(s, r, step) for s in range(9) for r in range(9) for step in range(9)]
    assert len({derived_seed(*x) for x in parts}) == len(parts)


class Experts(nn.Module):
    """An MLP of experts, of which each token reaches one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        chosen = x[..., : len(self.experts)].argmax(-1)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out + expert(x) * (chosen == i).unsqueeze(-1)
        return out


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    ids = {"eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}
    config = BartConfig(**sizes, **ids, max_position_embeddings=256, is_decoder=True, is_encoder_decoder=False)
    return BartForCausalLM(config).eval()


def mixture() -> Any:
    actor = tiny_llama(258)
    torch.manual_seed(1)
    for layer in actor.model.layers:
        layer.mlp = Experts(32)
    return actor


def two_steps(parallel: str, make: Callable[[], Any]) -> tuple[list[float], list[str], int]:
    """Scores and notes, and how many weights of experts have been trained."""
    warnings.simplefilter("ignore")
    trainer = trainer_of(options(parallel=parallel, total_steps=2, micro_batch_tokens=14), actor=make())
    before = {name: to_full_tensor(p.detach()).clone() for name, p in trainer.policy.named_parameters()}
    scores = [trainer.step()["score"] for _ in range(2)]
    after = {name: to_full_tensor(p.detach()) for name, p in trainer.policy.named_parameters()}
    return scores, trainer.notes, sum("expert" in n and not torch.equal(x, before[n]) for n, x in after.items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_weights_that_the_loss_does_not_reach_are_noted_and_the_others_are_trained(tmp_path, parallel):
    for _, notes, _ in run(tmp_path, two_steps, parallel, bart):
        (note,) = [note for note in notes if "are not trained" in note]
        assert "weights are not trained, because the loss does not reach them: actor.model.decoder.layers.0." in note


def test_experts_that_a_batch_does_not_reach_are_trained_by_others_without_a_note(tmp_path):
    scores, _, trained = two_steps("auto", mixture)
    for found, notes, experts in run(tmp_path, two_steps, "ddp", mixture):
        assert not any("are not trained" in note for note in notes)
        assert experts == trained > 20
        assert len(found) == len(scores)


def waits_for_a_slow_one(config: PPOConfig) -> str:
    rank = os.environ["RANK"]

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        time.sleep(3.0 if rank == "1" else 0.0)
        return [0.0] * len(prompts)

    trainer = trainer_of(config, rewards=slow)
    return message_of(trainer.train)


def test_a_process_beyond_the_time_limit_is_named_with_what_it_did_last(tmp_path):
    first, second = run(tmp_path, waits_for_a_slow_one, options(process_timeout=1.0))
    assert first == (
        "rank 0 waited 1 s after 'the rewards of step 1' for processes that did not come: rank 1, last seen after"
        " 'step 0'; process_timeout sets this limit"
    )
    assert second == "rank 0 has ended with an error; the reason is in its own message"


@posix
def test_a_signal_during_a_reward_is_no_change_of_handlers_by_the_reward_and_the_second_one_ends_it(
    recwarn, monkeypatch
):
    monkeypatch.setattr(interrupt, "REPEATED", 0.0)
    said: list[str] = []
    with stop_requests(said.append) as request:
        with isolated("mine", 0, CPU):
            signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt), isolated("mine", 0, CPU):
            signal.raise_signal(signal.SIGINT)
    assert not [w for w in recwarn if "signal handlers" in str(w.message)]


REWARDS = """
import os, signal, subprocess, time
from pathlib import Path

HERE = Path(__file__).parent

def log(text):
    with open(HERE / "log", "a") as file:
        file.write(text + "\\n")

def judge(prompts, completions):
    log(f"judged by {os.getpid()}")
    assert subprocess.run(["sleep", "0.3"]).returncode == 0
    time.sleep(0.2)
    return [len(set(c)) for c in completions]

def hangs(prompts, completions):
    child = subprocess.Popen(["sleep", "1000"])
    log(f"child {child.pid}")
    child.wait()

def ends_its_child(prompts, completions):
    child = subprocess.Popen(["sleep", "1000"])
    child.terminate()
    return [float(child.wait(5) == -15 and os.getsid(0) == os.getpid())]

def steady(prompts, completions):
    log(f"rank {os.environ['RANK']}")
    time.sleep(0.3)
    return [len(set(c)) for c in completions]

def times():
    return (HERE / "log").read_text().count(f"rank {os.environ['RANK']}")

def fails_in_step_2(prompts, completions):
    found = steady(prompts, completions)
    if os.environ["RANK"] == "1" and times() == 2:
        raise ValueError("no such unit")
    return found

def is_killed_in_step_2(prompts, completions):
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
    found = steady(prompts, completions)
    if os.environ["RANK"] == "1" and times() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

def takes_long_in_step_2(prompts, completions):
    found = steady(prompts, completions)
    if os.environ["RANK"] == "1" and times() == 2:
        time.sleep(60)
    return found
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    fill_folder(tmp_path)
    (tmp_path / "r.py").write_text(REWARDS)
    (tmp_path / "log").touch()
    return tmp_path


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None, limit: float = 90.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def lines(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers_of(pid: int) -> int:
    """How many subprocesses a process has that run Python: workers of pools, also while they begin."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def in_process(folder: Path, arguments: list[str]) -> None:
    """The command line in a process that has everything imported."""
    parser, train_parser = cli.build_parser()
    places = ["--model", str(folder / "model"), "--prompts", str(folder / "p.jsonl")]
    parsed = parser.parse_args(["train", *places, *SMALL.split(), *arguments])
    assert train.train(parsed, *train.resolve(parsed, train_parser)) == 0


def of_steps(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu"))}
        for row in rows
    ]


@posix
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_signal_for_the_process_group_does_not_interrupt_a_reward_and_the_resumed_run_has_the_same_bits(folder):
    pytest.importorskip("pebble")
    pool = f"ppo_fast.rewards:Pool(reward='{folder / 'r.py'}:judge', timeout=60, fallback=-9, workers=2)"
    few = ("--total-steps", "4", "--prompts-per-step", "2", "--minibatches", "1")

    given = [*few, "--reward", pool, "--out"]
    run(folder, in_process, folder, [*given, str(folder / "whole")], size=1)
    (folder / "log").write_text("")
    for number, status, judged in [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 1)]:
        process = command(folder, *few, "--out", str(folder / "out"), "--resume", reward=pool)
        wait_until(lambda judged=judged: len(lines(folder)) >= judged, process)
        time.sleep(0.1)
        os.killpg(process.pid, number)
        done = ended(process)
        assert done.returncode == status, done.stderr
        assert "it gets -9" not in done.stderr
        assert "signal handlers" not in done.stderr
        steps = len(of_steps(folder / "out"))
        newest = checkpoint.newest(folder / "out" / "checkpoints")
        assert newest is not None
        assert newest.name == f"step-{steps}"
        pids = {int(line.split()[-1]) for line in lines(folder)}
        wait_until(lambda pids=pids: not any(map(alive, pids)), limit=10.0)  # workers end with the trainer
        (folder / "log").write_text("")
    assert steps == 3
    run(folder, in_process, folder, [*given, str(folder / "out"), "--resume"], size=1)
    assert of_steps(folder / "out") == of_steps(folder / "whole")
    model = "model/model.safetensors"
    assert (folder / "out" / model).read_bytes() == (folder / "whole" / model).read_bytes()


BEGIN = """
import signal, sys
from ppo_fast.rewards import Pool
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    pool = Pool(sys.argv[1] + ":judge", timeout=60.0, fallback=-9.0, workers=2)
    print(pool(["p"] * 3, ["a", "ab", "abc"]))
"""


def script(folder: Path, text: str, *arguments: str) -> subprocess.Popen:
    """Python that runs `text` from a file, in a process group of its own."""
    (folder / "main.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@posix
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_signals_while_workers_begin_do_not_end_them(folder):
    pytest.importorskip("pebble")
    process = script(folder, BEGIN, "main.py", str(folder / "r.py"))
    wait_until(lambda: workers_of(process.pid) > 0, process)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.03)
    done = ended(process)
    assert done.stdout == "[1.0, 2.0, 3.0]\n", done.stderr
    assert "it gets -9" not in done.stderr


@posix
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_reward_that_hangs_ends_at_its_time_limit_with_its_subprocesses(folder, monkeypatch):
    process = pytest.importorskip("pebble").pool.process
    stop, seconds = process.stop_process, list[float]()

    def timed(worker: Any) -> None:
        begun = time.monotonic()
        stop(worker)
        seconds.append(time.monotonic() - begun)

    monkeypatch.setattr(process, "stop_process", timed)
    pool = Pool(f"{folder / 'r.py'}:hangs", timeout=0.5, fallback=-1.0, workers=1)
    assert pool(["p"] * 3, ["a"] * 3) == [-1.0] * 3
    assert len(seconds) == 3
    assert max(seconds) < 2.5, "pebble waits 3 s for a worker that ignores its signal"
    children = [int(line.split()[-1]) for line in lines(folder) if line.startswith("child")]
    assert len(children) == 3
    wait_until(lambda: not any(map(alive, children)), limit=5.0)
    assert Pool(f"{folder / 'r.py'}:ends_its_child", timeout=20.0, fallback=0.0)(["p"], ["a"]) == [1.0]


def newest_named(text: str, folder: Path) -> str:
    """The newest checkpoint of the folder's run; it is complete, and `text` names it."""
    newest = checkpoint.newest(folder / "out" / "checkpoints")
    assert newest is not None
    assert str(newest) in text, text
    assert checkpoint.read(newest).state["step"] == int(newest.name.removeprefix("step-"))
    assert not list(newest.parent.glob("*.un*"))
    return newest.name


SAVES = ("--save-every", "1", "--total-steps", "100")


@posix
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_sigterm_to_torchrun_saves_a_new_checkpoint_that_resume_continues(folder, parallel):
    few = ("--total-steps", "100", "--parallel", parallel, "--out", str(folder / "out"))
    process = command(folder, *few, reward="steady", size=2)
    wait_until(lambda: len(lines(folder)) >= 4, process)
    process.terminate()
    done = ended(process)
    assert done.returncode != 0
    steps = len(of_steps(folder / "out"))
    assert f"stopped by SIGTERM after step {steps}; --resume continues it" in done.stdout
    assert newest_named(str(folder / "out" / "checkpoints" / f"step-{steps}"), folder) == f"step-{steps}"
    assert "Traceback" not in done.stderr.split("torch/distributed/")[0]


@posix
def test_a_process_that_fails_is_named_with_the_newest_checkpoint_within_seconds(folder):
    process = command(folder, *SAVES, "--out", str(folder / "out"), reward="fails_in_step_2", size=2)
    wait_until(lambda: len(lines(folder)) >= 4, process)
    begun = time.monotonic()
    done = ended(process)
    assert time.monotonic() - begun < 15, "it does not wait for the time limit"
    assert done.returncode != 0
    found = [line for line in done.stderr.splitlines() if line.startswith("ppo-fast: rank")]
    first = next(line for line in found if "rank 0: error" in line)
    assert "rank 1 has ended with an error; the reason is in its own message" in first
    assert newest_named(first, folder) == "step-1"
    second = next(line for line in found if "rank 1: error" in line)
    assert "no such unit" in second
    assert newest_named(second, folder) == "step-1"


@posix
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_that_is_killed_is_named_with_the_newest_checkpoint(folder, parallel):
    done = torchrun(folder, *SAVES, "--parallel", parallel, "--out", str(folder / "out"), reward="is_killed_in_step_2")
    assert done.returncode != 0
    found = "\n".join(line for line in done.stderr.splitlines() if line.startswith("ppo-fast: rank 0"))
    assert newest_named(found, folder) == "step-1"


@posix
@pytest.mark.slow
def test_ctrl_c_for_all_processes_saves_one_checkpoint(folder):
    process = command(folder, "--total-steps", "100", "--out", str(folder / "out"), reward="steady", size=2)
    wait_until(lambda: len(lines(folder)) >= 4, process)
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    steps = len(of_steps(folder / "out"))
    assert f"stopped by SIGINT after step {steps}" in done.stdout, done.stderr
    assert newest_named(f"{folder / 'out' / 'checkpoints' / f'step-{steps}'}", folder) == f"step-{steps}"


@posix
@pytest.mark.slow
def test_sigterm_while_one_process_computes_for_long_names_the_newest_checkpoint(folder):
    process = command(folder, *SAVES, "--out", str(folder / "out"), reward="takes_long_in_step_2", size=2)
    wait_until(lambda: len(lines(folder)) >= 4, process)
    time.sleep(1.0)
    begun = time.monotonic()
    process.terminate()
    done = ended(process)
    assert 15 < time.monotonic() - begun < 29, "before torchrun kills its workers"
    for rank in (0, 1):
        start = f"ppo-fast: rank {rank}: SIGTERM, and not all processes reached the end of step 2 within 20 s"
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(start)]
        assert newest_named(line, folder) == "step-1"


@posix
@pytest.mark.slow
def test_a_slow_process_ends_the_command_with_one_sentence(folder):
    given = (*SAVES, "--process-timeout", "8", "--out", str(folder / "out"))
    done = torchrun(folder, *given, reward="takes_long_in_step_2")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ppo-fast: rank 0: error")]
    assert "waited 8 s after 'the rewards of step 2'" in line
    assert "rank 1, last seen after 'step 1'; process_timeout sets this limit" in line
    assert newest_named(line, folder) == "step-1"


UNDER_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py", "train")
GIVEN = ("--model", "model", "--prompts", "p.jsonl", "--reward", "r.py:steady", "--out", "out", "--device", "cpu")
OTHER_OPTIONS = """
import os, sys
from ppo_fast.cli.commands import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] + ["--resume"] * int(os.environ["RANK"])))
"""
KILLED_IN_A_COLLECTIVE = """
import os, signal, sys, time
from ppo_fast.cli import commands as cli; from ppo_fast.llm.learn import Learner
def killed(*arguments, original=Learner.update, calls=[], **options):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
Learner.update = killed
if __name__ == "__main__":
    sys.exit(cli.main())
"""


@posix
def test_options_of_the_command_line_that_differ_are_named(folder):
    done = ended(script(folder, OTHER_OPTIONS, *UNDER_TORCHRUN, *GIVEN))
    for rank in (0, 1):
        start = f"ppo-fast: rank {rank}: error: the processes do not agree on --resume: it is False in rank 0 and True"
        assert start in done.stderr


@posix
@pytest.mark.slow
def test_a_process_that_is_killed_while_others_wait_in_a_collective_is_named(folder):
    process = script(folder, KILLED_IN_A_COLLECTIVE, *UNDER_TORCHRUN, *GIVEN, *SMALL.split(), *SAVES)
    done = ended(process)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ppo-fast: rank 0: error")]
    assert "rank 1, last seen after 'the rewards of step 2' has ended" in line
    assert newest_named(line, folder) == "step-1"
