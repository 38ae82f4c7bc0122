"""Server side of weight verification: which slices of each HF tensor this rank holds, and the checksum of each.

SGLang fuses (q, k, v; gate, up), shards and pads HF tensors while it loads them. Instead of describing that once more
per architecture, `trace_loader` runs the model's own `load_weights` on empty tensors and records every copy it would make,
without making one: (elements of the HF tensor) -> (elements of a parameter). With that map the server answers, for what
it holds now, in terms of the HF tensors that the trainer sent. Exact for any model whose loader only slices and copies;
any other loader is refused, never guessed.

Runs in SGLang's scheduler processes, as an AROUND hook on `WeightChecker.handle` (srt/utils/weight_checker.py), so it is
reached over `POST /weights_checker` and answers for every rank:
    {"action": "torl_slices",    "skip_tensor_list": ["NAME DTYPE 4,8", ...]}   -> {"NAME@OFFSET:SIZE:STRIDE:DTYPE": ""}
    {"action": "torl_checksums", "skip_tensor_list": [...]}                     -> the same keys with checksums
A key `NAME@ignored` is a tensor that this rank's loader has no use for, `PARAM@uncovered` a parameter that the tensors
do not fill. The key `@device` says where the parameters lie, hence which checksum was used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torl_mega.serving.plugin.checksum import checksums
from torl_mega.serving.plugin.expert_names import make_quick

SLICES, CHECKSUMS = "torl_slices", "torl_checksums"
_traces: dict[tuple[int, str], Trace] = {}  # by model and described tensors


@dataclass(frozen=True, slots=True)
class Copy:
    """A slice of an HF tensor and where the loader puts it. Offsets and strides in elements."""

    source: str
    source_offset: int
    size: tuple[int, ...]
    source_stride: tuple[int, ...]
    parameter: str
    offset: int
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """NAME@OFFSET:SIZE:STRIDE:DTYPE of the slice, read back by sync/verify.parse_key."""
        numbers = [",".join(map(str, part)) for part in (self.size, self.source_stride)]
        return f"{self.source}@{self.source_offset}:{numbers[0]}:{numbers[1]}:{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Trace:
    """What the loader does with a list of tensors."""

    copies: tuple[Copy, ...]
    ignored: tuple[str, ...]  # tensors that no copy reads
    uncovered: tuple[str, ...]  # parameters that the copies do not fill


def handle(original: Callable[..., Any], checker: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    """The hook: answers our two actions, and leaves SGLang's own to `original`."""
    if action not in (SLICES, CHECKSUMS):
        return original(checker, action, *args, **kwargs)
    spec = kwargs.get("skip_tensor_list") or (args[1] if len(args) > 1 else None) or []
    model = checker._get_model()
    trace = trace_loader(model, spec, complete=action == CHECKSUMS)
    parameters = dict(model.named_parameters())
    kind = next(iter(parameters.values())).device.type
    answer = {"@device": kind}
    answer |= {f"{name}@ignored": "" for name in trace.ignored}
    answer |= {f"{name}@uncovered": "" for name in trace.uncovered}
    held = [parameters[c.parameter].data.as_strided(c.size, c.stride, c.offset) for c in trace.copies]
    sums = checksums(held, kind) if action == CHECKSUMS else [""] * len(held)
    answer |= {copy.key: found for copy, found in zip(trace.copies, sums, strict=True)}
    total = hashlib.sha256("".join(f"{k}{answer[k]}" for k in sorted(answer)).encode()).hexdigest()
    info = checker._parallelism_info(role=kwargs["role"]).model_dump()
    return {"checksums": answer, "per_gpu_checksum": total, "parallelism_info": info}


class _Recorder(TorchDispatchMode):
    """Records copies into parameters and suppresses whatever would write to one."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.sources: dict[
            int, tuple[str, torch.Tensor]
        ] = {}  # by storage; all are kept, since a loader may read ahead
        self.copies: list[Copy] = []
        self.filled: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if target is None or not name.endswith("_") or target.untyped_storage().data_ptr() not in self.parameters:
            return func(*args, **(kwargs or {}))
        parameter = self.parameters[target.untyped_storage().data_ptr()]
        if name == "aten::copy_":
            self._record(parameter, target, args[1])
        elif name not in ("aten::zero_", "aten::fill_"):
            raise NotImplementedError(f"the weight loader changes {parameter} by {name}, which cannot be audited")
        self.filled[parameter] = self.filled.get(parameter, 0) + target.numel()
        return target

    def _record(self, parameter: str, target: torch.Tensor, value: torch.Tensor) -> None:
        source, tensor = self.sources.get(value.untyped_storage().data_ptr(), ("", None))
        if tensor is None or value.dtype != tensor.dtype:
            raise NotImplementedError(f"the weight loader computes {parameter} from what it is sent: not auditable")
        value = value.expand_as(target)
        read = (int(value.storage_offset()), tuple(target.shape), tuple(value.stride()))
        written = (parameter, int(target.storage_offset()), tuple(target.stride()), target.dtype)
        self.copies.append(Copy(source, *read, *written))


def trace_loader(model: torch.nn.Module, spec: Sequence[str], *, complete: bool) -> Trace:
    """Where the model's loader puts the tensors described by `spec`; traced once per process and `spec`. `complete`: they
    are meant to fill the whole model, so what they leave out is reported."""
    cached = (id(model), hashlib.sha256("\n".join(spec).encode()).hexdigest() + str(complete))
    if cached not in _traces:
        make_quick(model)
        recorder = _Recorder(model)
        with torch.no_grad(), recorder:
            model.load_weights(_empty_tensors(spec, recorder))  # type: ignore[operator]
        used = {copy.source for copy in recorder.copies}
        ignored = tuple(name for line in spec if (name := line.split()[0]) not in used)
        _traces[cached] = Trace(tuple(recorder.copies), ignored, _uncovered(model, recorder) if complete else ())
    return _traces[cached]


def spec_line(name: str, dtype: str, shape: Sequence[int]) -> str:
    """Describes a tensor to `trace_loader`: NAME DTYPE SIZES."""
    return f"{name} {dtype} {','.join(map(str, shape))}".strip()


def _uncovered(model: torch.nn.Module, recorder: _Recorder) -> tuple[str, ...]:
    """Parameters that were not filled; scales of the KV cache, which FP8 models have, are SGLang's settings, no weights."""
    return tuple(
        n
        for n, p in model.named_parameters()
        if recorder.filled.get(n, 0) < p.numel() and not n.endswith((".attn.k_scale", ".attn.v_scale"))
    )


def _empty_tensors(spec: Sequence[str], recorder: _Recorder) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the described sizes; they are never written, so they cost address space only."""
    for line in spec:
        name, dtype, *sizes = line.split()
        shape = tuple(map(int, sizes[0].split(","))) if sizes else ()
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        recorder.sources[tensor.untyped_storage().data_ptr()] = (name, tensor)
        yield name, tensor
