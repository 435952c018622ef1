"""Errors a user can cause or must answer; each knows the exit code of the program that meets it.

UserError
 |- ConfigError   a setting is missing or impossible            2
 |- PolicyError   the artifact is missing, damaged or foreign   2
 |- DataError     a data file cannot be used                    2
 |- OutOfMemory   the memory does not suffice now               1
The worker adds RedisUnavailable (1), Fenced (3) and CheckFailed (4).
"""

from __future__ import annotations


class UserError(Exception):
    """One sentence that names what was expected and what was found; no traceback is shown."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting is missing or impossible; the program stops before any I/O."""

    exit_code = 2


class PolicyError(UserError, ValueError):
    """The artifact is missing, damaged or made for other features or actions; the program stops."""

    exit_code = 2


class DataError(UserError, ValueError):
    """A data file is missing, unreadable or lacks what is asked of it; the program stops."""

    exit_code = 2


class OutOfMemory(UserError, MemoryError):
    """The memory does not suffice now, which says nothing against the data; try again."""

    exit_code = 1
