"""How much the RL step costs over bare Megatron, how even the packing is, and what chunking the head saves.

    python tools/bench_trainer.py --model DIR [--steps 5]             one rank
    torchrun --nproc_per_node 2 tools/bench_trainer.py --model DIR --tp 2

Both sides of the first table run on the same packed micro-batches, layout, DDP and optimizer, in turns within one process:
`bare` projects every token, takes Megatron's vocab_parallel_cross_entropy and steps; `rl` is `forward_backward` and
`optim_step` of the trainer. The second table packs a heavy-tailed mix of lengths; the third runs the log-prob pass with
and without chunks in a process of its own each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.trainer import parallel
from torl_mega.trainer.packing import plan_micro_batches
from torl_mega.types import Sample

ROOT = Path(__file__).resolve().parents[1]


def make_samples(count: int, longest: int, vocab: int) -> list[Sample]:
    """Log-normal lengths with a tail; a fifth of each is the prompt, a tenth an observation."""
    rng = np.random.default_rng(0)
    samples = []
    for n in np.clip(rng.lognormal(np.log(longest / 6), 0.8, count), 16, longest).astype(int).tolist():
        mask = np.arange(n) >= n // 5
        mask[n // 2 : n // 2 + n // 10] = False
        zeros = np.zeros(n, np.float32)
        samples.append(Sample(rng.integers(0, vocab, n), mask, zeros, np.zeros(n, np.int32), float(rng.normal())))
    return samples


def bare_step(trainer: Any, samples: list[Sample]) -> None:
    """Megatron's forward, cross entropy over every token, backward and optimizer step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from torl_mega.trainer.pipeline import schedule_arguments

    def loss_func(micro: Any, model: Any, output: torch.Tensor) -> Any:
        layer = model.output_layer
        logits, _ = super(type(layer), layer).forward(output.transpose(0, 1), weight=layer.projection[0])  # pyright: ignore[reportAttributeAccessIssue]
        targets = micro.token_ids.roll(-1, -1).T.contiguous()
        loss = vocab_parallel_cross_entropy(logits.float(), targets).sum() / 1e4
        return loss, torch.tensor(targets.numel(), dtype=torch.int), {}

    def forward_step(iterator: Any, model: Any) -> Any:
        micro, inner = next(iterator), model
        while hasattr(inner, "module"):
            inner = inner.module
        return model(micro.token_ids, None, None, packed_seq_params=micro.packed), partial(loss_func, micro, inner)

    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    _, micros = trainer.pack(samples)
    many = len(trainer.model) > 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micros) for _ in trainer.model] if many else iter(micros),
        model=trainer.model if many else trainer.model[0],
        num_microbatches=len(micros),
        seq_length=trainer.config.trainer.micro_batch_tokens,
        micro_batch_size=1,
        forward_only=False,
        **schedule_arguments(trainer.model_config),
    )
    trainer.optimizer.step()


def side_by_side(trainer: Any, samples: list[Sample], steps: int) -> None:
    scored = trainer.old_logprobs(samples)

    def rl_step() -> None:
        trainer.forward_backward(scored)
        trainer.optim_step()

    times: dict[str, list[float]] = {"bare": [], "rl": []}
    sides: dict[str, Callable[[], None]] = {"bare": lambda: bare_step(trainer, samples), "rl": rl_step}
    for n in range(steps + 1):
        for name, run in sides.items():
            cpu = time.process_time()
            run()
            if n:  # the first round warms up
                times[name].append(time.process_time() - cpu)
    tokens = sum(len(s.token_ids) for s in samples)
    if parallel.is_rank0():
        for name, seconds in times.items():
            print(f"{name:5s} {tokens / statistics.median(seconds):10.0f} tokens per CPU second (median of {steps})")
        print(f"rl / bare = {statistics.median(times['bare']) / statistics.median(times['rl']):.3f}")


def packing_table(quadratic_at: float) -> None:
    lengths = [len(s.token_ids) for s in make_samples(1024, 3472, 100)]
    print(
        f"\n1,024 sequences, lengths {min(lengths)}..{max(lengths)}, mean {np.mean(lengths):.0f}, budget 16,384 tokens"
    )
    print("ranks  micro-batches  non-padding  imbalance | pad-to-longest: non-padding  imbalance")
    for ranks in (1, 2, 4, 8, 16):
        for align in (1, 4):
            plan = plan_micro_batches(
                lengths, max_tokens=16384, num_ranks=ranks, quadratic_at=quadratic_at, align=align
            )
            padded = sum(-(-n // align) * align for n in lengths)
            naive = np.array_split(np.array(lengths), ranks)
            rows = 16384 // max(lengths)
            area = sum(len(b) * b.max() for part in naive for b in np.array_split(part, -(-len(part) // rows)))
            cost = [float((p + p**2 / quadratic_at).sum()) for p in naive]
            print(
                f"{ranks:5d}  {plan.num_micro_batches:13d}  {sum(lengths) / padded:11.4f}  {plan.imbalance:9.4f} | "
                f"{sum(lengths) / area:27.4f}  {max(cost) / np.mean(cost) - 1:9.4f}   (align {align})"
            )


def logprob_memory(chunk: int) -> None:
    """Peak memory of forward and backward through the head, [4096 tokens, 64] on a vocabulary of 32,768."""
    config = load_config(ROOT / "conf/quickstart.yaml", [])
    parallel.init_distributed(config.parallel.model_copy(update={"tensor": 1}), config.trainer)
    from megatron.core import parallel_state

    from torl_mega.trainer.vocab_parallel import _LogProbEntropy

    hidden = torch.randn(4096, 64, requires_grad=True)
    weight = torch.randn(32768, 64, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _peak_mb()
    group = parallel_state.get_tensor_model_parallel_group()
    logprobs, entropies = _LogProbEntropy.apply(hidden, weight, targets, group, 32768, 1.0, chunk)  # type: ignore[misc]
    (logprobs.sum() + entropies.sum()).backward()
    print(_peak_mb() - before)


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory_table() -> None:
    print("\nlog-prob pass, 4,096 tokens, vocabulary 32,768 (fp32 logits 512 MiB): peak memory above the start")
    for chunk in (4096, 1024, 256):
        done = subprocess.run(
            [sys.executable, __file__, "--logprob-chunk", str(chunk)], capture_output=True, text=True, check=True
        )
        label = "not chunked" if chunk == 4096 else f"chunks of {chunk}"
        print(f"{label:14s} {float(done.stdout.splitlines()[-1]):8.0f} MiB")


def config_of(args: argparse.Namespace) -> Config:
    return load_config(
        ROOT / "conf/quickstart.yaml",
        [
            f"model.path={args.model}",
            f"parallel.tensor={args.tp}",
            f"parallel.pipeline={args.pp}",
            f"data.max_prompt_tokens={args.longest // 2}",
            f"rollout.max_response_tokens={args.longest - args.longest // 2}",
            f"trainer.micro_batch_tokens={args.micro_batch_tokens}",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(ROOT / "conf/quickstart"), help="HF folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--logprob-chunk", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.logprob_chunk:
        logprob_memory(args.logprob_chunk)
        return
    config = config_of(args)
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    side_by_side(trainer, make_samples(args.samples, args.longest, trainer.shape.vocab), args.steps)
    if parallel.is_rank0():
        packing_table(30000.0)
        memory_table()
    parallel.destroy()


if __name__ == "__main__":
    main()
