"""Choices by device: which device options name, what it can do, and what is decided once at the start of a run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import byte_tokenizer, distinct, tiny_gpt2, tiny_llama

from ppo_fast.cli import train
from ppo_fast.common import device as devices
from ppo_fast.common.errors import UserError
from ppo_fast.kernels.linear import chunks as linear_chunks
from ppo_fast.kernels.linear.chunks import Rows, make_plan
from ppo_fast.llm import distributed as parallel
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.policy import with_chunk_bytes
from ppo_fast.llm.report.export import copy_on_cpu
from ppo_fast.llm.sharding import wrap
from ppo_fast.llm.trainer import PPOTrainer

CPU = torch.device("cpu")
BFLOAT16_COST = devices.bfloat16_cost  # a fixture of every test replaces it
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_without_cuda_is_rejected_with_the_build_of_pytorch():
    with pytest.raises(UserError, match=r"'cuda' cannot be used: PyTorch \S+ (is built for the CPU only|finds no GPU)"):
        devices.pick_device("cuda")


def test_a_device_that_does_not_exist_is_rejected_with_those_that_do(two_gpus):
    with pytest.raises(UserError, match="'cuda:3' does not exist; this machine has cuda:0, cuda:1"):
        devices.pick_device("cuda:3")


def test_an_unknown_device_is_rejected_with_the_known_names():
    with pytest.raises(UserError, match=r"device must be cpu, cuda, cuda:1, ... or auto, got 'gpu7'"):
        devices.pick_device("gpu7")


def test_bfloat16_is_rejected_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(devices, "compute_capability", lambda device: (7, 5))
    assert devices.pick_device("cpu") == CPU
    with pytest.raises(UserError, match=r"needs a GPU of compute .* and cpu has 7.5; use --dtype float16"):
        devices.pick_device("cpu", dtype="bfloat16")
    assert devices.pick_device("cpu", dtype="float16") == CPU
    chosen, note = devices.choose_dtype("auto", CPU)
    assert chosen == "float32"
    assert "--dtype float16 is faster" in note
    monkeypatch.setattr(devices, "compute_capability", lambda device: (8, 0))
    assert devices.pick_device("cpu", dtype="bfloat16") == CPU


def test_tensors_are_uploaded_together_with_their_shapes_and_values(device: torch.device):
    tensors = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.int64), torch.tensor(7), torch.arange(4)]
    found = devices.upload_together(tensors, device)
    assert [x.device.type for x in found] == [device.type] * 4
    for x, y in zip(found, tensors, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.cpu(), y)


def test_chunks_of_logits_take_a_sixteenth_of_a_small_gpu_and_the_default_of_a_large_one():
    config = PPOConfig()
    assert with_chunk_bytes(config, 152_000, None).chunk_bytes is None
    assert with_chunk_bytes(config, 152_000, 141 << 30).chunk_bytes is None
    assert with_chunk_bytes(config, 152_000, 24 << 30).chunk_bytes == (24 << 30) // 16
    assert with_chunk_bytes(PPOConfig(chunk_bytes=5), 152_000, 24 << 30).chunk_bytes == 5


def trainer(**options) -> PPOTrainer:
    small = dict(total_steps=1, prompts_per_step=4, max_new_tokens=5, minibatches=2, quiet=True, tensorboard=False)
    config = PPOConfig(**{**small, "device": "cpu", "micro_batch_tokens": 40, **options})
    rows = [{"prompt": text} for text in ("hi", "a", "what", "no")]
    return PPOTrainer(
        config, tiny_llama(258), byte_tokenizer(), rows, lambda prompts, completions: [1.0] * len(prompts)
    )


@pytest.mark.parametrize("chunk_bytes", [None, 40_000, 400_000])
def test_scoring_and_the_loss_use_the_same_chunks(chunk_bytes):
    """Chunks of another size may round differently, and the first ratio would not be exactly 1."""

    def rows(*, gradients: bool) -> int:
        hidden, weight = torch.empty(512, 32), torch.empty(258, 32)
        options = dict(native=False, in_place=False, logits_dtype=None, scratch_bytes=0, chunk_bytes=chunk_bytes)
        return make_plan(hidden, weight, Rows(None, 512, None), needs=(gradients,) * 3, **options).rows

    assert rows(gradients=True) == rows(gradients=False)
    assert chunk_bytes is None or rows(gradients=True) < 512


def test_the_trainer_passes_chunk_bytes_on(monkeypatch):
    asked: list[int | None] = []
    plan = linear_chunks.compute_plan
    monkeypatch.setattr(linear_chunks, "compute_plan", lambda *args: asked.append(args[6]) or plan(*args))
    trainer(chunk_bytes=40_000, kl_coef=0.0).step()
    assert set(asked) == {40_000}


def test_tf32_is_switched_on_by_its_option_only():
    before = torch.get_float32_matmul_precision()
    try:
        trainer()
        assert torch.get_float32_matmul_precision() == before
        trainer(tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_warm_up_stays_within_the_positions_of_the_model():
    """The longest prompt leaves room for max_new_tokens; a GPU would stop with an assertion of the device."""
    options = dict(total_steps=1, prompts_per_step=1, max_new_tokens=1, minibatches=1, quiet=True, device="cpu")
    actor, rows = tiny_gpt2(positions=8), [{"prompt": "seven b"}]
    made = PPOTrainer(PPOConfig(**options), actor, byte_tokenizer(), rows, distinct)
    made._warm_up()
    assert made.step()["answer_tokens"] == 1


def test_the_warm_up_changes_no_number():
    def metrics(*, warm_up: bool) -> dict[str, float]:
        made = trainer(epochs=2)
        if warm_up:
            made._warm_up()
            assert all(p.grad is None for p in made.policy.parameters())
        timed = ("seconds", "tokens_per_second", "memory", "learn_tflops", "mfu")
        return {name: x for name, x in made.step().items() if not name.startswith(timed)}

    assert metrics(warm_up=True) == metrics(warm_up=False)


def test_a_copy_on_the_cpu_keeps_weights_tied_and_shares_no_memory():
    model = tiny_llama(258)
    model.lm_head.weight = model.model.embed_tokens.weight
    copied = copy_on_cpu(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    own = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
    assert not own & {x.data_ptr() for x in (*copied.parameters(), *copied.buffers())}
    ids = torch.arange(5).unsqueeze(0)
    assert torch.equal(copied(ids).logits, model(ids).logits)


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch, two_gpus) -> list[str]:
    """The second of two processes; what is called, in order."""
    calls: list[str] = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(f"set_device {index}"))
    monkeypatch.setattr(parallel, "pick_device", lambda name, *_: calls.append(f"pick {name}") or torch.device(name))
    monkeypatch.setattr(
        parallel.dist,
        "init_process_group",
        lambda backend, device_id=None, timeout=None: calls.append(f"join {backend} {device_id}"),
    )
    monkeypatch.setattr(parallel, "_barrier", lambda *_: None)
    monkeypatch.setattr(
        parallel.Distributed, "all_gather_object", lambda self, x: [x] * self.size
    )  # the others say the same
    return calls


def test_a_process_takes_the_gpu_of_its_local_rank_and_joins_with_it(rank_one):
    distributed = parallel.init_distributed(PPOConfig())
    assert rank_one == ["set_device 1", "pick cuda:1", "join nccl cuda:1"]
    assert distributed.device == torch.device("cuda:1")
    assert distributed.rank == 1


def test_a_process_on_the_cpu_calls_nothing_of_a_gpu(rank_one):
    assert parallel.init_distributed(PPOConfig(device="cpu")).device == CPU
    assert rank_one == ["pick cpu", "join gloo None"]


def test_one_named_gpu_for_several_processes_is_rejected(rank_one):
    with pytest.raises(UserError, match="device = cuda:1, but under torchrun each process has a GPU of its own"):
        parallel.init_distributed(PPOConfig(device="cuda:1"))


def test_more_processes_than_gpus_are_rejected(rank_one, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK = 1, but this machine has 1 GPUs"):
        parallel.init_distributed(PPOConfig())


def test_the_command_takes_its_gpu_before_a_reward_is_loaded(rank_one, monkeypatch, tmp_path):
    def load(spec: str):
        rank_one.append(f"load {spec}")
        raise UserError("enough")

    monkeypatch.setattr("ppo_fast.llm.reward.function.load_reward", load)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n')
    run = train.RunOptions(model="m", prompts=str(tmp_path / "p.jsonl"), reward=["x:y"])
    with pytest.raises(UserError, match="enough"):
        train.train(SimpleNamespace(resume=False, overwrite=False, allow_changes=False), PPOConfig(), run)
    assert rank_one[-1] == "load x:y"
    assert "set_device 1" in rank_one[:-1]


@pytest.mark.parametrize("chosen", [None, *ALLOCATOR])
def test_the_allocator_may_grow_segments_unless_the_user_chose(chosen, monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "max_split_size_mb:64")
    train._let_segments_grow()
    found = os.environ.get("PYTORCH_ALLOC_CONF")
    assert found == {None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}.get(chosen)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_a_run_on_the_cpu_calls_nothing_of_cuda(tmp_path):
    """With a GPU present, and functions of torch.cuda that would open a context replaced by an error."""
    program = """
import torch
from support.tiny import byte_tokenizer, distinct, tiny_gpt2, tiny_llama
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.trainer import PPOTrainer

def refuse(*_, **__):
    raise AssertionError("a CUDA context would be opened")

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
for name in ("_lazy_init", "synchronize", "get_rng_state", "current_device", "set_device", "max_memory_allocated"):
    setattr(torch.cuda, name, refuse)
rows = [{"prompt": "hi"}, {"prompt": "a"}]
config = PPOConfig(total_steps=1, prompts_per_step=2, minibatches=1, max_new_tokens=3, device="cpu", quiet=True,
                   eval_every=1, out=OUT, tensorboard=False, save_every=1)
PPOTrainer(config, tiny_llama(258), byte_tokenizer(), rows, lambda prompts, completions: [1.0] * len(prompts),
           eval_rows=rows).train()
print("trained")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("OUT", repr(str(tmp_path / "out")), 1)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        timeout=120,
        check=False,
    )
    assert "trained" in done.stdout, done.stderr


def test_a_run_without_matplotlib_leaves_a_model_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("ppo_fast.common.plots.find_spec", lambda name: None)
    made = trainer(out=str(tmp_path), save_every=0)
    made.train()
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    assert "learning_curves.png" not in names
    assert "learning_curves.png" not in (tmp_path / "model" / "README.md").read_text()
    assert any("matplotlib is not installed" in note for note in made.notes)


def test_gradients_of_ddp_are_views_of_its_buckets(tmp_path):
    """With memory of their own they would take 4 bytes more for each parameter."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        distributed = parallel.Distributed(0, 2, "ddp", CPU)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        wrap(model, distributed, dtype="float32", unused_parameters=False)
        for _ in range(2):  # buckets are ordered anew after the first backward
            model.zero_grad()
            distributed.wrapped_module(model)(torch.ones(1, 3)).sum().backward()
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
        assert len(storages) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_the_first_step_compiles_no_kernel_after_the_warm_up(emulator):
    if emulator is None:
        pytest.skip("launches are counted where kernels are emulated")
    made = trainer(backend="triton", entropy_coef=0.01)
    before = emulator.launches.copy()
    made._warm_up()
    warm = emulator.launches - before
    made.step()
    assert warm
    assert not {str(launch) for launch in emulator.launches - before} - {str(launch) for launch in warm}


def test_the_cost_of_bfloat16_is_measured_once_and_short():
    BFLOAT16_COST.cache_clear()
    start = time.perf_counter()
    cost = BFLOAT16_COST()
    assert 0.001 < cost < 10_000
    assert BFLOAT16_COST() == cost
    assert time.perf_counter() - start < 5  # also where bfloat16 is several hundred times slower


@pytest.mark.parametrize(
    ("seconds", "sizes", "cost"),
    [
        (lambda n: (1e-5, 4e-3), [128], 400.0),  # no instructions: a larger product would take a second
        (lambda n: (2e-3, 4e-3) if n == 128 else (1.5e-3, 5e-4), [128, 256, 512], 1 / 3),  # a disturbed first time
        (lambda n: (n**3 / 4e12, n**3 / 8e12), [128, 256, 512, 1024, 2048], 0.5),  # many cores
        (lambda n: (1e-5, 1e-5), [128, 256, 512, 1024, 2048, 4096], 1.0),
    ],
)
def test_larger_products_are_measured_until_they_show_the_speed_of_the_device(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], tuple[float, float]], sizes: list[int], cost: float
):
    asked = []

    def measured(size: int, dtypes: Sequence[torch.dtype], device: torch.device) -> list[float]:
        asked.append(size)
        return list(seconds(size))

    monkeypatch.setattr(devices, "_seconds_of_products", measured)
    assert BFLOAT16_COST.__wrapped__(CPU) == pytest.approx(cost)
    assert asked == sizes


def test_products_are_timed_in_each_dtype():
    full, double = devices._seconds_of_products(64, (torch.float32, torch.float64), CPU, budget=0.001)
    assert 0 < full < 5
    assert 0 < double < 5


@pytest.mark.parametrize(
    ("asked", "cost", "chosen", "note"),
    [
        ("float32", 376.0, "float32", ""),
        ("auto", 376.0, "float32", "dtype = auto: float32 (a product takes 376 times as long"),
        ("auto", 0.2, "bfloat16", "dtype = auto: bfloat16 (a product takes 0.2 times as long"),
        ("auto", 0.66, "bfloat16", "dtype = auto: bfloat16"),
        ("auto", 0.68, "float32", "dtype = auto: float32"),  # less than 1.5 times as fast
        ("bfloat16", 0.2, "bfloat16", "dtype = bfloat16: a product takes 0.2 times as long in bfloat16"),
        ("bfloat16", 376.0, "bfloat16", "warning: dtype = bfloat16 is slow here"),
        ("float16", 0.2, "float16", "warning: dtype = float16 is for GPUs without bfloat16"),
    ],
)
def test_a_cpu_takes_the_faster_dtype_and_reports_a_slow_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, cost: float, chosen: str, note: str
):
    monkeypatch.setattr(devices, "bfloat16_cost", lambda device: cost)
    found, said = devices.choose_dtype(asked, torch.device("cpu"))
    assert found == chosen
    assert said.startswith(note)
    assert bool(said) == bool(note)


def test_a_run_computes_in_the_dtype_that_auto_chose_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(devices, "bfloat16_cost", lambda device: 0.2)
    assert PPOConfig().dtype == "auto"
    made = trainer(out=str(tmp_path), quiet=False, total_steps=1, tensorboard=False)
    assert made.config.dtype == made.policy.config.dtype == "bfloat16"
    made.train()
    assert "dtype: bfloat16\n" in (tmp_path / "config.yaml").read_text()
    assert capsys.readouterr().out.splitlines()[0].startswith(f"cpu: {torch.get_num_threads()} thread")
    assert any(note.startswith("dtype = auto: bfloat16") for note in made.notes)


def test_threads_of_a_run_are_set_and_reported(capsys: pytest.CaptureFixture[str]):
    before = torch.get_num_threads()
    try:
        trainer(threads=3, quiet=False, total_steps=1).train()
        assert torch.get_num_threads() == 3
        assert capsys.readouterr().out.startswith("cpu: 3 threads")
    finally:
        torch.set_num_threads(before)
