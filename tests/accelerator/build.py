"""Builds device.cpp with the system's C++ compiler, once for each source, PyTorch, Python and compiler."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock  # installed with torch

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "testgpu_extension"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", f"-DTORCH_EXTENSION_NAME={NAME}")
_COMPILERS = ("c++", "g++", "clang++")


class CannotBuild(Exception):
    """This machine lacks something that the build needs; the message names it."""


def compiler() -> str:
    """$CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    for name in names:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"the test device needs a C++ compiler, and there is no {' or '.join(names)}: install g++")


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppo_fast" / "testgpu"


def command(compiler: str, target: Path) -> list[str]:
    """How the compiler is called: with the include paths and libraries of the installed torch."""
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    if not (includes[-1] / "Python.h").exists():
        raise CannotBuild(f"the test device needs Python.h, which is not in {includes[-1]}: install python3-dev")
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    headers = [part for folder in includes for part in ("-isystem", str(folder))]  # without their warnings
    return [compiler, *_FLAGS, *headers, str(SOURCE), "-o", str(target), *libraries]


def build(folder: Path | None = None) -> Path:
    """The extension in `folder`, built if it is not there yet; processes that start together build it once.

    Raises:
        CannotBuild: there is no compiler, or no Python.h.
    """
    with_compiler = compiler()
    # The folder of torch is in the key, because it is in the file: another environment may have the same versions.
    key = "\n".join([SOURCE.read_text(), torch.__version__, sys.version, *command(with_compiler, Path(NAME))])
    target = (folder or cache_folder()) / hashlib.sha256(key.encode()).hexdigest()[:16] / f"{NAME}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            _compile(with_compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    unfinished = target.with_suffix(".unfinished")
    done = subprocess.run(command(compiler, unfinished), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} cannot build {SOURCE}:\n{done.stderr[-4000:]}")
    unfinished.replace(target)  # so that an interrupted build leaves no extension


def load(path: Path) -> ModuleType:
    """Import the extension; PyTorch knows the device's kernels from then on."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
