"""The trainer on this machine's device: the first GPU run of a new machine begins with these tests.

Without a GPU they run on the CPU. On a GPU only what its kernels repeat bit for bit is compared bit for bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import families, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppo_fast.llm.generate import generate
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.models.probe import PROBE_LENGTHS, detect_head
from ppo_fast.llm.packing.attention import Layout, packed_attention
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

ROOT = Path(__file__).parents[2]
SETTINGS = pytest.mark.parametrize(("family", "dtype"), [(f, d) for d in tiny.DTYPES for f in tiny.FAMILIES])


@pytest.fixture
def last_device(device: torch.device) -> torch.device:
    """The last of several GPUs, which is not the current one."""
    return torch.device("cuda", torch.cuda.device_count() - 1) if device.type == "cuda" else device


@SETTINGS
def test_two_steps_have_finite_metrics_and_a_first_ratio_of_one(device, family, dtype):
    trainer = tiny.tiny_trainer(family, dtype, device)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    history = trainer.train()
    assert [row["step"] for row in history] == [1, 2]
    assert not tiny.problems(history)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))


@SETTINGS
def test_weights_gradients_and_moments_are_fp32_under_autocast(device, family, dtype):
    trainer = tiny.tiny_trainer(family, dtype, device, total_steps=1)
    trainer.train()
    for optimizer in (trainer.learner.optimizers.actor, trainer.learner.optimizers.critic):
        for weight, state in optimizer.adamw.state.items():
            assert weight.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
            assert weight.device.type == state["exp_avg"].device.type == device.type
    assert trainer.last_experience is not None
    assert trainer.last_experience.logprobs.dtype == torch.float32


@SETTINGS
def test_log_probabilities_of_sampler_and_trainer_agree(device, family, dtype):
    """Cached keys and padded rows against packed rows: bf16 has 8 bits, and logits here are below 1."""
    history = tiny.tiny_trainer(family, dtype, device, total_steps=1, lr=1e-9).train()
    assert history[0]["sampler_gap_max"] < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_seed_samples_the_same_answers(device, family):
    actor, tokenizer = tiny.tiny_actor(family).to(device), tiny.byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in tiny.PROMPTS]
    answers = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        answers.append(generate(actor, tokenizer, prompts, SamplingParams(max_new_tokens=12)))
    assert answers[0] == answers[1]
    assert answers[0].ids != answers[2].ids


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_resumed_run_samples_the_completions_of_the_whole_run(tmp_path, monkeypatch, last_device, family):
    """Weights and generators come back bit for bit. Gradients repeat bit for bit on a CPU; a GPU may add them in
    another order, so what follows from them is compared up to rounding."""
    monkeypatch.setattr(
        "ppo_fast.llm.report.export.draw_learning_curves", lambda *_: None
    )  # a GPU machine may lack matplotlib

    def trainer_in(out: Path) -> PPOTrainer:
        return tiny.tiny_trainer(family, "float32", last_device, out=str(out), save_every=1, keep_checkpoints=9)

    first = trainer_in(tmp_path / "a")
    went_on = first.train()[1]
    second = trainer_in(tmp_path / "a")
    assert second.resume(tmp_path / "a" / "checkpoints" / "step-1")
    resumed = second.step()
    assert first.last_rollout is not None
    assert second.last_rollout is not None
    assert torch.equal(first.last_rollout.tokens, second.last_rollout.tokens)
    bound = 0.0 if last_device.type == "cpu" else 1e-4
    for name, x in went_on.items():
        if not name.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu")):
            assert resumed[name] == pytest.approx(x, rel=bound, abs=bound), name


@pytest.mark.parametrize("name", families.NAMES)
def test_the_probe_takes_every_family_as_linear_and_packed(tmp_path, device, name):
    """`strict` turns the warning of a slower path into an error."""
    head = detect_head(families.load(name, tmp_path).to(device), strict=True)
    assert head.linear
    assert head.packed


def sequence_by_sequence(model, ids: Tensor) -> Tensor:
    rows = ids.split(PROBE_LENGTHS)
    return torch.cat([model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float() for row in rows])


def as_one_row(model, ids: Tensor) -> Tensor:
    layout = Layout.from_lengths(list(PROBE_LENGTHS), ids.device)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in PROBE_LENGTHS]).unsqueeze(0)
    with packed_attention(model):
        out = model(input_ids=ids.unsqueeze(0), position_ids=positions, use_cache=False, **layout.arguments())
        return out.logits[0].float()


@SETTINGS
def test_packed_rows_are_as_exact_as_rows_one_by_one(device, family, dtype):
    """Logits and gradients, against the same model in fp64; FlashAttention where a GPU has it. Twice the error of
    sequences one by one under the same autocast, and a few roundings where that happens to be small."""
    torch.manual_seed(0)
    model = tiny.tiny_actor(family, hidden=128).to(device)
    ids = torch.randint(0, 258, (sum(PROBE_LENGTHS),), device=device)
    upstream = torch.randn(len(ids), 258, device=device)
    weights = [p for p in model.parameters() if p.requires_grad]

    def evaluated(function) -> list[Tensor]:
        with autocast(dtype, device):
            logits = function(model, ids)
        return [logits.detach(), *torch.autograd.grad((logits * upstream).sum(), weights)]

    packed, single = evaluated(as_one_row), evaluated(sequence_by_sequence)
    model.double()
    weights, upstream = [p for p in model.parameters() if p.requires_grad], upstream.double()
    logits = torch.cat([model(input_ids=r.unsqueeze(0), use_cache=False).logits[0] for r in ids.split(PROBE_LENGTHS)])
    truth = [logits.detach(), *torch.autograd.grad((logits * upstream).sum(), weights)]
    eps = torch.finfo(getattr(torch, dtype)).eps
    for a, b, exact in zip(packed, single, truth, strict=True):
        error, other = ((x.double() - exact).norm() / exact.norm() for x in (a, b))
        assert error <= 2 * other + 4 * eps


TRAIN = """
import sys
from ppo_fast.common import plots
plots.draw_learning_curves = lambda *_: None  # a GPU machine may lack matplotlib
from ppo_fast.cli import commands as cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train(tmp_path, device, kind):
    """NCCL on two GPUs, gloo on a CPU."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{kind} over NCCL needs two GPUs, and this machine has {torch.cuda.device_count()}")
    tiny.save_tiny_model(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny.PROMPTS))
    (tmp_path / "r.py").write_text("def good(prompts, completions):\n    return [len(set(c)) for c in completions]\n")
    options = {
        "--model": tmp_path / "model",
        "--prompts": tmp_path / "p.jsonl",
        "--reward": f"{tmp_path / 'r.py'}:good",
        "--out": tmp_path / "out",
        "--parallel": kind,
        "--device": device.type,
        "--dtype": "float32",
        "--total-steps": 2,
        "--prompts-per-step": 4,
        "--max-new-tokens": 4,
        "--minibatches": 2,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "train.py").write_text(TRAIN)
    command += [str(tmp_path / "train.py"), "train", "--no-tensorboard"]
    command += [str(x) for pair in options.items() for x in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
