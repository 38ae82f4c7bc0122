"""A tool that a user brings: a class whose `__call__` the policy may call.

    class Calculator:
        \"\"\"Evaluates an arithmetic expression.\"\"\"          # the description
        name = "calc"                                     # default: the class's name in lower case

        async def __call__(self, expression: str) -> str: # the arguments' names, types and defaults are the schema
            ...

One instance serves one trajectory: made at its first call, with the `Problem` when the constructor takes an argument, and
closed with it (`close`, if there is one, sync or async). A `__call__` that is not async runs in a thread, of which THREADS run
at once; `timeout_s` counts from when one is free.

What is returned is shown to the policy as text, or as JSON when it is no text. `ToolError` says that the policy called wrongly:
its message is shown. Whatever else is raised, or takes longer than `timeout_s`, is a fault: the attempt starts over and is
counted, and the policy sees nothing of it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from torl_mega.errors import ConfigError, ToolFault
from torl_mega.import_path import load
from torl_mega.types import ExecutionStatus, Problem

THREADS = 32
"""Calls that are not async and run at once, of all trajectories."""


class ToolError(Exception):
    """The policy called a tool wrongly; the message is what it is shown."""


@dataclass(frozen=True, slots=True)
class OwnTool:
    """What is known of a user's class before it is made."""

    make: Any  # the class
    name: str
    description: str
    arguments: type[BaseModel]  # the schema of a call
    timeout_s: float  # one call
    max_chars: int  # shown of what it returns

    @property
    def single_text(self) -> str | None:
        """The argument that may be given as plain text: the only one that must be given, a `str`; None without such."""
        needed = [name for name, field in self.arguments.model_fields.items() if field.is_required()]
        return needed[0] if len(needed) == 1 and self.arguments.model_fields[needed[0]].annotation is str else None

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates and OpenAI's API describe a function."""
        parameters = self.arguments.model_json_schema()
        parameters.pop("title", None)
        parameters.pop("additionalProperties", None)
        for field in parameters.get("properties", {}).values():
            field.pop("title", None)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def load_tool(path: str) -> OwnTool:
    """The tool that `pkg.module:Class` names. Raises ConfigError for one that cannot be called."""
    return tool_of_class(load(path, "rollout.tools"), path)


def tool_of_class(made: Any, path: str) -> OwnTool:
    """The tool that `made` is; `path` names it in errors. Raises ConfigError."""
    call = inspect.getattr_static(made, "__call__", None) if inspect.isclass(made) else None
    if not inspect.isfunction(call):
        raise ConfigError(f"rollout.tools: {path} is no class with a __call__; its instances are what is called")
    name = getattr(made, "name", made.__name__.lower())
    if not (isinstance(name, str) and name.isidentifier()):
        raise ConfigError(f"rollout.tools: {path}: name = {name!r} is not a word of letters, digits and underscores")
    description = inspect.cleandoc(made.__doc__ or call.__doc__ or "")
    if not description:
        raise ConfigError(f"rollout.tools: {path} has no docstring; the policy is told what a tool does by it")
    timeout_s, max_chars = getattr(made, "timeout_s", 30.0), getattr(made, "max_chars", 256)
    return OwnTool(made, name, description, _arguments(call, path), float(timeout_s), int(max_chars))


def _arguments(call: Any, path: str) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    try:
        hints = inspect.get_annotations(call, eval_str=True)
    except NameError as exc:
        raise ConfigError(f"rollout.tools: {path}: a type of its arguments is not there: {exc}") from exc
    for parameter in list(inspect.signature(call).parameters.values())[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"rollout.tools: {path}: {parameter} cannot be filled by name; name each argument")
        if parameter.name not in hints:
            raise ConfigError(f"rollout.tools: {path}: argument {parameter.name} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
        if parameter.name.startswith(("_", "model_")):
            raise ConfigError(
                f"rollout.tools: {path}: argument {parameter.name} has a name that pydantic keeps for itself"
            )
    try:
        made = create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)
        made.model_json_schema()
    except Exception as exc:  # the boundary to a user's types
        raise ConfigError(
            f"rollout.tools: {path}: its arguments have no schema: {' '.join(str(exc).split())[:200]}"
        ) from exc
    return made


@dataclass(frozen=True, slots=True)
class Answer:
    """How one call ended."""

    status: ExecutionStatus  # OK or ERROR
    text: str
    wall_s: float


class OwnToolSession:
    """The instance of one trajectory."""

    def __init__(self, tool: OwnTool, problem: Problem) -> None:
        self._tool, self._problem = tool, problem
        self._instance: Any = None

    async def call(self, written: str | Mapping[str, Any]) -> Answer:
        """Calls with what the policy wrote: a JSON object of the arguments (as text, or read), or the text of a single one.
        Raises ToolFault."""
        start = time.monotonic()
        try:
            arguments = self.parse(written) if isinstance(written, str) else self.check(written)
            found = await self._run(arguments)
            said = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=_as_json)
            status = ExecutionStatus.OK
        except ToolError as exc:
            status, said = ExecutionStatus.ERROR, str(exc)
        except ToolFault:
            raise
        except TimeoutError as exc:
            raise ToolFault(f"{self._tool.name}: no answer within {self._tool.timeout_s:g} s") from exc
        except Exception as exc:  # the boundary to a user's tool
            raise ToolFault(f"{self._tool.name}: {type(exc).__name__}: {exc}") from exc
        said = said.encode("utf-8", "replace").decode()  # lone surrogates are no text that could be encoded
        return Answer(status, said, time.monotonic() - start)

    def parse(self, text: str) -> dict[str, Any]:
        """The arguments. Raises ToolError with what is wrong with them."""
        single = self._tool.single_text
        if not text.strip() and not self._tool.arguments.model_fields:
            return {}
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as exc:
            if single is not None:
                return {single: text.strip()}
            raise ToolError(f"{self._tool.name}: the arguments are no JSON object") from exc
        fits = isinstance(given, Mapping) and (
            single is None or not given.keys().isdisjoint(self._tool.arguments.model_fields)
        )
        if not fits:
            if single is not None:
                return {single: text.strip()}
            raise ToolError(f"{self._tool.name}: the arguments are no JSON object")
        return self.check(given)

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as `__call__` takes them. Raises ToolError with what is wrong with them."""
        try:
            checked = self._tool.arguments.model_validate(given)
        except ValidationError as exc:
            error = exc.errors()[0]
            where = ".".join(map(str, error["loc"]))
            raise ToolError(f"{self._tool.name}: {where}: {error['msg']}") from exc
        return {name: getattr(checked, name) for name in self._tool.arguments.model_fields}

    async def close(self) -> None:
        """Raises ToolFault for whatever the tool's own `close` raises."""
        close = getattr(self._instance, "close", None)
        if close is None:
            return
        try:
            done = close()
            if inspect.isawaitable(done):
                await asyncio.wait_for(done, self._tool.timeout_s)
        except Exception as exc:  # the boundary to a user's tool
            raise ToolFault(f"{self._tool.name}: close: {type(exc).__name__}: {exc}") from exc

    async def _run(self, arguments: dict[str, Any]) -> Any:
        if self._instance is None:
            takes_problem = bool(inspect.signature(self._tool.make).parameters)
            self._instance = self._tool.make(self._problem) if takes_problem else self._tool.make()
        if inspect.iscoroutinefunction(type(self._instance).__call__):
            return await asyncio.wait_for(self._instance(**arguments), self._tool.timeout_s)
        found = await self._begun(arguments)
        async with asyncio.timeout(self._tool.timeout_s):
            said = await found
            return await said if inspect.isawaitable(said) else said  # an `async def` under a decorator that is none

    async def _begun(self, arguments: dict[str, Any]) -> asyncio.Future[Any]:
        """What a thread has begun to compute. Raises ToolFault when none gets free: all run calls that are over their time."""
        threads = _threads()
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        found = asyncio.wrap_future(threads.pool.submit(self._in_thread, arguments, begun))
        try:
            while not begun.done() and not found.done():
                num_ended = threads.num_ended
                await asyncio.wait({begun, found}, timeout=self._tool.timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not begun.done() and threads.num_ended == num_ended:
                    raise ToolFault(f"{self._tool.name}: all {THREADS} threads are taken by calls that do not return")
        except BaseException:
            found.cancel()
            raise
        return found

    def _in_thread(self, arguments: dict[str, Any], begun: asyncio.Future[None]) -> Any:
        begun.get_loop().call_soon_threadsafe(_resolve, begun)
        try:
            return self._instance(**arguments)
        except StopIteration as exc:  # which a future cannot hold
            raise RuntimeError("StopIteration") from exc
        finally:
            _threads().num_ended += 1


@dataclass(slots=True)
class _Threads:
    pool: ThreadPoolExecutor
    num_ended: int = 0


@cache
def _threads() -> _Threads:
    return _Threads(ThreadPoolExecutor(THREADS, thread_name_prefix="tool"))


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _as_json(value: Any) -> Any:
    """What JSON does not know: arrays and numbers of numpy or torch as lists and numbers, sets as lists, the rest as text."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    return list(value) if isinstance(value, set | frozenset) else str(value)
