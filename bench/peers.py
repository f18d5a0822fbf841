"""Rivals, imported only where a benchmark wants them."""

import importlib
from typing import Any

import pytest


def peer(module: str, package: str) -> Any:
    """A peer's module, or a skip that names what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed ({error})")
