"""The pool as a process: `python -m torl_mega.sandbox.serve --socket PATH` and/or `--host 127.0.0.1 --port N`.

Prints one line when it is ready, `sandbox ready tier=A address=unix:/path`, and runs until SIGTERM, SIGINT, or end of file
on `--parent-fd`. It leaves no process, file or namespace behind; when it is killed itself, its zygotes see end of file on
their sockets and go, with every snippet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import sys

from torl_mega.config import SandboxConfig
from torl_mega.errors import ConfigError, TorlError
from torl_mega.sandbox.http_server import HttpServer
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.sandbox.socket_server import listen


def serve(
    *,
    socket: str | None,
    host: str | None = None,
    port: int | None = None,
    config: SandboxConfig,
    parent_fd: int | None = None,
) -> int:
    """Runs the pool until it is told to stop; returns the exit code. Raises TorlError when it cannot start."""
    if socket is None and port is None:
        raise ConfigError("the sandbox has no address: give --socket PATH, or --port N with --host")
    return asyncio.run(_serve(socket, host or "127.0.0.1", port, config, parent_fd))


async def _serve(path: str | None, host: str, port: int | None, config: SandboxConfig, parent_fd: int | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if parent_fd is not None:
        os.set_inheritable(parent_fd, False)
        os.set_blocking(parent_fd, False)
        loop.add_reader(parent_fd, _parent_spoke, parent_fd, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65536), hard))
    async with contextlib.AsyncExitStack() as stack:
        pool = SandboxPool(config)
        stack.push_async_callback(pool.close)
        start = loop.create_task(pool.start())
        stopped = loop.create_task(stop.wait())
        await asyncio.wait([start, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.wait([start])
            return 0
        plan = start.result()
        addresses = []
        if path is not None:
            server = await listen(pool, path)
            stack.callback(_unlink, path)
            stack.callback(server.close)
            addresses.append(f"unix:{path}")
        if port is not None:
            http = HttpServer(pool)
            stack.push_async_callback(http.close)
            addresses.append(f"http://{host}:{await http.start(host, port)}")
        for warning in plan.warnings:
            print(f"sandbox: {warning}", file=sys.stderr, flush=True)
        print(f"sandbox ready tier={plan.tier} address={','.join(addresses)}", flush=True)
        await stopped
    return 0


def _parent_spoke(fd: int, stop: asyncio.Event) -> None:
    try:
        data = os.read(fd, 4096)
    except BlockingIOError:
        return
    if not data:
        asyncio.get_running_loop().remove_reader(fd)
        stop.set()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torl_mega.sandbox.serve", description=__doc__)
    parser.add_argument("--socket", help="path of a unix socket for SandboxClient")
    parser.add_argument("--host", default="127.0.0.1", help="address for SandboxFusion's HTTP interface")
    parser.add_argument("--port", type=int, help="port for it; 0 takes a free one, printed in the ready line")
    parser.add_argument("--parent-fd", type=int, help="inherited pipe; end of file on it ends the service")
    parser.add_argument("--settings", default="{}", help='SandboxConfig as JSON, e.g. \'{"tier": "B"}\'')
    args = parser.parse_args(argv)
    try:
        config = SandboxConfig.model_validate(json.loads(args.settings))
        return serve(socket=args.socket, host=args.host, port=args.port, config=config, parent_fd=args.parent_fd)
    except (TorlError, ValueError) as e:
        print(f"sandbox: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
