"""Run a program as a confined systemd service does: with SystemCallFilter=~@resources and EPERM.

python tests/worker/confined.py PROGRAM ARGUMENT ...
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

RESOURCES = {
    # ioprio_set, mbind, migrate_pages, move_pages, sched_setaffinity, sched_setattr,
    # sched_setparam, sched_setscheduler, set_mempolicy, setpriority, setrlimit
    "x86_64": (251, 237, 256, 279, 203, 314, 142, 144, 238, 141, 160),
    "aarch64": (30, 235, 238, 239, 122, 274, 118, 119, 237, 140, 164),
}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_NUMBER, IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> None:
    """Refuse these system calls to this process from here on."""
    numbers = RESOURCES[platform.machine()]
    steps = [(LOAD_NUMBER, 0, 0, 0)]
    for place, number in enumerate(numbers):
        steps.append((IF_EQUAL, len(numbers) - place, 0, number))
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | errno.EPERM)]
    packed = b"".join(struct.pack("=HBBI", *step) for step in steps)
    program = _Program(len(steps), packed)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


if __name__ == "__main__":
    confine()
    os.execv(sys.argv[1], sys.argv[1:])
