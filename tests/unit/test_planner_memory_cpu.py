"""The planner's memory against what the real trainer takes on a CPU: peak resident growth of a rank, within 10 %.

Each case runs the real MegatronTrainer in a process of its own (this file as a program), on a random model large enough
that the interpreter's own noise does not matter, and compares the growth of its peak from just before the model is
built to the end of the second backward pass, when the optimizer has its state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.planner.hardware import Assumptions
from torl_mega.planner.memory import trainer_memory

LENGTH = 512
CASES = {
    "activations": ["trainer.micro_batch_tokens=2048"],
    "recompute": ["trainer.micro_batch_tokens=2048", "trainer.recompute=full"],
    "small batch": ["trainer.micro_batch_tokens=1024"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 37 M parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=16384, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def settings(model: Path, overrides: list[str]) -> Config:
    base = [
        f"model.path={model}", "model.dtype=float32", "rollout.prompts_per_step=1", "rollout.group_size=4",
        "rollout.max_response_tokens=512", "data.max_prompt_tokens=256", "trainer.mini_batch_samples=4",
        "trainer.logprob_chunk_tokens=1024",
    ]  # fmt: skip
    return load_config("conf/base.yaml", [*base, *overrides])


def predicted(config: Config) -> float:
    shape = describe_model(read_hf_config(config.model.path))
    memory = trainer_memory(shape, config, 1, LENGTH, Assumptions(), on_cpu=True)
    return memory.resident + memory.activations + memory.working


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_prediction_is_within_ten_percent_of_the_measured_peak(case: str, model: Path) -> None:
    arguments = [str(model), json.dumps(CASES[case])]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=850,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    expected = predicted(settings(model, CASES[case]))
    assert abs(expected / measured["peak"] - 1) < 0.10, f"predicted {expected / 2**20:.0f} MiB, measured {measured}"


# --------------------------------------------------------------------------------- the measured program


def main() -> None:
    import numpy as np

    from torl_mega.trainer import parallel
    from torl_mega.trainer.megatron_trainer import MegatronTrainer
    from torl_mega.types import Sample

    config = settings(Path(sys.argv[1]), json.loads(sys.argv[2]))
    parallel.init_distributed(config.parallel, config.trainer)
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            token_ids=rng.integers(0, 16384, LENGTH),
            loss_mask=np.arange(LENGTH) >= 64,
            rollout_logprobs=np.full(LENGTH, -9.0, np.float32),
            policy_versions=np.zeros(LENGTH, np.int32),
            advantage=float(rng.normal()),
        )
        for _ in range(config.trainer.mini_batch_samples)
    ]
    marks = {"start": status("VmRSS")}
    trainer = MegatronTrainer(config)
    marks["built"] = status("VmRSS")
    scored = trainer.old_logprobs(samples)
    marks["logprobs"] = status("VmHWM")
    trainer.forward_backward(scored)
    trainer.optim_step()  # makes the optimizer state
    trainer.forward_backward(scored)
    marks["peak"] = status("VmHWM")
    marks["resident"] = status("VmRSS")
    print(json.dumps({name: value - marks["start"] for name, value in marks.items()}))


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
