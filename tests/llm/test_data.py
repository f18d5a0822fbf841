"""Prompts from files and folders: every defect is named with file and row; the order is seeded and complete; a chat
goes through the tokenizer's template."""

import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ppo_fast.common.errors import RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import (
    RESERVED,
    Prompts,
    added_ids,
    as_rows,
    as_text,
    columns,
    prompt_ids,
    read_jsonl,
    read_prompts,
    set_template_options,
    tokenizer_notes,
)
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.hashes import rows_hash, tokenizer_hash
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.reward.scoring import score
from ppo_fast.llm.sample import drop_long_prompts, sample_rollout
from ppo_fast.llm.trainer import PPOTrainer

NO_PYARROW = 'pyarrow is not installed: pip install "ppo_fast[data]"'
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer():
    """A tokenizer that puts <s> before every text, and a template that writes it, too: as Llama's do."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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
        ('{"prompts": "a"}\n', r"line 1: no field 'prompt'; did you mean prompts\?; the fields are 'prompts'"),
        ('{"prompt": null}\n', r"line 1: field 'prompt' must be a string or a list of messages, got null"),
        ('{"prompt": "a", "b": 1, "b": 2}\n', r"line 1: .*an object has the field 'b' twice; remove one"),
        ('{"prompt": "a"}\n[1]\n', r"line 2: expected a JSON object, got list"),
        ("[1]\n", r"row 1: expected a JSON object, got int"),
        ("[]\n", r"has no prompts"),
        ('[{"prompt": "a"},\n {"prompt": 3}]', r"row 2: field 'prompt' must be a string .* got int"),
        ('[\n{"prompt": "a"},\n', r"prompts.jsonl: malformed JSON: .* \(line 3, column 1\)"),
        ('{\n"prompt": "a"\n}\n', r"has one JSON object over several lines: give one JSON object a line, or a JSON"),
        ("prompt,answer\na,b\n", r"is not JSON, its first line is 'prompt,answer': .* converts a CSV file"),
        (
            "What is 2 + 2?\n",
            r"is not JSON, its first line is 'What is 2 \+ 2\?': give one JSON object a line.*objects$",
        ),
        ('{"prompt": "  "}\n', r"line 1: the prompt is empty"),
        ('{"prompt": 3}\n', r"line 1: field 'prompt' must be a string or a list of messages, got int"),
        ('{"prompt": "a", "n": ' + 5000 * "9" + "}\n", r"line 1: JSON that Python cannot read: Exceeds the limit"),
        ('{"prompt": "a", "n": ' + 100_000 * "[" + "\n", r"line 1: JSON that Python cannot read: maximum recursion"),
        ('{"prompt": "a", "completions": 1}\n', r"line 1: field 'completions' clashes"),
        ('{"prompt": "a", "raw_completions": 1}\n', r"line 1: field 'raw_completions' clashes"),
        ('{"prompt": "a", "completion_ids": 1}\n', r"line 1: field 'completion_ids' clashes"),
        ('{"prompt": "a", "ended": 1}\n', r"line 1: field 'ended' clashes"),
        ('{"prompt": []}\n', r"line 1: the prompt is empty: a chat without messages"),
        ('{"prompt": ["hi"]}\n', r"line 1: message 1 must be \{\"role\": text, \"content\": text\}, got hi"),
        ('{"prompt": [{"role": "user", "content": ["x"]}]}\n', r"line 1: message 1 must be"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}\n', r"line 1: the last message is the assistant's"),
        ("\n", r"has no prompts"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_jsonl(write(tmp_path, text), "prompt")


@pytest.mark.parametrize("name", [name for name in RESERVED if name != "prompt"])
def test_a_column_with_a_name_that_rewards_get_is_an_error(tmp_path, name):
    row = {"prompt": "a", name: [1]}
    with pytest.raises(UserError, match=rf"rows\[1\]: field '{name}' clashes"):
        as_rows([{"prompt": "a"}, row])
    with pytest.raises(UserError, match=f"line 1: field '{name}' clashes"):
        read_jsonl(write(tmp_path, json.dumps({"question": "a", name: 1})), "question")
    assert read_jsonl(write(tmp_path, json.dumps({name: "a", "answer": 1})), name) == [{"prompt": "a", "answer": 1}]


def test_a_missing_file_and_a_wrong_encoding_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "absent.jsonl", "prompt")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_jsonl(write(tmp_path, '{"prompt": "é"}', "latin-1"), "prompt")


def test_every_row_is_drawn_once_in_each_epoch_in_the_order_of_the_seed():
    rows = [{"prompt": str(i)} for i in range(7)]
    prompts, again, other = (Prompts(rows, seed=s) for s in (1, 1, 2))
    dealt = [row["prompt"] for _ in range(7) for row in prompts.take(2)]
    assert sorted(dealt[:7]) == sorted(dealt[7:]) == [str(i) for i in range(7)]
    assert dealt[:7] != dealt[7:]
    assert [row["prompt"] for row in again.take(14)] == dealt
    assert [row["prompt"] for row in other.take(14)] != dealt


def test_rows_become_columns_repeated_for_each_sample():
    assert columns([{"a": 1}, {"a": 2, "b": 3}], 2) == {"a": [1, 1, 2, 2], "b": [None, None, 3, 3]}


ROWS = [{"question": f"q{i}", "answer": i, "tags": ["a", None]} for i in range(5)]
EXPECTED = [{"prompt": f"q{i}", "answer": i, "tags": ["a", None]} for i in range(5)]


def test_parquet_files_keep_their_columns_and_order(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    for name, rows in (("b.parquet", ROWS[3:]), ("a.parquet", ROWS[:3])):
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
    assert read_prompts(tmp_path / "a.parquet", "question") == EXPECTED[:3]
    assert read_prompts(tmp_path, "question") == EXPECTED
    with pytest.raises(UserError, match=r"a.parquet, row 1: no field 'prompt'; the fields are 'question', 'answer'"):
        read_prompts(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"cannot read the prompts: .*a.parquet"):
        read_prompts(tmp_path, "question")


def test_chats_in_parquet_are_lists_of_messages(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    parquet.write_table(arrow.Table.from_pylist([{"messages": CHAT, "n": 1}]), tmp_path / "chat.parquet")
    assert read_prompts(tmp_path / "chat.parquet", "messages") == [{"prompt": CHAT, "n": 1}]


def test_data_set_folders_keep_their_columns_and_order(tmp_path):
    datasets = pytest.importorskip("datasets", reason='datasets is not installed: pip install "ppo_fast[data]"')
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole")
    assert read_prompts(tmp_path / "whole", "question") == EXPECTED
    datasets.DatasetDict(train=whole, test=whole.select([4])).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        UserError, match=r"holds the splits test, train: name one of its splits, for instance .*splits:test"
    ):
        read_prompts(tmp_path / "splits", "question")
    assert read_prompts(tmp_path / "splits" / "test", "question") == EXPECTED[4:]
    assert read_prompts(f"{tmp_path / 'splits'}:test", "question") == EXPECTED[4:]


def test_a_folder_with_files_of_several_splits_needs_a_name(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        parquet.write_table(arrow.Table.from_pylist([{"prompt": "a", "n": number}]), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"holds the splits test, train: name one of its splits, for instance .*:test"):
        read_prompts(tmp_path)
    assert [row["n"] for row in read_prompts(f"{tmp_path}:train")] == [0, 1]
    assert [row["n"] for row in read_prompts(f"{tmp_path}:test")] == [2]
    with pytest.raises(UserError, match=r"has no split 'dev': name one of its splits, for instance .*:test"):
        read_prompts(f"{tmp_path}:dev")
    for file in tmp_path.glob("train*"):
        file.unlink()
    assert [row["n"] for row in read_prompts(tmp_path)] == [2]


@pytest.mark.parametrize(("name", "package"), [("x.parquet", "pyarrow"), ("folder", "datasets")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / "x.parquet").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "state.json").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{name} needs {package}: pip install {package}, or the extra ppo_fast\[data\]"
    ):
        read_prompts(tmp_path / name)


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(UserError, match=r"neither did save_to_disk write it nor does it hold \.parquet files"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "absent.parquet")


def test_plain_prompts_become_chats_only_where_asked_to(tmp_path):
    lines = [{"prompt": "a", "n": 1}, {"prompt": CHAT}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in lines))
    assert read_prompts(path) == lines
    assert [row["prompt"] for row in read_prompts(path, chat=True)] == [[{"role": "user", "content": "a"}], CHAT]


def test_a_chat_gets_one_begin_token_and_a_generation_prompt():
    tokenizer = chat_tokenizer()
    chat, plain, again = prompt_ids(tokenizer, [CHAT, "Why?", CHAT])
    assert tokenizer.decode(chat) == "<s>[system]Be brief.[user]Why?[assistant]"
    assert chat.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(plain) == "<s>Why?"
    assert again == chat


def test_a_template_that_is_missing_or_refuses_a_chat_is_named():
    tokenizer = chat_tokenizer()
    with pytest.raises(UserError, match=r"fails for the prompt .*'hidden'.*: no tools here"):
        prompt_ids(tokenizer, [[{"role": "tool", "content": "hidden"}]])
    with pytest.raises(UserError, match="the tokenizer has no chat template: take a model that was tuned for chat"):
        prompt_ids(byte_tokenizer(), [CHAT])


def test_an_error_of_any_class_inside_a_template_names_the_prompt():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + messages[0]['turn'] }}"
    with pytest.raises(UserError, match=r"fails for the prompt .*'turn': 1.*TypeError: can only concatenate"):
        prompt_ids(tokenizer, [[{"role": "user", "content": "x", "turn": 1}]])


def test_a_begin_token_in_the_text_is_not_repeated():
    tokenizer = chat_tokenizer()
    begin = tokenizer.bos_token_id
    texts = ["hi", "<s>hi", "<s><s>hi"]
    plain, made, doubled = prompt_ids(tokenizer, texts)
    assert plain == made == [begin, *tokenizer("hi", add_special_tokens=False)["input_ids"]]
    assert doubled == [begin, *made], "a text that has two keeps both"
    (note,) = tokenizer_notes(tokenizer, texts)
    assert note.startswith("2 of 3 prompts begin with '<s>', which the tokenizer puts before each text")
    assert tokenizer_notes(tokenizer, ["hi", CHAT]) == []


def test_an_end_token_that_the_tokenizer_appends_is_left_out_of_prompts():
    tokenizer = byte_tokenizer()
    bare = prompt_ids(tokenizer, ["2+2=", "a<end>"])
    assert tokenizer_notes(tokenizer, ["2+2="]) == []
    end = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end
    assert tokenizer("2+2=")["input_ids"][-1] == tokenizer.eos_token_id
    assert prompt_ids(tokenizer, ["2+2=", "a<end>"]) == bare
    assert bare[1][-1] == tokenizer.eos_token_id, "an end token of the text itself stays"
    (note,) = tokenizer_notes(tokenizer, ["2+2="])
    assert note.startswith("the tokenizer appends '<end>' to each text: prompts are used without it")


def test_a_trainer_reports_the_tokens_that_it_leaves_out_of_prompts():
    options = PPOConfig(total_steps=1, prompts_per_step=2, minibatches=1, epochs=1, max_new_tokens=3, quiet=True)
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "<s>[INST] hi"}, {"prompt": "<s>[INST] ab"}]
    trainer = PPOTrainer(options, tiny_llama(259), tokenizer, rows, lambda prompts, completions: [0.0] * len(prompts))
    trainer.step()
    first = trainer.last_rollout.tokens[0, : trainer.last_rollout.prompt_lengths[0]].tolist()
    assert first.count(tokenizer.bos_token_id) == 1
    assert any(note.startswith("2 of 2 prompts begin with '<s>'") for note in trainer.notes)


BAD_ROWS = [
    {"prompts": "a", "answer": 1},
    {"prompt": None},
    {"prompt": 3},
    {"prompt": " "},
    {"prompt": []},
    {"prompt": ["hi"]},
    {"prompt": [{"role": "assistant", "content": "x"}]},
    {"prompt": "\ud800"},
    {"prompt": "a", "ended": 1},
    {},
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=str)
@pytest.mark.parametrize("argument", ["rows", "eval_rows"])
def test_rows_from_python_get_the_message_that_a_file_gets(tmp_path, bad, argument):
    rows = [{"prompt": "a"}, bad]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as of_file:
        read_prompts(path)
    given = {"rows": [{"prompt": "a"}], argument: rows}
    with pytest.raises(UserError) as of_python:
        PPOTrainer(
            PPOConfig(),
            tiny_llama(),
            byte_tokenizer(),
            rewards=lambda prompts, completions: [0.0] * len(prompts),
            **given,
        )
    assert str(of_file.value).startswith(f"{path}, line 2: ")
    assert str(of_python.value) == str(of_file.value).replace(f"{path}, line 2", f"{argument}[1]")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows has no prompts: it is empty"),
        ({"prompt": ["a"]}, "rows must be a list of dicts, one for each prompt, got dict"),
        ("a", "rows must be a list of dicts, one for each prompt, got str"),
        (["a"], r"rows must be a list of dicts, one for each prompt, but rows\[0\] is 'a': give"),
        ([{"prompt": "a"}, None], r"but rows\[1\] is 'None'"),
        ([{"prompt": "a", 3: 1}], r"rows\[0\]: the field 3 must have a text as its name"),
    ],
)
def test_rows_from_python_that_are_no_rows_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        as_rows(rows)


def test_files_of_other_tools_are_read_correctly(tmp_path):
    """A byte-order mark, UTF-16, gzip, CRLF, empty lines, an array, a long line, and a path with blanks and umlauts."""
    folder = tmp_path / "Üb ungen"
    folder.mkdir()
    rows = [{"prompt": "é" * 10, "n": {"deep": [1, None]}}, {"prompt": "b" * 5_000_000}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {
        "mark.jsonl": "\n".join(lines).encode("utf-8-sig"),
        "wide.jsonl": "\r\n".join(lines).encode("utf-16"),
        "crlf.jsonl": ("\r\n\r\n" + "\r\n \r\n".join(lines) + "\r\n").encode(),
        "array.json": json.dumps(rows, indent=1).encode(),
        "lines.jsonl.gz": gzip.compress("\n".join(lines).encode()),
        "array.json.gz": gzip.compress(json.dumps(rows).encode("utf-16")),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        assert read_prompts(folder / name) == rows, name
    with pytest.raises(UserError, match=r"is a folder, but .*: name a file in it, such as .*Üb ungen/array\.json$"):
        read_prompts(folder)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="this system has no /dev/fd, where a pipe has a name")
def test_a_pipe_is_read_as_a_file_is():
    """As a shell passes it: --prompts <(zcat prompts.jsonl.gz)."""
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "a"}\n')
    os.close(writer)
    try:
        assert read_prompts(f"/dev/fd/{reader}") == [{"prompt": "a"}]
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "is a damaged gzip file"),
        (b"PK\x03\x04rest", "is a zip file: unpack it, or use gzip"),
        (b"\x28\xb5\x2f\xfdrest", "is a zstandard file: unpack it"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "has a zero byte: it is no text, or UTF-16; save it as UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16")[:-1], "is not UTF-16 text"),
        (b"PAR1rest", r"cannot read the prompts: .*prompts\.jsonl"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_what_to_do(tmp_path, data, message):
    if data.startswith(b"PAR1"):
        pytest.importorskip("pyarrow", reason=NO_PYARROW)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompts(path)


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    """Root may read everything: another user tries."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        for path in (locked, locked / "prompts.jsonl"):
            with pytest.raises(UserError, match=rf"cannot read the prompts: {path}: Permission denied"):
                read_prompts(path)
    finally:
        os.seteuid(0)


def test_parquet_columns_of_other_types_are_read_or_named(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    texts = arrow.array(["a", "b"])
    for name, column in {
        "large": texts.cast(arrow.large_string()),
        "dictionary": texts.dictionary_encode(),
        "view": texts.cast(arrow.string_view()),
    }.items():
        parquet.write_table(arrow.table({"prompt": column, "day": [datetime.date(2026, 1, 1)] * 2}), tmp_path / name)
        found = read_prompts(tmp_path / name)  # without the suffix, too
        assert found == [{"prompt": text, "day": datetime.date(2026, 1, 1)} for text in "ab"]
        assert rows_hash(found) != rows_hash(found[::-1])
    for column, got in ((arrow.array([1, 2]), "int"), (arrow.array([b"a", b"b"]), "bytes"), ([None, "b"], "null")):
        parquet.write_table(arrow.table({"prompt": column}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=rf"row 1: field 'prompt' must be a string .*, got {got}"):
            read_prompts(tmp_path / "x.parquet")
    twice = arrow.Table.from_arrays([texts, texts], names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet has the column 'prompt' twice: remove one"):
        read_prompts(tmp_path / "x.parquet")


def test_length_filter_measures_a_chat_with_its_template():
    """CHAT is 41 bytes with its template (<s> is one token), 13 without."""
    tokenizer, actor = chat_tokenizer(), tiny_llama(259)
    length = len(prompt_ids(tokenizer, [CHAT])[0])
    assert length == 39
    for limit, dropped in ((length, 0), (length - 1, 1)):
        options = PPOConfig(max_prompt_tokens=limit)
        kept, left_out = drop_long_prompts([{"prompt": "a"}, {"prompt": CHAT}], tokenizer, actor, options)
        assert (len(kept), left_out) == (2 - dropped, dropped)


def test_chats_and_columns_reach_the_rewards_unchanged():
    seen = {}

    def reward(prompts, completions, level):
        seen.update(prompts=prompts, level=level)
        return [0.0] * len(completions)

    options = PPOConfig(max_new_tokens=3, samples_per_prompt=2)
    tokenizer, actor = chat_tokenizer(), tiny_llama(259)
    rows = [{"prompt": CHAT, "level": 7}, {"prompt": "Why?", "level": 8}]
    rollout = sample_rollout(GenerateSampler(actor, tokenizer), tokenizer, rows, options, torch.device("cpu"))
    score(rollout, {"reward": reward}, options)
    assert seen == {"prompts": [CHAT, CHAT, "Why?", "Why?"], "level": [7, 7, 8, 8]}
    assert rollout.prompt_lengths[:1] == [len(prompt_ids(tokenizer, [CHAT])[0])]


def test_a_reward_model_reads_a_chat_through_its_own_template():
    tokenizer = chat_tokenizer()
    model = tiny_llama(259)
    model.config.num_labels = 1
    judge = RewardModel(model, tokenizer)
    assert tokenizer.decode(judge._ids(CHAT, "So.")) == "<s>[system]Be brief.[user]Why?[assistant]So."
    assert tokenizer.decode(judge._ids("Why?", "So.")) == "<s>[user]Why?[assistant]So."
    with pytest.raises(RewardError, match="the reward model's tokenizer has no chat template"):
        RewardModel(model, byte_tokenizer())._ids(CHAT, "So.")


def test_a_chat_is_shown_with_one_line_for_each_message():
    assert as_text(CHAT) == "system: Be brief.\nuser: Why?"
    assert as_text("Why?") == "Why?"


def test_a_vocabulary_that_does_not_cover_every_text_is_no_error():
    """A tokenizer of digits, as in the arithmetic example, which raises an error for letters."""
    tokenizer = Tokenizer(models.WordLevel({"7": 0, "8": 1, "<end>": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    assert added_ids(fast) == ([], [2])
    assert prompt_ids(fast, ["78"]) == [[0, 1]]


def test_arguments_of_the_chat_template_change_the_prompt_but_not_the_saved_tokenizer(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    plain, before = prompt_ids(tokenizer, [CHAT])[0], tokenizer_hash(tokenizer, [])
    set_template_options(tokenizer, '{"enable_thinking": false}')
    (ids,) = prompt_ids(tokenizer, [CHAT])
    assert tokenizer.decode(ids) == tokenizer.decode(plain) + "<think></think>"
    assert tokenizer_hash(tokenizer, []) != before, "a run that differs in this is another run"
    tokenizer.save_pretrained(tmp_path)
    assert prompt_ids(AutoTokenizer.from_pretrained(tmp_path), [CHAT]) == [plain]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{enable_thinking: false}", r"is not JSON: .*: Expecting property name"),
        ("[1]", r"must be a JSON object such as .*, got \[1\]"),
        ('{"enable_thinkng": false}', r"the chat template of the tokenizer has no variable 'enable_thinkng'"),
    ],
)
def test_wrong_arguments_of_the_chat_template_are_named(given, message):
    with pytest.raises(UserError, match=rf"--chat-template-kwargs:? {message}"):
        set_template_options(chat_tokenizer(), given)
