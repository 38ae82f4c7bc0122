"""What the policy may call and how it is told so: rollout.protocol, rollout.tools and data.template of the config, made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torl_mega.config import Config, RolloutConfig, SandboxConfig
from torl_mega.data.chat_template import CHAT, ChatTemplate
from torl_mega.data.prompts import TEMPLATES, EncodeProblem, plain_prompts
from torl_mega.data.readers import system_of
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, DataError
from torl_mega.import_path import is_import_path, load
from torl_mega.interfaces import Sandbox, Tool
from torl_mega.rollout.chat import ChatTools, make_chat
from torl_mega.rollout.fences import PYTHON, FencedTools, describe
from torl_mega.rollout.own_tool import load_tool
from torl_mega.rollout.python_session import PythonSessionTool
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.search import make_search
from torl_mega.types import ExecutionRequest, ExecutionResult

TOOLS = "{tools}"
"""What a template or a system message may say for what the tools are."""


def make_tool(config: RolloutConfig, limits: SandboxConfig, sandbox: Sandbox) -> Tool:
    """By a text protocol; with Python alone the paper's tool itself. Raises ConfigError for a class that is not there or is no
    tool."""
    if config.tools == (PYTHON,) and config.protocol == "torl":
        return PythonTool(sandbox, _limits(limits))
    box = _box(config, limits, sandbox)
    if config.protocol == "torl":
        return box
    make: Callable[[FencedTools], Tool] = load(config.protocol, "rollout.protocol")
    made = make(box)
    if not (hasattr(made, "open") and isinstance(getattr(made, "stop", None), tuple) and made.stop):
        raise ConfigError(
            f"rollout.protocol = {config.protocol}: its instances need `stop`, a tuple of texts, and `open(problem)`"
        )
    return made


def _limits(limits: SandboxConfig) -> Limits:
    return Limits(limits.wall_s, limits.cpu_s, limits.memory_mb, limits.output_bytes)


def _box(config: RolloutConfig, limits: SandboxConfig, sandbox: Sandbox) -> FencedTools:
    own = [load_tool(path) for path in config.tools if is_import_path(path)]
    if config.search_folder is not None:
        own.append(make_search(Path(config.search_folder), max_chars=config.search_max_chars))
    names = [tool.name for tool in own]
    python: PythonTool | PythonSessionTool | None = None
    if PYTHON in config.tools:
        python = PythonTool(sandbox, _limits(limits))
    elif "python_session" in config.tools:
        python = PythonSessionTool(sandbox, _limits(limits), limits.session_wall_s)
    reserved = {"output", *((PYTHON,) if python is not None else ())}
    if taken := next((name for name in names if names.count(name) > 1 or name in reserved), None):
        raise ConfigError(
            f"rollout.tools: two tools are called {taken}, or one as a block of the protocol; give it a `name`"
        )
    return FencedTools({tool.name: tool for tool in own}, python)


class NoSandbox:
    """Where tools are only looked at."""

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        return ExecutionResult.infra("nothing runs here")


def tool_and_prompts(
    config: Config, tokenizer: Tokenizer, sandbox: Sandbox | None = None
) -> tuple[Tool | ChatTools, EncodeProblem]:
    """What the policy may call, and how a problem becomes its prompt, which tells it so. Without a sandbox no program runs. Raises
    ConfigError and DataError for what cannot be used."""
    sandbox = sandbox or NoSandbox()
    data, rollout = config.data, config.rollout
    if rollout.protocol == "chat":
        box = _box(rollout, config.sandbox, sandbox)
        chat = make_chat(
            box,
            tokenizer,
            system=None if data.system is None else with_tools(data.system, box),
            arguments=data.chat_arguments,
            family=rollout.call_format,
        )
        return chat, lambda problem: chat.template.prompt(problem.problem, system_of(problem))
    tool = make_tool(rollout, config.sandbox, sandbox)
    if data.template == CHAT:
        system = None if data.system is None else with_tools(data.system, tool)
        tokenizer.check_plain(system or "", "data.system")
        template = ChatTemplate(tokenizer, system=system, arguments=data.chat_arguments)
        if template.end_ids[0] not in tokenizer.eos_ids:
            raise DataError(
                f"{tokenizer.path}: the chat template closes a turn with {template.closing}, which is no EOS of the model, so that "
                f"servers would sample on; set rollout.protocol=chat, or eos_token_id in generation_config.json"
            )
        return tool, lambda problem: template.prompt(problem.problem, system_of(problem))
    text = with_tools(TEMPLATES.get(data.template, data.template), tool)
    tokenizer.check_plain(text, "data.template")
    return tool, plain_prompts(text, tokenizer.encode)


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
