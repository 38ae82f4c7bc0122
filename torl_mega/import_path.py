"""What a user brings: `pkg.module:name` in a setting, found on Python's path."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torl_mega.errors import ConfigError

PATTERN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `pkg.module:name`."""
    return PATTERN.fullmatch(text) is not None


def load(path: str, setting: str) -> Any:
    """The callable or class that `path` names. Raises ConfigError, with `setting` and what to do, for one that is not there."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as exc:
        missing = isinstance(exc, ModuleNotFoundError) and exc.name and module_name.startswith(exc.name)
        remedy = "put the folder that holds it on PYTHONPATH" if missing else "its import fails"
        raise ConfigError(f"{setting} = {path}: {exc}; {remedy}") from exc
    except Exception as exc:  # the boundary to a user's module: whatever it raises, the setting is to blame
        raise ConfigError(f"{setting} = {path}: importing it raised {type(exc).__name__}: {exc}") from exc
    found = getattr(module, name, None)
    if not callable(found):
        what = "has no" if found is None else "holds no callable"
        raise ConfigError(f"{setting} = {path}: {module_name} {what} {name} ({module.__file__})")
    return found
