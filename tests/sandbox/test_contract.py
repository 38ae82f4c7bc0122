"""One contract for every door: the pool in this process, and the client over a unix socket and over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from pools import Pool, pool

from torl_mega.config import SandboxConfig
from torl_mega.sandbox.client import SandboxClient
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest, ExecutionResult
from torl_mega.types import ExecutionStatus as S

Run = Callable[..., ExecutionResult]


@pytest.fixture(scope="module")
def served() -> Iterator[Pool]:
    with pool(max_running=4) as made:
        yield made


@asynccontextmanager
async def _door(name: str, served: Pool) -> AsyncIterator[SandboxPool | SandboxClient]:
    if name == "pool":
        async with SandboxPool(SandboxConfig(max_running=2, data_libraries=False)) as p:
            yield p
    else:
        async with SandboxClient([served.address if name == "unix" else served.url]) as c:
            yield c


@pytest.fixture(scope="module", params=["pool", "unix", "tcp"])
def run(request: pytest.FixtureRequest, served: Pool) -> Iterator[Run]:
    with asyncio.Runner() as runner:
        stack = _door(request.param, served)
        door = runner.run(stack.__aenter__())

        def call(code: str, **kw: object) -> ExecutionResult:
            return runner.run(door.run(ExecutionRequest(code, **{"wall_s": 20.0, "cpu_s": 20.0, **kw})))  # type: ignore[arg-type]

        yield call
        runner.run(stack.__aexit__(None, None, None))


def test_ok(run: Run) -> None:
    r = run("print(6 * 7)")
    assert (r.status, r.return_code, r.stdout, r.stderr, r.message) == (S.OK, 0, "42\n", "", "")
    assert 0 < r.cpu_s < 5
    assert 0 < r.wall_s < 20
    assert 20 < r.max_rss_mb < 500


def test_error_keeps_pythons_traceback(run: Run) -> None:
    r = run("print('before')\n1 / 0\n")
    assert (r.status, r.return_code, r.stdout) == (S.ERROR, 1, "before\n")
    lines = r.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "main.py", line 2, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("code", [0, 1, 3, 125, 137, 255])
def test_exit_codes(run: Run, code: int) -> None:
    r = run(f"import sys; sys.exit({code})")
    assert (r.status, r.return_code) == (S.OK if code == 0 else S.ERROR, code)


def test_signal_of_its_own(run: Run) -> None:
    r = run("import os; os.kill(os.getpid(), 15)")
    assert (r.status, r.return_code) == (S.SIGNAL, -15)


def test_wall_limit_keeps_what_was_flushed(run: Run) -> None:
    r = run("import time\nprint('partial', flush=True)\ntime.sleep(60)", wall_s=0.5)
    assert (r.status, r.return_code, r.stdout) == (S.TIMEOUT_WALL, None, "partial\n")
    assert 0.5 <= r.wall_s < 2.0


def test_stdin(run: Run) -> None:
    assert run("print(input() + input())", stdin="a\nb\n").stdout == "ab\n"
    assert run("import sys; print(len(sys.stdin.read()))", stdin="x" * 300_000).stdout == "300000\n"
    assert run("input()").stderr.endswith("EOFError: EOF when reading a line\n")


def test_large_input_and_program_cost_the_snippet_no_memory(run: Run) -> None:
    r = run("import sys; print(sum(map(len, sys.stdin)))", stdin=("y" * 99 + "\n") * 400_000, memory_mb=32)
    assert (r.status, r.stdout) == (S.OK, "40000000\n")
    assert run("x = 1 #" + "y" * (33 << 20) + "\nprint(x)").stdout == "1\n"


def test_files_in_and_out(run: Run) -> None:
    code = "import os, helper\nos.makedirs('out/deep')\ndata = open('data.bin', 'rb').read()\n"
    code += "open('out/deep/x', 'wb').write(data[::-1])\nprint(helper.v)"
    files = {"data.bin": bytes(range(256)), "helper.py": b"v = 5"}
    asked = ("out/deep/x", "./out//deep/x", "/tmp/data.bin", "missing", "out", "/etc/hostname", "../x", "")
    r = run(code, files=files, fetch_files=asked)
    back = bytes(range(255, -1, -1))
    assert (r.status, r.stdout) == (S.OK, "5\n")
    assert r.files == {"out/deep/x": back, "./out//deep/x": back, "/tmp/data.bin": back[::-1]}


def test_fetch_follows_no_link(run: Run) -> None:
    r = run(
        "import os\nos.symlink('/etc/passwd', 'a')\nos.symlink('/etc', 'd')\nopen('b', 'w').write('ok')",
        fetch_files=("a", "d/passwd", "b"),
    )
    assert r.files == {"b": b"ok"}


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a\0b", "\ud800", "é" * 200])
def test_paths_outside_are_refused(run: Run, path: str) -> None:
    r = run("print(1)", files={path: b"x"})
    assert r.status is S.INFRA
    assert "path" in r.message


def test_memory(run: Run) -> None:
    r = run("x = bytearray(10 ** 10)", memory_mb=256)
    assert (r.status, r.return_code) == (S.MEMORY, 1)
    assert r.stderr.endswith("MemoryError\n")
    assert run("x = bytearray(200 << 20); print(len(x))", memory_mb=300).status is S.OK


def test_large_output_is_whole(run: Run) -> None:
    r = run("print('x' * 300_000)", output_bytes=1 << 20)
    assert (r.status, r.stdout) == (S.OK, "x" * 300_000 + "\n")


def test_libraries(run: Run) -> None:
    assert run("import numpy, sympy; print(numpy.arange(3), sympy.sqrt(8))").stdout == "[0 1 2] 2*sqrt(2)\n"
    code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    assert run(code).stdout != run(code).stdout


def test_unicode(run: Run) -> None:
    assert run("print('π≈3')").stdout == "π≈3\n"
    assert run("print(len('\ud800'))").status is S.ERROR  # as from a file: such a program is no UTF-8


def test_cpu_limit_of_its_own(run: Run) -> None:
    r = run("while True: pass", cpu_s=0.3)
    assert (r.status, r.return_code) == (S.TIMEOUT_CPU, None)
    assert r.wall_s < 10


def test_output_is_cut_where_the_request_says(run: Run) -> None:
    r = run("print('x' * 5000)", output_bytes=1000)
    assert "[4001 bytes left out]" in r.stdout


def test_any_bytes_and_any_text(run: Run) -> None:
    """Lone surrogates, which JSON libraries refuse, and bytes that are no UTF-8, both ways."""
    code = "import sys\ndata = sys.stdin.buffer.read()\nopen('out', 'wb').write(data)\nsys.stdout.buffer.write(data)"
    text = "a\ud800\udfff\0é\U0001f600"
    r = run(code, stdin=text, fetch_files=("out", "\ud800"))
    assert r.files == {"out": text.encode("utf-8", "surrogatepass")}
    assert r.stdout == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    every = bytes(range(256))
    assert run(
        code.replace("sys.stdin.buffer", "open('in', 'rb')"), files={"in": every}, fetch_files=("out",)
    ).files == {"out": every}
