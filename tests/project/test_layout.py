"""The layout of the repository: what must not exist, what must resolve, and which way imports go."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ppo_fast"

# A file may import from its own level and from those before it.
LEVELS = [
    {"errors", "threads"},
    {"kernels"},
    {"checks", "config"},
    {"ops"},
    {"", "data", "decoding", "device", "rollout", "checkpoint", "flash_calls"},  # "" is ppo_fast/__init__.py
    {"console", "folders", "interrupt", "hints", "invariants", "launched", "lock", "meeting"},
    {"flash"},
    {"attention"},
    {"packing"},
    {"heads", "loading", "adapters"},
    {"models", "plots", "probe"},
    {"policy", "parallel", "export"},
    {"sample", "rewards", "reward", "learn", "controllers", "progress", "recipes"},
    {"evaluate", "run_state", "preferences", "memory", "probe_sampling"},
    {"envs", "classic_log", "classic_config", "classic_network", "classic_spaces", "classic_policy"},
    {"classic_state"},
    {"trainer", "classic", "label"},
    {"cli", "examples", "doctor"},
]
SIDE = {"integrations": {"ops", "", "errors"}}  # these import the operations only
EXTRA = {
    "doctor": {"kernels"},
    "memory": {"kernels"},
    "run_state": {"trainer"},
    "classic_state": {"classic"},
}  # doctor reads the reference, memory the plan of a chunk, the others name a type


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def imports_of(file: Path) -> set[str]:
    """First-level modules of ppo_fast that a file imports, "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ppo_fast":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ppo_fast":
                    found.add(parts[1] if len(parts) > 1 else "")
    known = set().union(*LEVELS) | set(SIDE)
    return {name if name in known else "" for name in found}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def python_files() -> list[Path]:
    files = [f for f in PACKAGE.rglob("*.py") if "kernels" not in f.parts[len(PACKAGE.parts) :]]
    return sorted(files) + sorted((PACKAGE / "kernels").glob("*.py"))


@pytest.mark.parametrize("file", python_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_import_goes_upward(file: Path):
    own = module_name(file)
    for imported in imports_of(file):
        if own in SIDE:
            assert imported in SIDE[own] | {own}, f"{own} imports {imported}"
        elif imported in SIDE:
            assert own in LEVELS[-1], f"{own} imports {imported}"
        elif imported not in EXTRA.get(own, set()):
            assert level(imported) <= level(own), f"{own} imports {imported}, which stands above it"


def test_only_ops_its_checks_doctor_and_memory_read_the_kernels():
    readers = {module_name(f) for f in python_files() if "kernels" in imports_of(f)} - {"kernels"}
    assert readers <= {"ops", "checks", "doctor", "memory"}


def test_kernels_import_nothing_of_the_package_but_themselves():
    for file in (PACKAGE / "kernels").glob("*.py"):
        assert imports_of(file) <= {"kernels"}, file.name


def test_kernels_folder_has_no_init_that_would_shadow_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_link_resolves_to_the_folder_at_the_root():
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.resolve() == (ROOT / "kernels").resolve()


def test_top_level_has_the_agreed_entries_only():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("git does not know this tree (an unpacked sdist): no list of tracked files")
    allowed = {"pyproject.toml", "kernels", "ppo_fast", "tests", "bench", "README.md", "constraints.txt", "LICENSE"}
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} <= allowed


def run(code: str, cwd: Path = ROOT, path: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_triton_nor_transformers_and_is_quick_after_torch():
    seconds = run(
        "import torch, time, sys; before = set(sys.modules); t = time.perf_counter(); import ppo_fast;"
        "print(time.perf_counter() - t);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'triton', 'transformers', 'numba', 'rich', 'matplotlib'}, new"
    )
    assert float(seconds) < 1


def test_operations_run_on_a_cpu_without_triton():
    run(
        "import sys, torch; sys.modules['triton'] = None; import ppo_fast as ppo;"
        "x = torch.zeros(2, 3, requires_grad=True); t = torch.zeros(2, dtype=torch.long);"
        "ppo.token_logprobs(x, t).sum().backward();"
        "ppo.gae(torch.ones(2, 3), torch.ones(2, 3)); ppo.policy_loss(torch.zeros(3), torch.zeros(3), torch.ones(3))"
    )


def test_an_installed_hugging_face_kernels_package_still_wins_at_the_root(tmp_path: Path):
    """A regular package anywhere on sys.path beats a folder without __init__.py, also one in the current directory."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("origin = 'hugging face'\n")
    assert run("import kernels; print(kernels.origin)", path=str(tmp_path)) == "hugging face"


def test_wheel_holds_the_kernels_as_real_files(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (wheel,) = tmp_path.glob("*.whl")  # built from the sdist, so that both are tried
    names = zipfile.ZipFile(wheel).namelist()
    for file in (ROOT / "kernels").glob("*.py"):
        assert f"ppo_fast/kernels/{file.name}" in names
    for file in [*(PACKAGE / "recipes").rglob("*.*l"), *(PACKAGE / "integrations").glob("*.md")]:
        assert file.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith("kernels/") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_every_extra_that_the_readme_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"train", "cpu", "classic", "peft", "rewards", "flash", "bench", "test", "dev"} <= set(extras)
