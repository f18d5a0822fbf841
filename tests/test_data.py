"""Prompts from a file: every defect is named with file and line; the order is seeded and complete."""

import pytest

from ppo_fast.data import Prompts, columns, read_jsonl
from ppo_fast.errors import UserError


def write(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode(encoding))
    return path


def test_rows_keep_their_other_fields_and_unicode(tmp_path):
    path = write(tmp_path, '{"question": "a\\u2028b", "answer": "é"}\r\n\n{"question": "c", "n": 1}\n')
    assert read_jsonl(path, "question") == [{"prompt": "a\u2028b", "answer": "é"}, {"prompt": "c", "n": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2: malformed JSON"),
        (
            '{"prompt": "a"}\n{"question": "b", "answer": 1}\n',
            r"line 2: no field 'prompt'; the fields are 'question', 'answer'",
        ),
        ('{"prompt": "  "}\n', r"line 1: the prompt is empty"),
        ('{"prompt": 3}\n', r"line 1: field 'prompt' must be a string, got int"),
        ("[1]\n", r"line 1: expected a JSON object, got list"),
        ('{"prompt": "a", "completions": 1}\n', r"line 1: field 'completions' clashes"),
        ("\n", r"has no prompts"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_jsonl(write(tmp_path, text), "prompt")


def test_a_missing_file_and_a_wrong_encoding_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "absent.jsonl", "prompt")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_jsonl(write(tmp_path, '{"prompt": "é"}', "latin-1"), "prompt")


def test_every_row_is_dealt_once_in_each_epoch_and_the_order_is_the_seeds():
    rows = [{"prompt": str(i)} for i in range(7)]
    prompts, again, other = (Prompts(rows, seed=s) for s in (1, 1, 2))
    dealt = [row["prompt"] for _ in range(7) for row in prompts.take(2)]
    assert sorted(dealt[:7]) == sorted(dealt[7:]) == [str(i) for i in range(7)]
    assert dealt[:7] != dealt[7:]
    assert [row["prompt"] for row in again.take(14)] == dealt
    assert [row["prompt"] for row in other.take(14)] != dealt


def test_rows_become_columns_repeated_for_each_sample():
    assert columns([{"a": 1}, {"a": 2, "b": 3}], 2) == {"a": [1, 1, 2, 2], "b": [None, None, 3, 3]}
