"""The Trainer Protocol on Megatron-Core.

    samples -> pack (packing, micro_batch) -> run_schedule (Megatron's pipeline) -> hidden states
            -> token_logprobs (vocab_parallel): log-probs and entropies of the sampled tokens
            -> [old_logprobs], or policy loss -> gradients
            -> optim_step (clip, Adam, schedule)

Contract: every method is a collective with the same arguments on every rank; results are equal on all of them. The
old-log-prob pass and the update run the same code. Losses are sums of weighted tokens, so micro-batches, packing and
layout change rounding only.
Limits: models of `layout.SUPPORTED_ARCHITECTURES`; see docs/trainer.md.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from torl_mega.algo.advantage import charge_kl
from torl_mega.algo.loss import Sequences, policy_loss, token_mismatch
from torl_mega.algo.weights import loss_weights, token_shares
from torl_mega.config import Config
from torl_mega.errors import ConfigError, GuardError
from torl_mega.interfaces import NamedTensor
from torl_mega.layout import check_layout, check_router_settings, describe_model, read_hf_config
from torl_mega.trainer import router
from torl_mega.trainer.cpu import backend as cpu_backend
from torl_mega.trainer.layer_spec import choose_spec
from torl_mega.trainer.micro_batch import MicroBatch, build_micro_batch, packing_metrics
from torl_mega.trainer.model import build_chunks, transformer_config
from torl_mega.trainer.optimizer import build_optimizer, finalize_without_division, wrap_ddp
from torl_mega.trainer.packing import MicroBatchPlan, plan_micro_batches
from torl_mega.trainer.parallel import is_rank0, raise_together, share, sum_over_ranks, world_size
from torl_mega.trainer.parking import Parking
from torl_mega.trainer.pipeline import schedule_arguments
from torl_mega.trainer.precision import check_precision, this_machine, token_multiple, warn_if_unfit
from torl_mega.trainer.reference import Reference
from torl_mega.trainer.routes import Chosen, with_routes
from torl_mega.trainer.vocab_parallel import token_logprobs
from torl_mega.trainer.weights import checkpoint
from torl_mega.trainer.weights.hf_io import HfReader, write_hf
from torl_mega.trainer.weights.reshard import WeightMap
from torl_mega.types import Sample, TrainSample

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MegatronTrainer:
    """See the module's docstring. `init_distributed` (parallel.py) must have run."""

    def __init__(self, config: Config) -> None:
        """Builds the model and loads `model.path`. Raises ConfigError when model, layout or precision do not fit."""
        self.config = config
        self.hf_config = share(lambda: read_hf_config(config.model.path))
        problems = check_layout(self.hf_config, config.parallel, world_size())
        problems += check_router_settings(self.hf_config, config.algo)
        if problems:
            raise ConfigError("; ".join(problems))
        check_precision(config.trainer.precision, this_machine())
        if is_rank0():
            warn_if_unfit(config.trainer.precision)
        self.device = torch.device("cpu" if cpu_backend.install() else f"cuda:{torch.cuda.current_device()}")
        self._spec = choose_spec(config.trainer.layer_spec)
        self._temperature = config.rollout.temperature
        self.shape = describe_model(self.hf_config)
        self.model_config: Any = transformer_config(
            self.shape, config.parallel, config.trainer, _DTYPES[config.model.dtype], self._spec
        )
        chunks = build_chunks(
            self.shape, self.model_config, config.parallel, self._spec, fp32_router=config.model.fp32_router
        )
        self.weight_map = WeightMap(chunks, self.shape)
        self._load_start()
        self._reference = Reference(self._parameters()) if config.algo.kl_coef > 0 else None
        self.model_config.finalize_model_grads_func = finalize_without_division
        self.model = wrap_ddp(chunks, self.model_config, config.trainer)
        self.optimizer, self.schedule = build_optimizer(
            self.model, self.model_config, config.optim, config.trainer, total_steps=self._total_steps()
        )
        self._parking = Parking(self.model, self.optimizer)
        self._skipped_in_a_row = 0
        self.checkpoints = checkpoint.Checkpoints(config.checkpoint, self.shape, self.hf_config)
        self._metric_names: tuple[str, ...] = ()
        self._aux_weight = 0.0

    def _load_start(self) -> None:
        """Fills the weights from `model.path`; a file that one rank cannot read is an error on all."""
        error: BaseException | None = None
        try:
            self.weight_map.load(HfReader(self.config.model.path, self.shape))
        except ConfigError as exc:
            error = exc
        raise_together(error)

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        return self.config.num_steps * self.config.updates_per_step

    # ------------------------------------------------------------------------------------------------ verbs

    def old_logprobs(self, samples: Sequence[Sample]) -> list[TrainSample]:
        """Log-probs and entropies of every sampled token under the current weights (None where they are not needed), and
        the reference's where there is a KL, which is charged to the advantages if it belongs to the reward."""
        self._move_reference()
        algo, nothing = self.config.algo, [None] * len(samples)
        chosen: list[Chosen] | None = [] if algo.router_replay == "old" else None
        scored = self._score(samples, chosen) if self.config.needs_old_logprobs else (nothing, nothing)
        logprobs, entropies = scored
        if chosen is not None:
            samples = with_routes(samples, chosen, self.shape, self.device)
        reference: Sequence[Any] = nothing
        if self._reference is not None:
            self._settle_weights()
            with self._reference.in_model():
                reference, _ = self._score(samples)
        items = [TrainSample(*fields) for fields in zip(samples, logprobs, entropies, reference, strict=True)]
        return charge_kl(items, algo) if algo.kl_coef and algo.kl_in == "reward" else items

    def score(self, sample: Sample, *, temperature: float) -> np.ndarray:
        """[T] log-probs of one sample's tokens under another temperature than the rollout's."""
        kept, self._temperature = self._temperature, temperature
        try:
            (logprobs,), _ = self._score([sample])
        finally:
            self._temperature = kept
        return logprobs

    def forward_backward(self, batch: Sequence[TrainSample]) -> Mapping[str, float]:
        """Computes the gradients of one mini-batch. Metrics: those of `policy_loss`, num_tokens, padding_share, dp_imbalance;
        those of `mismatch` too where the old-log-prob pass was left out."""
        algo = self.config.algo
        weights = loss_weights(batch, algo, max_response_tokens=self.config.rollout.max_response_tokens)
        samples = [b.sample for b in batch]
        on_policy = any(b.old_logprobs is None for b in batch)
        old = [b.sample.rollout_logprobs if on_policy else b.old_logprobs for b in batch]
        flat = {
            "weights_T": _concat(weights),
            "shares_T": _concat(token_shares(batch)),
            "old_logprobs_T": _concat(old),
            "advantages_T": _concat([np.full(len(s.token_ids), s.advantage) for s in samples]),
        }
        if self._reference is not None:
            flat["ref_logprobs_T"] = _concat([b.ref_logprobs for b in batch])
        numbers = np.repeat(np.arange(len(samples)), [len(s.token_ids) for s in samples])
        lengths = torch.tensor([int(s.loss_mask.sum()) for s in samples])

        def loss_of(micro: MicroBatch, logprobs: torch.Tensor, entropies: torch.Tensor) -> Any:
            device = logprobs.device
            tensors = {k: torch.from_numpy(v[micro.where]).to(device) for k, v in flat.items()}
            tensors.setdefault("ref_logprobs_T", None)  # type: ignore[arg-type]
            extra = {}
            if on_policy:
                extra = token_mismatch(logprobs.detach(), tensors["old_logprobs_T"], tensors["shares_T"])
                tensors["old_logprobs_T"] = logprobs.detach()
            sequences = Sequences(torch.from_numpy(numbers[micro.where]).to(device), lengths.to(device), _context_sum)
            loss, metrics = policy_loss(
                logprobs_T=logprobs, entropy_T=entropies, config=algo, sequences=sequences, **tensors
            )
            metrics |= extra
            if not micro.rows.numel():  # a graph without targets: other ranks wait in its collectives
                loss = loss + 0.0 * logprobs.sum()
            return loss, metrics

        metrics = self.gradients(samples, loss_of)
        if on_policy:
            metrics["max_abs_logprob_diff"] = metrics.pop("abs_logprob_diff_max")
        return metrics

    def gradients(
        self, samples: Sequence[Sample], loss_of: Callable[[MicroBatch, torch.Tensor, torch.Tensor], Any]
    ) -> dict[str, float]:
        """The gradients of `loss_of`, summed over micro-batches and ranks, in the place of earlier ones; its metrics, summed,
        and those of the packing. `loss_of`: (micro-batch, log-probs [n], entropies [n]) -> (loss, metrics), always the same."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        plan, micros = self.pack(samples)
        self._aux_weight = self.config.algo.router_aux_coef / sum(len(s.token_ids) for s in samples)
        metrics = self._reduce_metrics(self.run_schedule(micros, loss_of, forward_only=False))
        if self.shape.experts is not None:
            metrics |= router.load_metrics([_unwrap(chunk) for chunk in self.model], self.shape.num_layers)
        return {**metrics, **packing_metrics(samples, plan, micros)}

    def optim_step(self) -> Mapping[str, float]:
        """Clips the gradients, steps, advances the schedule. An update whose gradient is not a number is skipped: weights and
        Adam's state stay as they are, `grad_norm` is 0 and `faults/skipped_updates` 1. Raises GuardError when that repeats."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row > self.config.guards.max_skipped_updates:
            raise GuardError(
                f"the gradient norm is {norm} at optimizer step {self.schedule.num_steps + 1}, {self._skipped_in_a_row} "
                f"times in a row (guards.max_skipped_updates = {self.config.guards.max_skipped_updates}); look at that "
                "step's data or lower optim.lr, then resume"
            )
        self.schedule.step(1)
        self.checkpoints.poll()
        return {"grad_norm": norm, "lr": lr} if finite else {"grad_norm": 0.0, "lr": lr, "faults/skipped_updates": 1.0}

    def weights(self) -> Iterator[NamedTensor]:
        """HF-named, unpadded tensors, one at a time, on rank 0, outlines on the others. See WeightMap.outlines."""
        self._settle_weights()
        return self.weight_map.outlines()

    def hold(self, parts: frozenset[str]) -> None:
        """Moves all other parts of this rank's memory to the host's, and these back; see parking.py."""
        if "weights" in self._parking.on_device:
            self._settle_weights()
        self._parking.hold(parts)
        raise_together(None)  # returns when every rank has

    def save(self, path: Path, *, extra: Mapping[str, Any]) -> None:
        """Writes a checkpoint to `path`, with `extra` (JSON) beside it; see checkpoint.py for what resumes how."""
        self._settle_weights()
        reference = None
        if self._reference is not None and self._reference_moves:
            with self._reference.in_model():
                reference = checkpoint.reference_state(self.model)
        self.checkpoints.save(path, self.model, self.optimizer, self.schedule, extra, reference)

    def load(self, path: Path) -> Mapping[str, Any]:
        """Goes on from a checkpoint of any layout; returns its `extra`. Raises CheckpointError before anything changed."""
        take = self._take_reference if self._reference_moves else None
        return self.checkpoints.load(path, self.model, self.optimizer, self.schedule, take)

    def finish_saves(self) -> None:
        """Waits for checkpoints that are still being written (checkpoint.async_save)."""
        self.checkpoints.poll(wait=True)

    def export_hf(self, path: Path) -> None:
        """Writes an HF folder that plain `transformers` loads, with the tokenizer of `model.path`."""
        error: BaseException | None = None
        tensors = self.weights()
        if is_rank0():
            try:
                write_hf(path, tensors, config=self.hf_config, source=Path(self.config.model.path))
            except Exception as exc:
                error = exc
        for _ in tensors:  # the other ranks send; rank 0 drains what a failed write left
            pass
        raise_together(error)

    # ------------------------------------------------------------------------------------------------ passes

    def _score(
        self, samples: Sequence[Sample], chosen: list[Chosen] | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per sample [T] log-probs and entropies, 0 where not sampled; the same on every rank. `chosen` is given what the routers
        of this rank took."""
        found: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = []

        def keep(micro: MicroBatch, logprobs: torch.Tensor, entropies: torch.Tensor) -> Any:
            found.append((micro.where, logprobs.detach(), entropies.detach()))
            return logprobs.sum(), {}

        _, micros = self.pack(samples)
        with torch.no_grad():
            self.run_schedule(micros, keep, forward_only=True, chosen=chosen)
        offsets = _offsets(samples)
        flat = torch.zeros(2, int(offsets[-1]), dtype=torch.float32)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for where, logprobs, entropies in found:
                flat[0, where], flat[1, where] = logprobs.cpu(), entropies.cpu()
        values = sum_over_ranks(flat, self.device).numpy()
        pieces = [slice(int(a), int(b)) for a, b in pairwise(offsets)]
        return [values[0, p].copy() for p in pieces], [values[1, p].copy() for p in pieces]

    def pack(self, samples: Sequence[Sample]) -> tuple[MicroBatchPlan, list[MicroBatch]]:
        """The plan of all data-parallel ranks, and this rank's part of it as packed micro-batches."""
        parallel, trainer = self.config.parallel, self.config.trainer
        # each context rank takes two chunks of every sequence
        align = 2 * parallel.context if parallel.context > 1 else 1
        plan = plan_micro_batches(
            [len(s.token_ids) for s in samples],
            max_tokens=trainer.micro_batch_tokens,
            num_ranks=parallel_state.get_data_parallel_world_size(),
            quadratic_at=self.shape.quadratic_at,
            align=align,
            # the interleaved schedule takes whole rounds over the stages only
            multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )
        offsets = _offsets(samples)
        build = partial(
            build_micro_batch,
            samples,
            offsets,
            align=align,
            total_align=(parallel.tensor if parallel.sequence else 1) * token_multiple(trainer.precision),
            context_size=parallel.context,
            context_rank=parallel_state.get_context_parallel_rank(),
            device=self.device,
            local=self._spec == "local",
        )
        mine = plan.micro_batches[parallel_state.get_data_parallel_rank()]
        return plan, [build(members) for members in mine]

    def run_schedule(
        self,
        micros: list[MicroBatch],
        use: Callable[[MicroBatch, torch.Tensor, torch.Tensor], Any],
        *,
        forward_only: bool,
        head: Callable[[Any, MicroBatch, torch.Tensor], Any] | None = None,
        chosen: list[Chosen] | None = None,
    ) -> list[dict[str, Any]]:
        """Drives Megatron's schedule over this rank's micro-batches; the metrics of each, on the last stage.

        On the last stage `head` turns (model chunk, micro-batch, hidden states [1, t, H]) into log-probs and entropies
        (default: `token_logprobs`), and `use` turns (micro-batch, log-probs, entropies) into (loss, metrics).
        """
        head = head or self.token_logprobs

        def loss_func(micro: MicroBatch, model: Any, output: torch.Tensor) -> Any:
            logprobs, entropies = head(model, micro, output)
            loss, metrics = use(micro, logprobs, entropies)
            return loss, torch.tensor(micro.rows.numel(), dtype=torch.int, device=output.device), metrics

        def forward_step(iterator: Iterator[MicroBatch], model: Any) -> Any:
            micro = next(iterator)
            if chosen is not None:
                chosen.append((micro.place, {}))
            # an attribute of its own of Megatron's record, which is handed to every layer
            micro.packed.router_inputs = router.RouterInputs(  # type: ignore[attr-defined]
                micro.sequence, micro.lengths, self._aux_weight, micro.routes, chosen[-1][1] if chosen else None
            )
            output = model(micro.token_ids, None, None, packed_seq_params=micro.packed)
            return output, partial(loss_func, micro, _unwrap(model))

        chunks = len(self.model)
        model: Any = self.model if chunks > 1 else self.model[0]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micros) for _ in range(chunks)] if chunks > 1 else iter(micros),
            model=model,
            num_microbatches=len(micros),
            seq_length=self.config.trainer.micro_batch_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            **schedule_arguments(self.model_config),
        )

    def token_logprobs(self, model: Any, micro: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] log-probs and entropies of the micro-batch's targets from the last stage's hidden states [1, t, H]."""
        rows, targets = micro.rows, micro.targets
        empty = rows.numel() == 0
        if empty:  # nothing to train here: one row of weight zero keeps the collectives and the graph alive
            rows = targets = torch.zeros(1, dtype=torch.int64, device=output.device)
        logprobs, entropies = token_logprobs(
            model,
            output,
            rows,
            targets,
            valid_vocab=self.shape.vocab,
            temperature=self._temperature,
            fp32=self.config.model.fp32_head,
            chunk=self.config.trainer.logprob_chunk_tokens,
        )
        return (logprobs[:0], entropies[:0]) if empty else (logprobs, entropies)

    # ------------------------------------------------------------------------------------------------ pieces

    def _reduce_metrics(self, outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """Sums (for names that end in `_max`: maxima) over micro-batches and ranks; the same on every rank."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        if not self._metric_names:  # only the last stage computes metrics; it names them once
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            names: list[Any] = [tuple(sorted(outputs[0])) if last else ()]
            group: Any = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast_object_list(names, src=source, group=group)
            self._metric_names = names[0]
        counts = last and parallel_state.get_tensor_model_parallel_rank() == 0
        is_max = np.array([n.endswith("_max") for n in self._metric_names])
        rows = [[float(o[n]) for n in self._metric_names] for o in outputs] if counts else []
        table = np.array(rows).reshape(-1, len(self._metric_names))
        sums = torch.from_numpy(table.sum(0))
        tops = torch.from_numpy(table.max(0, initial=-np.inf))
        if world_size() > 1:
            sums, tops = sums.to(self.device), tops.to(self.device)
            dist.all_reduce(sums)
            dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        values = np.where(is_max, tops.cpu().numpy(), sums.cpu().numpy())
        return dict(zip(self._metric_names, values.tolist(), strict=True))

    def _settle_weights(self) -> None:
        """Fetches the weights that other data-parallel ranks have updated; with overlap the next forward pass would."""
        if self.config.trainer.overlap and self.config.trainer.distributed_optimizer:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _parameters(self) -> list[torch.Tensor]:
        """All parameters of this rank, in a fixed order."""
        return [p for names in self.weight_map.parameters for p in names.values()]

    @property
    def _reference_moves(self) -> bool:
        return self._reference is not None and self.config.algo.ref_every_steps > 0

    def _move_reference(self) -> None:
        """Every `algo.ref_every_steps` RL steps the policy becomes the reference."""
        done, rest = divmod(self.schedule.num_steps, self.config.updates_per_step)
        if self._reference_moves and done and not rest and done % self.config.algo.ref_every_steps == 0:
            self._settle_weights()
            assert self._reference is not None
            self._reference.take([p.detach() for p in self._parameters()])

    def _take_reference(self, saved: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Takes the reference of a checkpoint."""
        assert self._reference is not None
        self._reference.take([saved[n][name] for n, names in enumerate(self.weight_map.parameters) for name in names])


def _offsets(samples: Sequence[Sample]) -> np.ndarray:
    """[len(samples) + 1] start of each sample in the concatenation of all."""
    return np.cumsum([0, *(len(s.token_ids) for s in samples)])


def _concat(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *arrays]).astype(np.float32)


def _context_sum(sums: torch.Tensor) -> torch.Tensor:
    """Summed over the context-parallel ranks, which hold parts of the same sequences."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    return sums


def _unwrap(model: Any) -> Any:
    """The GPTModel inside DDP's and the precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model
