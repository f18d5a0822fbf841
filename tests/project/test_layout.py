"""The layout of the repository: what must not exist, what must resolve, and which way imports go."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.layers import FILES, LAYERS, PACKAGE, graph, imported_names, layer

ROOT = Path(__file__).parents[2]
# Modules that read kernels below ops: the reference and the loops, the plan of a chunk of logits
READERS_OF_KERNELS = {"ppo_fast.doctor", "ppo_fast.llm.memory"}


def test_layers_are_all_that_exist():
    packages = {(*name.split("."), "")[1] for name in FILES}
    assert packages == {package for packages in LAYERS for package in packages}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downward(name: str):
    for imported in graph()[name]:
        assert imported in FILES, f"{name} imports {imported}, which does not exist"
        same_package = imported.split(".")[1:2] == name.split(".")[1:2]
        assert same_package or layer(imported) < layer(name), f"{name} imports {imported}"


def test_few_types_are_left_open():
    """Any, `type: ignore` and `assert x is not None` hide a structure that is not clear."""
    sources = [path.read_text() for path in FILES.values()]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    assert sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes) <= 8
    assert sum(source.count("# type: ignore") for source in sources) <= 4
    assert sum(len(re.findall(r"assert .* is not None", source)) for source in sources) <= 4


def test_imports_have_no_cycle():
    seen: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in seen:
            for imported in sorted(graph()[name]):
                visit(imported, (*path, name))
            seen[name] = ""

    for name in graph():
        visit(name, ())


def test_kernels_are_read_by_ops_doctor_and_memory_only():
    readers = {name for name, imported in graph().items() if any(x.startswith("ppo_fast.kernels") for x in imported)}
    outside = {name for name in readers if name.split(".")[1] not in ("kernels", "ops")}
    assert outside <= READERS_OF_KERNELS


def test_integrations_import_the_operations_and_errors_only():
    for name, imported in graph().items():
        if name.startswith("ppo_fast.integrations"):
            others = {x for x in imported if not x.startswith("ppo_fast.integrations")}
            assert others <= {"ppo_fast", "ppo_fast.common.errors"}, name


@pytest.mark.parametrize("name", FILES)
def test_names_with_an_underscore_stay_in_their_file(name: str):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    modules = {}
    for module, imported, local in imported_names(tree):
        private = imported.startswith("_") and not imported.startswith("__")
        assert not private or module.endswith("._patch"), f"{name} imports {imported} of {module}"
        if not imported:
            modules[local] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{name}, line {node.lineno}: {node.value.id}.{node.attr}"


def test_kernels_folder_has_no_init_that_would_shadow_hugging_face():
    assert not list((ROOT / "kernels").rglob("__init__.py"))


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
        "assert not new & {'triton', 'transformers', 'numba', 'rich', 'matplotlib', 'pydantic'}, new"
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
    for file in (ROOT / "kernels").rglob("*.py"):
        assert f"ppo_fast/{file.relative_to(ROOT).as_posix()}" in names
    for file in [*(PACKAGE / "recipes").rglob("*.*l"), *(PACKAGE / "integrations").glob("*.md")]:
        assert file.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith("kernels/") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_every_extra_that_the_readme_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"train", "cpu", "classic", "peft", "rewards", "flash", "bench", "test", "dev"} <= set(extras)
