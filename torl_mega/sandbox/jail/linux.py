"""The few Linux calls that Python does not have, by ctypes: mounts, namespaces, prctl, capabilities.

Every wrapper raises OSError naming the call. Standard library only: this runs inside the zygote, before and after it
has been confined. Covers x86_64 and aarch64; nothing here allocates or frees on behalf of the caller.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
_PR_SET_NAME = 15
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 22, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
_MADV_COLLAPSE = 25

_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "close_range": 436},
    "aarch64": {"pivot_root": 41, "capset": 91, "close_range": 436},
}
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture

MACHINE = platform.machine()
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def supported_machine() -> bool:
    return MACHINE in _NUMBERS


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    from_, to, kind, options = (None if t is None else os.fsencode(t) for t in (source, target, fstype, data))
    check(libc.mount(from_, to, kind, ctypes.c_ulong(flags), options), f"mount {source or fstype} on {target}")


def umount(target: str, flags: int = 0) -> None:
    check(libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    check(libc.syscall(_NUMBERS[MACHINE]["pivot_root"], os.fsencode(new_root), os.fsencode(put_old)), "pivot_root")


def unshare(flags: int) -> None:
    check(libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    check(libc.setns(fd, flags), f"setns({flags:#x})")


def prctl(option: int, arg: int = 0) -> None:
    check(libc.prctl(option, *map(ctypes.c_ulong, (arg, 0, 0, 0))), f"prctl({option})")


def set_name(name: bytes) -> None:
    """As ps shows this process, at most 15 bytes."""
    text = ctypes.create_string_buffer(name)
    prctl(_PR_SET_NAME, ctypes.addressof(text))


def drop_capabilities() -> None:
    """Empties the effective, permitted, inheritable and ambient sets. Final under no_new_privs."""
    libc.prctl(PR_CAP_AMBIENT, *map(ctypes.c_ulong, (PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)))
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.syscall(_NUMBERS[MACHINE]["capset"], header, data), "capset")


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """close_range(2), or one by one before Linux 5.9."""
    if libc.syscall(_NUMBERS[MACHINE]["close_range"], ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)) < 0:
        os.closerange(first, min(last, 4096))


def collapse(address: int, size: int) -> bool:
    """madvise(MADV_COLLAPSE), Linux 6.1: makes huge pages of private memory, now. False where the kernel will not."""
    return libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_COLLAPSE) == 0


def process_cpu_s(pid: int) -> float:
    """CPU seconds used so far by the whole process `pid`, without /proc (the clock id encodes the pid)."""
    import time

    return time.clock_gettime((~pid << 3) | 2)
