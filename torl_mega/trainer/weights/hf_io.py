"""Reads and writes HF folders tensor by tensor.

Contract: the reader opens shards lazily (mmap) and checks names and shapes against the model before any is copied; the
writer streams tensors into safetensors files of bounded size with an index, atomically (a temporary folder beside the
target, fsync, rename), so a folder of that name is complete. Memory: one file's tensors while writing, one tensor while reading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torl_mega.errors import CheckpointError, ConfigError, TorlError
from torl_mega.layout import ModelShape
from torl_mega.run.files import replace_folder, temporary_for
from torl_mega.trainer.weights.hf_mapping import all_names, hf_shape

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip


class HfReader:
    """The tensors of an HF folder by name. Raises ConfigError when one is missing, damaged or of another shape."""

    def __init__(self, path: str | Path, shape: ModelShape) -> None:
        self.folder = Path(path)
        self._files: dict[str, Any] = {}
        self._where = self._locate()
        for name in all_names(shape):
            if name not in self._where:
                raise ConfigError(f"{self.folder}: tensor {name} is missing; is config.json that of these weights?")
            found, wanted = tuple(self._open(name).get_slice(name).get_shape()), hf_shape(name, shape)
            if found != wanted:
                raise ConfigError(f"{self.folder}: tensor {name} has shape {found}, config.json says {wanted}")

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / _INDEX, self.folder / _SINGLE
        if index.is_file():
            try:
                return json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as exc:
                raise ConfigError(f"{index} is damaged: {exc!r}") from None
        if single.is_file():
            return dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        raise ConfigError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read")

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, "pt", device="cpu").__enter__()
            except (OSError, SafetensorError) as exc:
                raise ConfigError(f"{self.folder / name} cannot be read: {exc}; download or convert it again") from None
        return self._files[name]

    def _open(self, name: str) -> Any:
        return self._file(self._where[name])

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the type it is stored in."""
        try:
            return self._open(name).get_tensor(name)
        except SafetensorError as exc:
            raise ConfigError(f"{self.folder}: tensor {name} cannot be read: {exc}") from None


def write_hf(
    target: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    config: Mapping[str, Any],
    source: Path | None,
    max_file_bytes: int = 5 << 30,
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Writes an HF folder from a stream of tensors; `source` lends tokenizer and generation files. Returns bytes of weights.

    An existing `target` is replaced only when the new one is complete and `verify`, called with the finished temporary
    folder, has not raised. Raises CheckpointError when the disk refuses.
    """
    temporary = temporary_for(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        total = _write_files(temporary, tensors, max_file_bytes)
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        for name in _COPIED:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        if verify is not None:
            verify(temporary)
        replace_folder(temporary, target)
    except TorlError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot be written ({exc}); free space or choose another folder") from None
    return total


def _write_files(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_file_bytes: int) -> int:
    parts: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:  # final names hold the number of files, which is known at the end
        save_file(pending, folder / f"part-{len(parts):05d}", metadata={"format": "pt"})
        parts.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        held = tensor.detach().to("cpu", copy=True).contiguous()
        bytes_here = held.numel() * held.element_size()
        if pending and size + bytes_here > max_file_bytes:
            flush()
            size = 0
        pending[name] = held
        size += bytes_here
        total += bytes_here
    if pending:
        flush()
    if len(parts) == 1:
        (folder / "part-00000").rename(folder / _SINGLE)
        return total
    weight_map = {}
    for n, names in enumerate(parts):
        final = f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{n:05d}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total
