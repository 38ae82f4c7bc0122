"""The pool as a process: `python -m torl_mega.sandbox.serve --socket PATH` and/or `--host 127.0.0.1 --port N`.

Prints one line when it is ready, `sandbox ready tier=A address=unix:/path`, and runs until SIGTERM or SIGINT. It leaves no
process, file or namespace behind; when it is killed itself, its zygotes see end of file on their sockets and go, with every
snippet.
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
from torl_mega.errors import ConfigError, ServerError, TorlError
from torl_mega.sandbox.http_server import HttpServer
from torl_mega.sandbox.pool import SandboxPool


def serve(*, socket: str | None, host: str | None = None, port: int | None = None, config: SandboxConfig) -> int:
    """Runs the pool until it is told to stop; returns the exit code. Raises TorlError when it cannot start."""
    if socket is None and port is None:
        raise ConfigError("the sandbox has no address: give --socket PATH, or --port N with --host")
    return asyncio.run(_serve(socket, host or "127.0.0.1", port, config))


async def _serve(path: str | None, host: str, port: int | None, config: SandboxConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
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
        setup = start.result()
        http = HttpServer(pool)
        await http.start()
        stack.push_async_callback(http.close)
        addresses = []
        try:
            if path is not None:
                await http.listen_unix(path)
                stack.callback(_unlink, path)
                addresses.append(f"unix:{path}")
            if port is not None:
                addresses.append(f"http://{host}:{await http.listen_tcp(host, port)}")
        except (OSError, OverflowError) as exc:  # a folder, name or port that is not there, not ours, or taken
            where = f"--socket {path}" if path is not None and not addresses else f"--host {host} --port {port}"
            raise ServerError(f"cannot listen on {where}: {exc}") from None
        for warning in setup.warnings:
            print(f"sandbox: {warning}", file=sys.stderr, flush=True)
        print(f"sandbox ready tier={setup.tier} address={','.join(addresses)}", flush=True)
        await stopped
    return 0


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torl_mega.sandbox.serve", description=__doc__)
    parser.add_argument("--socket", help="path of a unix socket to listen on, for this user alone")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on with --port")
    parser.add_argument("--port", type=int, help="TCP port; 0 takes a free one, printed in the ready line")
    parser.add_argument("--settings", default="{}", help='SandboxConfig as JSON, e.g. \'{"tier": "B"}\'')
    args = parser.parse_args(argv)
    try:
        config = SandboxConfig.model_validate(json.loads(args.settings))
        return serve(socket=args.socket, host=args.host, port=args.port, config=config)
    except (TorlError, ValueError) as e:
        print(f"sandbox: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
