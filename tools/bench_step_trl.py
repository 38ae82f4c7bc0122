"""GRPO steps of TRL as `tools/bench_step.py` times them; runs in TRL's own environment and imports nothing of ours.

    build/trl/bin/python tools/bench_step_trl.py SETTINGS.json

SETTINGS: model (HF folder), prompts (list of {prompt, gold}), group_size, max_response_tokens, temperature, lr, steps.
Prints one JSON line per step: rollout_s (generation and reward) and train_s.
"""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[str], gold: list[str], **_: Any) -> list[float]:
    """The quickstart's: 1 for the right boxed answer, else -1."""
    boxed = [re.findall(r"\\boxed\{([^}]*)\}", text) for text in completions]
    return [1.0 if found and found[-1] == right else -1.0 for found, right in zip(boxed, gold, strict=True)]


class TimedTrainer(GRPOTrainer):
    rollout_s = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        begun = time.monotonic()
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.rollout_s = time.monotonic() - begun


class Clock(TrainerCallback):
    trainer: TimedTrainer
    begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        rollout_s = self.trainer.rollout_s
        print(json.dumps({"rollout_s": rollout_s, "train_s": time.monotonic() - self.begun - rollout_s}), flush=True)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    batch = len(settings["prompts"]) // settings["steps"] * settings["group_size"]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=batch, num_generations=settings["group_size"],
            max_completion_length=settings["max_response_tokens"], temperature=settings["temperature"],
            learning_rate=settings["lr"], beta=0.0, max_steps=settings["steps"], loss_type="dapo", use_cpu=True,
            bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        clock = Clock()
        clock.trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32"), args=config,
            reward_funcs=reward, train_dataset=Dataset.from_list(settings["prompts"]), processing_class=tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        clock.trainer.train()


if __name__ == "__main__":
    main()
