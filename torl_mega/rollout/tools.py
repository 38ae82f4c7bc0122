"""Which tool an episode has: rollout.protocol and rollout.tools of the config, made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torl_mega.config import RolloutConfig, SandboxConfig
from torl_mega.errors import ConfigError
from torl_mega.import_path import is_import_path, load
from torl_mega.interfaces import Sandbox, Tool
from torl_mega.rollout.fences import PYTHON, FencedTools, describe
from torl_mega.rollout.own_tool import load_tool
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.search import make_search

TOOLS = "{tools}"


def make_tool(config: RolloutConfig, limits: SandboxConfig, sandbox: Sandbox) -> Tool:
    """With Python alone the paper's tool itself. Raises ConfigError for a class that is not there or is no tool."""
    python = PythonTool(sandbox, Limits(limits.wall_s, limits.cpu_s, limits.memory_mb, limits.output_bytes))
    if config.tools == (PYTHON,) and config.protocol == "torl":
        return python
    own = [load_tool(path) for path in config.tools if is_import_path(path)]
    if config.search_folder is not None:
        own.append(make_search(Path(config.search_folder), max_chars=config.search_max_chars))
    names = [tool.name for tool in own]
    reserved = {"output", *({PYTHON} & set(config.tools))}
    if taken := next((name for name in names if names.count(name) > 1 or name in reserved), None):
        raise ConfigError(
            f"rollout.tools: two tools are called {taken}, or one as a block of the protocol; give it a `name`"
        )
    box = FencedTools({tool.name: tool for tool in own}, python if PYTHON in config.tools else None)
    if config.protocol == "torl":
        return box
    make: Callable[[FencedTools], Tool] = load(config.protocol, "rollout.protocol")
    made = make(box)
    if not (hasattr(made, "open") and isinstance(getattr(made, "stop", None), tuple) and made.stop):
        raise ConfigError(
            f"rollout.protocol = {config.protocol}: its instances need `stop`, a tuple of texts, and `open(problem)`"
        )
    return made


def with_tools(template: str, tool: Tool) -> str:
    """The template with `{tools}` replaced by what the tools are. Raises ConfigError where the protocol cannot say it."""
    if TOOLS not in template:
        return template
    if isinstance(tool, FencedTools):
        return template.replace(TOOLS, describe(tool))
    told = getattr(tool, "describe", None)  # a protocol of the user's may have it
    if told is None:
        raise ConfigError("data.template has {tools} in it, but the protocol describes none; write them out")
    return template.replace(TOOLS, told())
