"""Run by torchrun on GPUs: one scored, trained step of a model against HF in bf16.

gpu_worker.py MODEL OUT.json [a.b=value ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/parallel")]

import hf_reference as ref  # noqa: E402
from layout_cases import Layout  # noqa: E402
from layout_worker import config_for  # noqa: E402

from torl_mega.trainer import parallel  # noqa: E402
from torl_mega.trainer.precision import report  # noqa: E402

STEP = ("optim.lr=0.02",)  # one that bf16 shows next to a norm's weight of 1, which it rounds to 2^-8


def main(model: Path, out: Path, *overrides: str) -> None:
    # the layout comes from the overrides, which are later and win
    config = config_for(Layout(), model, ("model.dtype=bfloat16", "parallel.data=auto", *STEP, *overrides))
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    samples = ref.make_samples(0)
    scored = trainer.old_logprobs(samples)
    before = {name: t.clone() for name, t in trainer.weights()}
    metrics = {**trainer.forward_backward(scored), **trainer.optim_step()}
    after = dict(trainer.weights())
    if parallel.is_rank0():
        from transformers import AutoModelForCausalLM

        hf = ref.Reference(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))
        gaps = []
        with torch.no_grad():
            for sample, found in zip(samples, scored, strict=True):
                if len(sample.token_ids) > 1:
                    wanted = hf.score(sample)[0].numpy()
                    gaps.append(np.abs(found.old_logprobs[1:] - wanted)[sample.loss_mask[1:]])
        result = {
            **{
                k: v
                for k, v in report(config.trainer.layer_spec).items()
                if k in ("layer_spec", "usable_profiles", "optimizer")
            },
            "mean_abs_logprob_diff_to_hf": float(np.concatenate(gaps).mean()),
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "moved_weights": sum(int(not torch.equal(before[k], after[k])) for k in before),
            "num_weights": len(before),
        }
        out.write_text(json.dumps(result))
    parallel.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
