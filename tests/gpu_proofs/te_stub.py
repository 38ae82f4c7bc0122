"""Imports Transformer Engine's Python code on a machine without CUDA, to build (not to run) its layers.

Transformer Engine's wheel is plain Python; what needs CUDA is the compiled module `transformer_engine_torch` and the core
library. `install` puts an inert stand-in for the first into sys.modules and keeps the second from being loaded. Parameter
names, shapes, attributes, sharded_state_dict and every check of settings are then the real ones; a kernel call raises.
"""

from __future__ import annotations

import ast
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

# The compiled module's classes that TE subclasses or asks for with isinstance; the rest are functions and enums.
_CLASSES = {"CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "CommOverlapCore", "CommOverlapBase"}
_CLASSES |= {"CommOverlapP2PBase", "FP8TensorMeta", "Float8BlockScaleTensorFormat"}


class _Name:
    """A constant or function of the compiled module: has attributes, a hash and a number; cannot be called."""

    def __init__(self, path: str, value: int | None = None) -> None:
        self._path = path
        self._value = sum(path.encode()) % 97 if value is None else value

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        child = _Name(f"{self._path}.{name}")
        setattr(self, name, child)
        return child

    def __call__(self, *_: object, **__: object) -> object:
        raise RuntimeError(f"{self._path} needs the compiled Transformer Engine and a GPU")

    def __index__(self) -> int:
        return self._value

    __int__ = __index__


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        value: object = type(name, (), {}) if name in _CLASSES else _Name(path)
        setattr(self, name, value)
        return value


def _enum(path: str, members: list[str]) -> _Name:
    """An enum that TE copies or compares with its own by member (2.17 and later): numbered from 0, as pybind11 does."""
    found = _Name(path)
    found.__members__ = {}  # type: ignore[attr-defined]
    for value, member in enumerate(members):
        setattr(found, member, _Name(f"{path}.{member}", value))
        found.__members__[member] = getattr(found, member)  # type: ignore[attr-defined]
    return found


def _members_of_dtype(folder: Path) -> list[str]:
    tree = ast.parse((folder / "transformer_engine/pytorch/constants.py").read_text())
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DType")
    parts = (part for node in classes for part in node.body if isinstance(part, ast.Assign))
    return [part.targets[0].id for part in parts if isinstance(part.targets[0], ast.Name)]


def install(folder: Path) -> None:
    """Make `import transformer_engine.pytorch` work for the unpacked wheel in `folder`, as on a Hopper GPU."""
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = (
        "1"  # TE's own switch (transformer_engine/common/__init__.py): load no library
    )
    module = _Module("transformer_engine_torch")
    module.DType = _enum("transformer_engine_torch.DType", _members_of_dtype(folder))
    module.get_cudnn_version = lambda: 92400
    module.get_cublasLt_version = lambda: 130100
    module.get_num_cublas_streams = lambda: 4
    module.device_supports_multicast = lambda *_: False
    module.ubuf_built_with_mpi = lambda: False
    sys.modules[module.__name__] = module
    # what only an export to ONNX needs, and 46 MB of packages with it
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _Module("transformer_engine.pytorch.onnx_extensions")
    import transformer_engine.common as common  # pyright: ignore[reportMissingImports] - unpacked for this test

    common.load_framework_extension = lambda framework: None
    torch.cuda.Stream = type("Stream", (), {})  # type: ignore[assignment,misc] - context parallelism makes one
    pretend((9, 0))


def pretend(capability: tuple[int, int], cuda: str = "13.3") -> None:
    """From here on TE sees a GPU of this compute capability and CUDA version."""
    major, minor = capability
    device: Any = torch.cuda
    device.get_device_capability = lambda *_: capability
    device.get_device_properties = lambda *_: types.SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
    torch.version.cuda = cuda  # type: ignore[assignment]
    utils, quantization = (sys.modules.get(f"transformer_engine.pytorch.{name}") for name in ("utils", "quantization"))
    if utils is not None and quantization is not None:  # what they remember of the device
        utils._get_device_compute_capability.cache_clear()
        for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            setattr(quantization, name, None)
