"""HF folder -> FP8 checkpoint that SGLang serves.

    python tools/export_fp8.py --hf DIR --out DIR                                     block-wise 128 x 128, dynamic activations
    python tools/export_fp8.py --hf DIR --out DIR --method modelopt --trajectories RUN   per tensor, calibrated

`block` is what the weight sync sends too (torl_mega/serving/fp8.py). `modelopt` calibrates activation scales on the token
ids of recorded trajectories (RUN/trajectories) and needs nvidia-modelopt.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torl_mega.errors import ConfigError, DataError, TorlError
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.rollout.recorder import read_rows
from torl_mega.serving.fp8 import quantize_stream
from torl_mega.serving.fp8_format import QUANTIZATION_CONFIG
from torl_mega.trainer.weights.hf_io import HfReader, write_hf
from torl_mega.trainer.weights.hf_mapping import all_names
from torl_mega.trainer.weights.target import check_target


def export_block(hf: Path, out: Path) -> None:
    config = read_hf_config(hf)
    shape = describe_model(config)
    reader = HfReader(hf, shape)
    tensors = quantize_stream((name, reader.get(name)) for name in all_names(shape))
    write_hf(out, tensors, config={**config, "quantization_config": QUANTIZATION_CONFIG}, source=hf)


def token_sequences(run: Path, limit: int) -> Iterator[list[int]]:
    """Prompt and response token ids of recorded trajectories, newest step first."""
    steps = sorted((run / "trajectories").glob("step_*.jsonl.zst"), reverse=True)
    if not steps:
        raise DataError(f"{run}/trajectories holds no step_*.jsonl.zst; name a run folder that recorded trajectories")
    rows = (row for file in steps for row in read_rows(file))
    for row in itertools.islice(rows, limit):
        turns = ((*turn["token_ids"], *turn["observation_ids"]) for turn in row["turns"])
        yield [*row["prompt_ids"], *itertools.chain.from_iterable(turns)]


def export_modelopt(hf: Path, out: Path, trajectories: Path, num_sequences: int) -> None:
    try:
        import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports] - not on every machine
        from modelopt.torch.export import export_hf_checkpoint  # pyright: ignore[reportMissingImports] - not on every machine
    except ImportError as exc:
        raise ConfigError(
            f"--method modelopt needs nvidia-modelopt ({exc}); install it or take --method block"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    describe_model(read_hf_config(hf))
    sequences = list(token_sequences(trajectories, num_sequences))
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def calibrate(module: Any) -> None:
        for ids in sequences:
            module(torch.tensor([ids], device=device))

    with torch.inference_mode():
        quantized = mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=calibrate)
        export_hf_checkpoint(quantized, export_dir=out)
    AutoTokenizer.from_pretrained(hf).save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=("block", "modelopt"), default="block")
    parser.add_argument("--trajectories", type=Path, help="run folder to calibrate on (modelopt)")
    parser.add_argument("--sequences", type=int, default=128, help="trajectories to calibrate on")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        check_target(args.out, args.hf)
        if args.method == "block":
            export_block(args.hf, args.out)
        elif args.trajectories is None:
            raise ConfigError("--method modelopt needs --trajectories RUN to calibrate on")
        else:
            export_modelopt(args.hf, args.out, args.trajectories, args.sequences)
    except TorlError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
