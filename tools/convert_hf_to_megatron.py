"""HF folder -> Megatron torch_dist checkpoint (weights), written in a layout of choice and readable in any.

python tools/convert_hf_to_megatron.py --hf DIR --out DIR --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def main() -> int:
    warnings.filterwarnings("ignore")  # Megatron names what it would use on a GPU while it is imported
    from torl_mega.trainer.weights.convert import add_layout_arguments, hf_to_megatron, layout_of, run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True, help="HF folder: config.json and safetensors")
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint folder; an earlier result there is replaced"
    )
    add_layout_arguments(parser, "write")
    args = parser.parse_args()
    parallel = layout_of(args)
    return run(parallel, lambda: hf_to_megatron(args.hf, args.out, parallel))


if __name__ == "__main__":
    sys.exit(main())
