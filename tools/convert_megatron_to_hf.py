"""Megatron torch_dist checkpoint -> HF folder; see torl_mega/trainer/weights/export.py, which is also what `torl eval` runs."""

import sys
import warnings

if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # Megatron names what it would use on a GPU while it is imported
    from torl_mega.trainer.weights.export import main

    sys.exit(main())
