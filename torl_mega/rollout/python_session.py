"""The tool `python_session`: Python whose variables, functions and imports live as long as their trajectory.

    call 1: x = 6        ──► jail: runs it
    call 2: print(x*7)   ──► jail: runs call 1 again, unheard, then this one ──► 42

Nothing waits between calls, so thousands of sessions cost no process, a call that has to be made again finds everything as it
was, and any node's sandbox serves it. What a living interpreter would know is there, because it is made again: classes, generators,
open files, the state of modules. Random numbers are drawn from a seed that a session keeps, so they are the same each time; what a
program takes from elsewhere (the time, `os.urandom`) is not.

A program that a limit ended, or that ended its own process, is not part of the session. All calls of a trajectory together, with
what is run again, have `session_wall_s`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torl_mega.errors import SandboxFault
from torl_mega.interfaces import Sandbox
from torl_mega.rollout.python_tool import STOP, Limits, call_last_block, cut, render_body
from torl_mega.types import ExecutionRequest, ExecutionStatus, Problem, ToolCall

THROUGH = ".session"
"""A file that is there when a program came to its end, by an exception or without."""
_SPARE_S = 0.5  # what is run again may take that much longer than it did, and twice as long

# has names of its own: what a program calls `open` or `len` is not meant here
_WRAPPER = """
import linecache, os, random, sys
names, through = sys.modules["__main__"].__dict__, os.path.abspath(THROUGH)
random.seed(0)
if "numpy.random" in sys.modules:
    sys.modules["numpy.random"].seed(0)

def run(code, name):
    text = code.decode("utf-8", "replace")
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(code, name, "exec", dont_inherit=True), names)

if earlier:
    kept = [(os.dup(fd), fd) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for _, fd in kept:
        os.dup2(nowhere, fd)
    for number, old in enumerate(earlier, 1):
        try:
            run(old, f"call_{number}.py")
        except BaseException:
            pass
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except BaseException:
            pass
    for copy, fd in kept:
        os.dup2(copy, fd)
        os.close(copy)
    os.close(nowhere)
try:
    run(code, "main.py")
finally:
    os.close(os.open(through, os.O_WRONLY | os.O_CREAT))
"""
_DATA = re.compile(rb"\b(scipy|pandas|matplotlib)\b")


@dataclass(frozen=True, slots=True)
class PythonSessionTool:
    """Implements `Tool`: a session for each trajectory."""

    sandbox: Sandbox
    limits: Limits  # of one call
    wall_s: float  # of all calls of a trajectory together
    stop: tuple[str, ...] = (STOP,)

    def open(self, problem: Problem) -> PythonSession:
        return PythonSession(self)


@dataclass(slots=True)
class PythonSession:
    """The programs of one trajectory so far."""

    tool: PythonSessionTool
    earlier: list[bytes] = field(default_factory=list)
    again_s: float = 0.0  # what they take
    used_s: float = 0.0

    async def call(self, written: str) -> ToolCall:
        """Runs the last block of what the policy wrote. Raises SandboxFault."""
        return await call_last_block(written, self.execute)

    async def execute(self, code: str) -> ToolCall:
        """Runs a program after the earlier ones; the observation is what it says, without a fence. Raises SandboxFault."""
        tool = self.tool
        request = self.request(code)
        if self.used_s >= tool.wall_s:
            said = f"TimeoutError: this session has used its {tool.wall_s:g} seconds"
            return ToolCall(code, ExecutionStatus.TIMEOUT_WALL, None, said, 0.0)
        result = await tool.sandbox.run(request)
        if result.status is ExecutionStatus.INFRA:
            raise SandboxFault(f"sandbox: {result.message}")
        self.used_s += result.wall_s
        own_s = max(0.0, result.wall_s - self.again_s)
        if THROUGH in result.files and result.status in (ExecutionStatus.OK, ExecutionStatus.ERROR):
            self.earlier.append(_bytes(code))
            self.again_s += own_s
        said = render_body(result, wall_s=tool.limits.wall_s, memory_mb=request.memory_mb)
        return ToolCall(code, result.status, result.return_code, cut(said), own_s)

    def request(self, code: str) -> ExecutionRequest:
        """The earlier programs, then `code`, as one program."""
        box = self.tool.limits
        given = f'"__builtins__": __builtins__, "earlier": {self.earlier!r}, "code": {_bytes(code)!r}, "THROUGH": {THROUGH!r}'
        program = f'exec(compile({_WRAPPER!r}, "<session>", "exec"), {{{given}}})\n'
        if any(_DATA.search(part) for part in (*self.earlier, _bytes(code))):
            program += "if False:\n    import scipy\n"  # tells the pool which interpreter has it loaded
        more_s = 2 * self.again_s + _SPARE_S if self.earlier else 0.0
        return ExecutionRequest(
            program,
            fetch_files=(THROUGH,),
            wall_s=min(box.wall_s + more_s, max(self.tool.wall_s - self.used_s, 0.0)),
            cpu_s=box.cpu_s + more_s,
            memory_mb=box.memory_mb,
            output_bytes=box.output_bytes,
        )

    async def close(self) -> None:
        self.earlier.clear()


def _bytes(code: str) -> bytes:
    return code.encode("utf-8", "surrogatepass")
