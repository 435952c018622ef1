"""What did the audit of a recording find? Left in the store by one program, read by another."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rlv3.errors import DataError
from shadow.segments import write_durably

AUDIT = "audit.json"
_FORMAT = 1


class Replayed(msgspec.Struct, frozen=True):
    """What `rlv3-worker audit` found when it folded a recording again."""

    entries: int
    """Folded."""
    equal: int
    """Records that came out the same, byte for byte."""
    differences: int
    """Records that differ, are missing or are too many."""
    lost: int
    """Entries that the recorder itself missed."""
    format: int = _FORMAT


def read_replay(store: Path) -> Replayed | None:
    """Read what an audit left in a store.

    Raises:
        DataError: the file is none of an audit.
    """
    path = store / AUDIT
    try:
        return msgspec.json.decode(path.read_bytes(), type=Replayed)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"expected the result of an audit in {path}, found: {error}") from error


def write_replay(store: Path, found: Replayed) -> None:
    """Leave the result of an audit in a store, for its reports.

    Raises:
        DataError: the store cannot be written.
    """
    try:
        write_durably(store / AUDIT, msgspec.json.encode(found))
    except OSError as error:
        raise DataError(f"cannot write to {store}: {error.strerror}") from error
