"""Versions of the other projects: which are taken, without any of them installed."""

import importlib
import importlib.metadata
import sys

import pytest

from ppo_fast.integrations import _patch

PACKAGES = {
    "sb3": ("stable-baselines3", "2.9.*"),
    "torchrl": ("torchrl", "0.14.*"),
    "trl": ("trl", "1.16.* and 1.12.*"),
    "verl": ("verl", "0.9.*"),
    "openrlhf": ("openrlhf", "0.11.*"),
}


@pytest.fixture
def anew(monkeypatch):
    """Import an integration as if it had never been imported."""

    def import_one(name):
        monkeypatch.delitem(sys.modules, f"ppo_fast.integrations.{name}", raising=False)
        monkeypatch.delattr(sys.modules["ppo_fast.integrations"], name, raising=False)
        return importlib.import_module(f"ppo_fast.integrations.{name}")

    monkeypatch.delenv(_patch.ANY_VERSION, raising=False)
    return import_one


@pytest.mark.parametrize("name", PACKAGES)
def test_a_version_that_was_not_tested_is_an_error_that_says_what_to_do(anew, monkeypatch, name):
    package, tested = PACKAGES[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    with pytest.raises(ImportError) as error:
        anew(name)
    note = ", on a machine with a GPU" if name == "openrlhf" else ""
    assert str(error.value) == (
        f"{package} 99.1 is installed, but ppo_fast was tested with {tested}:"
        f' pip install "{package}=={tested.split()[0]}"{note}, or set the environment variable PPO_FAST_ANY_VERSION=1'
        " and compare the numbers"
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_an_error_with_the_line_that_installs_it(anew, monkeypatch, name):
    package, tested = PACKAGES[name]

    def not_there(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    with pytest.raises(ImportError, match=f'this integration needs {package}: pip install "{package}==') as error:
        anew(name)
    assert tested.split()[0] in str(error.value)


@pytest.mark.parametrize(("given", "taken"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_variable_takes_any_version(monkeypatch, given, taken):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    monkeypatch.delenv(_patch.ANY_VERSION, raising=False)
    if given is not None:
        monkeypatch.setenv(_patch.ANY_VERSION, given)
    if taken:
        assert _patch.peer("json", "json", ("1.",)) is importlib.import_module("json")
    else:
        with pytest.raises(ImportError, match=r"json 99.1 is installed, but ppo_fast was tested with 1.\*"):
            _patch.peer("json", "json", ("1.",))


def test_a_tested_version_is_taken_by_its_prefix(monkeypatch):
    for version, taken in (("0.9.1", True), ("0.9.0rc1", True), ("0.90.1", False), ("1.0.9.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        if taken:
            _patch.peer("json", "json", ("0.9.",))
        else:
            with pytest.raises(ImportError, match="is installed"):
                _patch.peer("json", "json", ("0.9.",))
