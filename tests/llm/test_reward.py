"""Reward functions are somebody else's code: whatever they return is checked, and the sample at fault is named."""

import decimal
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from support.tiny import byte_tokenizer, tiny_llama

from ppo_fast.common.errors import RewardError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.packing.rollout import Rollout, mask_of_lengths
from ppo_fast.llm.reward.scoring import score
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.rewards import load_reward, matches, stays_in_role

CONFIG = PPOConfig()


def rollout() -> Rollout:
    return Rollout(
        tokens=torch.tensor([[9, 1, 2, 3], [8, 4, 5, 0]]),
        mask=mask_of_lengths([3, 2]),
        prompt_index=[0, 1],
        prompt_lengths=[1, 1],
        completion_lengths=[3, 2],
        ended=[False, True],
        completions=["abc", "de"],
        columns={"prompt": ["p", "q"], "answer": ["abc", "x"]},
        raw_completions=["abc", "de<end>"],
    )


def test_a_number_for_each_answer_becomes_scores_of_answers():
    scores, means = score(rollout(), {"f": lambda prompts, completions, answer: [1, 2.5]}, CONFIG)
    assert scores.tolist() == [1.0, 2.5]
    assert means == {"reward/f": 1.75}


def test_the_penalty_of_a_completion_without_an_end_is_subtracted_after_clipping():
    """The first answer did not end. Its score of 9 is clipped to 1 before the penalty of 3 is subtracted."""
    config = PPOConfig(score_clip=1.0, missing_eos_penalty=3.0)
    scores, _ = score(rollout(), {"f": lambda prompts, completions: [9.0, -9.0]}, config)
    assert scores.tolist() == [-2.0, -1.0]
    per_token = {"t": lambda prompts, completions: [[5.0, 0.5, 9.0], [-2.0, 0.25]]}
    scores, _ = score(rollout(), per_token, config)
    assert scores.tolist() == [[1.0, 0.5, -2.0], [-1.0, 0.25, 0.0]]


def test_a_score_clip_reaches_the_rewards_of_a_run():
    trainer = PPOTrainer(
        PPOConfig(
            total_steps=1,
            prompts_per_step=2,
            minibatches=1,
            epochs=1,
            max_new_tokens=3,
            kl_coef=0.0,
            lam=1.0,
            score_clip=0.5,
            quiet=True,
            device="cpu",
        ),
        tiny_llama(258),
        byte_tokenizer(),
        [{"prompt": "a"}],
        lambda prompts, completions: [8.0] * len(completions),
    )
    metrics = trainer.step()
    assert metrics["score"] == 8.0
    assert metrics["return"] == pytest.approx(0.5)


def test_numbers_for_tokens_and_for_answers_add_up_at_the_last_token():
    per_token = [[0.1, 0.2, 0.3], [0.4, 0.5]]
    functions = {"t": lambda prompts, completions: per_token, "a": lambda prompts, completions: [1.0, 2.0]}
    scores, _ = score(rollout(), functions, CONFIG)
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.2, 1.3], [0.4, 2.5, 0.0]]))


def test_answers_cut_by_length_pay_the_missing_end_penalty():
    config = PPOConfig(missing_eos_penalty=1.0)
    batch = rollout()
    scores, _ = score(batch, {"f": lambda prompts, completions: [0.0, 0.0]}, config)
    assert scores.tolist() == [-1.0, 0.0]
    assert batch.scores == [-1.0, 0.0]


def test_columns_and_tokens_reach_the_function_by_name():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    score(rollout(), {"f": everything}, CONFIG)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["abc", "de"],
        "answer": ["abc", "x"],
        "raw_completions": ["abc", "de<end>"],
        "completion_ids": [[1, 2, 3], [4, 5]],
        "ended": [False, True],
    }


def raises(prompts, completions):
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values for 2 answers"),
        (None, "must return a list, got NoneType"),
        ([1.0, float("nan")], r"answer 1 \('de'\): expected a finite number, got nan"),
        ([float("inf"), 0.0], r"answer 0 \('abc'\): expected a finite number, got inf"),
        ([1e300, 0.0], r"answer 0 \('abc'\): expected a finite number, got 1e\+300 \(fp32 ends at 3.4e38\)"),
        ([1.0, None], r"answer 1 \('de'\): expected a number, got None"),
        ([1.0, "good"], "expected a number, got 'good'"),
        ([[1.0, 2.0], [1.0, 2.0]], r"answer 0 \('abc'\): 2 values for 3 tokens"),
        ([[1.0, 2.0, None], [1.0, 2.0]], "expected a number, got None"),
    ],
)
def test_a_wrong_result_names_function_sample_and_reason(returned, message):
    with pytest.raises(RewardError, match=message):
        score(rollout(), {"judge": lambda prompts, completions: returned}, CONFIG)


def test_an_exception_in_the_function_is_reported_with_its_place():
    with pytest.raises(RewardError, match=r"'judge' raised KeyError: 'gone' \(.*test_reward.py, line \d+\)"):
        score(rollout(), {"judge": raises}, CONFIG)


def test_tensors_and_numpy_numbers_are_numbers_too():
    scores, _ = score(rollout(), {"f": lambda prompts, completions: torch.tensor([1.0, 2.0])}, CONFIG)
    assert scores.tolist() == [1.0, 2.0]


def test_exit_in_a_reward_is_an_error_that_names_the_function_and_the_place():
    def leaves(prompts, completions):
        exec("exit(3)", {})

    with pytest.raises(RewardError, match=r"'judge' called exit\(3\) \(<string>, line 1\), at answer 0 \('abc'\)"):
        score(rollout(), {"judge": leaves}, CONFIG)


def test_exit_at_the_import_of_a_reward_is_an_error(tmp_path):
    (tmp_path / "r.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(RewardError.__bases__[0], match="SystemExit: 0"):
        load_reward(f"{tmp_path / 'r.py'}:f")


def test_ctrl_c_in_a_reward_is_no_error_of_the_reward():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(rollout(), {"judge": interrupted}, CONFIG)


def test_an_error_in_a_generator_is_reported_with_its_place():
    def generator(prompts, completions):
        yield 1.0
        raise KeyError("gone")

    with pytest.raises(RewardError, match=r"'judge' raised KeyError: 'gone' \(.*test_reward.py"):
        score(rollout(), {"judge": generator}, CONFIG)


def test_rewards_get_copies_of_everything():
    batch = rollout()
    batch.columns |= {"chat": [[{"role": "user"}]] * 2, "lock": [batch] * 2}

    def destructive(prompts, completions, **columns):
        assert columns["chat"][0] is not columns["chat"][1]  # samples of one prompt
        for values in (prompts, completions, *columns.values()):
            if isinstance(values[0], list):
                values[0].append("more")
            values.reverse()
            values.append(None)
        return [0.0, 0.0]

    seen = []

    def second(prompts, completions, **columns):
        seen.append((prompts, completions, {k: v for k, v in columns.items() if k != "lock"}))
        return [0.0, 0.0]

    score(batch, {"first": destructive, "second": second}, CONFIG)
    ids, raw = [[1, 2, 3], [4, 5]], ["abc", "de<end>"]
    columns = {"answer": ["abc", "x"], "chat": [[{"role": "user"}]] * 2}
    expected = {**columns, "raw_completions": raw, "completion_ids": ids, "ended": [False, True]}
    assert seen == [(["p", "q"], ["abc", "de"], expected)]
    assert batch.columns["chat"] == columns["chat"]
    assert batch.ended == [False, True]


def test_an_object_that_cannot_be_copied_is_passed_itself():
    batch, stream = rollout(), sys.stdout
    batch.columns["stream"] = [stream, stream]
    score(batch, {"f": lambda prompts, completions, stream: [float(x is sys.stdout) for x in stream]}, CONFIG)
    assert batch.scores == [1.0, 1.0]


def test_a_reward_that_appends_to_chats_leaves_the_data_as_it_is():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("hi", "ho")]

    def judge(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.append({"role": "assistant", "content": completion})
        return [float(len(prompt)) for prompt in prompts]

    trainer = PPOTrainer(
        small(total_steps=2, samples_per_prompt=2, prompts_per_step=2), tiny_llama(), tokenizer, rows, judge
    )
    assert [row["score"] for row in trainer.train()] == [2.0, 2.0]
    assert [len(row["prompt"]) for row in trainer.prompts.rows] == [1, 1]


def small(**options) -> PPOConfig:
    config = {"total_steps": 3, "prompts_per_step": 4, "minibatches": 1, "epochs": 1, "max_new_tokens": 8}
    return PPOConfig(**{**config, "quiet": True, "device": "cpu", "tensorboard": False, **options})


def test_a_reward_that_seeds_leaves_sampling_random():
    def seeding(prompts, completions):
        transformers.set_seed(42)
        return [0.0] * len(prompts)

    answers = []
    for reward in (seeding, lambda prompts, completions: [0.0] * len(prompts)):
        config = small(lr=0.0, critic_lr=0.0, kl_coef=0.0)
        trainer = PPOTrainer(config, tiny_llama(), byte_tokenizer(), [{"prompt": "ab"}], reward)
        for _ in range(3):
            trainer.step()
            answers.append(trainer.last_rollout.completion_ids)
    assert answers[:3] == answers[3:]  # as with a reward that leaves the generators alone
    assert answers[0] != answers[1] != answers[2]


def draws(found):
    def reward(prompts, completions):
        found.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return [0.0] * len(prompts)

    return reward


def test_random_numbers_of_rewards_are_new_in_each_step_and_repeat_with_the_seed():
    found, again, other = [], [], []
    for numbers, seed in ((found, 0), (again, 0), (other, 1)):
        rewards = {"a": draws(numbers), "b": draws(numbers)}
        PPOTrainer(small(seed=seed), tiny_llama(), byte_tokenizer(), [{"prompt": "ab"}], rewards).train()
    assert found == again
    assert len({x for numbers in (*found, *other) for x in numbers}) == 3 * 12


def test_random_numbers_of_rewards_are_the_same_after_resume(tmp_path):
    def run(out, steps, found):
        config = small(out=str(tmp_path / out), save_every=1, show_samples_every=0)
        trainer = PPOTrainer(config, tiny_llama(), byte_tokenizer(), [{"prompt": "ab"}], {"a": draws(found)})
        trainer.resume()
        trainer.train(lambda trainer, _: trainer.steps_done == steps)

    whole, parts = [], []
    run("whole", 3, whole)
    run("parts", 1, parts)
    run("parts", 3, parts)
    assert whole == parts


SETTINGS = {
    "the working directory": (os.getcwd, lambda: os.chdir("/")),
    "torch's default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "torch's default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "torch's number of threads": (
        torch.get_num_threads,
        lambda: torch.set_num_threads(torch.get_num_threads() % 2 + 1),
    ),
    "torch's gradient mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "torch's float32 matmul precision": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "torch's fp32 precision": (
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    ),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "torch's anomaly detection": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "torch's flushing of denormal numbers": (
        lambda: (torch.tensor(1e-310, dtype=torch.float64) * 1).item(),
        lambda: torch.set_flush_denormal(True) or pytest.skip("this CPU does not flush denormal numbers"),
    ),
    "torch's flash attention": (
        torch.backends.cuda.flash_sdp_enabled,
        lambda: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    ),
    "mkldnn.deterministic": (
        lambda: torch.backends.mkldnn.deterministic,
        lambda: setattr(torch.backends.mkldnn, "deterministic", True),
    ),
    "numpy's error handling": (np.geterr, lambda: np.seterr(all="raise")),
    "the decimal context": (
        lambda: decimal.getcontext().prec,
        lambda: setattr(decimal.getcontext(), "prec", 3),
    ),
    "Python's recursion limit": (sys.getrecursionlimit, lambda: sys.setrecursionlimit(7000)),
    "the filters of warnings": (lambda: list(warnings.filters), lambda: warnings.simplefilter("error")),
    "sys.stdout": (lambda: sys.stdout, lambda: setattr(sys, "stdout", sys.stderr)),
    "signal handlers": (
        lambda: signal.getsignal(signal.SIGINT),
        lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_a_reward_changes_is_restored_and_reported_once(name):
    read, change = SETTINGS[name]
    before, inside = read(), []

    def reward(prompts, completions):
        change()
        inside.append(read())
        return [0.0, 0.0]

    function = f"changes {name}".replace("'", "")  # repr() then quotes it with them
    with pytest.warns(RuntimeWarning, match=f"reward function '{function}' changed {name}; the change is undone"):
        score(rollout(), {function: reward}, CONFIG)
    assert read() == before != inside[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(rollout(), {function: reward}, CONFIG)
    assert read() == before


def test_modes_that_a_reward_leaves_on_are_switched_off():
    modes = []  # whose end would switch them off

    def reward(prompts, completions):
        modes.append(torch.inference_mode())
        modes[0].__enter__()
        torch.set_autocast_enabled("cpu", True)
        return [0.0, 0.0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score(rollout(), {"f": reward}, CONFIG)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_an_alarm_that_a_reward_leaves_is_cancelled():
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        pytest.skip("this test run has an alarm of its own")

    def reward(prompts, completions):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(100)
        return [0.0, 0.0]

    with pytest.warns(RuntimeWarning, match="changed the alarm timer"):
        score(rollout(), {"leaves an alarm": reward}, CONFIG)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_settings_are_restored_after_an_error():
    def reward(prompts, completions):
        torch.set_default_dtype(torch.float64)
        raise KeyError("gone")

    with pytest.raises(RewardError, match="gone"), pytest.warns(RuntimeWarning, match="default dtype"):
        score(rollout(), {"fails and changes": reward}, CONFIG)
    assert torch.get_default_dtype() == torch.float32


def test_special_tokens_of_a_template_are_a_change_of_role_except_at_the_end():
    raw = ["Sure.<|im_start|>user\nThanks", "Sure.<|im_end|>", "Sure.<|im_end|>", "Sure."]
    clean = ["Sure.user\nThanks", "Sure.", "Sure.", "Sure."]
    assert stays_in_role([""] * 4, clean, raw, [True, True, False, False]) == [0.0, 1.0, 0.0, 1.0]
    batch = rollout()
    batch.raw_completions = ["a<|im_start|>bc", "de<|im_end|>"]
    assert score(batch, {"role": stays_in_role}, CONFIG)[0].tolist() == [0.0, 1.0]


def test_a_pattern_for_the_raw_text_matches_special_tokens():
    raw = ["<think>two</think> 2<end>", "two 2<end>"]
    pattern = "<think>.*</think>.*"
    assert matches([""] * 2, ["two 2"] * 2, pattern) == [0.0, 0.0]
    assert matches([""] * 2, ["two 2"] * 2, pattern, raw, raw=True) == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs raw_completions"):
        matches([""], ["2"], pattern, raw=True)
