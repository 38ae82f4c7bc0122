"""A pool of a run with a secret runs nothing for who does not show it."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from pools import SECRET, pool

from torl_mega.sandbox.client import SandboxClient
from torl_mega.types import ExecutionRequest as R
from torl_mega.types import ExecutionStatus as S


def answer(url: str, shown: str | None, body: dict | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({} if shown is None else {"Authorization": shown})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as got:
            return got.status
    except urllib.error.HTTPError as exc:
        return exc.code


def test_who_does_not_show_the_secret_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORL_SECRET", SECRET)
    with pool(tier="B", data_libraries=False) as served:
        code = {"code": "print(6 * 7)", "language": "python"}
        for shown in (None, "Bearer", "Bearer other", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x"):
            for path, body in (("/run_code", code), ("/v1/ping", None), ("/metrics", None), ("/nowhere", None)):
                assert answer(served.url + path, shown, body) == 401
        assert answer(f"{served.url}/run_code", f"Bearer {SECRET}", code) == 200
        command = Path(f"/proc/{served.process.pid}/cmdline").read_text()
        assert SECRET not in command + served.ready

        async def run() -> S:
            async with SandboxClient([served.url]) as client:
                return (await client.run(R("print(1)"))).status

        assert asyncio.run(run()) is S.OK
        monkeypatch.delenv("TORL_SECRET")
        assert asyncio.run(run()) is S.INFRA
