"""One trainer that goes on from its newest checkpoint, for the kill test.

resume_worker.py WORK_DIR MODEL_DIR NUM_STEPS ASYNC      appends to WORK_DIR/metrics.jsonl, ends with WORK_DIR/final.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
from layout_cases import Layout
from layout_worker import config_for

from torl_mega.trainer import parallel
from torl_mega.trainer.weights import checkpoint


def main(work: Path, model: Path, num_steps: int, asynchronous: bool) -> None:
    extra = (f"checkpoint.async_save={str(asynchronous).lower()}", f"num_steps={num_steps}", "optim.schedule=cosine")
    config = config_for(Layout(), model, extra)
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    newest = checkpoint.latest(work)
    done = trainer.load(newest)["steps_done"] if newest else 0
    while done < num_steps:
        scored = trainer.old_logprobs(ref.make_samples(done))
        metrics = {**trainer.forward_backward(scored), **trainer.optim_step()}
        with (work / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": done, **{k: float(v).hex() for k, v in metrics.items()}}) + "\n")
        done += 1
        trainer.save(work / f"step_{done:06d}", extra={"steps_done": done})
    trainer.finish_saves()
    digest = hashlib.sha256()
    for name, tensor in trainer.weights():
        digest.update(name.encode() + tensor.numpy().tobytes())
    (work / "final.json").write_text(json.dumps(digest.hexdigest()))
    parallel.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "async")
