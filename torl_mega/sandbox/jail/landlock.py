"""Landlock: the process may read these paths, write below those, and nothing else of the file system.

Handles every access right of the running kernel's ABI (1: Linux 5.13 … 6: Linux 6.12), plus TCP from ABI 4 and signals and
abstract sockets from ABI 6. Landlock does not govern stat, chmod, chown, utime, xattrs or chdir: seccomp.py does.
"""

from __future__ import annotations

import os
import stat
import struct

from torl_mega.sandbox.jail.linux import LANDLOCK_ADD_RULE, LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, check, libc

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEV
# EXECUTE lets libraries be mapped where a Linux security module asks for it; seccomp refuses execve
READ = EXECUTE | READ_FILE | READ_DIR


def abi() -> int:
    """The kernel's Landlock ABI, 0 when it has none."""
    return max(0, libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))


def handled_fs(version: int) -> int:
    bits = 16 if version >= 5 else 15 if version >= 3 else 14 if version >= 2 else 13
    return (1 << bits) - 1


class Rule:
    """A path opened once (O_PATH) in the zygote, so that a child only has to add it."""

    def __init__(self, path: str, access: int, version: int) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(self.fd).st_mode):
            access &= _FILE_RIGHTS
        self.packed = struct.pack("=Qi", access & handled_fs(version), self.fd)


def restrict(rules: list[Rule], writable: str, version: int) -> None:
    """Confines the calling thread for good. Needs no_new_privs."""
    rights = handled_fs(version)
    attr = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = check(libc.syscall(LANDLOCK_CREATE_RULESET, attr, size, 0), "landlock_create_ruleset")
    for rule in (*rules, Rule(writable, rights & ~EXECUTE, version)):
        check(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule.packed, 0), "landlock_add_rule")
    check(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
