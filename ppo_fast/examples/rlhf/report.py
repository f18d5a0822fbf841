"""Phase 5: before and after on held-out prompts, as a table, a page and pictures."""

import json
import statistics
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ppo_fast.common.device import pick_device
from ppo_fast.common.jsonl import read_rows
from ppo_fast.common.plots import draw_learning_curves
from ppo_fast.common.text import markdown_table, shortened
from ppo_fast.examples.rlhf.common import Reward, Settings, held_out_stretches, load_supervised, rewards_of
from ppo_fast.examples.rlhf.judge import repetition
from ppo_fast.examples.rlhf.text import ANSWER_TOKENS
from ppo_fast.llm.generate import generate
from ppo_fast.llm.models.weights import no_loading_bars
from ppo_fast.llm.report.evaluation import distinct
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.rewards import Fluency

SHOWN = {
    "reward_model": "reward model (0: real text)",
    "reward_model_spread": "  its standard deviation over answers",
    "judge": "judge: n-grams of unseen text (nats per token)",
    "coherence": "coherence",
    "fluency": "log-likelihood under the supervised model",
    "kl": "KL to the supervised model (nats per answer)",
    "tokens": "tokens per answer",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU (0 to 100, less is more varied)",
    "repetition": "repeated 3-grams in an answer",
}
SAMPLES = 6
BLEU_ANSWERS = 64
Row = dict[str, float | None]  # of metrics.jsonl


class Report(TypedDict):
    """The contents of report.json; the numbers of models and texts are those of SHOWN."""

    supervised: dict[str, float]
    reward_model: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    real: dict[str, float]
    samples: list[dict[str, str]]
    seconds: NotRequired[dict[str, float]]  # of each phase
    sweep: NotRequired[dict[str, Row]]  # weight of the KL penalty -> its last evaluation


def compare(out: Path, parts: dict[str, list[str]], settings: Settings) -> Report:
    """Evaluate answers of the supervised model, of the trained one, and of the text itself in the same way."""
    rewards, _ = rewards_of(out, parts, settings)
    device = pick_device(settings.device)
    with no_loading_bars():
        before, tokenizer = load_supervised(out)
        after: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out / "ppo" / "model")
    places = held_out_stretches(tokenizer, parts, settings)
    prompts = [place.prompt for place in places]
    supervised, reward_model = (
        json.loads((out / name / "result.json").read_text(encoding="utf-8")) for name in ("supervised", "reward_model")
    )
    numbers, texts = {}, {}
    for name, model in (("before", nn.Module.to(before, device)), ("after", nn.Module.to(after, device))):
        torch.manual_seed(settings.seed + 7)
        ids = tokenizer(prompts)["input_ids"]
        answers = generate(model.eval(), tokenizer, ids, SamplingParams(max_new_tokens=ANSWER_TOKENS))
        texts[name] = tokenizer.batch_decode(answers.ids, skip_special_tokens=True)
        numbers[name] = evaluate(prompts, texts[name], answers.ids, rewards)
        own = Fluency(model, tokenizer, same_tokens=True)(prompts, texts[name], answers.ids)
        first = Fluency(before, tokenizer, same_tokens=True)(prompts, texts[name], answers.ids)
        lengths = list(map(len, answers.ids))
        numbers[name]["kl"] = statistics.mean((a - b) * n for a, b, n in zip(own, first, lengths, strict=True))
    real = [place.follows for place in places]
    return {
        "supervised": supervised,
        "reward_model": reward_model,
        "before": numbers["before"],
        "after": numbers["after"],
        "real": evaluate(prompts, real, tokenizer(real)["input_ids"], rewards),
        "samples": [
            {"prompt": p, "before": b, "after": a}
            for p, b, a in list(zip(prompts, texts["before"], texts["after"], strict=True))[:SAMPLES]
        ],
    }


def evaluate(
    prompts: list[str], texts: list[str], ids: list[list[int]], rewards: dict[str, Reward]
) -> dict[str, float]:
    """All numbers of the table except KL."""
    scores = rewards["reward_model"](prompts, texts)
    others = {name: rewards[name](prompts, texts, ids) for name in ("judge", "coherence", "fluency")}
    return {
        "reward_model": statistics.mean(scores),
        "reward_model_spread": statistics.pstdev(scores),
        **{name: statistics.mean(values) for name, values in others.items()},
        "tokens": statistics.mean(map(len, ids)),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "self_bleu": self_bleu(texts[:BLEU_ANSWERS]),
        "repetition": statistics.mean(map(repetition, ids)),
    }


def self_bleu(texts: list[str]) -> float:
    """Mean BLEU of each text against all others (Zhu et al. 2018), by sacrebleu."""
    from sacrebleu import sentence_bleu

    scores = [sentence_bleu(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts) if text.strip()]
    return statistics.mean(scores) if scores else 0.0


def show(found: Report, console: Console) -> None:
    """The table, and some answers side by side."""
    table = Table("held-out prompts", "real text", "before PPO", "after PPO")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _rows(found):
        table.add_row(*row)
    console.print(table)
    samples = Table("prompt", "before PPO", "after PPO", show_lines=True)
    for sample in found["samples"]:
        samples.add_row(*(Text(shortened(sample[name])) for name in ("prompt", "before", "after")))
    console.print(samples)


def _rows(found: Report) -> list[tuple[str, ...]]:
    columns = found["real"], found["before"], found["after"]
    return [
        (label, *(f"{numbers[name]:z.3f}" if name in numbers else "-" for numbers in columns))
        for name, label in SHOWN.items()
    ]


def write(out: Path, found: Report, settings: Settings) -> None:
    """report.json, report.md, learning_curves.png, reward_against_kl.png and, after a sweep, sweep.png."""
    history = read_rows(out / "ppo" / "metrics.jsonl")
    draw_learning_curves(history, out / "learning_curves.png", "PPO against the reward model")
    draw_against_kl({"PPO": history}, out / "reward_against_kl.png")
    runs = {
        f"{coefficient:g}": read_rows(out / "sweep" / f"{coefficient:g}" / "metrics.jsonl")
        for coefficient in settings.sweep
    }
    if runs:
        draw_against_kl(runs, out / "sweep.png")
        found["sweep"] = {name: _last_evaluation(rows) for name, rows in runs.items()}
    (out / "report.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_page(found), encoding="utf-8")


def _last_evaluation(rows: list[Row]) -> Row:
    return [{k: v for k, v in row.items() if k.startswith("eval/")} for row in rows if "eval/score" in row][-1]


def _page(found: Report) -> str:
    table = markdown_table(("held-out prompts", "real text", "before PPO", "after PPO"), _rows(found))
    ranks = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in found["reward_model"].items())
    parts = [
        "# RLHF on real text",
        f"Held-out perplexity of the supervised model: {found['supervised']['held_out_perplexity']:.1f} per token,"
        f" {found['supervised']['parameters']} parameters.",
        f"Held-out pairs that the reward model ranks right: {ranks}.",
        table,
        "![learning curves](learning_curves.png)",
        "![reward and judge against KL](reward_against_kl.png)",
        *(["![the same for several weights of the KL penalty](sweep.png)"] if "sweep" in found else []),
        "## Samples",
        *(
            "\n\n".join(f"**{name}**\n\n```text\n{sample[name]}\n```" for name in ("prompt", "before", "after"))
            for sample in found["samples"]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def draw_against_kl(runs: dict[str, list[Row]], path: Path) -> None:
    """Reward model and judge over KL, one line for each run, a point for each evaluation (Gao et al. 2022)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {
        "eval/reward/reward_model": "what was trained for: the reward model",
        "eval/reward/judge": "what was not: n-grams of unseen text (nats per token)",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for label, rows in runs.items():
            points = [
                (row["eval/kl_per_answer"], row[name]) for row in rows if row.get("eval/kl_per_answer") is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("KL to the supervised model (nats per answer)")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0].legend(title="weight of the KL penalty", fontsize=8)
    figure.savefig(path, dpi=120)
