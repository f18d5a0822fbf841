"""Two processes equal one on the joined batch: DDP and FSDP2, with gloo on a CPU."""

import dataclasses
import importlib
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.several import (
    CPU,
    ROWS,
    TEXTS,
    Fixed,
    assert_close,
    fill_folder,
    judge,
    of_training,
    options,
    run,
    torchrun,
    trainer_of,
)
from support.tiny import byte_tokenizer, tiny_llama
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from ppo_fast.cli import commands as cli
from ppo_fast.cli import train
from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import Distributed, init_distributed
from ppo_fast.llm.generate import GenerateOptions, generate
from ppo_fast.llm.models.critic_folder import VALUE_HEAD, load_critic
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.models.policy import packed_mode
from ppo_fast.llm.models.reference import AdapterReference
from ppo_fast.llm.packing.rollout import Rollout, join_rollouts, mask_of_lengths
from ppo_fast.llm.reward.scoring import score
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.sharding import to_full_tensor
from ppo_fast.llm.state import trainable_state
from ppo_fast.llm.trainer import PPOTrainer


def first_gradient(config: PPOConfig) -> tuple[dict[str, torch.Tensor], dict[str, float], bool]:
    """Gradient and statistics of the first minibatch, whole, and whether parameters are sharded."""
    trainer = trainer_of(config, sampler=Fixed())
    distributed, policy = trainer.distributed, trainer.policy
    torch.nn.init.constant_(trainer.critic.head.bias, 0.1)
    mine = sample_rollout(trainer.sampler, trainer.tokenizer, distributed.local_rows(ROWS[:5]), config, CPU)
    scores, _ = score(mine, trainer.rewards, config)
    rollout, scores = distributed.gather_rollout(mine, scores, 257)
    experience = trainer.learner.experience_maker.make(rollout, scores)
    with packed_mode(policy):
        stats = trainer.learner.accumulate_gradients(experience.minibatches[0], experience)
    gradient = {name: to_full_tensor(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
    sharded = all(isinstance(p, DTensor) for p in policy.parameters())
    return gradient, {name: x.item() for name, x in stats.items()}, sharded


def three_steps(config: PPOConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer = trainer_of(config, sampler=Fixed())
    history = trainer.train()
    return of_training(history), {name: to_full_tensor(p.detach()) for name, p in trainer.policy.named_parameters()}


CASES = [
    {},
    {"critic": "shared", "entropy_coef": 0.01},
    {"kl_in": "loss", "aggregation": "seq-mean-token-mean", "gradient_checkpointing": True},
    {"critic_warmup_steps": 1, "kl_controller": "adaptive", "kl_horizon": 20.0, "samples_per_prompt": 1},
    {"target_kl": 2e-3},  # which stops the actor within steps
]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: "+".join(case) or "default")
def test_the_gradient_of_two_processes_is_that_of_one(tmp_path, parallel, case):
    expected, stats, _ = first_gradient(options(**case))
    for gradient, its_stats, sharded in run(tmp_path, first_gradient, options(**case, parallel=parallel)):
        assert_close(gradient, expected)
        assert_close(its_stats, stats)
        assert sharded == (parallel == "fsdp"), "parameters are DTensors under fsdp, and only there"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case) or "default")
def test_three_steps_of_two_processes_are_those_of_one(tmp_path, parallel, case):
    history, weights = three_steps(options(**case))
    updates = [row["updates"] for row in history]
    assert ("target_kl" in case) == any(0 < n < 4 for n in updates), updates
    for its_history, its_weights in run(tmp_path, three_steps, options(**case, parallel=parallel)):
        for here, there in zip(its_history, history, strict=True):
            assert_close(here, there)
        assert_close(its_weights, weights)


def counted(config: PPOConfig) -> list[float]:
    """FLOPs of all processes in each step, from what they log, and as a share of what all can do."""
    trainer = trainer_of(config, sampler=Fixed())
    for row in (history := trainer.train()):
        assert row["mfu"] == pytest.approx(1e12 * row["learn_tflops"] / trainer.peak_rate)
    return [1e12 * row["learn_tflops"] * row["seconds/learn"] * trainer.distributed.size for row in history]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [{}, {"critic": "shared", "critic_warmup_steps": 1}], ids=["own", "shared"])
def test_two_processes_log_the_flops_of_all_tokens(tmp_path, parallel, case):
    expected = counted(options(**case))
    assert "critic_warmup_steps" not in case or expected[0] < 0.5 * expected[1]
    for found in run(tmp_path, counted, options(**case, parallel=parallel)):
        assert found == pytest.approx(expected)


def generated(config: PPOConfig) -> list[list[list[int]]]:
    """Greedy answers of this process before and after two steps; and those of the whole weights, unsharded."""
    trainer = trainer_of(config)
    prompts = [byte_tokenizer()(text)["input_ids"] for text in trainer.distributed.local_rows(TEXTS)]
    found = []
    params = SamplingParams.from_config(config)
    how = GenerateOptions(call=trainer.policy.generate, synced_gpus=trainer.distributed.strategy == "fsdp")
    for _ in range(2):
        weights = {name: to_full_tensor(x.detach()).clone() for name, x in trainer.actor.state_dict().items()}
        plain = tiny_llama(258)
        plain.load_state_dict(weights)
        found += [
            generate(trainer.actor, trainer.tokenizer, prompts, params, options=how, greedy=True).ids,
            generate(plain, trainer.tokenizer, prompts, params, greedy=True).ids,
        ]
        trainer.step()
        trainer.step()
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_generation_from_shards_is_that_of_whole_weights(tmp_path, parallel):
    # one answer at a time: a process with three prompts takes more rounds than one with two
    config = options(parallel=parallel, sample_batch_size=1, lr=3e-2, total_steps=9)
    for before, plain_before, after, plain_after in run(tmp_path, generated, config):
        assert before == plain_before
        assert after == plain_after
        assert before != after, "the policy did not move"


def gathers_and_captures(config: PPOConfig) -> tuple[list[int], list[list[int]], dict[str, int]]:
    """How many gathers of weights two samplings take, with and without `gather_for_sampling`, the answers of both, and
    how many tensors this process has for a checkpoint."""
    trainer = trainer_of(config)
    trainer.step()
    prompts = [byte_tokenizer()(text)["input_ids"] for text in trainer.distributed.local_rows(TEXTS[:2])]
    counts, answers = [], []
    collectives = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    gather = collectives.foreach_all_gather
    for whole in (True, False):
        trainer.policy.config = dataclasses.replace(trainer.policy.config, gather_for_sampling=whole)
        with mock.patch.object(collectives, "foreach_all_gather", side_effect=gather) as gathered:
            answers.append(
                trainer.sampler.sample(prompts, SamplingParams.from_config(dataclasses.replace(config, top_k=1))).ids
            )
        counts.append(gathered.call_count)
    tensors, _ = trainer.state_dict()
    trainer.step()  # what was gathered is divided again, and learns
    return counts, answers, {name: len(x) for name, x in tensors.items()}


def test_sampling_gathers_the_actor_once_and_only_the_main_process_has_a_checkpoint(tmp_path):
    (counts, answers, mine), (_, _, others) = run(tmp_path, gathers_and_captures, options(parallel="fsdp"))
    layers, tokens = 2, len(answers[0][0])
    assert answers[0] == answers[1]
    assert counts[0] <= layers + 1
    assert counts[1] >= layers * tokens
    assert mine["weights"] > 0
    assert mine["optimizers"] > 0
    assert others["weights"] == others["optimizers"] == 0


def sampled(config: PPOConfig) -> list[list[int]]:
    trainer = trainer_of(config, rows=[{"prompt": "hi", "bonus": 0.0}] * 5)
    trainer.step()
    assert trainer.last_rollout is not None
    return trainer.last_rollout.completion_ids


def test_processes_sample_different_completions_and_share_one_rollout(tmp_path):
    first, second = run(tmp_path, sampled, options())
    assert first == second
    assert len({tuple(ids) for ids in first}) == 5  # the first two are one process's, the others the other's


def go_on(config: PPOConfig, stop_after: int | None) -> tuple[list[dict], dict[str, torch.Tensor], list[str]]:
    trainer = trainer_of(config, eval_rows=ROWS[4:])
    trainer.resume()
    history = trainer.train(lambda trainer, _: trainer.steps_done == stop_after)
    return (
        of_training(history),
        {n: to_full_tensor(p.detach()) for n, p in trainer.policy.named_parameters()},
        trainer.notes,
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_resumed_run_of_two_processes_is_the_whole_run(tmp_path, parallel):
    config = options(parallel=parallel, save_every=1, eval_every=1)
    (whole, weights, _), _ = run(tmp_path, go_on, dataclasses.replace(config, out=str(tmp_path / "whole")), None)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    run(tmp_path, go_on, stopped, 2)
    for history, its_weights, _ in run(tmp_path, go_on, stopped, None):
        assert history == whole[2:]
        assert all(torch.equal(x, weights[name]) for name, x in its_weights.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "model")
    for name, x in model.named_parameters():
        assert torch.equal(x, weights[f"actor.{name}"]), name
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_is_resumed_by_another_number(tmp_path, parallel):
    config = options(parallel=parallel, save_every=1, out=str(tmp_path / "run"), lr_schedule="constant")
    (_, weights, _), _ = run(tmp_path, go_on, config, 2)
    alone = trainer_of(dataclasses.replace(config, parallel="auto"), eval_rows=ROWS[4:])
    assert alone.resume()
    assert alone.steps_done == 2
    for name, p in alone.policy.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert any("processes was 2 and is 1 now" in note for note in alone.notes)
    moments = [x.abs().sum() for slots in alone.learner.optimizers.actor.adamw.state.values() for x in slots.values()]
    assert len(moments) == 3 * len(alone.learner.optimizers.actor.parameters)
    assert all(x > 0 for x in moments)
    alone.train()  # writes step-3, from which three processes continue
    longer = dataclasses.replace(config, total_steps=4)
    for history, _, notes in run(tmp_path, go_on, longer, None, size=3):
        assert [row["step"] for row in history] == [4]
        assert any("processes was 1 and is 3 now" in note for note in notes)


def adapted(config: PPOConfig, start_model: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    actor = AutoModelForCausalLM.from_pretrained(start_model)
    trainer = PPOTrainer(config, actor, byte_tokenizer(), ROWS, judge, sampler=Fixed())
    history = trainer.train()
    return of_training(history), {name: to_full_tensor(p.detach()) for name, p in trainable_state(trainer.policy)}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_learn_the_same_in_two_processes(tmp_path, parallel):
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    tiny_llama(258).save_pretrained(tmp_path / "start")
    case = options(lora_rank=2, out=str(tmp_path / "one"))
    history, weights = adapted(case, tmp_path / "start")
    config = dataclasses.replace(case, parallel=parallel, out=str(tmp_path / "two"))
    for its_history, its_weights in run(tmp_path, adapted, config, tmp_path / "start"):
        for here, there in zip(its_history, history, strict=True):
            assert_close(here, there)
        assert_close(its_weights, weights)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    ids = torch.arange(9).view(1, -1)
    assert (one(ids).logits - two(ids).logits).abs().max() < 1e-5


def refused(config: PPOConfig) -> str:
    with pytest.raises(UserError) as error:
        trainer_of(config)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_step": 1, "samples_per_prompt": 2}, "prompts_per_step = 1 is less than the 2 processes"),
        ({"parallel": "fsdp", "lora_rank": 2, "merge_adapters": True}, "merge_adapters needs whole weights"),
    ],
)
def test_runs_that_cannot_be_divided_are_rejected_with_the_reason(tmp_path, changes, message):
    for found in run(tmp_path, refused, options(**changes)):
        assert message in found


def test_fsdp_without_torchrun_is_rejected(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="parallel = fsdp needs torchrun"):
        init_distributed(options(parallel="fsdp"))


def test_every_pack_and_row_is_assigned_once():
    groups = [Distributed(rank, 3, "ddp", CPU) for rank in range(3)]
    for count in (1, 3, 4, 8):
        rows = [distributed.local_rows(range(count)) for distributed in groups]
        assert [i for mine in rows for i in mine] == list(range(count))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        packs = [distributed.assign_packs(list(range(count))) for distributed in groups]
        assert len({len(mine) for mine in packs}) == 1
        assert sorted(i for mine in packs for i in mine if i is not None) == list(range(count))


def test_joined_rollouts_keep_prompts_completions_and_columns():
    def part(prompts: list[list[int]], answers: list[list[int]], **columns) -> Rollout:
        P, T = max(map(len, prompts)), max(map(len, answers))
        tokens = [[9] * (P - len(p)) + p + a + [9] * (T - len(a)) for p, a in zip(prompts, answers, strict=True)]
        return Rollout(
            tokens=torch.tensor(tokens),
            mask=mask_of_lengths(list(map(len, answers))),
            prompt_index=list(range(len(prompts))),
            prompt_lengths=list(map(len, prompts)),
            completion_lengths=list(map(len, answers)),
            ended=[True] * len(prompts),
            completions=[str(a) for a in answers],
            columns={"prompt": [str(p) for p in prompts], **columns},
            logprobs=torch.ones(len(prompts), T),
        )

    whole = join_rollouts([part([[1, 2, 3]], [[4]]), part([[5], [6, 7]], [[8, 8, 8], [0]], extra=["x", "y"])], 9)
    assert whole.tokens.tolist() == [[1, 2, 3, 4, 9, 9], [9, 9, 5, 8, 8, 8], [9, 6, 7, 0, 9, 9]]
    assert whole.completion_ids == [[4], [8, 8, 8], [0]]
    assert whole.mask.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert whole.prompt_index == [0, 1, 2]
    assert whole.raw_completions == ["[4]", "[8, 8, 8]", "[0]"]
    assert whole.columns == {"prompt": ["[1, 2, 3]", "[5]", "[6, 7]"], "extra": [None, "x", "y"]}
    assert whole.logprobs is not None
    assert whole.logprobs.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill_folder(tmp_path)


def test_the_command_under_torchrun_writes_each_file_once(folder):
    out = folder / "out"
    done = torchrun(folder, "--out", str(out), "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3") == 1
    assert done.stdout.count("are in ") == 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_a_process_that_fails_ends_the_others(folder):
    begun = time.monotonic()
    done = torchrun(folder, reward="bad")
    assert time.monotonic() - begun < 60
    assert done.returncode != 0
    assert "ppo-fast: rank 1: error: reward function" in done.stderr
    assert "raised ValueError: no such unit" in done.stderr


def kept_copies(config: PPOConfig) -> int:
    """Bytes of copies of layer weights that a forward pass keeps for its backward, besides the weights themselves."""
    trainer = trainer_of(config, sampler=Fixed())
    distributed, policy = trainer.distributed, trainer.policy
    mine = sample_rollout(trainer.sampler, trainer.tokenizer, distributed.local_rows(ROWS[:5]), config, CPU)
    scores, _ = score(mine, trainer.rewards, config)
    rollout, scores = distributed.gather_rollout(mine, scores, 257)
    experience = trainer.learner.experience_maker.make(rollout, scores)
    shapes = {tuple(p.shape) for p in trainer.actor.model.layers.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters() if not isinstance(p, DTensor)}
    kept: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) in shapes and x.untyped_storage().data_ptr() not in own:
            kept.append(x)
        return x

    found = []

    def backward(loss: torch.Tensor) -> None:
        found.append(sum(x.untyped_storage().size() for x in kept))
        loss.backward()

    with packed_mode(policy), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        trainer.learner.accumulate_gradients(experience.minibatches[0], experience, backward=backward)
    return max(found)


def test_fsdp_in_bfloat16_keeps_no_copy_of_a_layer_until_backward(tmp_path):
    """FSDP2 empties the gathered weights after each layer's forward; autocast's own copies would stay."""
    assert run(tmp_path, kept_copies, options(parallel="fsdp", dtype="bfloat16")) == [0, 0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_gradient_of_two_processes_in_bfloat16_is_that_of_one(tmp_path, parallel):
    expected, stats, _ = first_gradient(options(dtype="bfloat16"))
    # DDP runs the same operations. FSDP2 has norms and the residual stream within a layer in bfloat16, too: 8 bits.
    tolerance = {"ddp": 1e-5, "fsdp": 2e-2}[parallel]
    for gradient, its_stats, _ in run(tmp_path, first_gradient, options(dtype="bfloat16", parallel=parallel)):
        assert_close(gradient, expected, tolerance)
        assert_close(its_stats, stats, 2 * tolerance)


class LargestStorage(TorchDispatchMode):
    """Elements of the largest storage, in fp32, of numbers that any operation returned; of a DTensor its local part."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            x = x._local_tensor if isinstance(x, DTensor) else x
            if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


def commanded(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What a run of `ppo-fast train` leaves in this process, and the largest tensor that it had before it trained."""
    small = "--total-steps 2 --prompts-per-step 5 --max-new-tokens 6 --minibatches 2 --lr 1e-3 --critic-lr 1e-3"
    small += " --adam-eps 1e-3 --device cpu --dtype float32 --no-tensorboard --quiet"
    given = ["train", "--model", str(folder / "model"), "--prompts", str(folder / "p.jsonl"), *small.split()]
    parser, train_parser = cli.build_parser()
    parsed = parser.parse_args([*given, "--reward", f"{folder / 'r.py'}:good", *arguments])
    largest, found = LargestStorage(), dict[str, Any]()

    def run_to_the_end(self: PPOTrainer) -> list[dict[str, float]]:
        largest.__exit__(None, None, None)
        history = run_training(self)
        found["history"] = of_training(history)
        found["weights"] = {name: to_full_tensor(p.detach()) for name, p in self.policy.named_parameters()}
        found["buffers"] = dict(self.policy.named_buffers())
        found["tied"] = self.actor.get_input_embeddings().weight is self.actor.get_output_embeddings().weight
        found["digest"] = self.hashes.start_model
        return history

    run_training = PPOTrainer.train
    fixed = mock.patch("ppo_fast.llm.setup.GenerateSampler", return_value=Fixed())
    with fixed, mock.patch.object(PPOTrainer, "train", run_to_the_end):
        largest.__enter__()
        assert train.train(parsed, *train.resolve(parsed, train_parser)) == 0
    return {**found, "largest": largest.elements}


def tied_model(folder: Path) -> None:
    model = tiny_llama(258)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "model")


COMMANDS = {
    "own critic": (),
    "shared critic in bfloat16": ("--critic", "shared", "--dtype", "bfloat16"),
    "adapters": ("--lora-rank", "2"),
    "given critic": ("--critic-model", "critic"),
    "critic of a run": ("--critic-model", "first/critic"),
    "tied": (),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_under_fsdp_loads_whole_weights_in_the_first_process_only(folder, name):
    if name == "adapters":
        pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    if name == "tied":
        tied_model(folder)
    critic = LlamaForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    critic.save_pretrained(folder / "critic")
    byte_tokenizer().save_pretrained(folder / "critic")
    if name == "critic of a run":
        commanded(folder, ["--out", str(folder / "first")])
        assert (folder / "first" / "critic" / VALUE_HEAD).exists()
    arguments = [str(folder / x) if x.endswith("critic") and x[0] != "-" else x for x in COMMANDS[name]]
    one = commanded(folder, [*arguments, "--out", str(folder / "one")])
    size = 3 if name == "tied" else 2  # three: no weight divides evenly, and the value head has no row for two of them
    fsdp = [*arguments, "--out", str(folder / "several"), "--parallel", "fsdp"]
    tolerance = 4e-2 if "bfloat16" in name else 1e-5  # fsdp gathers bf16 weights, autocast rounds fp32 ones
    for rank, its in enumerate(run(folder, commanded, folder, fsdp, size=size)):
        for here, there in zip(its["history"], one["history"], strict=True):
            assert_close(here, there, tolerance)
        assert_close(its["weights"], one["weights"], tolerance)
        fixed = [{n: b for n, b in x["buffers"].items() if "critic.value_" not in n} for x in (its, one)]
        assert_close(*fixed, 0.0)
        assert_close(its["buffers"], one["buffers"], tolerance)  # those of the scale follow the returns
        assert its["digest"] == one["digest"] != ""
        assert its["tied"] == one["tied"] == (name == "tied")
        embedding = 258 * 32
        if rank == 0:
            assert its["largest"] >= embedding
        else:
            assert its["largest"] <= embedding // size
    saved = [folder / run / "critic" for run in ("one", "several")]
    if name == "adapters":  # which merging needs whole
        assert [path.exists() for path in saved] == [True, False]
    else:
        (here, _), (there, _) = map(load_critic, saved)
        for (key, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
            assert (mine - theirs).abs().max() <= tolerance, key


def unlike_its_configuration(folder: Path) -> None:
    """A checkpoint whose LM head is not tied, with a configuration that says that it is."""
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def test_each_process_loads_whole_weights_when_the_configuration_does_not_describe_them(folder):
    unlike_its_configuration(folder)
    loaded, _ = load_actor(folder / "model")
    assert loaded.get_input_embeddings().weight is not loaded.get_output_embeddings().weight
    one = commanded(folder, [])
    for its in run(folder, commanded, folder, ["--parallel", "fsdp"]):
        assert its["largest"] >= 258 * 32
        assert_close(its["weights"], one["weights"])


def with_trained_adapters(config: PPOConfig) -> tuple[list[dict], dict[str, torch.Tensor], bool]:
    """A run whose actor has trained adapters, and weights in the first process only."""
    import peft

    first = int(os.environ.get("RANK", "0")) == 0
    with torch.device("cpu" if first else "meta"):
        how = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        actor = peft.get_peft_model(tiny_llama(258), how)
    assert has_weights(actor) == first
    trainer = PPOTrainer(config, actor, byte_tokenizer(), ROWS, judge, sampler=Fixed())
    assert isinstance(trainer.reference, AdapterReference)
    history = trainer.train()
    weights = {name: to_full_tensor(p.detach()) for name, p in trainable_state(trainer.policy)}
    return of_training(history), weights, trainer.reference.starts_trained


def test_trained_adapters_are_the_reference_when_other_processes_have_no_weights(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    history, weights, _ = with_trained_adapters(options())
    for its_history, its_weights, starts_trained in run(tmp_path, with_trained_adapters, options(parallel="fsdp")):
        assert starts_trained
        for here, there in zip(its_history, history, strict=True):
            assert_close(here, there)
        assert_close(its_weights, weights)


def refused_by_the_probe(config: PPOConfig) -> str:
    first = int(os.environ["RANK"]) == 0
    with torch.device("cpu" if first else "meta"):
        actor = tiny_llama(258)
    complaint = mock.patch("ppo_fast.llm.models.build.detect_heads", side_effect=UserError("no packed rows"))
    with complaint if first else nullcontext(), pytest.raises(UserError) as error:
        PPOTrainer(config, actor, byte_tokenizer(), ROWS, judge)
    return str(error.value)


def test_an_error_of_the_probe_in_the_first_process_is_raised_in_all(tmp_path):
    found = run(tmp_path, refused_by_the_probe, options(parallel="fsdp", strict=True))
    assert found == ["no packed rows", "no packed rows"]


def built_differently(config: PPOConfig) -> str:
    first = int(os.environ["RANK"]) == 0
    with torch.device("cpu" if first else "meta"):
        actor = tiny_llama(258, hidden=32 if first else 64)
    with pytest.raises(UserError) as error:
        PPOTrainer(config, actor, byte_tokenizer(), ROWS, judge)
    return str(error.value)


def test_models_that_differ_between_processes_are_rejected_when_weights_are_sent(tmp_path):
    for message in run(tmp_path, built_differently, options(parallel="fsdp", kl_coef=0.0)):
        assert "the model of rank 1 differs from that of rank 0 in actor" in message


def test_a_command_under_fsdp_ends_in_all_processes_when_weights_cannot_be_read(folder):
    (folder / "model" / "model.safetensors").unlink()  # only the first process reads it
    begun = time.monotonic()
    done = torchrun(folder, "--parallel", "fsdp")
    assert time.monotonic() - begun < 60
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"ppo-fast: rank {rank}: error: cannot load the model in {folder / 'model'}" in done.stderr


def test_an_actor_without_weights_is_rejected_in_a_single_process(folder):
    actor, tokenizer = load_actor(folder / "model", weights=False)
    with pytest.raises(UserError, match="the actor has no weights: load it"):
        PPOTrainer(options(out=str(folder / "out")), actor, tokenizer, ROWS, judge)
