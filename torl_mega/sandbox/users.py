"""Which users snippets run as, where the pool is root and may choose; else they run as the pool's own."""

from __future__ import annotations

import glob
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field

_SPARE_UIDS = 64  # a replacement zygote starts while the slots of the old one are still in use


@dataclass(frozen=True)
class Users:
    uid: int | None = None  # tier A: the user of all snippets
    slot_uids: list[int] = field(default_factory=list)  # tier B: a user per slot
    keep_euid: bool = False  # these only count threads; files are opened as the pool's user
    warning: str = ""


def choose(tier: str, uid_base: int, num_slots: int) -> Users:
    """For a pool in this tier with `num_slots` slots; user ids from `uid_base` on."""
    if os.getuid() != 0 or tier == "C":
        return Users()
    fenced = "; snippets keep the pool's user" + (", fenced in by Landlock" if tier == "B" else "")
    if why := _cannot_run(uid_base, ["/bin/true"]):
        return Users(warning=f"root cannot become user {uid_base} here ({why}){fenced}")
    if tier == "A":  # the mounts are made as root
        return Users(uid=uid_base)
    uids = [uid_base + i for i in range(num_slots + _SPARE_UIDS)]
    files = [spec.origin for m in ("json", "numpy", "sympy") if (spec := importlib.util.find_spec(m)) and spec.origin]
    code = "import os,sys; [open(f).close() for f in sys.argv[1:]]"
    if why := _cannot_run(uid_base, [sys.executable, "-s", "-P", "-B", "-c", code, *files]):
        warning = (
            f"user {uid_base} cannot run {sys.executable} ({why}){fenced}; better install the environment where "
            "every user may read it, not below a closed folder such as /root"
        )
        return Users(slot_uids=uids, keep_euid=True, warning=warning)
    return Users(slot_uids=uids)


def _cannot_run(uid: int, command: list[str]) -> str:
    """Why a process of that user cannot run `command`; empty when it can."""
    try:
        done = subprocess.run(command, user=uid, group=uid, extra_groups=[], cwd="/", env={}, capture_output=True)
    except OSError as e:
        return str(e)
    if done.returncode == 0:
        return ""
    return (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def count_threads(uid: int) -> int:
    """Threads that this user runs on the whole machine."""
    total = 0
    for status in glob.glob("/proc/[0-9]*/status"):
        try:
            if os.stat(status).st_uid == uid:
                with open(status) as f:
                    total += int(f.read().split("Threads:")[1].split()[0])
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
    return total
