"""The command line: ppo-fast train, ppo-fast doctor."""

import argparse
import dataclasses
import functools
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ppo_fast.config import PPOConfig, add_option, nearest, options_of, read_yaml
from ppo_fast.errors import UserError, plain_warnings
from ppo_fast.launched import process_count, this_rank
from ppo_fast.lock import absolute, locked
from ppo_fast.threads import wait_passively

# What stands around the fields of PPOConfig, with its defaults; a configuration file may hold it, too
RUN_OPTIONS: dict[str, Any] = {
    "model": None,
    "prompts": None,
    "prompt_field": "prompt",
    "chat": False,
    "eval_prompts": None,
    "reward": [],
    "reward_model": [],
    "reward_weight": None,
    "critic_model": None,
    "pad_token": None,
    "trust_remote_code": False,
}


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest option when one is unknown."""

    def refuse_unknown(self, unknown: list[str]) -> None:
        options = [name for action in self._actions for name in action.option_strings]
        self.error(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")


def build_parser() -> tuple[_Parser, _Parser]:
    """The whole parser, and that of `train`, whose options are the fields of PPOConfig and what stands around it."""
    parser = _Parser(prog="ppo-fast", description="PPO for language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model with PPO on prompts and a reward function",
        description="Train a model with PPO on prompts and a reward function.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given comes from the configuration file, or by default
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of these options, such as OUT/config.yaml of an earlier run; the command line wins",
    )
    train.add_argument(
        "--model", metavar="DIR", help="folder of a causal language model and tokenizer (required, no default)"
    )
    train.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON Lines or .parquet file, folder of .parquet files, or folder that save_to_disk of Hugging Face's"
        " datasets wrote (required, no default)",
    )
    train.add_argument(
        "--prompt-field",
        metavar="NAME",
        help="field of the prompt, a text, or a list of messages for the chat template (default: prompt)",
    )
    train.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="plain prompts become a user's message, too, and go through the tokenizer's chat template (default: no)",
    )
    train.add_argument(
        "--eval-prompts",
        metavar="FILE",
        help="held-out prompts to evaluate on, read as --prompts are (default: none, no evaluation)",
    )
    train.add_argument(
        "--reward",
        action="append",
        metavar="MODULE:FUNCTION",
        help="reward function f(prompts, completions, **columns), as module:function or file.py:function, perhaps with"
        " (option=value, argument=column), such as ppo_fast.rewards:f1(reference=answer); may be repeated, the numbers"
        " are added (default: none)",
    )
    train.add_argument(
        "--reward-model",
        action="append",
        metavar="DIR",
        help="folder of a sequence classifier with one output and its tokenizer; may be repeated (default: none)",
    )
    train.add_argument(
        "--reward-weight",
        type=float,
        nargs="+",
        metavar="FLOAT",
        help="a factor for each --reward, then for each --reward-model (default: 1 each)",
    )
    train.add_argument(
        "--critic-model",
        metavar="DIR",
        help="folder of a reward model that the critic starts from (default: actor)",
    )
    train.add_argument(
        "--pad-token", metavar="TOKEN", help="a token of the vocabulary to pad with (default: the tokenizer's own)"
    )
    train.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run Python files that lie in the folder of --model (default: no)",
    )
    earlier = train.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier run in OUT")
    earlier.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the newest checkpoint in OUT, or start if there is none yet; with the same options and data",
    )
    train.add_argument(
        "--allow-changes",
        action="store_true",
        default=False,
        help="with --resume: continue although prompts, rewards or tokenizer have changed since the checkpoint",
    )
    for option in dataclasses.fields(PPOConfig):
        add_option(train, option)
    commands.add_parser(
        "compile", help="compile the loops of numba ahead of time, before many processes start together"
    )
    commands.add_parser("classic", help="train on a Gymnasium environment: ppo-fast classic --help", add_help=False)
    label = commands.add_parser("label", help="choose the better of two answers, to train a reward model on")
    label.add_argument("answers", metavar="FILE", help='JSON Lines of {"prompt": text, "answers": [text, text]}')
    label.add_argument("--out", required=True, metavar="FILE", help="JSON Lines of pairs, to which choices are added")
    recipe = commands.add_parser("recipe", help="copy a configuration and a few prompts for a common task")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="which; without it they are listed")
    recipe.add_argument("folder", nargs="?", metavar="FOLDER", help="where to (default: NAME)")
    memory = commands.add_parser(
        "memory",
        help="calculate the peak GPU memory of a run, by phase and part",
        description="Calculate the peak GPU memory of a run, by phase and part. All options of the trainer are taken.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    memory.add_argument(
        "--model", metavar="DIR", required=True, help="folder with the model's config.json; weights are not read"
    )
    memory.add_argument(
        "--prompt-tokens", type=int, default=256, metavar="INT", help="longest prompt, in tokens (default: 256)"
    )
    memory.add_argument(
        "--gpu-gib", type=float, default=None, metavar="FLOAT", help="memory of the GPU in GiB (default: enough)"
    )
    for option in dataclasses.fields(PPOConfig):
        add_option(memory, option)
    doctor = commands.add_parser("doctor", help="say what this machine will run, and check every operation on it")
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same as JSON, with a hash of each compiled kernel")
    form.add_argument("--report", action="store_true", help="print a report for an issue, with these hashes")
    return parser, train


def resolve(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[PPOConfig, dict[str, Any]]:
    """PPOConfig and the options around it: the command line's, else the configuration file's, else the defaults."""
    fields = {option.name for option in dataclasses.fields(PPOConfig)}
    given, file = vars(arguments), {}
    if "config" in given:
        file = read_yaml(arguments.config, [*RUN_OPTIONS, *fields])
        for action in parser._actions:
            if action.dest in RUN_OPTIONS and file.get(action.dest) is not None:
                file[action.dest] = _from_file(action, file[action.dest], f"{arguments.config}: {action.dest}")
    values = {**file, **given}
    run = {name: default if values.get(name) is None else values[name] for name, default in RUN_OPTIONS.items()}
    for name in ("model", "prompts"):
        if run[name] is None:
            parser.error(f"--{name} is missing (on the command line, or as `{name}:` in the file of --config)")
    return options_of({name: value for name, value in values.items() if name in fields}), run


def _from_file(action: argparse.Action, value: Any, where: str) -> Any:
    """A value of a configuration file as the command line would have made it: its type, and a list where it takes one.

    1 for 1.0 will do.
    """
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    kind = bool if isinstance(action, argparse.BooleanOptionalAction) else action.type or str
    assert isinstance(kind, type)
    values = value if several and isinstance(value, list) else [value]
    for x in values:
        if not isinstance(x, (float, int) if kind is float else kind) or (isinstance(x, bool) and kind is not bool):
            raise UserError(f"{where} must be of type {kind.__name__}{' or a list of such' * several}, got {x!r}")
    return values if several else value


def _load_rewards(specs: Sequence[str]) -> dict[str, Any]:
    """The reward functions by their names in metrics: the function's name alone where no other has it.

    Raises:
        UserError: one is given twice, or cannot be loaded.
    """
    from ppo_fast.rewards.spec import load_reward

    for spec in specs:
        if specs.count(spec) > 1:
            raise UserError(f"--reward {spec} is given twice: give it a weight with --reward-weight")
    functions = [load_reward(spec) for spec in specs]
    names = [spec.partition("(")[0].rpartition(":")[2].strip() for spec in specs]
    for number, function in enumerate(functions):
        if names[number] == type(function).__name__:  # an object, such as a Pool, whose own name is its function's
            names[number] = getattr(function, "__name__", names[number])
    return {
        name if names.count(name) == 1 else spec: function
        for name, spec, function in zip(names, specs, functions, strict=True)
    }


def _let_segments_grow() -> None:
    """Asks PyTorch's allocator for segments that grow, unless the user chose: packs differ in size from step to step,
    and segments of fixed sizes leave gaps. The allocator reads this at its first use."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def train(arguments: argparse.Namespace, config: PPOConfig, run: dict[str, Any]) -> int:
    """Reads what the options name, trains, and says where the results are; the exit status."""
    _let_segments_grow()
    if arguments.allow_changes and not arguments.resume:
        raise UserError("--allow-changes belongs to --resume: a run that starts has nothing to differ from")
    if arguments.resume and config.out is None:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    if config.out is not None:  # a reward's module may change the working directory
        config = dataclasses.replace(config, out=str(absolute(config.out)))
    with ExitStack() as stack:
        claim = functools.partial(_claim, stack, arguments, config)
        if process_count() > 1:
            from ppo_fast.parallel import start

            # first: rewards and models that ask for "cuda" must find this process's own GPU
            world = start(config)
            given = {"--resume": arguments.resume, "--allow-changes": arguments.allow_changes}
            world.agree({**given, "whether --critic-model is given": run["critic_model"] is not None})
            world.first_says(claim)
        else:
            claim()
        if arguments.resume and config.dtype == "auto":
            config = dataclasses.replace(config, dtype=_dtype_of_run(Path(str(config.out))))
        return _train(arguments, config, run)


def _dtype_of_run(out: Path) -> str:
    """The dtype that an earlier run in OUT has chosen, since a second measurement may choose another one; else auto."""
    file = out / "config.yaml"
    fields = [option.name for option in dataclasses.fields(PPOConfig)]
    return read_yaml(file, [*RUN_OPTIONS, *fields]).get("dtype", "auto") if file.exists() else "auto"


def _holds_run(out: Path) -> bool:
    """Whether OUT holds a run, or what was left of it; one that ended before its first step left no metrics."""
    metrics = out / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
        (out / name).exists() for name in ("checkpoints", "model", "best")
    )


def _claim(stack: ExitStack, arguments: argparse.Namespace, config: PPOConfig) -> None:
    """Locks OUT until the stack is closed, and refuses one that holds another run."""
    stack.enter_context(locked(config.out))
    if config.out is not None and (Path(config.out) / "config.json").exists():
        raise UserError(f"{config.out} holds a run of `ppo-fast classic`: choose another --out")
    if config.out is not None and _holds_run(Path(config.out)) and not (arguments.overwrite or arguments.resume):
        raise UserError(
            f"{config.out} already holds a run; choose another --out, continue it with --resume, or replace it with"
            " --overwrite"
        )


def _train(arguments: argparse.Namespace, config: PPOConfig, run: dict[str, Any]) -> int:
    from ppo_fast.console import console_of, say

    size = process_count()
    console = console_of(quiet=config.quiet or (size > 1 and this_rank(size) > 0))
    say(console, f"reading {run['prompts']}; importing PyTorch and transformers takes some seconds")
    from ppo_fast.data import read_prompts

    rows, held_out = (
        None if path is None else read_prompts(path, run["prompt_field"], chat=run["chat"])
        for path in (run["prompts"], run["eval_prompts"])
    )
    assert rows is not None
    rewards = _load_rewards(run["reward"])
    names = [*rewards, *run["reward_model"]]
    weights = run["reward_weight"] or [1.0] * len(names)
    if not names:
        raise UserError("nothing to train for: give --reward, --reward-model, or both")
    if len(weights) != len(names):
        raise UserError(f"--reward-weight has {len(weights)} numbers for {len(names)} rewards")
    if sys.flags.optimize > 1:
        raise UserError("transformers needs docstrings, which python -OO and PYTHONOPTIMIZE=2 remove: run without them")
    # transformers takes seconds to import: bad input is reported before
    import torch

    from ppo_fast.models import Critic, load_actor, load_reward_model
    from ppo_fast.parallel import load_on_first, start
    from ppo_fast.reward import RewardModel
    from ppo_fast.trainer import PPOTrainer

    world = start(config)  # before models are loaded: a device that does not exist is reported at once
    say(console, f"loading {run['model']}")
    how = {name: run[name] for name in ("pad_token", "trust_remote_code")}
    actor, tokenizer = load_on_first(world, lambda weights: load_actor(run["model"], weights=weights, **how))
    for folder in run["reward_model"]:
        model, its_tokenizer = load_reward_model(folder)
        rewards[folder] = RewardModel(model, its_tokenizer, device=world.device)
    critic = None
    if run["critic_model"] is not None:
        folder = run["critic_model"]
        critic_model, _ = load_on_first(
            world, lambda weights: load_reward_model(folder, weights=weights, dtype=torch.float32)
        )
        critic = Critic.from_reward_model(critic_model)
    reward_weights = dict(zip(names, weights, strict=True))
    say(console, f"{len(rows)} prompts; checking how the models are computed and sampled")
    trainer = PPOTrainer(
        config, actor, tokenizer, rows, rewards, reward_weights=reward_weights, critic=critic, eval_rows=held_out
    )
    trainer.run_options = run
    if arguments.resume:
        trainer.resume(allow_changes=arguments.allow_changes)
    trainer.train()
    if trainer.stopped_by is not None:
        stopped = f"stopped by {trainer.stopped_by} after step {trainer.steps_done}"
        say(console, f"{stopped}; --resume continues it in {config.out}")
        return 128 + signal.Signals[trainer.stopped_by].value
    if config.out is None or not trainer.world.first:
        return 0
    from ppo_fast.plots import can_draw, draw_learning_curves

    if can_draw():
        title = f"PPO on {Path(run['prompts']).name}"
        draw_learning_curves(trainer.recorded, Path(config.out) / "learning_curves.png", title)
    names = sorted(path.name for path in Path(config.out).iterdir() if not path.name.startswith("."))
    say(console, f"{', '.join(names)} are in {config.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 after bad input, 2 after a bad command line, 130 after Ctrl-C,
    143 after SIGTERM."""
    wait_passively()
    plain_warnings()
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["classic"]:  # its options need Gymnasium, which nobody else should have to install
        return _classic(given[1:])
    parser, train_parser = build_parser()
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        (train_parser if arguments.command == "train" else parser).refuse_unknown(unknown)
    if arguments.command == "doctor":
        from ppo_fast import doctor

        return doctor.main(as_json=arguments.json, report=arguments.report)
    others = {"label": _label, "recipe": _recipe, "memory": _memory, "compile": _compile}
    if arguments.command in others:
        try:
            return others[arguments.command](arguments)
        except UserError as error:
            print(f"ppo-fast: error: {error}", file=sys.stderr)
            return 1
    name = "ppo-fast"
    try:
        if (size := process_count()) > 1:
            name = f"ppo-fast: rank {this_rank(size)}"
        status = train(arguments, *resolve(arguments, train_parser))
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        status = 130
    except RuntimeError as error:
        from ppo_fast.parallel import why_lost

        reason = why_lost(error)
        if not reason:
            raise
        print(f"{name}: error: {reason}", file=sys.stderr)
        status = 1
    from ppo_fast.parallel import leave

    leave(status)
    return status


def _classic(given: list[str]) -> int:
    try:
        from ppo_fast import classic
    except ImportError as error:
        print(f"ppo-fast: error: classic RL needs the extra ppo_fast[classic]: {error}", file=sys.stderr)
        return 1
    parser = _Parser(prog="ppo-fast classic", description="PPO on a Gymnasium environment.", allow_abbrev=False)
    classic.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        parser.refuse_unknown(unknown)
    try:
        return classic.main(arguments)
    except UserError as error:
        print(f"ppo-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ppo-fast: stopped", file=sys.stderr)
        return 130


def _label(arguments: argparse.Namespace) -> int:
    print(f"reading {arguments.answers}; importing transformers takes some seconds", flush=True)
    from ppo_fast.label import label

    label(arguments.answers, arguments.out)
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    from ppo_fast import memory
    from ppo_fast.models import load_model_config

    fields = {option.name for option in dataclasses.fields(PPOConfig)}
    config = options_of({name: value for name, value in vars(arguments).items() if name in fields})
    gib = arguments.gpu_gib
    if gib is not None and not 0 < gib < float("inf"):
        raise UserError(f"--gpu-gib must be a number above 0, got {gib}")
    if config.dtype == "auto":  # which GPUs of compute capability 8.0 and newer compute in
        config = dataclasses.replace(config, dtype="bfloat16")
    bytes_ = None if gib is None else round(gib * 2**30)
    print(memory.table(load_model_config(arguments.model), config, arguments.prompt_tokens, bytes_))
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    from ppo_fast import doctor

    doctor.compile_loops()
    return 0


def _recipe(arguments: argparse.Namespace) -> int:
    from ppo_fast import recipes

    if arguments.name is None:
        for name in recipes.NAMES:
            print(f"{name:20}{recipes.describe(name)}")
        return 0
    written = recipes.copy(arguments.name, arguments.folder or arguments.name)
    config = written[0]
    command = f"ppo-fast train --config {shlex.quote(str(config))} --model DIR --out runs/first"
    print(f"{', '.join(path.name for path in written)} are in {config.parent}; {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
