"""The gradient of an embedding that is also the LM head, added in place."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers", reason='transformers is not installed: pip install "ppo_fast[train]"')

from support import families
from support.tiny import byte_tokenizer, distinct, tiny_gpt2, tiny_llama
from torch import nn

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.learn import Learner
from ppo_fast.llm.models import embedding
from ppo_fast.llm.models.embedding import tied_gradient
from ppo_fast.llm.optimizer import _norm_of
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]
IDS = torch.tensor([[3, 5, 3, 7], [0, 3, 250, 0]])


def gradients_of(model: nn.Module, *, enabled: bool, times: int = 2) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with tied_gradient(model, enabled=enabled):
        for _ in range(times):
            model(input_ids=IDS).logits.logsumexp(-1).sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=2e-5, atol=2e-6 * x.abs().max().item(), msg=name)


def tied_llama() -> nn.Module:
    model = tiny_llama(258)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("make", [tied_llama, tiny_gpt2, tiny_llama])
def test_gradients_are_those_of_autograd(make: Callable[[], nn.Module]):
    model = make()
    layer = model.get_input_embeddings()
    before = dict(vars(layer))
    assert_equal(gradients_of(model, enabled=True), gradients_of(model, enabled=False))
    assert vars(layer).keys() == before.keys()


def test_a_padding_token_gets_no_gradient_of_the_lookup():
    model = tied_llama()
    model.get_input_embeddings().padding_idx = 3
    assert_equal(gradients_of(model, enabled=True), gradients_of(model, enabled=False))


@pytest.mark.parametrize("name", families.NAMES)
def test_families_learn_with_the_same_gradients(name: str, tmp_path):
    model = families.load(name, tmp_path)
    assert_equal(gradients_of(model, enabled=True, times=1), gradients_of(model, enabled=False, times=1))


def test_gradients_are_the_same_bits_each_time_with_several_threads():
    """A run that is resumed has the bits of an undisturbed one."""
    layer = nn.Embedding(8, 576)
    ids = torch.randint(0, 8, (400,), generator=torch.Generator().manual_seed(0))
    rows = torch.randn(400, 576, generator=torch.Generator().manual_seed(1))

    def gradient() -> torch.Tensor:
        layer.weight.grad = None
        embedding._Lookup.apply(torch.zeros((), requires_grad=True), ids, layer).backward(rows)
        return layer.weight.grad

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(50))
    finally:
        torch.set_num_threads(before)
    exact = torch.zeros(8, 576, dtype=torch.float64).index_add_(0, ids, rows.double())
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_largest_tensor_is_made_once(monkeypatch: pytest.MonkeyPatch):
    """Only the head's gradient has the size of the weight; a hook on the weight gives autograd its way back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = tied_llama()
    shape = model.get_input_embeddings().weight.shape

    class Made(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and out.shape == shape and all(out is not x for x in args)
            self.count += made and out._base is None and "detach" not in str(function)
            return out

    def count(*, enabled: bool) -> int:
        model.zero_grad()
        with tied_gradient(model, enabled=enabled):
            loss = model(input_ids=IDS).logits.logsumexp(-1).sum()
            with Made() as made:
                loss.backward()
        return made.count

    fewer, usual = count(enabled=True), count(enabled=False)
    assert fewer <= usual - 2
    handle = model.get_input_embeddings().weight.register_hook(lambda grad: grad)
    assert count(enabled=True) == count(enabled=False)
    handle.remove()


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_learn_step_has_the_gradients_of_autograd(critic, monkeypatch: pytest.MonkeyPatch):
    options = dict(total_steps=1, prompts_per_step=4, max_new_tokens=6, minibatches=2, epochs=1, micro_batch_tokens=40)
    config = PPOConfig(**options, device="cpu", quiet=True, tensorboard=False, critic=critic)

    def learned(*, enabled: bool) -> list[dict[str, torch.Tensor]]:
        seen = []
        accumulate = Learner.accumulate_gradients

        def keep(self, *args, **kwargs):
            found = accumulate(self, *args, **kwargs)
            seen.append({n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None})
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "accumulate_gradients", keep)
            if not enabled:
                patch.setattr(
                    "ppo_fast.llm.learn.tied_gradient", lambda model, enabled: tied_gradient(model, enabled=False)
                )
            trainer = PPOTrainer(config, tied_llama(), byte_tokenizer(), ROWS, distinct)
            trainer.train()
        return seen

    for ours, theirs in zip(learned(enabled=True), learned(enabled=False), strict=True):
        assert_equal(ours, theirs)


def test_norm_of_many_gradients():
    torch.manual_seed(0)
    gradients = [torch.randn(3000, 500) * 1e-3, torch.randn(7), torch.randn(64, 5).t(), torch.zeros(0)]
    exact = torch.stack([x.double().square().sum() for x in gradients]).sum().sqrt()
    torch.testing.assert_close(_norm_of(gradients), exact.float(), rtol=1e-6, atol=0)
    assert _norm_of([]) == 0
    assert _norm_of([torch.tensor([1.0, float("nan")])]).isnan()
    assert _norm_of([torch.tensor([1.0, float("inf")])]).isinf()
