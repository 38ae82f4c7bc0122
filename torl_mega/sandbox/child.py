"""What happens in a new child between the fork and the first line of foreign code."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time

from torl_mega.sandbox import confine, linux, payload, runner


def become(
    cage: confine.Cage,
    request: dict,
    fds: list[int],
    stamp: int,
    flags: mmap.mmap,
    box: str | None,
    slot: int,
    parent: int,
) -> None:
    """Everything between fork and foreign code. Does not return."""
    leave = os._exit
    try:
        confine.die_with_parent(parent)
        os.setsid()
        runner.reset_signals()
        snippet = payload.read(fds[0])
        box = confine.make_box(cage, box, slot)
        runner.lay_program(snippet.code)
        snippet.lay_files()
        if len(fds) > 3:
            _hand_out_box(fds[3])
        os.dup2(snippet.open_stdin(), 0)
        os.dup2(fds[1], 1)
        os.dup2(fds[2], 2)
        os.setpriority(os.PRIO_PROCESS, 0, cage.niceness)
        main = runner.fresh_look(box, snippet.code, deterministic=cage.settings.deterministic_random)
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


def _hand_out_box(fd: int) -> None:
    """Gives the pool a handle of the working folder, by which it reads files back after the end."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(fileno=os.dup(fd)) as channel:
        socket.send_fds(channel, [b"box"], [folder])
    os.close(folder)
