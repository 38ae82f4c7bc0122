"""Reads a config: YAML with `base:`, then `a.b=value` overrides, into the strict tree of `config/`.

`base:` names a file relative to the one that says it; the child wins key by key, lists replace. Overrides are YAML
values and the right-most wins. Every mistake is one `ConfigError` line: file, key, value, what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from torl_mega.config import Config
from torl_mega.errors import ConfigError

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as text; this loader reads it as the number everybody means. Duplicate keys and rings are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, which `super` takes apart
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


ELSEWHERE = {
    "learning_rate": "optim.lr", "actor_lr": "optim.lr", "train_batch_size": "rollout.prompts_per_step",
    "rollout_batch_size": "rollout.prompts_per_step", "num_generations": "rollout.group_size",
    "n_samples_per_prompt": "rollout.group_size", "rollout_n": "rollout.group_size", "max_steps": "num_steps",
    "total_training_steps": "num_steps", "num_rollout": "num_steps", "max_completion_length": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens", "max_prompt_length": "data.max_prompt_tokens", "beta": "algo.kl_coef",
    "kl_loss_coef": "algo.kl_coef", "model_name_or_path": "model.path", "train_files": "data.train", "val_files": "eval.data",
    "tensor_model_parallel_size": "parallel.tensor", "pipeline_model_parallel_size": "parallel.pipeline",
    "tp_size": "parallel.tensor", "pp_size": "parallel.pipeline", "max_turns": "rollout.max_tool_calls",
}  # fmt: skip
"""What other trainers call our settings."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated config of `path` with `overrides` applied. Raises ConfigError."""
    tree = _read(Path(path), ())
    origin = str(path)
    for text in overrides:
        _override(tree, text)
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        raise ConfigError("\n".join(_explain_all(origin, exc.errors()))) from None


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """By dotted name of what is said anywhere: the file or override that says it last. Raises ConfigError."""
    _read(Path(path), ())  # a chain of bases that ends
    said: dict[str, str] = {}
    file: Path | None = Path(path)
    chain: list[tuple[Path, Tree]] = []
    while file is not None:
        tree = _parse(file.resolve())
        chain.append((file, tree))
        base = tree.pop("base", None)
        file = file.parent / base if isinstance(base, str) else None
    for file, tree in reversed(chain):
        said |= dict.fromkeys(_leaves(tree), os.path.relpath(file))
    for text in overrides:
        said[text.partition("=")[0]] = "command line"
    return said


def _leaves(tree: Tree, prefix: str = "") -> list[str]:
    inner = ((f"{prefix}{key}", value) for key, value in tree.items())
    return [leaf for name, v in inner for leaf in (_leaves(v, f"{name}.") if isinstance(v, dict) and v else [name])]


def config_hash(config: Config) -> str:
    """Twelve hex digits over everything but the run's name and place."""
    tree = config.model_dump(mode="json", exclude={"name", "runs_dir"})
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = _resolved(path)
    if path in seen:
        raise ConfigError(f"{path}: `base:` goes round in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    tree = _parse(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r} is not the name of a file")
    if not (path.parent / base).is_file():
        raise ConfigError(f"{path}: base = {base!r}: {path.parent / base} is no file; see conf/ for the ones that ship")
    return _merge(_read(path.parent / base, (*seen, path)), tree)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as exc:  # Python 3.11 has a RuntimeError for a circle of links
        raise ConfigError(f"{path}: not a config file: {exc}") from None


def _parse(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text("utf-8-sig"), Loader=_Loader) or {}
        json.dumps(tree, default=str, skipkeys=True)  # a value that holds itself is a ValueError
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; see conf/ for the ones that ship") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as exc:  # 2024-99-99 is a ValueError
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(exc).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _merge(base: Tree, over: Tree) -> Tree:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(tree: Tree, text: str) -> None:
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        value = yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        value = raw  # e.g. a template with braces: taken as the text it is
    *parents, leaf = dotted.split(".")
    node = tree
    for depth, key in enumerate(parents):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[leaf] = value


def _explain_all(origin: str, errors: Sequence[Any]) -> list[str]:
    """A line for each error; whole sections that are missing in one."""
    missing = [error["loc"][0] for error in errors if error["type"] == "missing" and len(error["loc"]) == 1]
    if len(missing) < 2:
        return [_explain(origin, error) for error in errors]
    others = [
        _explain(origin, error) for error in errors if not (error["type"] == "missing" and len(error["loc"]) == 1)
    ]
    return [
        f"{origin}: {', '.join(map(str, missing))} are missing; start from `base: base.yaml` and say what differs",
        *others,
    ]


def _explain(origin: str, error: Any) -> str:
    loc = [
        str(part) for part in error["loc"] if not str(part).startswith("as ")
    ]  # which form of a setting it is read as
    dotted = ".".join(loc)
    if error["type"] == "extra_forbidden":
        near = _nearest(loc)
        hint = f"; did you mean {near}?" if near else f"; known here: {', '.join(_fields(loc[:-1]))}"
        return f"{origin}: {dotted} = {error['input']!r} is not a setting{hint}"
    if error["type"] == "missing":
        return f"{origin}: {dotted} is missing; set it there or start from `base: base.yaml`"
    message = error["msg"].removeprefix("Value error, ")
    if loc == ["name"] and error["type"] == "string_pattern_mismatch":
        message = "a name has letters, digits, `.`, `_` and `-`, and begins with a letter or digit"
    if not loc or isinstance(error["input"], dict):
        return f"{origin}: {message}"
    return f"{origin}: {dotted} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _section(loc: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for key in loc:
        if key.isdigit():  # a row of a list of sections
            continue
        info = section.model_fields.get(key)
        inner = _sections_in(info.annotation) if info else []
        if not inner:
            return None
        section = inner[0]
    return section


def _sections_in(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for part in get_args(kind) for section in _sections_in(part)]


def _fields(loc: Sequence[str]) -> list[str]:
    section = _section(loc)
    return sorted(section.model_fields) if section else []


def _nearest(loc: Sequence[str]) -> str | None:
    """The known setting nearest to a wrong one: in its own section, by what others call it, by its last name anywhere."""
    close = difflib.get_close_matches(loc[-1], _fields(loc[:-1]), n=1, cutoff=0.7)
    if close:
        return ".".join([*loc[:-1], close[0]])
    if loc[-1] in ELSEWHERE:
        return ELSEWHERE[loc[-1]]
    everywhere = {f"{s}.{k}": k for s in Config.model_fields for k in _fields([s])}
    everywhere |= {k: k for k in Config.model_fields}
    close = difflib.get_close_matches(loc[-1], list(everywhere.values()), n=1, cutoff=0.8)
    return next((dotted for dotted, key in everywhere.items() if close and key == close[0]), None)
