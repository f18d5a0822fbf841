"""Several gloo processes on a CPU: forked from a server that has everything imported, or started by torchrun."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.sampler import Completions, SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ppo_fast.llm.trainer", "torch.utils.tensorboard", "peft"])
CPU = torch.device("cpu")
TEXTS = ("hi", "what time is it", "a", "the fox jumps over it", "no", "well", "seven")
ROWS = [{"prompt": text, "bonus": float(i)} for i, text in enumerate(TEXTS)]


class Fixed:
    """A sampler whose answers depend on prompt and step only, not on the process."""

    def __init__(self) -> None:
        self.step = 0

    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
        self.step += 1
        ids, ended = [], []
        for prompt in prompts:
            words = torch.Generator().manual_seed(zlib.crc32(bytes(i % 256 for i in prompt)) + self.step)
            length = int(torch.randint(1, params.max_new_tokens + 1, (1,), generator=words))
            ids.append(torch.randint(0, 256, (length,), generator=words).tolist())
            ended.append(length % 2 == 0)
        return Completions(ids, ended)


def judge(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], bonus: list[float]
) -> list[float]:
    return [sum(i % 7 for i in ids) / 10 + b for ids, b in zip(completion_ids, bonus, strict=True)]


def options(**changes) -> PPOConfig:
    small = dict(
        dtype="float32",
        total_steps=3,
        prompts_per_step=5,  # three for one process, two for the other
        max_new_tokens=9,
        minibatches=2,
        epochs=2,
        micro_batch_tokens=24,
        lr=1e-3,
        critic_lr=1e-3,
        adam_eps=1e-3,  # a gradient that is nearly zero must not decide a whole step
        quiet=True,
        device="cpu",
        tensorboard=False,
    )
    return PPOConfig(**{**small, **changes})


def trainer_of(config: PPOConfig, *, rows=ROWS, **others) -> PPOTrainer:
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), rows, judge, **others)


def of_training(history: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu"))}
        for row in history
    ]


def run(tmp_path: Path, function, *arguments, size: int = 2) -> list:
    """Run the function in each of several processes, and return the results."""
    store = tmp_path / f"store-{time.monotonic_ns()}"
    children = [SERVER.Process(target=_child, args=(r, size, store, function, arguments)) for r in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode is not None, "the processes hang"
    found = [pickle.loads(Path(f"{store}.{rank}").read_bytes()) for rank in range(size)]
    failures = [trace for trace, _ in found if trace]
    assert not failures, "\n".join(failures)
    return [result for _, result in found]


def _child(rank: int, size: int, store: Path, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trace, result = "", None
    try:
        result = function(*arguments)
    except Exception:  # the test shows it
        trace = traceback.format_exc()
    Path(f"{store}.{rank}").write_bytes(pickle.dumps((trace, result)))
    dist.destroy_process_group()


def assert_close(here: dict, there: dict, tolerance: float = 1e-5) -> None:
    assert here.keys() == there.keys()
    for name, x in here.items():
        x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (x, there[name]))
        gap = (x - y).abs().max() / max(1.0, y.abs().max())
        assert gap <= tolerance, f"{name}: {gap:.1e} apart"


SMALL = "--total-steps 3 --prompts-per-step 4 --max-new-tokens 4 --minibatches 2 --device cpu --no-tensorboard"
SMALL += " --dtype float32"


def command(folder: Path, *arguments: str, reward: str = "good", size: int = 1) -> subprocess.Popen:
    """`ppo-fast train` on what `fill_folder` wrote, under torchrun if size > 1, in a process group of its own.

    The options are SMALL and then `arguments`; `reward` is a function of r.py, or any specification.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    spec = reward if ":" in reward else f"{folder / 'r.py'}:{reward}"
    given = ["--model", str(folder / "model"), "--prompts", str(folder / "p.jsonl"), "--reward", spec, *SMALL.split()]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "ppo_fast.cli", "train", *given, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )


def ended(process: subprocess.Popen, timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for the command and return its output; none of its processes outlives the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which have sessions of their own
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"the command hangs\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(folder: Path, *arguments: str, reward: str = "good", size: int = 2) -> subprocess.CompletedProcess:
    """The same under torchrun, until it ends."""
    return ended(command(folder, *arguments, reward=reward, size=size))


def fill_folder(folder: Path) -> Path:
    """A model, prompts and rewards for the command line."""
    save_tiny_model(folder / "model")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    (folder / "r.py").write_text(
        "import os\n\ndef good(prompts, completions):\n    return [len(set(c)) for c in completions]\n\n"
        "def bad(prompts, completions):\n    if os.environ['RANK'] == '1':\n        raise ValueError('no such unit')\n"
        "    return good(prompts, completions)\n"
    )
    return folder
