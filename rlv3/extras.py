"""Is an optional part of the installation there? If not, one sentence says how to get it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rlv3.errors import ConfigError


def require(name: str, extra: str) -> Any:
    """Import a module that an extra installs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = find_spec(name) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        found = False
    if not found:
        raise ConfigError(
            f"expected {name} to be installed, found none: pip install 'rlv3-shadow[{extra}]'"
        )
    return import_module(name)
