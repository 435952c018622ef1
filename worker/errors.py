"""Errors of the shell, each with the exit code of the program that meets it.

RedisUnavailable   Redis cannot be reached, or refuses us, at start   1
Fenced             another worker owns the state now                  3
CheckFailed        a check said no (doctor, audit, --on-gap fail)     4
"""

from __future__ import annotations

from rlv3.errors import UserError


class RedisUnavailable(UserError):
    """Redis cannot be reached, or refuses us, at start; a running worker backs off instead."""

    exit_code = 1


class Fenced(UserError):
    """Another worker took the epoch: this one must stop and must not be restarted."""

    exit_code = 3


class CheckFailed(UserError):
    """A check the user asked for failed; the sentence says what was expected and found."""

    exit_code = 4
