"""Megatron torch_dist checkpoint -> HF folder; see torl_mega/trainer/export.py, which is also what `torl eval` runs."""

import sys

from torl_mega.trainer.export import main

if __name__ == "__main__":
    sys.exit(main())
