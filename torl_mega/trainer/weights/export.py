"""Megatron torch_dist checkpoint (of training or of weights) -> HF folder that plain transformers loads.

python tools/convert_megatron_to_hf.py --checkpoint runs/NAME/checkpoints/step_00100 --out DIR --tokenizer DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torl_mega.trainer.weights.convert import add_layout_arguments, layout_of, megatron_to_hf, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder, any layout")
    parser.add_argument("--out", type=Path, required=True, help="HF folder; an earlier result there is replaced")
    parser.add_argument("--tokenizer", type=Path, help="HF folder that lends tokenizer and generation files")
    add_layout_arguments(parser, "read")
    parser.add_argument("--max-file-mb", type=float, default=5120, help="size of one safetensors file")
    args = parser.parse_args()
    parallel = layout_of(args)

    def work() -> None:
        limit = int(args.max_file_mb * 2**20)
        megatron_to_hf(args.checkpoint, args.out, parallel, tokenizer=args.tokenizer, max_file_bytes=limit)

    return run(parallel, work)


if __name__ == "__main__":
    sys.exit(main())
