"""Writes the table of docs/recipe.md out of the configs: every setting whose docstring names ToRL's value and its source.

    python tools/make_recipe_doc.py            writes docs/recipe.md
    python tools/make_recipe_doc.py --check    exit code 1 when the page does not say what the configs say

The values are those of conf/base.yaml, and of conf/torl_1.5b.yaml and torl_7b.yaml where they differ. What stands around
the table is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from torl_mega.config import Config
from torl_mega.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/recipe.md"
BEGIN, END = "<!-- made by tools/make_recipe_doc.py -->", "<!-- end -->"
MODELS = {"1.5B": "torl_1.5b.yaml", "7B": "torl_7b.yaml"}


def recipe_fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(setting, docstring on one line) of every field that names a source, in the order of the config."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from recipe_fields(kind, f"{prefix}{name}.")
        elif "Source:" in (text := " ".join((field.description or "").split())):
            yield prefix + name, text


def table() -> str:
    base = load_config(ROOT / "conf/base.yaml")
    models = {label: load_config(ROOT / "conf" / name) for label, name in MODELS.items()}
    lines = ["| setting | value | where ToRL says so | where and why ours differs |", "|---|---|---|---|"]
    for setting, text in recipe_fields():
        source, _, differs = text.partition("Source:")[2].partition("Differs:")
        values = {label: value_of(config, setting) for label, config in models.items()}
        shown = value_of(base, setting)
        if any(value != shown for value in values.values()):
            alike = len(set(values.values())) == 1
            shown = values["7B"] if alike else "; ".join(f"{label}: {value}" for label, value in values.items())
        lines.append(f"| `{setting}` | {shown} | {_cell(source)} | {_cell(differs)} |")
    return "\n".join(lines)


def value_of(config: Config, setting: str) -> str:
    value: Any = config
    for name in setting.split("."):
        value = getattr(value, name)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def page(written: str) -> str:
    """The page with its table made anew."""
    begin, end = re.escape(BEGIN), re.escape(END)
    return re.sub(f"{begin}.*{end}", lambda _: f"{BEGIN}\n{table()}\n{END}", written, flags=re.DOTALL)


def _cell(text: str) -> str:
    return text.strip().removesuffix(".").replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    written = PAGE.read_text()
    wanted = page(written)
    if args.check and wanted != written:
        print(
            f"{PAGE.relative_to(ROOT)} does not say what the configs say; run tools/make_recipe_doc.py", file=sys.stderr
        )
        return 1
    if not args.check:
        PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
