"""Many layouts and model families, each compared with HF + torch on rank 0. The ranks are forked anew for every layout.

    layout_worker.py RESULTS.jsonl WORK_DIR CASES.json

CASES is a list of [layout fields, [[family, tied], ...]]. One line of RESULTS per case: the largest absolute differences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
from forked import run_ranks
from layout_cases import Layout

from torl_mega.config_file import load_config
from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend
from torl_mega.types import TrainSample

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cpu"
LAYOUT_LIMIT_S = 280.0


def config_for(layout: Layout, model_path: Path, extra: tuple[str, ...] = ()) -> Any:
    return load_config(
        ROOT / "conf/quickstart.yaml",
        [
            f"model.path={model_path}",
            "data.max_prompt_tokens=8",
            "algo.old_logprobs=always",
            "rollout.max_response_tokens=40",
            f"rollout.temperature={ref.TEMPERATURE}",
            f"algo.entropy_coef={ref.ENTROPY_COEF}",
            f"optim.lr={ref.OPTIM['lr']}",
            f"optim.eps={ref.OPTIM['eps']}",
            "optim.betas=[0.9,0.95]",
            f"optim.weight_decay={ref.WEIGHT_DECAY}",
            f"optim.clip_grad={ref.CLIP_GRAD}",
            "trainer.micro_batch_tokens=60",
            "trainer.logprob_chunk_tokens=7",
            "trainer.gradient_bucket_parameters=20000",
            *layout.overrides(),
            *extra,
        ],
    )


def aux_of(family: str, tied: bool) -> tuple[str, ...]:
    """The reference's balance loss."""
    return (f"algo.router_aux_coef={ref.AUX_COEF.get((family, tied), 0.0)}",)


def replay_of(family: str, tied: bool) -> tuple[str, ...]:
    """Of one model the update takes the experts of the old-log-prob pass; those that samples name come first."""
    return ("algo.router_replay=old",) if (family, tied) == ("qwen3moe", False) else ()


def all_logits(trainer: Any, samples: list[Any]) -> list[torch.Tensor]:
    """Full logits per sample, through the trainer's own packing, schedule and deferred head."""
    from megatron.core import parallel_state as ps

    offsets = np.cumsum([0, *(len(s.token_ids) for s in samples)])
    flat = torch.zeros(int(offsets[-1]), trainer.shape.vocab, device=DEVICE)
    every = [replace(s, loss_mask=np.arange(len(s.token_ids)) > 0) for s in samples]

    def full_head(model: Any, micro: Any, output: torch.Tensor) -> Any:
        hidden, layer = output[0], model.output_layer
        if layer.sequence_parallel:
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(hidden)
        part = (hidden @ layer.projection[0].T).float()
        group = ps.get_tensor_model_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        full = torch.cat(parts, -1)[:, : trainer.shape.vocab]
        if ps.get_tensor_model_parallel_rank() == 0:
            flat[torch.from_numpy(micro.where - 1)] = full[micro.rows]
        return output.sum(), output.sum()

    _, micros = trainer.pack(every)
    with torch.no_grad():
        trainer.run_schedule(micros, lambda micro, a, b: (a, {}), forward_only=True, head=full_head)
    dist.all_reduce(flat)
    return [flat[a:b] for a, b in pairwise(offsets)]


def gather_gradients(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """HF-named gradients on rank 0; shards of the distributed optimizer are collected first."""
    from megatron.core import parallel_state as ps

    if trainer.config.trainer.distributed_optimizer:
        dense, experts = ps.get_data_parallel_group(with_context_parallel=True), ps.get_expert_data_parallel_group()
        for chunk in trainer.model:
            for buffers, group in ((chunk.buffers, dense), (chunk.expert_parallel_buffers, experts)):
                for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    weight_map = trainer.weight_map
    kept = weight_map.parameters
    weight_map.parameters = [{n: p.main_grad for n, p in names.items()} for names in kept]
    try:
        yield from weight_map.gather()
    finally:
        weight_map.parameters = kept


def largest(pairs: Any) -> float:
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def run_case(layout: Layout, family: str, tied: bool, hf: ref.HfRun | None, model_path: Path) -> dict[str, float]:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config_for(layout, model_path, (*aux_of(family, tied), *replay_of(family, tied))))
    found: dict[str, float] = dict.fromkeys(
        ("logits", "logprobs", "entropy", "loss", "grad", "grad_norm", "weights", "routes"), 0.0
    )
    logits = all_logits(trainer, ref.step_samples(family, tied, 0))
    if hf:
        found["logits"] = largest((a[:-1], b[:-1]) for a, b in zip(logits, hf.logits, strict=True))
    for n in range(ref.STEPS):
        samples = ref.step_samples(family, tied, n)
        scored = trainer.old_logprobs(samples)
        shifted = [
            TrainSample(t.sample, t.old_logprobs + shift, t.entropy)
            for t, shift in zip(scored, ref.noise(n, samples), strict=True)
        ]
        metrics = trainer.forward_backward(shifted)
        gradients = {k: g.clone() for k, g in gather_gradients(trainer)} if n == 0 else {}
        norm = trainer.optim_step()["grad_norm"]
        if hf and n == 0 and trainer.config.algo.router_replay == "old":  # what the update took is what HF takes
            taken = [np.sort(t.sample.routes) for t in scored]
            found["routes"] = sum(int((a != np.sort(b)).sum()) for a, b in zip(taken, hf.routes, strict=True))
        if hf:
            step = hf.steps[n]
            arrays = lambda x: [torch.from_numpy(a) for a in x]  # noqa: E731
            found["logprobs"] = max(
                found["logprobs"],
                largest(zip(arrays(t.old_logprobs for t in scored), arrays(step.logprobs), strict=True)),
            )
            found["entropy"] = max(
                found["entropy"], largest(zip(arrays(t.entropy for t in scored), arrays(step.entropies), strict=True))
            )
            found["loss"] = max(found["loss"], abs(metrics["loss"] - step.loss))
            found["grad_norm"] = max(found["grad_norm"], abs(norm - step.grad_norm) / step.grad_norm)
            if gradients:
                assert set(gradients) == set(hf.gradients), set(gradients) ^ set(hf.gradients)
                found["grad"] = largest((gradients[k], hf.gradients[k]) for k in gradients)
                found["largest_grad"] = max(float(g.abs().max()) for g in hf.gradients.values())
    weights = dict(trainer.weights())
    if hf:
        assert set(weights) == set(hf.weights), set(weights) ^ set(hf.weights)
        found["weights"] = largest((weights[k], hf.weights[k]) for k in weights)
    return found


def reference(work: Path, family: str, tied: bool) -> ref.HfRun:
    """Computed by the first rank 0 that needs it, read by the later ones."""
    path = work / f"reference_{family}_{tied}.pt"
    if not path.exists():
        torch.save(ref.HfRun(family, tied), path)
    return torch.load(path, weights_only=False)


def run_layout(layout: Layout, families: list[tuple[str, bool]], version: str, results: Path, work: Path) -> None:
    """One rank's part of all models in one layout."""
    config = config_for(layout, work)
    parallel.init_distributed(config.parallel, config.trainer)
    for family, tied in families:
        hf = reference(work, family, tied) if parallel.is_rank0() else None
        found = run_case(layout, family, tied, hf, work / f"{family}_{'tied' if tied else 'untied'}")
        if parallel.is_rank0():
            line = {"megatron": version, "layout": layout.name, "model": family, "tied": tied, **found}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    dist.barrier()
    parallel.destroy()


def main(results: Path, work: Path, cases: Path) -> None:
    cpu_backend.install()
    import megatron.core

    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    version = str(megatron.core.__version__).split("+")[0]  # what follows is the commit of the folder it runs in
    for fields, families in json.loads(cases.read_text()):
        layout = Layout(**fields)
        run = partial(run_layout, layout, families, version, results, work)
        run_ranks(layout.world_size, run, LAYOUT_LIMIT_S)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
