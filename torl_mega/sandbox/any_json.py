"""JSON for texts that may hold lone surrogates: orjson, and the standard library for what orjson refuses."""

from __future__ import annotations

import json
from typing import Any

import orjson


def dumps(value: Any) -> bytes:
    """Lone surrogates become the three bytes that json.loads(bytes) reads them from, everywhere: escapes would pair up."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def loads(data: bytes, **hooks: Any) -> Any:
    """`hooks` are json.loads'. Raises ValueError or RecursionError in its words."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data, **hooks)
