"""The templates of this folder and their style sheets."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

import jinja2


def environment() -> jinja2.Environment:
    """Everything that is filled in is escaped, and a missing value is an error."""
    loader = jinja2.FunctionLoader(lambda name: (files("torl_mega.view") / name).read_text("utf-8"))
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@cache
def style(name: str) -> dict[str, str]:
    """A style sheet and the hash under which the page's policy allows it, and nothing else."""
    css = (files("torl_mega.view") / name).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return {"css": css, "css_hash": f"sha256-{digest}"}
