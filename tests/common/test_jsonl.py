"""JSON Lines and tables: what is written can be read, and files are truncated at a step."""

import pytest

from ppo_fast.common.errors import UserError
from ppo_fast.common.jsonl import JsonLines, as_lines, read_rows, step_of, truncate_rows
from ppo_fast.common.text import escape_control, markdown_table, shortened


def test_rows_are_read_as_they_were_written(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    rows = [{"step": 1, "text": "é\n"}, {"step": 2, "value": None}]
    for row in rows:
        file.write_row(row)
    file.close()
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == as_lines(rows)
    assert read_rows(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("end", ["", '{"step": 4', '{"step": 4}'])
def test_later_rows_and_a_part_of_a_row_are_removed(tmp_path, end):
    path = tmp_path / "x.jsonl"
    path.write_text(as_lines({"step": step} for step in (1, 2, 3)) + end)
    assert truncate_rows(path, 2) == ['{"step": 1}', '{"step": 2}']
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_rows(path, 0) == []
    assert path.read_text() == ""


def test_a_row_of_others_is_named():
    with pytest.raises(UserError, match=r'x, line 3 is not a row that ppo-fast wrote \(\'{"a": 1}\'\)'):
        step_of('{"a": 1}', "x, line 3")


def test_a_table_has_a_line_for_each_row():
    table = markdown_table(("a", "b", "c"), [("1", "2", "3")], align="---:")
    assert table.splitlines() == ["| a | b | c |", "| --- | ---: | ---: |", "| 1 | 2 | 3 |"]


def test_control_characters_are_escaped_and_long_texts_shortened():
    assert escape_control("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert shortened("x " * 100, 10) == "x x x ... x x x"
