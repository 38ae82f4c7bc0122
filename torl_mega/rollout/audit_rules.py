"""What the log of a run is audited against, from the run's own config: `torl view --audit`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from torl_mega.config import Config
from torl_mega.data.chat_template import CHAT
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError
from torl_mega.import_path import load
from torl_mega.rollout.chat import ChatTools
from torl_mega.rollout.python_tool import STOP
from torl_mega.rollout.token_audit import Rules
from torl_mega.rollout.tools import tool_and_prompts


def rules_of(run: Path, model: Path) -> Rules:
    """The rules for the run in the folder `run`, with the tokenizer of `model`. Raises ConfigError where its tools are no longer
    there, DataError for a tokenizer or chat template that cannot be used."""
    path, tokenizer = run / "config.json", Tokenizer(model)
    config = json.loads(path.read_text())["config"] if path.is_file() else {}
    protocol = config.get("rollout", {}).get("protocol", "torl")
    if config.get("data", {}).get("template") == CHAT:
        try:
            checked = Config.model_validate(config)
        except ValidationError as exc:
            wrong = ".".join(map(str, exc.errors()[0]["loc"]))
            raise DataError(f"{path}: {wrong} is no setting of this version, which cannot audit the run") from exc
        tool, prompts = tool_and_prompts(checked, tokenizer)
        if isinstance(tool, ChatTools):
            return Rules(tokenizer, chat=tool, prompts=prompts)
        return Rules(tokenizer, tool.stop, prompts=prompts)
    return Rules(tokenizer, (STOP,) if protocol == "torl" else tuple(load(protocol, "rollout.protocol").stop))
