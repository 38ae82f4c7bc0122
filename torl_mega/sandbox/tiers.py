"""The tiers of confinement in the order to try them, and the setup of a pool in each.

A tier is not guessed from version numbers: the pool starts a zygote in the strongest one and runs a snippet; where that
fails it takes the next. What snippets may read is `readable_paths`, whom they run as users.py.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field

from torl_mega.config import SandboxConfig
from torl_mega.errors import ServerError
from torl_mega.sandbox.host import PROJECT, Ready
from torl_mega.sandbox.jail import landlock, linux
from torl_mega.sandbox.jail.confine import SPARE_SLOTS, ZygoteSettings
from torl_mega.sandbox.jail.scratch import remove_tree
from torl_mega.sandbox.jail.warm import PRELOAD, WARM
from torl_mega.sandbox.users import Users, choose, count_threads

_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime",
    "/usr/share/zoneinfo", "/usr/share/fonts", "/usr/share/fontconfig", "/etc/fonts",
)  # fmt: skip
_SCRATCH_PREFIX = "torl-sandbox-"
_COUNT_EVERY_S = 10.0


@dataclass(frozen=True)
class KindSetup:
    num_zygotes: int
    slots: int


@dataclass
class PoolSetup:
    """What a pool in this tier consists of: kinds of zygotes, users, folders, and how to say so."""

    tier: str
    config: SandboxConfig
    kinds: dict[str, KindSetup]
    max_running: int
    users: Users
    scratch: str | None
    exact_threads: bool
    mechanisms: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _counted: tuple[float, int] = (-1e9, 0)
    _uid_cursor: int = 0

    def settings(self, kind: str) -> ZygoteSettings:
        c, k = self.config, self.kinds[kind]
        if self.scratch is not None:  # the last zygote to end removes it
            os.makedirs(self.scratch, exist_ok=True)
            os.chmod(self.scratch, 0o711)
        uids: list[int] = []
        if free := self.users.slot_uids:
            num = k.slots + SPARE_SLOTS
            uids = [free[(self._uid_cursor + i) % len(free)] for i in range(num)]
            self._uid_cursor += num
        return ZygoteSettings(
            tier=self.tier, readable=readable_paths(c), slots=k.slots, preload=list(PRELOAD[kind]), warm=WARM[kind],
            uid=self.users.uid, slot_uids=uids, keep_euid=self.users.keep_euid, scratch_base=self.scratch,
            max_threads=c.max_threads, nproc=None, scratch_mb=c.scratch_mb, scratch_inodes=c.scratch_inodes, nice=c.nice,
            deterministic_random=c.deterministic_random,
        )  # fmt: skip

    def note_ready(self, ready: Ready) -> None:
        if self.tier != "C":
            self.mechanisms.append(f"Landlock ABI {ready.landlock}" if ready.landlock else "no Landlock")
        if ready.missing:
            self.warnings.append("not importable in the sandbox: " + "; ".join(ready.missing))

    def nproc(self) -> int | None:
        """RLIMIT_NPROC where the kernel can only count a user's threads as a whole; None where it counts exactly. Those that
        are aside when a snippet begins are counted, those that come later with one thread each."""
        if self.exact_threads:
            return None
        now = time.monotonic()
        if now - self._counted[0] > _COUNT_EVERY_S:
            self._counted = (now, count_threads(os.getuid() if self.users.uid is None else self.users.uid))
        return self._counted[1] + self.max_running * self.config.max_threads + self.config.max_aside

    def remove_scratch(self) -> None:
        if self.scratch is not None:
            with contextlib.suppress(FileNotFoundError):
                remove_tree(self.scratch, os.path.dirname(self.scratch))


def order(config: SandboxConfig) -> list[str]:
    """Tiers to try, strongest first."""
    if config.tier != "auto":
        return [config.tier]
    return ["A", "B"]


def set_up(config: SandboxConfig, tier: str) -> PoolSetup:
    """Decides everything that the pool's processes need in this tier. Raises ServerError when this tier cannot work here."""
    if sys.platform != "linux" or not (linux.supported_machine() or tier == "C"):
        raise ServerError(f"sandbox tier {tier} needs Linux on x86_64 or aarch64, not {sys.platform} {linux.MACHINE}")
    cores = len(os.sched_getaffinity(0))
    running = config.max_running or cores + 2
    num_math = config.zygotes or max(1, cores // 4)
    kinds = {"math": KindSetup(num_math, -(-(running + config.max_aside) // num_math))}
    if config.data_libraries:
        num_data = max(1, num_math // 4)
        kinds["data"] = KindSetup(num_data, -(-(running + config.max_aside // 4) // num_data))
    num_slots = sum(k.num_zygotes * (k.slots + SPARE_SLOTS) for k in kinds.values())
    users = choose(tier, config.uid_base, num_slots)
    warnings = [users.warning] if users.warning else []
    made = PoolSetup(tier, config, kinds, running, users, None, exact_threads=True, warnings=warnings)
    if tier == "A":
        made.exact_threads = _kernel() >= (5, 14)
        made.mechanisms = [
            "user, mount, net, ipc, uts and pid namespaces",
            "empty root with read-only binds",
            "seccomp allow list",
            "rlimits",
        ]
    elif tier == "B":
        if not landlock.abi() and (users.keep_euid or not users.slot_uids):
            raise ServerError(
                "sandbox tier B needs Landlock (Linux 5.13, in the lsm= list), or root and an interpreter that every user "
                "may run: the file system would stay open" + "".join(f"; {w}" for w in warnings)
            )
        if not landlock.abi():
            warnings.append("no Landlock: files that every user may read stay readable to snippets")
        made.exact_threads = bool(users.slot_uids)
        made.mechanisms = [
            "seccomp allow list",
            "rlimits",
            "a user per slot" if users.slot_uids and not users.keep_euid else "the pool's own user",
        ]
    else:
        warnings.append("tier C does not isolate: snippets can read and write whatever this user can")
        made.exact_threads = False
        made.mechanisms = ["rlimits"]
    if tier != "A":
        _sweep(config)
        made.scratch = tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{os.getpid()}-", dir=config.scratch_dir)
    return made


def readable_paths(config: SandboxConfig) -> list[str]:
    """Paths a snippet may read: the interpreter's libraries, the system's, and the config's. Links and their targets both."""
    wanted = [*_SYSTEM, *config.readable_paths]
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        wanted += [os.path.join(prefix, name) for name in ("lib", "lib64", "local/lib")]
    wanted += [p for key in ("stdlib", "platstdlib", "purelib", "platlib") if (p := sysconfig.get_path(key))]
    for name in ("numpy", "sympy", "mpmath"):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            wanted.append(os.path.dirname(os.path.dirname(spec.origin)))
    out: list[str] = []
    for path in sorted({p for w in wanted for p in (w, os.path.realpath(w))}):
        inside = any(path == o or (path.startswith(o + "/") and not os.path.islink(o)) for o in out)
        if os.path.lexists(path) and not inside and path not in ("/", PROJECT):
            out.append(path)
    return out


def _sweep(config: SandboxConfig) -> None:
    """Removes scratch folders of pools that were killed together with their zygotes."""
    base = config.scratch_dir or tempfile.gettempdir()
    for path in glob.glob(os.path.join(base, _SCRATCH_PREFIX + "*")):
        pid = os.path.basename(path).removeprefix(_SCRATCH_PREFIX).split("-")[0]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}") and os.stat(path).st_uid == os.getuid():
            subprocess.run(["rm", "-rf", "--one-file-system", "--", path], check=False)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
