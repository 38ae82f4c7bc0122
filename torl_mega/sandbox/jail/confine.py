"""Confinement of the zygote (once) and of each snippet (after the fork), in three tiers.

    A   own user, mount, net, ipc, uts and pid namespaces; an empty root with read-only binds; per snippet a fresh
        tmpfs, an unmapped user namespace of its own, no capabilities, Landlock where the kernel has it, seccomp, rlimits
    B   no namespaces: a user id per slot when root, a scratch folder, Landlock, seccomp, rlimits
    C   rlimits and a scratch folder only

Runs in the zygote and its children: standard library only, and every failure raises before any foreign code has run.
Needs the host's /proc only to write the user-namespace maps; mounts none. It is not a virtual machine: a hole in one of
the roughly 190 system calls that stay open is a hole in the sandbox.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
from dataclasses import dataclass, field

from torl_mega.sandbox.jail import landlock, linux, seccomp

MIB = 1 << 20
SPARE_SLOTS = 2  # beyond the settings' slots, for children that were killed and answered for but are not gone yet
BOX = "/tmp"  # the snippet's folder in tier A
_KEEP = "/.below-tmp"
_ROOT_CANDIDATES = ("/mnt", "/media", "/srv", "/opt", "/home", "/var", "/tmp")  # where the new root is mounted, briefly
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWPID


@dataclass(frozen=True)
class ZygoteSettings:
    """What the pool tells a zygote. Plain data: it travels as JSON in argv and holds no secret."""

    tier: str
    readable: list[str]  # paths a snippet may read
    slots: int
    preload: list[str]
    warm: str
    uid: int | None  # drop to this user (tier A as root); None keeps the current one
    slot_uids: list[int]  # tier B as root: one user per slot
    keep_euid: bool  # the interpreter is closed to those users: they only count threads, files are opened as the pool's
    scratch_base: str | None  # tiers B and C
    max_threads: int
    nproc: int | None  # RLIMIT_NPROC where threads cannot be counted per snippet; None: max_threads is exact
    scratch_mb: int
    scratch_inodes: int
    nice: int
    deterministic_random: bool


@dataclass
class Cage:
    """The confinement that the zygote prepares once and each child applies."""

    settings: ZygoteSettings
    niceness: int  # of snippets
    vm_bytes: int = 0
    landlock_abi: int = 0
    rules: list[landlock.Rule] = field(default_factory=list)
    filter: bytes = b""


# ------------------------------------------------------------------------------------------------ the zygote, once


def enter_namespaces(settings: ZygoteSettings) -> int:
    """Tier A: moves the calling process behind an empty root and into namespaces of its own. Returns an fd of /proc/self.

    The caller must fork next: its children are in the new pid namespace, it is not.
    """
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    procfs = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.getuid() == 0 and settings.uid is not None:
        # as root the mounts come first, so that an interpreter below a closed folder (/root) can still be bound
        linux.unshare(linux.CLONE_NEWNS)
        _build_root(settings.readable)
        drop_user(settings.uid)
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(linux.CLONE_NEWUSER | _NAMESPACES)
        _map_user(proc, uid, gid)
    else:
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(linux.CLONE_NEWUSER | _NAMESPACES)
        _map_user(proc, uid, gid)
        _build_root(settings.readable)
    os.close(proc)
    return procfs


def drop_user(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root and the maps cannot be written


def _map_user(proc: int, uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _build_root(readable: list[str]) -> None:
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    folders = [d for d in _ROOT_CANDIDATES if os.path.isdir(d)]
    free = [d for d in folders if not any(p == d or p.startswith(d + "/") for p in readable)]
    if not free:
        raise RuntimeError(f"no place for the new root: each of {', '.join(folders)} holds readable paths")
    root = free[0]
    linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=4m,nr_inodes=4096,mode=755")
    for path in (*readable, *_DEVICES):
        _bind(path, root)
    for path, kept in _below_box(readable):
        _bind(path, root, kept)
    for name in (BOX, "/old"):
        os.makedirs(root + name, mode=0o755, exist_ok=True)
    linux.pivot_root(root, root + "/old")
    os.chdir("/")
    linux.umount("/old", linux.MNT_DETACH)
    os.rmdir("/old")
    linux.mount(None, "/", None, linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)


def _below_box(readable: list[str]) -> list[tuple[str, str]]:
    """Interpreter paths that a private /tmp would hide, such as a virtual environment made there, and where each is kept."""
    return [(p, os.path.join(_KEEP, str(i))) for i, p in enumerate(readable) if p.startswith(BOX + "/")]


def mount_box(settings: ZygoteSettings) -> None:
    """Mounts an empty tmpfs on /tmp, and binds the readable paths that lie below /tmp into it again."""
    options = f"size={settings.scratch_mb}m,nr_inodes={settings.scratch_inodes},mode=700"
    linux.mount("tmpfs", BOX, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, options)
    for path, kept in _below_box(settings.readable):
        if os.path.islink(kept):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(kept), path)
        elif os.path.isdir(kept):
            os.makedirs(path, exist_ok=True)
            linux.mount(kept, path, None, linux.MS_BIND)


def _bind(path: str, root: str, shown_as: str | None = None) -> None:
    """Shows `path` under the new root, read-only; a link is shown as the same link."""
    target = root + (shown_as or path)
    if os.path.lexists(target):
        return
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if not os.path.exists(path):
        return
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(path, target, None, linux.MS_BIND | linux.MS_REC)
    if stat.S_ISCHR(mode):
        return
    # flags that a mount already has are locked inside a user namespace: they must be repeated
    kept = os.statvfs(target).f_flag & (linux.MS_NOEXEC | 1024 | 2048)
    flags = linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | kept
    linux.mount(None, target, None, flags)


def prepare(settings: ZygoteSettings, niceness: int) -> Cage:
    """Opens the Landlock paths and assembles the filter; called once, after the root has been built."""
    cage = Cage(settings, niceness)
    if settings.tier == "C":
        return cage
    cage.landlock_abi = landlock.abi()
    cage.filter = seccomp.program(shared_files=settings.tier == "B", landlock_abi=cage.landlock_abi)
    if cage.landlock_abi:
        for path in settings.readable:
            if os.path.exists(path):
                cage.rules.append(landlock.Rule(path, landlock.READ, cage.landlock_abi))
        for path in _DEVICES:
            if os.path.exists(path):
                cage.rules.append(landlock.Rule(path, landlock.READ_FILE | landlock.WRITE_FILE, cage.landlock_abi))
    return cage


# ------------------------------------------------------------------------------------------------ a snippet, each


def die_with_parent(parent: int) -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (0, parent):  # 0: the parent is outside this pid namespace
        os._exit(125)


def prepare_box(cage: Cage) -> None:
    """Tier A: mounts the snippet's own empty folder in a mount namespace of its own."""
    if cage.settings.tier == "A":
        linux.unshare(linux.CLONE_NEWNS)
        mount_box(cage.settings)


def enter_box(cage: Cage, scratch: str | None, slot: int) -> str:
    """Changes into the snippet's folder and returns its path; in tier B also changes to the slot's user."""
    settings = cage.settings
    if settings.tier == "A":
        os.chdir(BOX)
        return BOX
    assert scratch is not None
    if settings.slot_uids:
        uid = settings.slot_uids[slot]
        os.setgroups([])
        if settings.keep_euid:
            os.setresuid(uid, -1, uid)
        else:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
    os.chdir(scratch)
    return scratch


def lock(cage: Cage, box: str, *, memory_mb: int, cpu_s: float, nproc: int | None, parent: int) -> None:
    """Applies limits, capabilities, Landlock and seccomp, irrevocably; the last trusted step before foreign code."""
    settings = cage.settings
    if settings.tier == "A":
        linux.unshare(linux.CLONE_NEWUSER)  # its own count of threads, and no way to name anything outside
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if settings.tier != "C":
        linux.drop_capabilities()
        if cage.landlock_abi:
            landlock.restrict(cage.rules, box, cage.landlock_abi)
    _set_limits(cage, memory_mb=memory_mb, cpu_s=cpu_s, nproc=nproc)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # no core, no ptrace, no /proc of it for others
    die_with_parent(parent)  # after every change of user, which clears it
    if cage.filter:
        seccomp.install(cage.filter, os.getpid())


def _set_limits(cage: Cage, *, memory_mb: int, cpu_s: float, nproc: int | None) -> None:
    seconds = int(cpu_s) + 2  # a backstop: the zygote measures and kills to the millisecond
    # without a tmpfs of its own a snippet could hold NOFILE deleted files open, which no look at its folder shows
    file_bytes = cage.settings.scratch_mb * MIB // (1 if cage.settings.tier == "A" else 4)
    limits = {
        resource.RLIMIT_AS: cage.vm_bytes + memory_mb * MIB,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 8 * MIB,  # also what a thread's stack reserves of the address space
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_NPROC: nproc if nproc is not None else cage.settings.max_threads,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
