"""The results of an evaluation in the terminal, and as a page with tables, a file of completions, and a picture."""

import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_fast.common.checkpoint import reported, write_file
from ppo_fast.common.jsonl import as_lines
from ppo_fast.common.plots import can_draw, draw_tokens
from ppo_fast.common.text import escape_control, markdown_table, shortened
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompt, as_text
from ppo_fast.llm.report.evaluation import Evaluation
from ppo_fast.llm.report.progress import SAMPLES_SHOWN

TOKENS_SHOWN = 30  # in the terminal; the file has all


def summary(evaluation: Evaluation) -> str:
    """Format one line: step 10, 64 held-out answers: score 0.53, ..."""
    shown = {
        "score": "score",
        "kl_per_answer": "KL per answer",
        "answer_tokens": "tokens",
        "ended": "ended",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }
    m = evaluation.metrics
    numbers = ", ".join(f"{label} {m[f'eval/{name}']:z.4g}" for name, label in shown.items() if f"eval/{name}" in m)
    return f"step {evaluation.step}, {len(evaluation.rollout)} held-out answers: {numbers}"


@dataclass(frozen=True)
class Sample:
    """A held-out completion."""

    prompt: Prompt
    answer: str
    numbers: dict[str, float]  # score, tokens and, with a reference, the KL in nats

    def row(self) -> dict[str, object]:
        """Return everything by name."""
        return {"prompt": self.prompt, "answer": self.answer, **self.numbers}


def samples(evaluation: Evaluation) -> list[Sample]:
    """List every held-out completion."""
    rollout = evaluation.rollout
    numbers: list[dict[str, float]] = [
        {"score": points, "tokens": tokens}
        for points, tokens in zip(rollout.scores, rollout.completion_lengths, strict=True)
    ]
    if evaluation.kl is not None:
        numbers = [{**row, "kl": kl} for row, kl in zip(numbers, evaluation.kl, strict=True)]
    texts = zip(rollout.columns["prompt"], rollout.completions, numbers, strict=True)
    return [Sample(prompt, answer, row) for prompt, answer, row in texts]


def show(evaluation: Evaluation, console: Console, *, tables: bool = True) -> None:
    """Print the summary, and with `tables` some held-out completions and the explained completion."""
    console.print(Text(summary(evaluation), style="bold"), soft_wrap=True)
    if not tables:
        return
    rows = samples(evaluation)[:SAMPLES_SHOWN]
    table = Table("prompt", "answer", *rows[0].numbers)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        texts = (Text(shortened(text)) for text in (as_text(row.prompt), row.answer))
        table.add_row(*texts, *(f"{x:z.4g}" for x in row.numbers.values()))
    console.print(table)
    explained = evaluation.explained
    if explained is None:
        return
    title = f"an answer of step {evaluation.step} in training, score {explained.score:z.4g}, to: {explained.prompt}"
    console.print(Text(shortened(title)))
    table = Table("token", *explained.numbers)
    for column in table.columns[1:]:
        column.justify = "right"
    for token, *numbers in list(zip(explained.tokens, *explained.numbers.values(), strict=True))[:TOKENS_SHOWN]:
        table.add_row(Text(token), *(f"{x:z.4f}" for x in numbers))
    if len(explained.tokens) > TOKENS_SHOWN:
        table.add_row("...")
    console.print(table)


def write(evaluation: Evaluation, folder: Path, config: PPOConfig) -> None:
    """Write step-N.md with tables, step-N.jsonl with every held-out completion, step-N.png with the explained one."""
    name = folder / f"step-{evaluation.step}"
    with reported(f"the evaluation could not be written to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(name.with_suffix(".jsonl"), as_lines(sample.row() for sample in samples(evaluation)))
        write_file(name.with_suffix(".md"), markdown(evaluation))
    if evaluation.explained is not None and can_draw():
        e = evaluation.explained
        title = f"step {evaluation.step}, score {e.score:z.4g}: {shortened(e.prompt, 100)}"
        draw_tokens(e.tokens, e.numbers, name.with_suffix(".png"), title, clip=(config.clip_low, config.clip_high))


def markdown(evaluation: Evaluation) -> str:
    """Format the evaluation as a page: metrics, some held-out completions, and the explained completion by token."""
    rows = samples(evaluation)[:SAMPLES_SHOWN]
    parts = [
        f"# Evaluation after step {evaluation.step}",
        _table(["metric", "value"], [[name, f"{x:z.6g}"] for name, x in evaluation.metrics.items()]),
        "## Held-out answers",
        _table(
            ["prompt", "answer", *rows[0].numbers],
            [[as_text(row.prompt), row.answer, *(f"{x:z.4g}" for x in row.numbers.values())] for row in rows],
        ),
    ]
    if evaluation.explained is not None:
        e = evaluation.explained
        parts += [
            f"## One answer of step {evaluation.step} in training",
            "The answer with the largest sum of |advantage|: score " + f"{e.score:z.4g}" + ". The reward of a token has"
            " the KL penalty in it (and the score at the last token), the value is what the critic expected, and the"
            " ratio is p(token) after the step over p(token) when it was sampled.",
            f"Prompt: {_escaped(e.prompt)}",
            _table(
                ["token", *e.numbers],
                [
                    [token, *(f"{x:z.4f}" for x in numbers)]
                    for token, *numbers in zip(e.tokens, *e.numbers.values(), strict=True)
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _table(names: list[str], rows: list[list[str]]) -> str:
    return markdown_table(names, [[_escaped(x) for x in row] for row in rows])


def _escaped(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", escape_control(" ".join(text.split())))
