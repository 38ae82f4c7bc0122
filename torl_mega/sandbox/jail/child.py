"""What a new child does between the fork and the first line of foreign code.

A child forked for a snippet gets its job at once. One forked ahead does the steps that are the same for every snippet (its
signals, its mount), then waits on a socket for its job.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from torl_mega.sandbox.jail import confine, linux, payload, runner

_MAX_FDS = 8


class Job(NamedTuple):
    """One snippet, as its child gets it."""

    request: dict
    fds: list[int]  # payload, stdout, stderr (, fetch)
    scratch: str | None  # tiers B and C: the folder made for it


def send_job(channel: socket.socket, job: Job) -> None:
    """Sends the job to a child that waits in `wait_for_job`. Raises OSError when that child is gone."""
    socket.send_fds(channel, [json.dumps([job.request, job.scratch]).encode()], job.fds)


def wait_for_job(channel: socket.socket) -> Job:
    message, fds, _, _ = socket.recv_fds(channel, 65536, _MAX_FDS)
    if not message:
        os._exit(0)  # the zygote ends
    request, scratch = json.loads(message)
    return Job(request, fds, scratch)


def run_in_child(
    cage: confine.Cage, get_job: Callable[[], Job], stamp: int, flags: mmap.mmap, slot: int, parent: int
) -> None:
    """Reads the payload, enters the box, applies the limits and runs the program. Never returns."""
    leave = os._exit
    try:
        confine.die_with_parent(parent)
        os.setpgid(0, 0)  # a session would be a scheduling group of its own (autogroup), where niceness means nothing
        runner.reset_signals()
        confine.prepare_box(cage)
        request, fds, scratch = get_job()
        snippet = payload.read(fds[0])
        box = confine.enter_box(cage, scratch, slot)
        runner.write_program(snippet.code)
        snippet.write_files()
        if len(fds) > 3:
            _send_folder_handle(fds[3])
        os.dup2(snippet.open_stdin(), 0)
        os.dup2(fds[1], 1)
        os.dup2(fds[2], 2)
        os.setpriority(os.PRIO_PROCESS, 0, cage.niceness)
        main = runner.reset_interpreter(box, snippet.code, deterministic=cage.settings.deterministic_random)
        confine.lock(
            cage, box, memory_mb=request["memory_mb"], cpu_s=request["cpu_s"], nproc=request.get("nproc"), parent=parent
        )
        linux.close_range(3, stamp - 1)
        linux.close_range(stamp + 1)
        os.write(stamp, b"S" + struct.pack("<d", time.monotonic()))
        os.close(stamp)
        stamp = -1
        runner.run(main, snippet.code, flags)
    except BaseException as e:
        if stamp >= 0:
            os.write(stamp, b"E" + repr(e).encode("utf-8", "replace")[:1000])
    finally:
        leave(125)


def _send_folder_handle(fd: int) -> None:
    """Sends the pool a descriptor of the working folder, through which it reads files back after the program ended."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(fileno=os.dup(fd)) as channel:
        socket.send_fds(channel, [b"box"], [folder])
    os.close(folder)
