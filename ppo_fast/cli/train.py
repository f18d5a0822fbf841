"""ppo-fast train: resolve the options, load data and models, and run the trainer."""

import argparse
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.common.errors import UserError
from ppo_fast.common.launched import process_count, this_rank
from ppo_fast.common.lock import absolute, locked
from ppo_fast.common.options import options, read_yaml
from ppo_fast.llm.config import DtypeOption, PPOConfig, options_of

if TYPE_CHECKING:  # they import PyTorch and transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ppo_fast.llm.distributed import Distributed
    from ppo_fast.llm.models.critic import Critic
    from ppo_fast.llm.models.reward_model import RewardModel
    from ppo_fast.llm.reward.scoring import RewardFunction
    from ppo_fast.llm.trainer import PPOTrainer


@dataclass(frozen=True)
class RunOptions:
    """What a run needs besides PPOConfig; a configuration file may contain it, too."""

    model: str
    prompts: str = ""
    prompt_field: str = "prompt"
    chat: bool = False
    chat_template_kwargs: str | None = None
    eval_prompts: str | None = None
    reward: list[str] = field(default_factory=list)
    reward_model: list[str] = field(default_factory=list)
    reward_weight: list[float] | None = None
    critic_model: str | None = None
    pad_token: str | None = None
    trust_remote_code: bool = False


RUN_OPTIONS = [option.name for option in dataclasses.fields(RunOptions)]


def resolve(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, *, required: Sequence[str] = ("model", "prompts")
) -> tuple[PPOConfig, RunOptions]:
    """Return PPOConfig and the run options: from the command line, else the configuration file, else the defaults.

    `required` names the run options without which the parser ends with an error.
    """
    fields = options(PPOConfig)
    given, file = vars(arguments), {}
    if "config" in given:
        file = read_yaml(arguments.config, [*RUN_OPTIONS, *fields])
        for action in parser._actions:
            if action.dest in RUN_OPTIONS and file.get(action.dest) is not None:
                file[action.dest] = _from_file(action, file[action.dest], f"{arguments.config}: {action.dest}")
    values = vars(argparse.Namespace(**{**file, **given}))  # argparse and `_from_file` have checked the types
    run = {name: values[name] for name in RUN_OPTIONS if values.get(name) is not None}
    for name in required:
        if name not in run:
            parser.error(f"--{name} is missing (on the command line, or as `{name}:` in the file of --config)")
    return options_of({name: value for name, value in values.items() if name in fields}), RunOptions(**run)


def _from_file(action: argparse.Action, value: object, where: str) -> object:
    """Check a value of a configuration file as the command line would: its type, and a list where one is expected.

    An int is accepted as a float.
    """
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    kind = bool if isinstance(action, argparse.BooleanOptionalAction) else action.type or str
    assert isinstance(kind, type)  # not a function: our own options have bool, float or str
    values = value if several and isinstance(value, list) else [value]
    for x in values:
        if not isinstance(x, (float, int) if kind is float else kind) or (isinstance(x, bool) and kind is not bool):
            raise UserError(f"{where} must be of type {kind.__name__}{' or a list of such' * several}, got {x!r}")
    return values if several else value


def load_rewards(specs: Sequence[str]) -> "dict[str, RewardFunction]":
    """Load the reward functions, by their names in metrics: the name of the function alone where it is unique.

    Raises:
        UserError: one is given twice, or cannot be loaded.
    """
    from ppo_fast.llm.reward.function import load_reward

    for spec in specs:
        if specs.count(spec) > 1:
            raise UserError(f"--reward {spec} is given twice: give it a weight with --reward-weight")
    functions = [load_reward(spec) for spec in specs]
    names = [spec.partition("(")[0].rpartition(":")[2].strip() for spec in specs]
    for number, function in enumerate(functions):
        if names[number] == type(function).__name__:  # an object such as a Pool, which has the name of its function
            names[number] = getattr(function, "__name__", names[number])
    return {
        name if names.count(name) == 1 else spec: function
        for name, spec, function in zip(names, specs, functions, strict=True)
    }


def _let_segments_grow() -> None:
    """Configure PyTorch's allocator with segments that can grow, unless the user has configured it.

    Packs differ in size from step to step, and segments of fixed sizes leave gaps. The allocator reads this at its
    first use.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def train(arguments: argparse.Namespace, config: PPOConfig, run: RunOptions) -> int:
    """Run `ppo-fast train`: read the inputs, train, and print where the results are. Returns the exit status."""
    _let_segments_grow()
    if arguments.allow_changes and not arguments.resume:
        raise UserError("--allow-changes belongs to --resume: a run that starts has nothing to differ from")
    if arguments.resume and config.out is None:
        raise UserError("--resume needs --out, the folder of the run to resume")
    if config.out is not None:  # a reward's module may change the working directory
        config = dataclasses.replace(config, out=str(absolute(config.out)))
    with ExitStack() as stack:
        claim = functools.partial(_claim, stack, arguments, config)
        if process_count() > 1:
            from ppo_fast.llm.distributed import init_distributed

            # first: rewards and models that ask for "cuda" must find this process's own GPU
            distributed = init_distributed(config)
            given = {"--resume": arguments.resume, "--allow-changes": arguments.allow_changes}
            distributed.check_equal({**given, "whether --critic-model is given": run.critic_model is not None})
            distributed.run_on_main(claim)
        else:
            claim()
        if arguments.resume and config.dtype == "auto":
            config = dataclasses.replace(config, dtype=_dtype_of_run(Path(str(config.out))))
        return _train(arguments, config, run)


def _dtype_of_run(out: Path) -> DtypeOption:
    """Return the dtype of an earlier run in OUT: a measurement here may choose another one. "auto" without a run."""
    file = out / "config.yaml"
    if not file.exists():
        return "auto"
    written = read_yaml(file, [*RUN_OPTIONS, *options(PPOConfig)])
    return options_of({"dtype": written.get("dtype", "auto")}).dtype


def _holds_run(out: Path) -> bool:
    """Check whether OUT has a run or parts of one; a run that ended before its first step has no metrics."""
    metrics = out / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
        (out / name).exists() for name in ("checkpoints", "model", "best")
    )


def _claim(stack: ExitStack, arguments: argparse.Namespace, config: PPOConfig) -> None:
    """Lock OUT until the stack is closed, and reject one that holds another run."""
    stack.enter_context(locked(config.out))
    if config.out is not None and (Path(config.out) / "config.json").exists():
        raise UserError(f"{config.out} holds a run of `ppo-fast classic`: choose another --out")
    if config.out is not None and _holds_run(Path(config.out)) and not (arguments.overwrite or arguments.resume):
        raise UserError(
            f"{config.out} already holds a run; choose another --out, continue it with --resume, or replace it with"
            " --overwrite"
        )


def _train(arguments: argparse.Namespace, config: PPOConfig, run: RunOptions) -> int:
    from ppo_fast.common.console import console_of, say

    size = process_count()
    console = console_of(quiet=config.quiet or (size > 1 and this_rank(size) > 0))
    say(console, f"reading {run.prompts}; importing PyTorch and transformers takes some seconds")
    from ppo_fast.llm.data import read_named_prompts, set_template_options

    read = functools.partial(read_named_prompts, prompt_field=run.prompt_field, chat=run.chat)
    rows, prompts = read(run.prompts)
    held_out, eval_prompts = read(run.eval_prompts) if run.eval_prompts is not None else (None, None)
    rewards = load_rewards(run.reward)
    reward_weights = weights_of_rewards(rewards, run)
    if sys.flags.optimize > 1:
        raise UserError("transformers needs docstrings, which python -OO and PYTHONOPTIMIZE=2 remove: run without them")
    # transformers takes seconds to import: bad input is reported before
    from ppo_fast.llm.distributed import init_distributed
    from ppo_fast.llm.models.loading import load_actor
    from ppo_fast.llm.sharding import load_on_main
    from ppo_fast.llm.trainer import PPOTrainer

    distributed = init_distributed(config)  # before models are loaded: a device that does not exist is reported at once
    say(console, f"loading {run.model}")
    sources = Sources(distributed, code=run.trust_remote_code)
    path = sources.find(run.model, "model")
    load = functools.partial(load_actor, path, pad_token=run.pad_token, trust_remote_code=run.trust_remote_code)
    actor, tokenizer = load_on_main(distributed, lambda weights: load(weights=weights))
    if run.chat_template_kwargs is not None:
        set_template_options(tokenizer, run.chat_template_kwargs)
    judges = load_reward_models(run.reward_model, sources)
    rewards |= judges
    critic = None if run.critic_model is None else load_given_critic(run.critic_model, sources, actor, tokenizer)
    say(console, f"{len(rows)} prompts; checking how the models are computed and sampled")
    trainer = PPOTrainer(
        config, actor, tokenizer, rows, rewards, reward_weights=reward_weights, critic=critic, eval_rows=held_out
    )
    for judge in judges.values():  # after the trainer has hashed their weights
        judge.follow_dtype(trainer.config)
    trainer.run_options = dataclasses.asdict(sources.pinned(run)) | {"prompts": prompts, "eval_prompts": eval_prompts}
    if arguments.resume:
        trainer.resume(allow_changes=arguments.allow_changes)
    trainer.train()
    if trainer.stopped_by is not None:
        stopped = f"stopped by {trainer.stopped_by} after step {trainer.steps_done}"
        say(console, f"{stopped}; --resume continues it in {config.out}")
        return 128 + signal.Signals[trainer.stopped_by].value
    if config.out is not None and trainer.distributed.is_main:
        _draw_curves(trainer, Path(run.prompts).name, Path(config.out))
        names = sorted(path.name for path in Path(config.out).iterdir() if not path.name.startswith("."))
        say(console, f"{', '.join(names)} are in {config.out}")
    return 0


def weights_of_rewards(rewards: "dict[str, RewardFunction]", run: RunOptions) -> dict[str, float]:
    """Return the weight of each reward function and reward model, by name."""
    names = [*rewards, *run.reward_model]
    weights = run.reward_weight or [1.0] * len(names)
    if not names:
        raise UserError("nothing to train for: give --reward, --reward-model, or both")
    if len(weights) != len(names):
        raise UserError(f"--reward-weight has {len(weights)} numbers for {len(names)} rewards")
    return dict(zip(names, weights, strict=True))


class Sources:
    """Where the models of a run are, and which commit of the hub each is from.

    Args:
        distributed: the processes of the run; the main one downloads.
        code: download Python files, too.
    """

    def __init__(self, distributed: "Distributed", *, code: bool) -> None:
        self.distributed, self.code = distributed, code
        self.names: dict[str, str] = {}

    def find(self, name: str, what: str) -> Path:
        """Return the path of a folder or .gguf file, after a download if it is a name on the hub."""
        from ppo_fast.llm.hub import find_model

        find = functools.partial(find_model, name, what, code=self.code)
        source = self.distributed.run_on_main(find)
        if not source.path.exists() and not self.distributed.is_main:  # the main process is on another machine
            source = find()
        self.names[name] = source.name
        return source.path

    def pinned(self, run: RunOptions) -> RunOptions:
        """Return the options with the commits of models from the hub."""
        return dataclasses.replace(
            run,
            model=self.names[run.model],
            reward_model=[self.names[name] for name in run.reward_model],
            critic_model=None if run.critic_model is None else self.names[run.critic_model],
        )


def load_reward_models(names: Sequence[str], sources: Sources) -> dict[str, "RewardModel"]:
    """Load the sequence classifiers of --reward-model, by the names that are given."""
    from ppo_fast.llm.models.reward_model import RewardModel, load_reward_model

    device = sources.distributed.device
    return {name: RewardModel(*load_reward_model(sources.find(name, "reward model")), device=device) for name in names}


def load_given_critic(
    name: str, sources: Sources, actor: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "Critic":
    """Load the critic of --critic-model; collective.

    Raises:
        UserError: it belongs to another model or tokenizer, or cannot be loaded.
    """
    from ppo_fast.llm.models.critic_folder import load_critic
    from ppo_fast.llm.models.critic_origin import check_origin
    from ppo_fast.llm.sharding import load_on_main

    path = sources.find(name, "critic")
    sources.distributed.run_with_weights(lambda: check_origin(path, actor, tokenizer), of=actor)
    return load_on_main(sources.distributed, lambda weights: load_critic(path, weights=weights))[0]


def _draw_curves(trainer: "PPOTrainer", prompts: str, out: Path) -> None:
    from ppo_fast.common.plots import can_draw, draw_learning_curves

    if can_draw():
        draw_learning_curves(trainer.recorded, out / "learning_curves.png", f"PPO on {prompts}")
