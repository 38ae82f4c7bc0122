"""The tool `python_session`: Python whose variables, functions and imports live as long as their trajectory.

    call 1: x = 6 ──► jail ──► what it printed, and the namespace as bytes (dill) ──┐
    call 2: print(x*7) ──► jail, with those bytes laid in ──► 42 ◄──────────────────┘

Nothing waits between calls: the bytes travel with the trajectory, so that thousands of sessions cost no process, a call that has to
be made again finds the state from before it, and any node's sandbox serves it. They are made and read inside the jail alone.

What has no bytes (generators, threads, locks) is gone in the next call, as are files on disk and whatever a program did
that was killed by a limit. A session that has used `session_wall_s` in all, or whose namespace is larger than
`session_state_mb`, is told so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torl_mega.errors import SandboxFault
from torl_mega.interfaces import Sandbox
from torl_mega.rollout.python_tool import NO_CODE, STOP, Limits, cut, frame, last_code_block, render_body
from torl_mega.types import ExecutionRequest, ExecutionStatus, Problem, ToolCall

STATE = ".session"
TOO_LARGE = "(the variables of this session need more than {mb} MB; those of this call are not kept)"

_PROGRAM = """def _session(code, limit):
    import sys, os
    main = sys.modules["__main__"]
    names = main.__dict__
    del names["_session"]
    fresh = set(names)
    if os.path.getsize({state!r}):
        import dill
        dill.load_module({state!r})
    def keep():
        import dill, io, random
        def write():
            target = io.BytesIO()
            dill.dump_module(target)
            return target.getvalue()
        try:
            data = write()
        except BaseException:
            for name in [n for n in names if n not in fresh]:
                try:
                    if not dill.pickles(names[name]):
                        del names[name]
                except BaseException:
                    names.pop(name, None)
            data = write()
        with open({state!r} if len(data) <= limit else {state!r} + ".large", "wb") as file:
            file.write(data if len(data) <= limit else b"1")
    try:
        exec(compile(code, "main.py", "exec", dont_inherit=True), names)
    finally:
        keep()

_session({code!r}, {limit})
"""


@dataclass(frozen=True, slots=True)
class PythonSessionTool:
    """Implements `Tool`: a session for each trajectory."""

    sandbox: Sandbox
    limits: Limits  # of one call
    wall_s: float  # of all calls of a trajectory together
    state_mb: int
    stop: tuple[str, ...] = (STOP,)

    def open(self, problem: Problem) -> PythonSession:
        return PythonSession(self)


@dataclass(slots=True)
class PythonSession:
    """The namespace of one trajectory."""

    tool: PythonSessionTool
    state: bytes = b""
    used_s: float = 0.0

    async def call(self, written: str) -> ToolCall:
        """Runs the last block of what the policy wrote. Raises SandboxFault."""
        code = last_code_block(written)
        if code is None:
            return ToolCall("", ExecutionStatus.ERROR, None, frame(NO_CODE), 0.0)
        ran = await self.execute(code)
        return dataclasses.replace(ran, observation=frame(ran.observation))

    async def execute(self, code: str) -> ToolCall:
        """Runs a program in this namespace; the observation is what it says, without a fence. Raises SandboxFault."""
        tool = self.tool
        request = self.request(code)
        if request.wall_s <= 0:
            said = f"TimeoutError: this session has used its {tool.wall_s:g} seconds"
            return ToolCall(code, ExecutionStatus.TIMEOUT_WALL, None, said, 0.0)
        result = await tool.sandbox.run(request)
        if result.status is ExecutionStatus.INFRA:
            raise SandboxFault(f"sandbox: {result.message}")
        self.used_s += result.wall_s
        if f"{STATE}.large" in result.files:
            said = TOO_LARGE.format(mb=tool.state_mb)
            return ToolCall(code, ExecutionStatus.MEMORY, None, said, result.wall_s)
        self.state = result.files.get(STATE, self.state)
        said = render_body(result, wall_s=request.wall_s, memory_mb=request.memory_mb)
        return ToolCall(code, result.status, result.return_code, cut(said), result.wall_s)

    def request(self, code: str) -> ExecutionRequest:
        """The program that runs `code` in the namespace as it is now and gives back what it is then."""
        box = self.tool.limits
        return ExecutionRequest(
            _PROGRAM.format(state=STATE, code=code.encode("utf-8", "surrogatepass"), limit=self.tool.state_mb << 20),
            files={STATE: self.state},
            fetch_files=(STATE, f"{STATE}.large"),
            wall_s=min(box.wall_s, self.tool.wall_s - self.used_s),
            cpu_s=box.cpu_s,
            memory_mb=box.memory_mb,
            output_bytes=box.output_bytes,
        )

    async def close(self) -> None:
        self.state = b""
