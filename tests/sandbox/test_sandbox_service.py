"""The served process: it ends with its parent, leaves nothing when killed, and callers always get an answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import uvloop
from pools import ORDINARY_UID, PROJECT, Pool, descendants, pool, scratch_of, start, wait_gone

from torl_mega.errors import ServerError
from torl_mega.sandbox.client import SandboxClient
from torl_mega.types import ExecutionRequest as R
from torl_mega.types import ExecutionStatus as S


@pytest.mark.parametrize("tier", ["A", "B"])
def test_killed_pool_takes_everything_along(tier: str) -> None:
    """SIGKILL mid-burst: zygotes and snippets go, callers get INFRA, the next pool removes what tier B had on disk."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), tier=tier, user=None, data_libraries=False)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("sandbox ready")

        async def burst() -> Counter[S]:
            async with SandboxClient([f"unix:{folder}/s"], reconnect_timeout_s=0.5) as client:
                calls = [asyncio.create_task(client.run(R("import time; time.sleep(0.5)"))) for _ in range(200)]
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                tree.update(descendants(process.pid))
                process.kill()
                return Counter(r.status for r in await asyncio.gather(*calls))

        tree: set[int] = set()
        counts = asyncio.run(burst())
        process.wait()
        process.stdout.close()
        assert counts[S.INFRA] > 100
        assert set(counts) <= {S.OK, S.INFRA}
        assert tree
        assert wait_gone(tree, 5.0) == set()
        assert scratch_of(process.pid) == []


def test_a_restarted_pool_gets_the_open_calls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = start(Path(folder), tier="auto", user=None, data_libraries=False)
        assert first.stdout is not None
        assert first.stdout.readline().startswith("sandbox ready")

        async def burst() -> tuple[Counter[S], subprocess.Popen[str]]:
            async with SandboxClient([f"unix:{folder}/s"], reconnect_timeout_s=30) as client:
                calls = [
                    asyncio.create_task(client.run(R("import time; time.sleep(0.1); print(7)"))) for _ in range(60)
                ]
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                first.kill()
                second = start(Path(folder), tier="auto", user=None, data_libraries=False)
                return Counter(r.status for r in await asyncio.gather(*calls)), second

        counts, second = asyncio.run(burst())
        first.wait()
        first.stdout.close()
        second.terminate()
        second.wait(15)
        assert second.stdout is not None
        second.stdout.close()
        assert counts == {S.OK: 60}


def test_sigterm_while_starting_and_running_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), tier="auto", user=None)
        threading.Event().wait(0.6)
        tree = descendants(process.pid)
        process.terminate()
        assert process.wait(15) in (0, -signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.close()
        assert wait_gone(tree, 5.0) == set()


def test_a_second_pool_does_not_take_a_live_socket() -> None:
    with pool(data_libraries=False) as served:
        command = [
            sys.executable,
            "-m",
            "torl_mega.sandbox.serve",
            "--socket",
            served.socket,
            "--settings",
            '{"data_libraries": false}',
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
        assert done.returncode == 1
        assert "another sandbox listens" in done.stderr


@pytest.mark.parametrize("address", ["unix:/nonexistent/s", "http://127.0.0.1:1"])
def test_client_without_a_pool(address: str) -> None:
    async def main() -> None:
        with pytest.raises(ServerError, match=f"no sandbox listens on {address}"):
            await SandboxClient([address], start_timeout_s=0.2).start()
        client = SandboxClient([address], reconnect_timeout_s=0.2)
        result = await client.run(R("print(1)"))
        await client.close()
        assert result.status is S.INFRA
        assert address in result.message
        assert client.counters == {"sandbox_infra": 1}

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nnonsense",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 500 Broken\r\nContent-Length: 1\r\n\r\n\xff",
    ],
)
def test_an_answer_that_is_none_is_infra(answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        await reader.read()  # until the client leaves
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            client = SandboxClient([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
            assert (await client.run(R("print(1)"))).status is S.INFRA
            await client.close()
            assert client.counters == {"sandbox_infra": 1}

    asyncio.run(main())


@pytest.mark.parametrize("door", ["address", "url"])
def test_client_follows_the_event_loop(door: str) -> None:
    with pool(data_libraries=False) as served:
        client = SandboxClient([getattr(served, door)])
        for factory in (None, uvloop.new_event_loop, None):
            with asyncio.Runner(loop_factory=factory) as runner:
                assert runner.run(_five(client)) == ["1\n"] * 5
        asyncio.run(client.close())


async def _five(client: SandboxClient) -> list[str]:
    return [r.stdout for r in await asyncio.gather(*(client.run(R("print(1)")) for _ in range(5)))]


@pytest.mark.parametrize("door", ["address", "url"])
def test_a_cancelled_call_is_cancelled_at_the_pool(door: str) -> None:
    async def running(session: aiohttp.ClientSession, url: str) -> bool:
        async with session.get(f"{url}/metrics") as r:
            return "torl_sandbox_running 1.0" in await r.text()

    async def main(served: Pool) -> None:
        async with aiohttp.ClientSession() as session, SandboxClient([getattr(served, door)]) as client:
            call = asyncio.create_task(client.run(R("import time; time.sleep(200)", wall_s=200)))
            while not await running(session, served.url):
                assert not call.done()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            async with asyncio.timeout(10):
                while await running(session, served.url):
                    pass
            assert (await client.run(R("print(1)"))).stdout == "1\n"
            assert not client.counters

    with pool(data_libraries=False) as served:
        asyncio.run(main(served))


@pytest.mark.parametrize("door", ["address", "url"])
def test_calls_at_a_hung_pool_go_elsewhere(door: str) -> None:
    """A pool that is stopped keeps its connections open; only its silence shows it."""

    async def main(hung: Pool, well: Pool) -> None:
        addresses = [getattr(p, door) for p in (hung, well)]
        async with SandboxClient(addresses, silence_s=2.0, reconnect_timeout_s=0.5) as client:
            hung.process.send_signal(signal.SIGSTOP)
            large = "#" * (4 << 20)  # more than the kernel takes from us for a peer that does not read
            calls = [client.run(R(f"print({n}) {large if n < 2 else ''}")) for n in range(8)]
            results = await asyncio.gather(*calls)
            assert [r.stdout for r in results] == [f"{n}\n" for n in range(8)]
            assert client.counters == {"sandbox_resent": 4}
            assert (await client.run(R("print(1)"))).stdout == "1\n"  # not asked again while it is silent
            assert client.counters == {"sandbox_resent": 4}
            well.process.send_signal(signal.SIGSTOP)
            assert (await client.run(R("print(1)"))).status is S.INFRA
            hung.process.send_signal(signal.SIGCONT)
            well.process.send_signal(signal.SIGCONT)
            result = await client.run(R("print(1)"))
            while result.status is S.INFRA:  # until a ping has been answered
                result = await client.run(R("print(1)"))
            assert result.stdout == "1\n"

    with pool(data_libraries=False) as hung, pool(data_libraries=False) as well:
        try:
            asyncio.run(main(hung, well))
        finally:
            for p in (hung, well):
                p.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("door", ["address", "url"])
@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop])
def test_a_burst_of_calls(door: str, factory: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
    async def main(address: str) -> Counter[str]:
        async with SandboxClient([address]) as client:
            results = await asyncio.gather(*(client.run(R(f"print({n})")) for n in range(1500)))
            assert [r.stdout for r in results] == [f"{n}\n" for n in range(1500)]
            return client.counters

    with pool(data_libraries=False) as served, asyncio.Runner(loop_factory=factory) as runner:
        assert not runner.run(main(getattr(served, door)))


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 7):
        yield data[at : at + 7]


async def _zeros(megabytes: int) -> AsyncIterator[bytes]:
    for _ in range(megabytes):
        yield bytes(1 << 20)


def test_http_like_sandboxfusion() -> None:
    async def main(url: str) -> None:
        async with aiohttp.ClientSession() as session:

            async def post(body: object) -> tuple[int, dict]:
                async with session.post(f"{url}/run_code", json=body) as r:
                    return r.status, await r.json()

            async with session.get(f"{url}/v1/ping") as r:
                assert (r.status, await r.json()) == (200, "pong")
            ok = {"code": "print(1)", "language": "python", "compile_timeout": 10, "files": {"a": None}, "stdin": None}
            status, answer = await post(ok)
            assert status == 200
            assert isinstance(answer["run_result"].pop("execution_time"), float)
            run = {"status": "Finished", "return_code": 0, "stdout": "1\n", "stderr": ""}
            assert answer == {
                "status": "Success",
                "message": "",
                "compile_result": None,
                "run_result": run,
                "executor_pod_name": None,
                "files": {},
            }
            _, late = await post({"code": "while True: pass", "language": "python", "run_timeout": 0.3})
            assert (late["status"], late["run_result"]["status"], late["run_result"]["return_code"]) == (
                "Failed",
                "TimeLimitExceeded",
                None,
            )
            _, failed = await post({"code": "import sys; sys.exit(3)", "language": "python"})
            assert (failed["status"], failed["run_result"]["status"], failed["run_result"]["return_code"]) == (
                "Failed",
                "Finished",
                3,
            )
            for body, kind, place in (
                ({"code": "1"}, "missing", ["body", "language"]),
                ({"language": "python"}, "missing", ["body", "code"]),
                ({"code": "1", "language": "klingon"}, "literal_error", ["body", "language"]),
                ({"code": 5, "language": "python"}, "string_type", ["body", "code"]),
                ({"code": "1", "language": "python", "run_timeout": "soon"}, "float_parsing", ["body", "run_timeout"]),
            ):
                status, answer = await post(body)
                assert status == 422
                assert (answer["detail"][0]["type"], answer["detail"][0]["loc"]) == (kind, place)
            for body, kind in (
                (b"{", "json_invalid"),
                (b"null", "missing"),
                (b"", "missing"),
                (b"[]", "model_attributes_type"),
                (b'{"code": "", "language": "python", "run_timeout": NaN}', "json_invalid"),
                (b'{"code": "", "language": "python", "run_timeout": 1e999}', "finite_number"),
                (b"[" * 10**5, "json_invalid"),
                (b"\xff", "json_invalid"),
            ):
                async with session.post(f"{url}/run_code/", data=body) as r:
                    assert (r.status, (await r.json())["detail"][0]["type"]) == (422, kind)
            async with session.post(f"{url}/run_code", data=_pieces(json.dumps(ok).encode())) as r:  # chunked
                assert (await r.json())["run_result"]["stdout"] == "1\n"
            _, bad = await post({**ok, "files": {"a": "abc"}})
            assert (bad["status"], bad["run_result"], bad["files"]) == ("SandboxError", None, {})
            names = {"stdin": "hi", "files": {"in.txt": "aGk="}, "fetch_files": ["./out.txt", "none", "/etc/passwd"]}
            _, fetched = await post(
                {**ok, **names, "code": "open('out.txt', 'w').write(open('in.txt').read() + input())"}
            )
            assert (fetched["status"], fetched["files"]) == ("Success", {"./out.txt": "aGloaQ=="})
            _, long = await post({**ok, "code": "print('x' * (2 << 20))"})
            assert (long["status"], len(long["run_result"]["stdout"]) >= 1 << 20) == ("Success", True)
            async with session.post(f"{url}/run_code", json=ok, expect100=True) as r:
                assert (await r.json())["run_result"]["stdout"] == "1\n"
            for method, path, expected in (
                ("GET", "/run_code", (405, "Method Not Allowed")),
                ("POST", "/v1/ping", (405, "Method Not Allowed")),
                ("GET", "/run_code/x", (404, "Not Found")),
            ):
                async with session.request(method, url + path) as r:
                    assert (r.status, (await r.json())["detail"]) == expected
            too_large = {"Content-Length": str(300 << 20)}
            async with session.post(f"{url}/run_code", data=_zeros(300), headers=too_large) as r:
                assert (r.status, (await r.json())["detail"]) == (413, "Request Entity Too Large")
            async with session.get(f"{url}/metrics") as r:
                assert 'torl_sandbox_snippets_total{status="ok"} 5.0' in await r.text()

    with pool(data_libraries=False) as served:
        asyncio.run(main(served.url))


def test_full_queue_is_503_and_the_client_waits() -> None:
    async def main(url: str) -> None:
        slow = {"code": "import time; time.sleep(1)", "language": "python"}
        async with aiohttp.ClientSession() as session:

            async def post() -> tuple[int, str | None]:
                async with session.post(f"{url}/run_code", json=slow) as r:
                    return r.status, r.headers.get("Retry-After")

            answers = Counter(await asyncio.gather(*(post() for _ in range(12))))
            assert set(answers) == {(200, None), (503, "1")}
        async with SandboxClient([url, url]) as client:
            results = await asyncio.gather(
                *(client.run(R("import time; time.sleep(0.3); print(1)")) for _ in range(12))
            )
            assert {r.stdout for r in results} == {"1\n"}

    with pool(data_libraries=False, max_running=1, max_queue=2) as served:
        asyncio.run(main(served.url))


def test_nothing_of_the_environment_is_left_by_a_closed_pool() -> None:
    with pool(tier="B", data_libraries=False) as served:

        async def main() -> None:
            async with SandboxClient([served.address]) as client:
                await client.run(R("import os\nos.umask(0o777)\nfor _ in range(200): os.mkdir('d')\n"))
                await client.run(R("import os\nfor _ in range(2000):\n    os.mkdir('d'); os.chdir('d')\n"))

        asyncio.run(main())
    assert scratch_of(served.process.pid) == []


REFUSING = """
import ctypes, os, struct, sys
sys.path.insert(0, sys.argv[1])
from torl_mega.sandbox.jail import linux, seccomp
ins = seccomp._ins
unshare = {"x86_64": 272, "aarch64": 97}[linux.MACHINE]
refused = [unshare] + [444] * (sys.argv[2] == "landlock too")
tests = [i for n in refused for i in (ins(0x15, n, 0, 1), ins(0x06, 0x00050001))]
program = b"".join([ins(0x20, 0), *tests, ins(0x06, 0x7FFF0000)])
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install(program, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


@pytest.mark.parametrize(
    "user", [None, pytest.param(ORDINARY_UID, marks=pytest.mark.skipif(os.getuid() != 0, reason="needs root"))]
)
def test_without_namespaces_tier_b_is_chosen(user: int | None) -> None:
    """As under docker's default seccomp profile, which refuses unshare()."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        as_user = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        served = ["-m", "torl_mega.sandbox.serve", "--port", "0", "--settings", '{"data_libraries": false}']
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
        process = subprocess.Popen(
            [sys.executable, "-c", REFUSING, str(PROJECT), "namespaces", *served],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd="/",
            **as_user,
        )  # type: ignore[call-overload]
        assert process.stdout is not None
        ready = process.stdout.readline()
        url = ready.split("address=")[1].strip()

        async def main() -> str:
            async with SandboxClient([url]) as client:
                return (await client.run(R("print(1)"))).stdout

        answer = asyncio.run(main())
        process.terminate()
        assert process.wait(15) == 0
        process.stdout.close()
        assert ready.startswith("sandbox ready tier=B")
        assert answer == "1\n"


PROGRAM_BELOW_TMP = """
import sys, sympy, only_here, threading
open("x", "w")
threading.stack_size(65536)
wait, started = threading.Event(), 0
try:
    while started < 500:
        threading.Thread(target=wait.wait, daemon=True).start()
        started += 1
except RuntimeError:
    pass
print(sys.prefix, only_here.v, started < 500)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become an ordinary user")
def test_where_no_tier_works_one_line_says_why() -> None:
    served = ["-m", "torl_mega.sandbox.serve", "--port", "0"]
    command = [sys.executable, "-c", REFUSING, str(PROJECT), "landlock too", *served]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=env,
        cwd="/",
        user=ORDINARY_UID,
        group=ORDINARY_UID,
        extra_groups=[],
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sandbox: no sandbox tier works here: sandbox tier A: ")
    assert "unshare" in done.stderr
    assert "sandbox tier B needs Landlock" in done.stderr


def test_an_address_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for where in (["--port", str(taken.getsockname()[1])], ["--socket", str(tmp_path / "none" / "s")]):
            served = ["-m", "torl_mega.sandbox.serve", *where, "--settings", '{"data_libraries": false}']
            done = subprocess.run([sys.executable, *served], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("sandbox: cannot listen on --")
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("tier", "mode"), [("A", 0o700), ("B", 0o755), ("B", 0o700)])
def test_an_interpreter_below_tmp_is_not_hidden(tier: str, mode: int) -> None:
    """A private /tmp must not cover a virtual environment in the real one, nor a closed folder lock snippets out."""
    import sysconfig
    import venv

    code = f"""
import asyncio
from torl_mega.config import SandboxConfig
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest
async def main():
    async with SandboxPool(SandboxConfig(tier={tier!r}, data_libraries=False)) as pool:
        request = ExecutionRequest({PROGRAM_BELOW_TMP!r})
        print((await pool.run(request)).stdout, end="")
asyncio.run(main())
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, mode)
        venv.create(folder, symlinks=True)
        packages = next(Path(folder).glob("lib/python*/site-packages"))
        (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
        (packages / "only_here.py").write_text("v = 5")
        command = [f"{folder}/bin/python", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(PROJECT)}, cwd="/")
        assert done.stdout == f"{folder} 5 True\n", done.stderr
