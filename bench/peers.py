"""Baselines, imported only where a benchmark needs them."""

import importlib
import sys
from typing import Any

import pytest


def peer(module: str, package: str) -> Any:
    """A peer's module, or a skip that names what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed ({error})")


def peer_without_its_cluster(module: str, package: str) -> Any:
    """As `peer`, for verl and OpenRLHF: where ray, deepspeed and others are missing, empty modules replace them
    during the import only, so that no other package finds them."""
    from oracles import openrlhf_stubs

    openrlhf_stubs.install()
    try:
        return peer(module, package)
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, openrlhf_stubs._Finder)]
        for name in [name for name, found in sys.modules.items() if isinstance(found, openrlhf_stubs._Stub)]:
            del sys.modules[name]
        transformers = sys.modules.get("transformers.utils.import_utils")
        for remembered in [] if transformers is None else vars(transformers).values():
            if hasattr(remembered, "cache_clear"):  # is_peft_available() and others
                remembered.cache_clear()
