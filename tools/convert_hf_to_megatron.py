"""HF folder -> Megatron torch_dist checkpoint (weights), written in a layout of choice and readable in any.

python tools/convert_hf_to_megatron.py --hf DIR --out DIR --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True, help="HF folder: config.json and safetensors")
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint folder; an earlier result there is replaced"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size to write with")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages to write with")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per stage")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # Megatron names what it would use on a GPU while it is imported
    from torl_mega.config import ParallelConfig
    from torl_mega.trainer.weights.convert import hf_to_megatron, run

    parallel = ParallelConfig(tensor=args.tp, pipeline=args.pp, virtual_pipeline=args.vpp)
    return run(parallel, lambda: hf_to_megatron(args.hf, args.out, parallel))


if __name__ == "__main__":
    sys.exit(main())
