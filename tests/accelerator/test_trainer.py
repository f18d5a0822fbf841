"""Steps of the trainer on the test device give the numbers of the CPU, also while another device is the current one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator.runs import (
    HELD_OUT,
    ROWS,
    FixedAnswers,
    assert_same_metrics,
    config,
    llama,
    metrics,
    of_each_token,
    off_device,
    reward_model,
    trainer,
    unallocated,
    untouched,
    vowels,
    weights,
)
from accelerator.stand_ins import varlen_calls
from accelerator.waits import record_waits
from support.flash_attn_stand_in import machine
from support.tiny import byte_tokenizer

from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.lora import add_lora
from ppo_fast.llm.packing import flash
from ppo_fast.llm.trainer import PPOTrainer

# The orders of sums differ: attention takes SDPA's math path here and a fused one on a CPU, and the chunks of logits
# have other sizes. Each is off by a few 2^-24, and two steps of training add up some.
RTOL, ATOL = 1e-5, 2e-6

SETTINGS: dict[str, dict[str, Any]] = {
    "own critic": {},
    "shared critic": dict(critic="shared"),
    "lora": dict(lora_rank=4),
    "lora, shared critic": dict(lora_rank=4, critic="shared"),
    "no reference": dict(kl_coef=0.0),
    "kl in the loss": dict(kl_in="loss", kl_controller="adaptive"),
    "top-k, top-p, min-p": dict(top_p=0.9, top_k=20, min_p=0.01),
    "bootstrap": dict(bootstrap_truncated=True, importance_cap=2.0, missing_eos_penalty=1.0, score_clip=2.0),
    "mean of sequences": dict(aggregation="seq-mean-token-mean"),
    "norm of sequences": dict(aggregation="seq-mean-token-sum-norm", dual_clip=3.0),
    "entropy": dict(entropy_coef=0.01, entropy_target=2.5, target_kl=0.5),
    "critic first": dict(critic_warmup_steps=1),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "stop": dict(stop=("e",)),
    "batches of samples": dict(sample_batch_size=4, samples_per_prompt=3, prompts_per_step=3),
}


def rewards_for(name: str, device: torch.device | str) -> Any:
    return {"vowels": vowels, "model": reward_model(device), "tokens": of_each_token} if name == "own critic" else None


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_the_second_device_gives_the_numbers_of_the_cpu(
    name: str, testgpu: torch.device, second_testgpu: torch.device
) -> None:
    on_cpu = trainer("cpu", rewards=rewards_for(name, "cpu"), **SETTINGS[name])
    expected = on_cpu.train()
    with unallocated(testgpu):
        on_device = trainer(second_testgpu, rewards=rewards_for(name, second_testgpu), **SETTINGS[name])
    with untouched(testgpu):
        found = on_device.train()
    assert on_device.last_rollout.completion_ids == on_cpu.last_rollout.completion_ids
    assert_same_metrics(found, expected, rtol=RTOL, atol=ATOL)
    assert not off_device(on_device)
    assert torch.testgpu.current_device() == testgpu.index


def test_a_run_on_the_first_device_gives_the_numbers_of_the_second(
    testgpu: torch.device, second_testgpu: torch.device
) -> None:
    first, second = (trainer(device) for device in (testgpu, second_testgpu))
    with untouched(second_testgpu):
        found = first.train()
    torch.manual_seed(7)
    assert list(map(metrics, found)) == list(map(metrics, second.train()))
    for name, x in weights(first).items():
        assert torch.equal(x, weights(second)[name]), name


def test_only_the_trainers_device_is_synchronised(testgpu: torch.device, second_testgpu: torch.device) -> None:
    made = trainer(second_testgpu, total_steps=1)
    with record_waits() as waits:
        made.train()
    synchronised = {wait.operation for wait in waits if wait.kind == "synchronize"}
    assert synchronised == {"testgpu:1"}


# bf16 has 8 bits: each product is off by 2^-9, and a loss that is a difference of such numbers by more. A clip fraction
# changes by 1/44 when one of 44 ratios lies on the other side of the clip.
BF16_RTOL, BF16_ATOL = 0.05, 0.03


@pytest.mark.parametrize("name", ["own critic", "shared critic", "lora", "kl in the loss"])
def test_a_run_in_bf16_gives_the_numbers_of_fp32_to_the_precision_of_bf16(
    name: str, as_cuda: torch.device, second_testgpu: torch.device
) -> None:
    given = {"sampler": FixedAnswers()}
    expected = trainer("cpu", given=given, total_steps=1, **SETTINGS[name]).train()
    on_device = trainer(second_testgpu, given=given, total_steps=1, dtype="bfloat16", **SETTINGS[name])
    with untouched(as_cuda):
        found = on_device.train()
    assert_same_metrics(found, expected, rtol=BF16_RTOL, atol=BF16_ATOL)
    assert metrics(found[0]) != metrics(expected[0]), "autocast was off"
    assert varlen_calls, "packed rows did not reach FlashAttention"
    assert {x.dtype for x in on_device.policy.parameters() if x.requires_grad} == {torch.float32}
    assert not off_device(on_device)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_gradient_checkpointing_in_bf16_changes_nothing(critic: str, as_cuda: torch.device) -> None:
    runs = [
        trainer(as_cuda, dtype="bfloat16", critic=critic, gradient_checkpointing=recomputed)
        for recomputed in (False, True)
    ]
    histories = []
    for run in runs:
        torch.manual_seed(7)
        histories.append(list(map(metrics, run.train())))
    assert varlen_calls
    assert histories[0] == histories[1]
    for name, x in weights(runs[0]).items():
        assert torch.equal(x, weights(runs[1])[name]), name


def test_evaluations_give_the_numbers_and_files_of_the_cpu(
    testgpu: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    histories, written = [], []
    for device in ("cpu", second_testgpu):
        out = tmp_path / str(device)
        made = trainer(device, given={"eval_rows": HELD_OUT}, eval_every=2, out=str(out), show_samples_every=1)
        with untouched(testgpu):
            histories.append(made.train())
        written.append({x.name for x in out.rglob("*")})
    assert "eval/score" in histories[0][-1]
    assert_same_metrics(histories[1], histories[0], rtol=RTOL, atol=ATOL)
    assert written[0] == written[1]


def test_greedy_evaluations_give_the_numbers_of_the_cpu(second_testgpu: torch.device) -> None:
    options = dict(eval_every=1, eval_greedy=True, total_steps=1)
    expected, found = (
        trainer(device, given={"eval_rows": HELD_OUT}, **options).train() for device in ("cpu", second_testgpu)
    )
    assert "eval/score" in found[0]
    assert_same_metrics(found, expected, rtol=RTOL, atol=ATOL)


def test_evaluations_do_not_change_the_samples_of_training(second_testgpu: torch.device) -> None:
    plain, evaluated = trainer(second_testgpu), trainer(second_testgpu, given={"eval_rows": HELD_OUT}, eval_every=1)
    expected = plain.train()
    torch.manual_seed(7)
    found = evaluated.train()
    assert [{name: row[name] for name in metrics(expected[0])} for row in found] == list(map(metrics, expected))


def test_models_are_moved_to_the_trainers_device_from_wherever_they_are(
    testgpu: torch.device, second_testgpu: torch.device
) -> None:
    expected = trainer(second_testgpu).train()
    for start in ("testgpu:0", "testgpu:1"):
        actor = llama().to(start)
        made = trainer(second_testgpu, actor=actor, given={"reference": llama()})
        assert not off_device(made)
        assert list(map(metrics, made.train())) == list(map(metrics, expected)), start


@pytest.mark.parametrize("start", ["cpu", "testgpu:0"])
def test_a_critic_from_a_reward_model_is_moved_to_the_trainers_device(
    start: str, testgpu: torch.device, second_testgpu: torch.device
) -> None:
    histories = []
    for device, model_on in (("cpu", "cpu"), (second_testgpu, start)):
        critic = Critic.from_reward_model(reward_model(model_on).model)
        made = trainer(device, given={"critic": critic})
        assert not off_device(made)
        histories.append(made.train())
    assert_same_metrics(histories[1], histories[0], rtol=RTOL, atol=ATOL)


def test_a_reward_model_may_be_on_another_device(testgpu: torch.device, second_testgpu: torch.device) -> None:
    histories = []
    for device in ("cpu", testgpu, second_testgpu):
        made = trainer(second_testgpu, rewards={"model": reward_model(device)})
        histories.append(made.train())
        assert made.rewards["model"].model.device == torch.device(device)  # it stays where it was
    for history in histories[1:]:
        assert_same_metrics(history, histories[0], rtol=RTOL, atol=ATOL)


def trained_adapters() -> torch.nn.Module:
    actor = add_lora(llama(), rank=4, alpha=8, targets="all-linear", language_model=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, x in actor.named_parameters():
            if "lora_B" in name:
                x.copy_(0.05 * torch.randn(x.shape, generator=generator))
    return actor


def tied_embeddings() -> torch.nn.Module:
    actor = llama()
    actor.config.tie_word_embeddings = True
    actor.tie_weights()
    return actor


def own_head() -> torch.nn.Module:
    """A head whose class the trainer does not know, so that it computes logits as the model does."""

    class Head(torch.nn.Linear):
        pass

    actor = llama()
    head = Head(32, 258, bias=False)
    head.load_state_dict(actor.lm_head.state_dict())
    actor.lm_head = head
    return actor


ACTORS = {"trained adapters": trained_adapters, "tied embeddings": tied_embeddings, "own head": own_head}


@pytest.mark.parametrize("name", ACTORS)
def test_unusual_actors_give_the_numbers_of_the_cpu(
    name: str, testgpu: torch.device, second_testgpu: torch.device
) -> None:
    histories = []
    for device in ("cpu", second_testgpu):
        made = trainer(device, actor=ACTORS[name]())
        with untouched(testgpu):
            histories.append(made.train())
    assert_same_metrics(histories[1], histories[0], rtol=RTOL, atol=ATOL)
    assert not off_device(made)
    if name == "tied embeddings":
        assert made.actor.lm_head.weight is made.actor.model.embed_tokens.weight


def test_padded_rows_give_the_numbers_of_packed_rows(second_testgpu: torch.device) -> None:
    packed, padded = trainer(second_testgpu), trainer(second_testgpu)
    assert packed.policy.head.packed
    for judge in (padded.policy, padded.reference):
        object.__setattr__(judge.head, "packed", False)
    torch.manual_seed(7)
    expected = packed.train()
    torch.manual_seed(7)
    assert_same_metrics(padded.train(), expected, rtol=RTOL, atol=ATOL)


def test_the_current_device_is_used_by_a_name_without_an_index(second_testgpu: torch.device) -> None:
    with torch.testgpu.device(second_testgpu):
        made = PPOTrainer(config("testgpu", total_steps=1), llama(), byte_tokenizer(), ROWS, vowels)
    assert made.device == second_testgpu
    made.train()  # while the first is the current one
    assert not off_device(made)


def test_a_device_that_does_not_exist_is_rejected_with_those_that_do(testgpu: torch.device) -> None:
    from ppo_fast.common.errors import UserError

    with pytest.raises(UserError, match=r"'testgpu:3' does not exist; this machine has testgpu:0, testgpu:1"):
        trainer("testgpu:3")


@pytest.mark.parametrize("version", ["2.8.3", "3.0.0"])
def test_a_run_with_the_flash_attn_package_gives_the_numbers_of_pytorchs_own(
    version: str, as_cuda: torch.device, second_testgpu: torch.device, tmp_path: Path
) -> None:
    given = {"sampler": FixedAnswers()}
    expected = trainer(second_testgpu, given=given, total_steps=1, dtype="bfloat16").train()
    assert varlen_calls
    varlen_calls.clear()
    with machine(tmp_path, version) as calls, untouched(as_cuda):
        found = trainer(second_testgpu, given=given, total_steps=1, dtype="bfloat16").train()
        assert {arguments["q"].device for _, arguments in calls} == {second_testgpu}
    assert not varlen_calls
    # Both are exact attention, rounded to bf16 at its end; sums in another order can round to its neighbour.
    assert_same_metrics(found, expected, rtol=BF16_RTOL, atol=BF16_ATOL)


def test_the_trial_of_a_fast_path_makes_its_device_the_current_one(
    as_cuda: torch.device, second_testgpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that launches kernels from Python launches them on the current device."""
    current = []
    attend = torch.nn.attention.varlen.varlen_attn

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        current.append(torch.testgpu.current_device())
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", noted)
    flash.reset()
    request = flash.Request(device=second_testgpu, dtype=torch.bfloat16, head_size=8, value_size=8)
    assert flash.decide(request).path == "torch varlen"
    assert current == [1]
    assert torch.testgpu.current_device() == 0
    flash.reset()
