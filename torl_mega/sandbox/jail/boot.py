"""The zygote's start: it confines itself, imports the libraries, moves its heap into huge pages, and serves.

The pool starts it as a process of its own (`host.py`) and is told {"ready": …} or {"failed": reason} over the socket.
"""

from __future__ import annotations

import contextlib
import gc
import json
import linecache
import mmap
import os
import resource
import signal
import socket
import sys

from torl_mega.sandbox.jail import confine, linux, runner, scratch
from torl_mega.sandbox.jail.pid_namespaces import PidNamespaces
from torl_mega.sandbox.jail.zygote import Zygote

_HUGE_PAGE = 2 << 20


def _fork_into_pid_namespace(control: socket.socket) -> None:
    """Returns in a child inside the new pid namespace; the calling process stays outside and only waits for it."""
    pid = os.fork()
    if pid == 0:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    control.close()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the inner one dies with it
    linux.close_range(3)
    os.waitpid(pid, 0)
    os._exit(0)


def _preload(settings: confine.ZygoteSettings) -> list[str]:
    """Imports the libraries and returns the errors of missing ones, which are not fatal."""
    missing = []
    for name in settings.preload:
        try:
            __import__(name)
        except ImportError as e:
            missing.append(f"{name}: {e}")
    try:
        if settings.warm:
            exec(settings.warm, {})
    except ImportError as e:
        missing.append(str(e))
    return missing


def main(control_fd: int, raw_settings: str, project: str) -> None:
    """Entry point of the process the pool starts. Tells the pool {"ready": …} or {"failed": reason}, then serves."""
    settings = confine.ZygoteSettings(**json.loads(raw_settings))
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    control.setblocking(False)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL if settings.tier == "A" else signal.SIGTERM)
    _raise_oom_score()
    os.umask(0o022)  # the new root must be readable to the user that snippets become
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness - 10)  # it keeps time even when others fight for the cores
    procfs = vm = -1
    try:
        namespaces: PidNamespaces | None = None
        if settings.tier == "A":
            procfs = confine.enter_namespaces(settings)
            _fork_into_pid_namespace(control)
            namespaces = PidNamespaces(procfs)
            confine.mount_box(settings)  # for what libraries write when they are imported; each snippet gets its own
        else:
            procfs = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != project and os.path.exists(p)]
        sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]

        base = scratch.Base(settings.scratch_base) if settings.scratch_base else None
        if base:  # until serve() takes over: the pool's death must not leave the folder behind
            signal.signal(signal.SIGTERM, lambda *_: (base.remove(), os._exit(0)))
        os.environ["MPLCONFIGDIR"] = base.path if base else confine.BOX
        missing = _preload(settings)
        cage = confine.prepare(settings, min(19, niceness + settings.nice))
        vm = os.open("self/statm", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)
        cage.vm_bytes = int(os.read(vm, 100).split()[0]) * mmap.PAGESIZE
        os.close(vm)
        zygote = Zygote(control, cage, namespaces, base, procfs)
        runner.set_environment(base.path if base else confine.BOX)
        _forget_own_modules()
        linecache.clearcache()
        gc.collect()
        gc.freeze()
        gc.disable()
        _use_huge_pages(procfs)
    except BaseException as e:
        control.send(json.dumps({"failed": f"{type(e).__name__}: {e}"}).encode())
        os._exit(1)
    control.send(json.dumps({"ready": True, "missing": missing, "landlock": cage.landlock_abi}).encode())
    zygote.serve()
    os._exit(0)


def _forget_own_modules() -> None:
    """Drops this package from sys.modules, so that snippets cannot import it; in a child the walk would copy 3 MB."""
    for name in [m for m in sys.modules if m == "torl_mega" or m.startswith("torl_mega.")]:
        del sys.modules[name]


def _use_huge_pages(procfs: int) -> None:
    """Moves the heap into huge pages: a fork copies 30 page-table entries instead of 15,000, a fifth of a short snippet's cost.

    Best effort: without huge pages everything works as before. A child still copies what it writes in 4 KiB pages.
    """
    fd = os.open("self/maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.readlines()
    for line in lines:
        area, rights, _, _, inode, *name = line.split()
        if rights != "rw-p" or inode != "0" or (name and name[0] != "[heap]"):
            continue
        begin, end = (int(part, 16) for part in area.split("-"))
        for address in range(-(-begin // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
            linux.collapse(address, _HUGE_PAGE)  # an area that was never touched is refused: nothing to gain there


def _raise_oom_score() -> None:
    """Makes the kernel's out-of-memory killer take a snippet before the trainer. Best effort: it may be refused."""
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("800")
    except OSError:
        return
