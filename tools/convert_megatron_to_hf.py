"""Megatron torch_dist checkpoint -> HF folder; see torl_mega/trainer/weights/export.py, which is also what `torl eval` runs."""

import sys

from torl_mega.trainer.weights.export import main

if __name__ == "__main__":
    sys.exit(main())
