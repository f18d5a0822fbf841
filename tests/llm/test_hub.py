"""Models and data sets by name: files of this machine come first, and errors of a download are one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.hub_server import TOKEN, Hub
from support.tiny import save_tiny_model

from ppo_fast.common.errors import UserError
from ppo_fast.llm.hub import ModelSource, find_model, is_dataset_name

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: hard
  data_files:
  - {split: test, path: hard/test.jsonl}
---
"""
FIND = """
import json, sys
from ppo_fast.common.errors import UserError
from ppo_fast.llm import hub
found = []
for name in sys.argv[1:]:
    try:
        if hub.is_dataset_name(name) and "sums" in name or "data" in name:
            rows, whole = hub.load_dataset(name)
            found.append([whole, list(rows)])
        else:
            source = hub.find_model(name)
            found.append([source.name, sorted(path.name for path in source.path.iterdir())])
    except UserError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    root = tmp_path / "hub"
    for name in ("tiny", "secret", "gated"):
        save_tiny_model(root / "models" / "me" / name)
    (root / "models/me/tiny/onnx").mkdir()
    (root / "models/me/tiny/onnx/model.safetensors").write_text("another program's")
    (root / "models/me/tiny/modeling.py").write_text("raise SystemExit")
    (root / "models/me/tiny/pytorch_model.bin").write_text("a pickle")
    data = root / "datasets" / "me" / "sums"
    for file, answer in (("main/train", "2"), ("main/test", "3"), ("hard/test", "4")):
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / f"{file}.jsonl").write_text(json.dumps({"question": "1+1=", "answer": answer}) + "\n")
    (data / "README.md").write_text(CARD)
    return Hub(root, private={"me/secret"}, gated={"me/gated"})


@pytest.fixture
def served(hub: Hub) -> Iterator[str]:
    with hub.served() as address:
        yield address


def find(hub: Hub, address: str, *names: str, **environment: str) -> list[tuple[str, str | list]]:
    """The name with its commit, and the files or rows; or "UserError" and the message."""
    mine = {"HF_ENDPOINT": address, "HF_HOME": str(hub.folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIND, *names],
        cwd=hub.folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **mine, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_a_model_is_downloaded_once_without_files_of_other_programs(hub: Hub, served: str):
    commit = hub.commit("models", "me/tiny")
    expected = (f"me/tiny@{commit}", ["config.json", "generation_config.json", "model.safetensors"])
    ((name, files),) = find(hub, served, "me/tiny")
    assert name == expected[0]
    assert set(expected[1]) < set(files)
    assert not {"onnx", "modeling.py", "pytorch_model.bin"} & set(files)
    hub.requests.clear()
    assert find(hub, served, "me/tiny@main", f"me/tiny@{commit}") == [(name, files)] * 2
    assert not [path for method, path, _ in hub.requests if method == "GET" and "safetensors" in path]
    assert find(hub, served, "me/tiny", HF_HUB_OFFLINE="1") == [(name, files)]
    assert find(hub, "http://127.0.0.1:9", "me/tiny") == [(name, files)]


def test_names_that_cannot_be_loaded_are_one_sentence_with_what_to_do(hub: Hub, served: str):
    (hub.folder / "tinny").mkdir()
    names = ("me/none", "me/secret", "me/gated", "me/tiny@v9", "tiny", "me/sums-data")
    found = find(hub, served, *names, HF_TOKEN="")
    assert {kind for kind, _ in found} == {"UserError"}
    missing, private, gated, revision, typo, data = (message for _, message in found)
    assert missing.startswith("there is no folder me/none, and the hub has none of this name, or it is private")
    assert "set HF_TOKEN" in private
    assert gated == (
        "the model me/gated is gated: accept its conditions on its page on the hub, and log in with `hf auth login`, or"
        " set HF_TOKEN"
    )
    assert revision == "the model me/tiny has no revision v9: name a branch, a tag or a commit"
    assert typo.startswith("there is no folder tiny (did you mean tinny?), and ")
    assert data.startswith("there is no file me/sums-data, and the hub has none of this name")
    ((name, _),) = find(hub, served, "me/secret", HF_TOKEN=TOKEN)
    assert name == f"me/secret@{hub.commit('models', 'me/secret')}"


def test_without_a_network_the_message_names_the_reason(hub: Hub):
    ((_, offline), (_, data)) = find(hub, "http://127.0.0.1:9", "me/other", "me/sums:main:train", HF_HUB_OFFLINE="1")
    assert offline == (
        "there is no folder me/other, and the model me/other is not in the cache of the hub, while HF_HUB_OFFLINE is"
        " set: correct the name, or unset it once to download it"
    )
    assert data.startswith("there is no file me/sums:main:train, and the data set me/sums is not in the cache")
    ((_, closed),) = find(hub, "http://127.0.0.1:9", "me/other")
    assert "while http://127.0.0.1:9 cannot be reached: correct the name, or connect this machine once" in closed


def test_a_download_that_breaks_is_resumed_by_the_same_command(hub: Hub, served: str):
    hub.cut = {"model.safetensors"}
    ((kind, message),) = find(hub, served, "me/tiny")
    assert kind == "UserError"
    assert message.startswith("cannot read the model me/tiny: ")
    assert message.endswith("; the same command resumes a download")
    assert "\n" not in message
    hub.cut = set()
    ((name, files),) = find(hub, served, "me/tiny")
    assert name.startswith("me/tiny@")
    assert "model.safetensors" in files
    cache = hub.folder / "home" / "hub" / "models--me--tiny" / "snapshots" / hub.commit("models", "me/tiny")
    same = (hub.folder / "models/me/tiny/model.safetensors").read_bytes()
    assert (cache / "model.safetensors").read_bytes() == same


def test_a_download_continues_where_it_broke_off(hub: Hub, served: str):
    large = hub.folder / "models" / "me" / "tiny" / "model.safetensors"
    large.write_bytes(os.urandom(2**20) * 24)  # more than the 10 MiB that huggingface_hub writes at once
    hub.cut_once = {large.name}
    ((name, _),) = find(hub, served, "me/tiny")
    commit = name.removeprefix("me/tiny@")
    (copy,) = (hub.folder / "home").rglob(f"{commit}/{large.name}")
    assert copy.read_bytes() == large.read_bytes()
    parts = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(large.name)]
    assert parts == ["", f"bytes={10 * 2**20}-"]


def test_a_data_set_is_read_by_configuration_and_split(hub: Hub, served: str):
    at = f"me/sums@{hub.commit('datasets', 'me/sums')}"
    names = (
        "me/sums:main:train",
        "me/sums@main:main:test",
        "me/sums:hard",
        "me/sums",
        "me/sums:main",
        "me/sums:main:tran",
    )
    rows = [[{"question": "1+1=", "answer": answer}] for answer in "234"]
    found = find(hub, served, *names)
    assert found[:3] == [(f"{at}:main:train", rows[0]), (f"{at}:main:test", rows[1]), (f"{at}:hard:test", rows[2])]
    assert [message for _, message in found[3:]] == [
        "the data set me/sums has several configurations: name one of main, hard, for instance me/sums:main",
        "the data set me/sums has several splits: name one of train, test, for instance me/sums:main:train",
        "the data set me/sums has no split 'tran'; did you mean train?: name one of train, test, for instance"
        " me/sums:main:train",
    ]
    assert find(hub, served, "me/sums:main:train", HF_HUB_OFFLINE="1")[0][1] == rows[0]


def test_files_of_this_machine_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    (tmp_path / "me" / "data").write_text("{}")
    assert find_model("me/tiny") == ModelSource("me/tiny", Path("me/tiny"))
    assert not is_dataset_name("me/data")
    assert not is_dataset_name("data/train.jsonl")
    assert not is_dataset_name("/data/train")
    assert is_dataset_name("openai/gsm8k:main:train")


def test_a_gguf_file_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model in .*none\.gguf: there is no such file"):
        find_model(tmp_path / "none.gguf")


def test_a_run_reads_model_and_data_by_name_and_records_their_commits(hub: Hub, served: str):
    (hub.folder / "r.py").write_text("def short(prompts, completions):\n    return [-len(x) for x in completions]\n")
    options = "--prompt-field question --reward r.py:short --prompts-per-step 4 --minibatches 1 --max-new-tokens 4"
    options += " --dtype float32"

    def train(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
        mine = {"HF_ENDPOINT": served, "HF_HOME": str(hub.folder / "home"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "ppo_fast.cli", "train", *options.split(), "--total-steps", "1", *names],
            cwd=hub.folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **mine, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    done = train("--model", "me/tiny", "--prompts", "me/sums:main:train", "--out", "out")
    assert done.returncode == 0, done.stderr
    model, data = hub.commit("models", "me/tiny"), hub.commit("datasets", "me/sums")
    written = yaml.safe_load((hub.folder / "out" / "config.yaml").read_text())
    assert written["model"] == f"me/tiny@{model}"
    assert written["prompts"] == f"me/sums@{data}:main:train"
    card = (hub.folder / "out" / "model" / "README.md").read_text()
    assert f"| model | me/tiny@{model} |" in card
    assert "base_model: me/tiny\n" in card
    again = train("--config", "out/config.yaml", "--out", "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    weights = [(hub.folder / out / "model" / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]
    typo = train("--model", "me/tyni", "--prompts", "me/sums:main:train", "--out", "typo")
    assert typo.returncode == 1
    assert typo.stderr.splitlines()[-1].startswith("ppo-fast: error: there is no folder me/tyni, and the hub has none")
    column = train("--model", "me/tiny", "--prompts", "me/sums:main:train", "--prompt-field", "text", "--out", "column")
    assert "row 1: no field 'text'" in column.stderr.splitlines()[-1]
    assert not (hub.folder / "column" / "metrics.jsonl").exists()
