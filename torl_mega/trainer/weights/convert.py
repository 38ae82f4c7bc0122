"""Converts HF folder <-> Megatron checkpoint in any layout, tensor by tensor; both directions read back what they wrote.

Contract: collective over the ranks of the layout; no rank holds more than its shard and one full tensor. The result appears
under its name only when it is complete and verified. The type is that of the stored weights, so a round trip is
bit-identical. Limits: weights only; a training checkpoint converts to HF, HF gives no optimizer state.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torl_mega.config import ParallelConfig, TrainerConfig
from torl_mega.errors import CheckpointError, ConfigError, TorlError
from torl_mega.interfaces import NamedTensor
from torl_mega.layout import ModelShape, check_layout, describe_model, read_hf_config
from torl_mega.trainer.parallel import destroy, init_distributed, is_rank0, raise_together, share, world_size
from torl_mega.trainer.weights import checkpoint
from torl_mega.trainer.weights.checkpoint_files import read_manifest
from torl_mega.trainer.weights.hf_io import HfReader, write_hf
from torl_mega.trainer.weights.hf_mapping import EMBEDDING, all_names
from torl_mega.trainer.weights.target import check_target

_TRAINER = TrainerConfig(mini_batch_samples=1, micro_batch_tokens=1)
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def hf_to_megatron(hf: Path, out: Path, parallel: ParallelConfig) -> None:
    """Writes the weights of HF folder `hf` as a checkpoint. Raises ConfigError for a bad source, layout or target,
    CheckpointError when what was written reads back differently."""
    share(lambda: check_target(out, hf))
    hf_config = read_hf_config(hf)
    chunks, weight_map, shape = _build(hf_config, parallel, lambda shape: HfReader(hf, shape).one_type())
    reader = HfReader(hf, shape)
    weight_map.load(reader)
    checkpoint.save_weights(out, chunks, shape, hf_config)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    checkpoint.load_weights(out, chunks, shape)
    differing = [
        n for n, t in _progress(weight_map.gather(), shape, "verify") if not torch.equal(t.cpu(), reader.get(n))
    ]
    error: BaseException | None = None
    if differing:
        shutil.rmtree(out, ignore_errors=True)
        error = CheckpointError(f"{out}: {differing[0]} reads back differently; nothing is left there")
    raise_together(error)


def megatron_to_hf(
    source: Path, out: Path, parallel: ParallelConfig, *, tokenizer: Path | None, max_file_bytes: int
) -> None:
    """Writes the weights of checkpoint `source` as an HF folder; `tokenizer` lends its files. Raises ConfigError for a target
    that may not be replaced, CheckpointError for a damaged source or when what was written reads back differently."""
    share(lambda: check_target(out, source))
    manifest = share(lambda: read_manifest(source))
    hf_config = manifest["hf_config"]
    chunks, weight_map, shape = _build(hf_config, parallel, lambda _: _stored_dtype(source))
    checkpoint.load_weights(source, chunks, shape)
    digests: dict[str, str] = {}

    def verify(folder: Path) -> None:
        reader = HfReader(folder, shape)
        for name, digest in digests.items():
            if _digest(reader.get(name)) != digest:
                raise CheckpointError(f"{out}: {name} reads back differently; nothing was left there")

    tensors = _recording(_progress(weight_map.gather(), shape, "write"), digests)
    error: BaseException | None = None
    if is_rank0():
        try:
            write_hf(out, tensors, config=hf_config, source=tokenizer, max_file_bytes=max_file_bytes, verify=verify)
        except TorlError as exc:
            error = exc
    for _ in tensors:
        pass
    raise_together(error)


def _build(
    hf_config: Mapping[str, Any], parallel: ParallelConfig, find_dtype: Callable[[ModelShape], torch.dtype]
) -> tuple[list[Any], Any, ModelShape]:
    """Bare model chunks of this rank, on the CPU or the GPU as the trainer would build them."""
    problems = check_layout(hf_config, parallel, world_size())
    if problems:
        raise ConfigError("; ".join(problems))
    from torl_mega.trainer.cpu import backend as cpu_backend

    cpu_backend.install()
    from torl_mega.trainer.layer_spec import choose_spec
    from torl_mega.trainer.model import build_chunks, transformer_config
    from torl_mega.trainer.weights.reshard import WeightMap

    shape = describe_model(hf_config)
    dtype = find_dtype(shape)
    if dtype not in _DTYPES:
        raise ConfigError(f"weights of type {dtype} are not converted; supported: {', '.join(_DTYPES.values())}")
    config = transformer_config(shape, parallel, _TRAINER, dtype, choose_spec())
    chunks = build_chunks(shape, config, parallel, choose_spec())
    return chunks, WeightMap(chunks, shape), shape


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type of the embedding in a torch_dist checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        tensors: Any = FileSystemReader(folder).read_metadata().state_dict_metadata
        return tensors[EMBEDDING.megatron].properties.dtype
    except Exception as exc:
        raise CheckpointError(f"{folder}: its index cannot be read ({type(exc).__name__}); it is damaged") from None


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _recording(tensors: Iterable[NamedTensor], digests: dict[str, str]) -> Iterator[NamedTensor]:
    """Passes tensors on and keeps their digests."""
    for name, tensor in tensors:
        digests[name] = _digest(tensor)
        yield name, tensor


def _progress(tensors: Iterator[NamedTensor], shape: ModelShape, what: str) -> Iterator[NamedTensor]:
    if not is_rank0():
        return tensors
    from tqdm import tqdm

    return iter(tqdm(tensors, total=len(all_names(shape)), desc=what, unit="tensor", disable=not sys.stderr.isatty()))


# ------------------------------------------------------------------------------------------------ as a program


def add_layout_arguments(parser: argparse.ArgumentParser, doing: str) -> None:
    """The options of a layout; `doing`: read or write."""
    parser.add_argument("--tp", type=_size, default=1, help=f"tensor-parallel size to {doing} with")
    parser.add_argument("--pp", type=_size, default=1, help=f"pipeline stages to {doing} with")
    parser.add_argument("--vpp", type=_size, default=1, help="model chunks per stage")
    parser.add_argument("--ep", type=_size, default=1, help="ranks over which the experts of a layer are spread")
    parser.add_argument("--etp", type=_size, default=1, help="ranks over which one expert is cut")


def _size(text: str) -> int:
    """A size of an option. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks; take 1 or more")
    return int(text)


def layout_of(args: argparse.Namespace) -> ParallelConfig:
    """The smallest layout that has what the options ask for."""
    data = math.lcm(args.tp, args.ep * args.etp) // args.tp
    return ParallelConfig(
        tensor=args.tp,
        sequence=args.tp > 1,
        pipeline=args.pp,
        virtual_pipeline=args.vpp,
        expert=args.ep,
        expert_tensor=args.etp,
        data=data,
    )


def run(parallel: ParallelConfig, work: Callable[[], None]) -> int:
    """Runs `work` as one rank, as a rank of torchrun, or, for a larger layout, starts this program again under torchrun.

    Returns the exit code; what the user can mend is printed as one line.
    """
    warnings.filterwarnings("ignore")  # torch and Megatron deprecate things at each other
    if "RANK" not in os.environ and parallel.world_size > 1:
        return _run_ranks(parallel.world_size)
    try:
        init_distributed(parallel, _TRAINER)
        work()
    except TorlError as exc:
        if is_rank0():
            print(f"error: {exc}", file=sys.stderr)
        return 1
    finally:
        destroy()
    return 0


def _run_ranks(world_size: int) -> int:
    """This program once for each rank, on this machine; the exit code. A rank says itself what is wrong, in one line."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(["--standalone", f"--nproc_per_node={world_size}", *sys.argv]))
    except ChildFailedError as exc:
        codes = {rank: failure.exitcode for rank, failure in exc.failures.items()}
        if 1 not in codes.values():
            print(
                f"error: ranks ended with exit codes {codes}; a negative one is a signal, -9 often memory",
                file=sys.stderr,
            )
        return 1
    return 0
