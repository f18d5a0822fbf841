"""Decoder layers under torch.compile: the same learning, with code that is compiled once."""

import shutil
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from support.tiny import byte_tokenizer, distinct, tiny_llama

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
NAMES = "entropy", "kl", "learn/policy_loss", "learn/value_loss", "learn/grad_norm", "learn/critic_grad_norm"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: torch.compile needs it")


def trainer_of(**options: object) -> PPOTrainer:
    sizes = dict(total_steps=3, prompts_per_step=4, max_new_tokens=9, minibatches=2, epochs=2, lr=1e-3)
    config = PPOConfig(**sizes, device="cpu", quiet=True, tensorboard=False, **options)
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), ROWS, distinct)


@needs_compiler
def test_a_run_learns_the_same_and_compiles_in_its_first_step_only():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, compiled = trainer_of(), trainer_of(compile_layers=True)
    graphs = []
    for _ in range(3):
        theirs, ours = plain.step(), compiled.step()
        graphs.append(counters["stats"]["unique_graphs"])
        assert ours["score"] == theirs["score"]
        for name in NAMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert 0 < graphs[0] <= 20
    assert graphs[2] == graphs[1]
    assert not compiled.actor.model.layers[0]._compiled_call_impl  # sampling runs as before
    weights = dict(plain.policy.named_parameters())
    for name, p in compiled.policy.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=2e-3, msg=name)


@needs_compiler
def test_it_runs_with_checkpointed_layers_and_adapters():
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    trainer = trainer_of(compile_layers=True, gradient_checkpointing=True, lora_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that the first ratio is not 1
        metrics = trainer.step()
    assert metrics["learn/grad_norm"] > 0


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="compile_layers needs the C\\+\\+ compiler no-such-compiler: install it"):
        trainer_of(compile_layers=True)
