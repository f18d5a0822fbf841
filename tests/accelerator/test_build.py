"""The build of the test device: a missing compiler is named, and processes build it once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerator import build

PROJECT = Path(__file__).parents[2]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.CannotBuild, match=r"no c\+\+ or g\+\+ or clang\+\+: install"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "/opt/other/g++-99")
    with pytest.raises(build.CannotBuild, match=r"no /opt/other/g\+\+-99: install"):
        build.build(tmp_path)


def test_tests_are_skipped_with_a_message_that_names_the_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/accelerator/test_waits.py", "-k", "item", "--no-header"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" not in done.stdout
    assert "needs a C++ compiler, and there is no no-such-compiler" in done.stdout


def fake_compiler(folder: Path, *, status: int = 0) -> Path:
    """A compiler that notes each call and writes what was asked for."""
    path = folder / "cxx"
    path.write_text(
        f"#!{sys.executable}\nimport sys, time, pathlib\n"
        f"with open({str(folder / 'calls')!r}, 'a') as calls: calls.write('call\\n')\n"
        "time.sleep(0.3)\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text('built')\n"
        f"print('line 7 is wrong', file=sys.stderr)\nsys.exit({status})\n"
    )
    path.chmod(0o755)
    return path


def test_processes_that_start_together_build_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    code = f"from accelerator.build import build; from pathlib import Path; print(build(Path({str(tmp_path)!r})))"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "tests")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "built"
    assert (tmp_path / "calls").read_text() == "call\n"


def test_another_source_or_compiler_is_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    first = build.build(tmp_path)
    changed = tmp_path / "device.cpp"
    changed.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    assert build.build(tmp_path) != first
    assert (tmp_path / "calls").read_text() == "call\n" * 2


def test_a_failed_build_gives_the_compilers_message_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, status=1)))
    with pytest.raises(RuntimeError, match="line 7 is wrong"):
        build.build(tmp_path)
    assert not list(tmp_path.rglob("*.so"))
