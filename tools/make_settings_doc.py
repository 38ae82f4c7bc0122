"""Writes docs/settings.md: every setting with its kind, its default and its meaning, out of `torl_mega/config/`.

    python tools/make_settings_doc.py            writes docs/settings.md
    python tools/make_settings_doc.py --check    exit code 1 when the page does not say what the config says

Where a setting has no default its value is that of conf/base.yaml, and the page marks it. What a docstring says about ToRL's own
value (`Source:`, `Differs:`) stands in docs/recipe.md. What stands above the tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from torl_mega.config import Config
from torl_mega.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/settings.md"
BEGIN, END = "<!-- made by tools/make_settings_doc.py -->", "<!-- end -->"
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
Schema = Mapping[str, Any]


def tables() -> str:
    """A heading and a table for the top level and for each section, in the order of the config."""
    schema = Config.model_json_schema()
    base = load_config(ROOT / "conf/base.yaml").model_dump(mode="json")
    parts = [_table("Top level", "", list(_rows(Config, schema, schema["$defs"], base, "")))]
    for name, field in Config.model_fields.items():
        if section := section_of(field.annotation):
            inner = resolve(schema["properties"][name], schema["$defs"])
            about = (section.__doc__ or "").strip() if section.__doc__ != BaseModel.__doc__ else ""
            parts.append(
                _table(f"`{name}`", about, list(_rows(section, inner, schema["$defs"], base[name], f"{name}.")))
            )
    return "\n\n".join(parts)


def section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _rows(model: type[BaseModel], schema: Schema, defs: Schema, base: Schema, prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if section_of(field.annotation):
            continue
        value = _shown(field.get_default(call_default_factory=True))
        if field.default is PydanticUndefined and field.default_factory is None:
            value = f"{_shown(base[name])} ¹"
        meaning = re.split(r"\s*(?:Source|Differs):", " ".join((field.description or "").split()))[0]
        meaning = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", meaning)
        cells = (f"`{prefix}{name}`", kind_of(schema["properties"][name], defs), value, meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(title: str, about: str, rows: list[str]) -> str:
    head = [f"## {title}", "", *([" ".join(about.split()), ""] if about else [])]
    return "\n".join([*head, "| setting | kind | default | meaning |", "|---|---|---|---|", *rows])


def resolve(schema: Schema, defs: Schema) -> Schema:
    """The schema behind a `$ref`."""
    return defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def kind_of(schema: Schema, defs: Schema) -> str:
    """What may be written there, in words: `integer > 0`, `one of a, b`, `list of text`."""
    schema = resolve(schema, defs)
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(kind_of(each, defs) for each in several))
    kind = schema.get("type", "anything")
    if kind == "array":
        inner = kind_of(schema.get("items") or {"type": "number"}, defs)
        return f"list of {inner}{'' if inner.startswith('`') else 's'}"
    if kind == "object":
        return f"`{{{', '.join(schema['properties'])}}}`" if "properties" in schema else "mapping"
    bounds = " and ".join(f"{sign} {schema[word]:g}" for word, sign in BOUNDS.items() if word in schema)
    named = {"string": "text", "boolean": "true or false"}.get(str(kind), str(kind))
    return f"{named} {bounds}" if bounds else named


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def page(written: str) -> str:
    """The page with its tables made anew."""
    begin, end = re.escape(BEGIN), re.escape(END)
    return re.sub(f"{begin}.*{end}", lambda _: f"{BEGIN}\n{tables()}\n\n{END}", written, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    written = PAGE.read_text()
    wanted = page(written)
    if args.check and wanted != written:
        print(
            f"{PAGE.relative_to(ROOT)} does not say what the config says; run tools/make_settings_doc.py",
            file=sys.stderr,
        )
        return 1
    if not args.check:
        PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
