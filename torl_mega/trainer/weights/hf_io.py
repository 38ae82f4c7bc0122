"""Reads and writes HF folders tensor by tensor.

Contract: the reader opens shards lazily (mmap) and checks names and shapes against the model before any is copied; the
writer streams tensors into safetensors files of bounded size with an index, atomically (a temporary folder beside the
target, fsync, rename), so a folder of that name is complete, and names the tensors' type in config.json. Memory: one
file's tensors while writing, one tensor while reading.
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
from torl_mega.trainer.weights.hf_mapping import EMBEDDING, HEAD, all_names, hf_shape

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MARK = {"format": "pt", "written_by": "torl_mega"}  # in the head of every weight file; transformers wants the format
_DERIVED = ".rotary_emb.inv_freq"  # what old checkpoints keep beside the weights and config.json says too
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip


class HfReader:
    """The tensors of an HF folder by name. Raises ConfigError when one is missing, damaged or of another shape, and when
    there is one that the model has no place for."""

    def __init__(self, path: str | Path, shape: ModelShape) -> None:
        self.folder = Path(path)
        self._files: dict[str, Any] = {}
        self._where = self._locate()
        names = all_names(shape)
        for name in names:
            if name not in self._where:
                raise ConfigError(f"{self.folder}: tensor {name} is missing; is config.json that of these weights?")
            found, wanted = tuple(self._slice(name).get_shape()), hf_shape(name, shape)
            if found != wanted:
                raise ConfigError(f"{self.folder}: tensor {name} has shape {found}, config.json says {wanted}")
        self._refuse_leftovers(names, shape)

    def _refuse_leftovers(self, names: list[str], shape: ModelShape) -> None:
        held = {name for file in set(self._where.values()) for name in self._file(file).keys()}  # noqa: SIM118
        left = sorted(name for name in held.difference(names) if not name.endswith(_DERIVED))
        if shape.tied and HEAD.hf[0] in left and self._is_copy(HEAD.hf[0], EMBEDDING.hf[0]):
            left.remove(HEAD.hf[0])
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ConfigError(
                f"{self.folder}: tensor {left[0]}{more} would be left out: a {shape.architecture} of "
                f"{shape.num_layers} layers has no place for it; is config.json that of these weights?"
            )

    def _is_copy(self, name: str, of: str) -> bool:
        """transformers unties a head that differs from the embedding, SGLang drops it."""
        return name in self._where and torch.equal(self.get(name), self.get(of))

    def one_type(self) -> torch.dtype:
        """The type of every tensor. Raises ConfigError when there are several: a Megatron checkpoint holds one."""
        types = {name: self._slice(name).get_dtype() for name in self._where if not name.endswith(_DERIVED)}
        first = types[EMBEDDING.hf[0]]
        for name, found in types.items():
            if found != first:
                raise ConfigError(
                    f"{self.folder}: {name} is {found} and {EMBEDDING.hf[0]} is {first}; weights of several types are not "
                    f"converted: load the model with transformers, cast it to one type and save it"
                )
        return self.get(EMBEDDING.hf[0]).dtype

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / _INDEX, self.folder / _SINGLE
        if index.is_file() and single.is_file():  # transformers reads the second, SGLang the first
            raise ConfigError(f"{self.folder} has both {_SINGLE} and {_INDEX}; remove the one that is out of date")
        if index.is_file():
            try:
                where = json.loads(index.read_text())["weight_map"]
                return {str(name): str(file) for name, file in where.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise ConfigError(f"{index} is damaged: {exc!r}; download or convert it again") from None
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

    def _slice(self, name: str) -> Any:
        return self._read(name, "get_slice")

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the type it is stored in."""
        return self._read(name, "get_tensor")

    def _read(self, name: str, how: str) -> Any:
        file = self._where[name]
        try:
            return getattr(self._file(file), how)(name)
        except SafetensorError as exc:
            raise ConfigError(
                f"{self.folder}: tensor {name} cannot be read from {file} ({exc}); download or convert it again"
            ) from None


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
        total, dtype = _write_files(temporary, tensors, max_file_bytes)
        (temporary / "config.json").write_text(json.dumps(_typed(config, dtype), indent=2) + "\n")
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


def is_written_here(folder: Path, files: Iterable[str]) -> bool:
    """Whether these files of `folder` are what `write_hf` wrote, and nothing else."""
    weights = {name for name in files if name.endswith(".safetensors")}
    if not weights or not set(files) - weights <= {"config.json", _INDEX, *_COPIED}:
        return False
    try:
        for name in weights:
            with safe_open(folder / name, "pt") as file:
                if file.metadata() != _MARK:
                    return False
    except (OSError, SafetensorError):
        return False
    return True


def _typed(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """`config` with the type of the tensors under the keys that it has for that: transformers loads at that type."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))} if dtype else dict(config)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Equal tensors make equal files: safetensors writes the entries of its metadata in any order."""
    save_file(tensors, file, metadata=_MARK)
    wanted, other = (json.dumps(dict(m), separators=(",", ":")).encode() for m in (_MARK, reversed(_MARK.items())))
    with file.open("r+b") as out:
        at = out.read(len(wanted) + 64).find(other)
        if at >= 0:
            out.seek(at)
            out.write(wanted)


def _write_files(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_file_bytes: int
) -> tuple[int, torch.dtype | None]:
    """Bytes written, and the type of the first tensor, the embedding, which no quantisation touches."""
    parts: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype: torch.dtype | None = None

    def flush() -> None:  # final names hold the number of files, which is known at the end
        _save(pending, folder / f"part-{len(parts):05d}")
        parts.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
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
        return total, dtype
    weight_map = {}
    for n, names in enumerate(parts):
        final = f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{n:05d}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total, dtype
