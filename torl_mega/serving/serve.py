"""The serving side-car: runs one SGLang server and keeps it running on its port.

    python -m torl_mega.serving.serve CONF [a.b=value ...] --port P [--host H] [--gpu-ids 0,1] [--log PATH]
                                      [--kv-tokens N --mem-fraction F] [--in-turns]      as the plan has it

    (turn) ─► start ─► /ready ─► watch ──(died, or its scheduler silent for serving.hang_timeout_s)──► start again, same URL
                                  └──(SIGTERM, or the death of whoever started us under `process.start`)──► end it

A restarted server holds the checkpoint's weights, not the policy's: clients see its version and do not use it until the
next weight sync. On GPUs that it shares with the trainer in turns it starts in a turn of the servers (gate.py), and has the
KV cache of the plan or is not ready. Ends with code 1 and one line when the first start fails or when the server died more than
`serving.max_restarts` times. What is started: sglang_server.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ServerError, TorlError
from torl_mega.process.secret import authorization
from torl_mega.process.start import GuardedProcess, start
from torl_mega.serving.gate import ServerGate, notes_folder
from torl_mega.serving.sglang_server import PLAIN, Room, check_port, launch_command, launch_env, ranks_port, wait_ready

STOP_GRACE_S = 0.0  # SGLang has nothing to save, and its own shutdown takes many seconds
WATCH_S = 5.0
T = TypeVar("T")


class Supervisor:
    """Keeps one server running. `run` returns when `stop` is set and raises ServerError when it gives up."""

    def __init__(
        self,
        config: Config,
        *,
        host: str,
        port: int,
        gpu_ids: Sequence[int],
        log_path: Path | None,
        room: Room = PLAIN,
    ) -> None:
        self.config, self.room = config, room
        self.gate = ServerGate(notes_folder() if room.in_turns else None, host, port)
        self.host, self.port, self.gpu_ids, self.log_path = host, port, gpu_ids, log_path
        self.url = f"http://{host}:{port}"
        self.stop = asyncio.Event()
        self.num_restarts = 0

    async def run(self) -> None:
        for port in (self.port, ranks_port(self.port)):
            check_port(self.host, port)
        on_gpu = bool(self.gpu_ids)
        command = launch_command(self.config, host=self.host, port=self.port, on_gpu=on_gpu, room=self.room)
        env = launch_env(self.config, gpu_ids=self.gpu_ids)
        while not self.stop.is_set():
            if await self._until_stopped(self.gate.enter()) is None:
                return
            started = time.monotonic()
            server = start(command, name=f"sglang:{self.port}", log_path=self.log_path, env=env)
            try:
                cause = await self._until_stopped(self._serve(server, started))
            finally:
                server.stop(STOP_GRACE_S)
            if cause is None:
                return
            self.num_restarts += 1
            _say(f"{self.url} {cause}; restart {self.num_restarts} of at most {self.config.serving.max_restarts}")
            if self.num_restarts > self.config.serving.max_restarts:
                raise ServerError(
                    f"server {self.url} {cause}, more than serving.max_restarts = "
                    f"{self.config.serving.max_restarts} times; its log is {self.log_path}"
                )

    async def _until_stopped(self, serving: Coroutine[Any, Any, T]) -> T | None:
        """What `serving` returned, or None when we were told to stop first."""
        task, stopped = asyncio.ensure_future(serving), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for pending in (task, stopped):
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending

    async def _serve(self, server: GuardedProcess, started: float) -> str:
        """Waits for readiness, then for the end. Returns what ended it; the first start's failure is raised."""
        timeout_s = self.config.serving.startup_timeout_s
        try:
            await wait_ready(self.url, timeout_s, process=server, log_path=self.log_path)
            await self._check_room()
        except ServerError as exc:
            if self.num_restarts == 0:
                raise
            return str(exc).partition("\n")[0]
        self.gate.passed()
        _say(f"{self.url} ready after {time.monotonic() - started:.0f} s (pid {server.pid})")
        last_answer = time.monotonic()
        async with aiohttp.ClientSession(headers=authorization()) as session:
            while (code := server.poll()) is None:
                if await scheduler_answers(session, self.url, WATCH_S):
                    last_answer = time.monotonic()
                if time.monotonic() - last_answer > self.config.serving.hang_timeout_s:
                    return f"hung for {self.config.serving.hang_timeout_s:g} s"
                await asyncio.sleep(min(1.0, WATCH_S))
        return f"died (exit code {code})"

    async def _check_room(self) -> None:
        """Raises ServerError when the KV cache holds fewer tokens than the plan says: SGLang takes what it finds free."""
        if self.room.kv_tokens is None or not self.gpu_ids:
            return
        limit = aiohttp.ClientTimeout(total=WATCH_S * 6)
        async with aiohttp.ClientSession(headers=authorization(), timeout=limit) as session:
            async with session.get(f"{self.url}/server_info") as answer:
                found = int((await answer.json())["max_total_num_tokens"])
        if found < self.room.kv_tokens:
            raise ServerError(
                f"server {self.url} has a KV cache of {found} tokens, the plan gives it {self.room.kv_tokens}: other processes "
                f"hold memory of GPUs {','.join(map(str, self.gpu_ids))}; end them, or lower serving.mem_fraction"
            )


async def scheduler_answers(session: aiohttp.ClientSession, url: str, timeout_s: float) -> bool:
    """True when the scheduler behind the HTTP process answers; it does even while generation is paused."""
    try:
        async with session.get(f"{url}/server_info", timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
            await answer.read()
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _say(text: str) -> None:
    print(f"[serve] {text}", flush=True)


def _gpu_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


async def _main(args: argparse.Namespace) -> None:
    config = load_config(args.conf, args.overrides)
    gpu_ids, room = args.gpu_ids, Room(args.kv_tokens, args.mem_fraction, args.in_turns)
    supervisor = Supervisor(config, host=args.host, port=args.port, gpu_ids=gpu_ids, log_path=args.log, room=room)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop.set)
    await supervisor.run()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torl_mega.serving.serve", description="Runs one SGLang server and keeps it up."
    )
    parser.add_argument("conf", help="config file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--gpu-ids", type=_gpu_ids, default=(), help="GPUs of this server, e.g. 0,1; none = CPU")
    parser.add_argument("--kv-tokens", type=int, help="size of the KV cache; default: serving.max_total_tokens")
    parser.add_argument("--mem-fraction", type=float, help="of what is free; default: serving.mem_fraction")
    parser.add_argument("--in-turns", action="store_true", help="the trainer has these GPUs in turns")
    parser.add_argument("--log", type=Path, default=None, help="SGLang's own output; default: ours")
    try:
        asyncio.run(_main(parser.parse_args()))
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)  # the mark that a task looks for in a log
        sys.exit(1)


if __name__ == "__main__":
    main()
