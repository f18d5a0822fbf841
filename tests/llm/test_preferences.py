"""Pairs, the Bradley-Terry loss, the reward model that learns them, and the person who makes them."""

import gzip
import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from support.tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from ppo_fast.cli.commands import main
from ppo_fast.common.errors import NonFiniteError, UserError
from ppo_fast.llm.models.reward_model import RewardModel, load_reward_model
from ppo_fast.llm.preferences.label import label
from ppo_fast.llm.preferences.reward_model import (
    Pair,
    accuracy,
    bradley_terry_loss,
    calibrate,
    pair_loss,
    read_pairs,
    train_reward_model,
    write_pairs,
)


def classifier(seed: int = 0, labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = tiny_llama(258).config
    config.num_labels = labels
    return LlamaForSequenceClassification(config).eval()


def vowel_pairs(count: int) -> list[Pair]:
    """Answers of vowels are better than answers of consonants."""
    letters = torch.Generator().manual_seed(1)

    def draw(text: str) -> str:
        return "".join(text[i] for i in torch.randint(len(text), (5,), generator=letters).tolist())

    return [Pair(f"{i % 10}", draw("aeiou"), draw("bcdfg"), "ab"[i % 2]) for i in range(count)]


def test_the_loss_is_that_of_the_paper():
    chosen, rejected = torch.tensor([2.0, -1.0, 40.0]), torch.tensor([0.5, 1.0, -40.0])
    expected = [math.log(1 + math.exp(-d)) for d in (1.5, -2.0, 80.0)]
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert math.isfinite(bradley_terry_loss(rejected * 100, chosen * 100).item())


def test_the_loss_of_a_batch_tells_chosen_from_rejected():
    model, tokenizer = classifier(), byte_tokenizer()
    reader = RewardModel(model, tokenizer)
    pairs = vowel_pairs(3)
    chosen = reader([p.prompt for p in pairs], [p.chosen for p in pairs])
    rejected = reader([p.prompt for p in pairs], [p.rejected for p in pairs])
    expected = sum(math.log1p(math.exp(b - a)) for a, b in zip(chosen, rejected, strict=True)) / 3
    assert pair_loss(reader, pairs).item() == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_learns_its_pairs():
    model, tokenizer = classifier(), byte_tokenizer()
    losses = []
    train_reward_model(
        model,
        tokenizer,
        vowel_pairs(256),
        epochs=2,
        batch_size=16,
        lr=3e-3,
        after_step=lambda step, steps, loss: losses.append((step, steps, loss)),
    )
    assert [step for step, _, _ in losses] == list(range(1, 33))
    assert losses[0][1] == 32
    assert losses[-1][2] < 0.2
    found = accuracy(model, tokenizer, vowel_pairs(40))
    assert set(found) == {"all", "a", "b"}
    assert min(found.values()) > 0.95
    assert not any(p.requires_grad for p in model.parameters())


def test_two_trainings_with_one_seed_are_equal():
    weights = []
    for _ in range(2):
        model = classifier()
        train_reward_model(model, byte_tokenizer(), vowel_pairs(20), batch_size=8, seed=3)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_accuracy_counts_a_tie_as_half_and_each_kind_apart():
    model, tokenizer = classifier(), byte_tokenizer()
    torch.nn.init.zeros_(model.score.weight)
    assert accuracy(model, tokenizer, vowel_pairs(4)) == {"all": 0.5, "a": 0.5, "b": 0.5}


def test_the_mean_over_real_text_is_zero_after_calibration(tmp_path):
    model, tokenizer = classifier(), byte_tokenizer()
    prompts, texts = ["a", "b", "c"], ["one", "two", "three"]
    before = RewardModel(model, tokenizer)(prompts, texts)
    offset = calibrate(model, tokenizer, prompts, texts)
    assert offset == pytest.approx(sum(before) / 3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = load_reward_model(tmp_path)
    after = RewardModel(loaded, its_tokenizer)(prompts, texts)
    assert after == pytest.approx([x - offset for x in before], abs=1e-6)
    assert calibrate(loaded, its_tokenizer, prompts, texts) == pytest.approx(offset), "it was subtracted twice"
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), LlamaForSequenceClassification)


def test_a_model_that_gives_no_score_is_rejected():
    with pytest.raises(UserError, match="has 2 outputs; one score is expected"):
        train_reward_model(classifier(labels=2), byte_tokenizer(), vowel_pairs(2))
    model = classifier()
    model.config.pad_token_id = None
    with pytest.raises(UserError, match="has no pad token"):
        train_reward_model(model, byte_tokenizer(), vowel_pairs(2))
    with pytest.raises(UserError, match="there are no pairs"):
        train_reward_model(classifier(), byte_tokenizer(), [])


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"batch_size": 0}, {"lr": math.nan}])
def test_a_setting_that_learns_nothing_is_rejected(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"{name} must be greater than 0 and finite"):
        train_reward_model(classifier(), byte_tokenizer(), vowel_pairs(2), **setting)


def test_a_loss_that_is_no_number_does_not_reach_the_weights():
    model = classifier()
    torch.nn.init.constant_(model.score.weight, math.inf)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"the loss of step 1 of 1 is (nan|inf)"):
        train_reward_model(model, byte_tokenizer(), vowel_pairs(2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_empty_list_of_pairs_is_rejected():
    with pytest.raises(UserError, match="no pairs to evaluate on"):
        accuracy(classifier(), byte_tokenizer(), [])
    with pytest.raises(UserError, match="no answers to calibrate on"):
        calibrate(classifier(), byte_tokenizer(), [], [])


def test_pairs_are_read_as_they_were_written(tmp_path):
    pairs = [Pair("é\n", "a", "b", "x"), Pair("p", "", "c")]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', "line 2: no field 'rejected'; the fields are 'prompt', 'chosen'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 2: chosen and rejected are the same text: 'b'"),
        ('{"prompt": "a", "chosen": 1, "rejected": "b"}', "line 2: chosen must be a text, got 1"),
        ('{"prompt": "a"', "line 2: malformed JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        (r'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}', "line 2: chosen has a lone surrogate"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path / "p.jsonl")
    assert message in str(error.value)


def test_a_missing_or_empty_file_of_pairs_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the pairs: .*absent.jsonl: No such file"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no pairs: it is empty"):
        read_pairs(tmp_path / "empty.jsonl")


@pytest.fixture
def answers(tmp_path):
    rows = [
        {"prompt": "one", "answers": ["a", "b"]},
        {"prompt": "two", "answers": ["same", "same"]},
        {"prompt": "three", "answers": ["c", "c", "d"]},
        {"prompt": "[red]four", "answers": ["\x1b[31me", "f"]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "answers.jsonl"


def choose(answers, *typed: str) -> tuple[int, str]:
    keys, screen = iter(typed), StringIO()
    made = label(
        answers, answers.parent / "pairs.jsonl", console=Console(file=screen, width=80), ask=lambda _: next(keys)
    )
    return made, screen.getvalue()


def test_each_choice_is_asked_once_and_written_as_made(answers):
    made, screen = choose(answers, "2", "x", "1", "q")
    assert made == 2
    assert "[red]four" in screen
    assert "\x1b[31m" not in screen
    pairs = read_pairs(answers.parent / "pairs.jsonl")
    assert pairs == [Pair("one", "b", "a", "person"), Pair("three", "c", "d", "person")]
    made, screen = choose(answers, "S")
    assert made == 0
    assert "four" in screen
    assert "three" not in screen
    assert choose(answers, "1")[0] == 1
    assert len(read_pairs(answers.parent / "pairs.jsonl")) == 3
    assert choose(answers)[0] == 0


def test_an_ended_terminal_keeps_the_choices_before(answers):
    def gone(_: str) -> str:
        raise EOFError

    assert choose(answers, "1", "q")[0] == 1
    assert label(answers, answers.parent / "pairs.jsonl", console=Console(file=StringIO()), ask=gone) == 0
    assert len(read_pairs(answers.parent / "pairs.jsonl")) == 1


def test_label_on_the_command_line_rejects_a_bad_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answers": ["b"]}\n')
    assert main(["label", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "p.jsonl")]) == 1
    assert 'a.jsonl, line 1: expected {"prompt": text, "answers": [text, text]}' in capsys.readouterr().err


def test_a_choice_begins_a_new_line_after_one_without_a_break(tmp_path):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")
    out.write_text('{"prompt": "q", "chosen": "c", "rejected": "d"}', encoding="utf-8")  # as editors may leave it
    assert label(answers, out, console=Console(file=StringIO()), ask=lambda _: "2") == 1
    assert [(p.prompt, p.chosen) for p in read_pairs(out)] == [("q", "c"), ("p", "b")]


def test_a_file_of_blank_lines_takes_choices(tmp_path):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")
    out.write_text("\n\n", encoding="utf-8")
    assert label(answers, out, console=Console(file=StringIO()), ask=lambda _: "1") == 1


def test_a_file_that_cannot_be_written_is_rejected_before_the_first_choice(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="cannot write to"):
        label(answers, answers / "pairs.jsonl", console=Console(file=StringIO()), ask=pytest.fail)


def test_a_missing_folder_of_the_pairs_is_made(tmp_path):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "none" / "pairs.jsonl"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")
    assert label(answers, out, console=Console(file=StringIO()), ask=lambda _: "1") == 1
    assert [(p.prompt, p.chosen) for p in read_pairs(out)] == [("p", "a")]


PAIR = '{"prompt": "q", "chosen": "c", "rejected": "d"}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (f"[{PAIR}]".encode(), "is no JSON Lines file of pairs: choose another --out"),
        (PAIR.encode("utf-16"), "is no JSON Lines file of pairs: choose another --out"),
        (gzip.compress(PAIR.encode(), mtime=0), "is no JSON Lines file of pairs: choose another --out"),
        (b"My diary\n", "is no JSON Lines file of pairs: choose another --out"),
        (b'{"prompt": "p", "answers": ["a", "b"]}\n', "line 1: no field 'chosen'"),
        (None, "cannot write to .*: Is a directory"),
    ],
)
def test_a_file_of_another_program_keeps_its_content(tmp_path, data, message):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "mine"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")
    out.mkdir() if data is None else out.write_bytes(data)
    with pytest.raises(UserError, match=message):
        label(answers, out, console=Console(file=StringIO()), ask=pytest.fail)
    assert data is None or out.read_bytes() == data


def test_no_standard_input_is_an_error_without_a_traceback(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "p", "answers": ["a", "b"]}\n', encoding="utf-8")

    def closed(_: str) -> str:
        raise RuntimeError("input(): lost sys.stdin")

    with pytest.raises(UserError, match=r"lost sys\.stdin"):
        label(answers, tmp_path / "pairs.jsonl", console=Console(file=StringIO()), ask=closed)
