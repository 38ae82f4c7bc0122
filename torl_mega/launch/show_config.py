"""`torl config`: every setting of a run with its value, where the value comes from, and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from torl_mega.config_file import load_config, origins


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the config tree."""

    name: str  # a.b
    value: Any
    origin: str  # the file or override that says it, or `default`
    meaning: str


def run(conf: Path, overrides: Sequence[str], *, only: str = "", json_output: bool = False) -> int:
    """Prints the settings whose name starts with `only`; 1 when there are none. Raises ConfigError."""
    said = origins(conf, overrides)
    found = [s for s in _settings(load_config(conf, overrides), "", said) if s.name.startswith(only)]
    if json_output:
        fields = {s.name: {"value": s.value, "origin": s.origin, "meaning": s.meaning} for s in found}
        print(json.dumps(fields, indent=1))
        return int(not found)
    console = Console(soft_wrap=False, highlight=False)
    for setting in found:
        line = Text(setting.name, style="bold")
        line.append(f" = {json.dumps(setting.value, ensure_ascii=False)}", style="")
        line.append(f"   {setting.origin}", style="dim")
        console.print(line)
        if setting.meaning:
            console.print(Text(setting.meaning, style="dim"), width=min(console.width, 120), soft_wrap=False)
    if not found:
        console.print(f"no setting starts with {only!r}")
    return int(not found)


def _settings(section: BaseModel, prefix: str, said: dict[str, str]) -> Iterator[Setting]:
    for key, info in type(section).model_fields.items():
        value, name = getattr(section, key), f"{prefix}{key}"
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{name}.", said)
            continue
        plain = section.model_dump(mode="json", include={key})[key]
        # a section or list that is set as a whole says where all below it come from
        above = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
        below = [place for other, place in said.items() if other.startswith(f"{name}.")]
        origin = next((said[part] for part in above if part in said), below[-1] if below else "default")
        yield Setting(name, plain, origin, re.sub(r"\s+", " ", info.description or ""))
