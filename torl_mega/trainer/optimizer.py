"""Wraps this rank's model chunks in Megatron's DDP and builds their optimizer and schedule.

Contract: gradients are plain sums over micro-batches, data and context ranks (the loss carries the global divisor), the
norm is clipped over the whole model, weight decay is on matrices only, and lr and decay follow Megatron's scheduler.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as megatron_finalize
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from torl_mega.config import OptimConfig, TrainerConfig


def wrap_ddp(chunks: Sequence[Any], config: Any, trainer: TrainerConfig) -> list[DistributedDataParallel]:
    """Each chunk in Megatron's DDP. With `trainer.overlap` the schedule also gets the hooks that overlap communication."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=trainer.distributed_optimizer,
        overlap_grad_reduce=trainer.overlap,
        overlap_param_gather=trainer.overlap and trainer.distributed_optimizer,
        grad_reduce_in_fp32=True,
        bucket_size=trainer.gradient_bucket_parameters if trainer.overlap else None,
    )
    # later chunks in one bucket each: their communication overlaps with compute anyway (as in Megatron's own get_model)
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)
    ]
    if trainer.overlap:
        single = len(wrapped) == 1
        config.no_sync_func = wrapped[0].no_sync if single else [w.no_sync for w in wrapped]
        if trainer.distributed_optimizer:
            starts = [w.start_param_sync for w in wrapped]
            config.param_sync_func = starts[0] if single else starts
    return wrapped


def finalize_without_division(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient all-reduces, without its division by the token count: `loss_weights` has divided already."""
    del num_tokens
    megatron_finalize(model, None, **kwargs)


def build_optimizer(
    wrapped: list[Any],
    config: TransformerConfig,
    optim: OptimConfig,
    trainer: TrainerConfig,
    *,
    total_steps: int,
) -> tuple[Any, OptimizerParamScheduler]:
    """The optimizer over all chunks and its schedule over `total_steps` optimizer steps, which a resumed run may raise."""
    dtype = config.params_dtype
    offload = trainer.optimizer_offload and torch.cuda.is_available()  # without a GPU it is in host memory already
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        use_distributed_optimizer=trainer.distributed_optimizer,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        overlap_param_gather=trainer.overlap and trainer.distributed_optimizer,
        optimizer_cpu_offload=offload,
        optimizer_offload_fraction=1.0 if offload else 0.0,
        # Megatron's arguments.py demands it: without, what was loaded does not reach the copies that the CPU's Adam steps on
        use_precision_aware_optimizer=offload,
    )
    optimizer = get_megatron_optimizer(settings, wrapped)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # so that a checkpoint before the first step has a state to save, and a new run one to load into
        init = _init_offloaded if offload else getattr(part, "init_state_fn", None)
        if init is not None:
            init(part.optimizer, part.config)
    config.grad_scale_func = optimizer.scale_loss
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / (optim.warmup_steps + 1),  # at 0 the samples of the first update would be thrown away
        max_lr=optim.lr,
        min_lr=optim.lr if optim.schedule == "constant" else 0.0,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(total_steps, optim.warmup_steps + 1),
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        # a checkpoint says how many steps were made; how many there will be, the config says
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


def _init_offloaded(hybrid: Any, config: Any) -> None:
    """The state that the CPU's Adam itself begins with. HybridDeviceOptimizer has none for it but a step in random directions."""
    del config
    for inner in hybrid.sub_optimizers:
        for weight in (p for group in inner.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[weight] = {"step": torch.zeros(()), **moments}
    hybrid._sync_sub_optimizers_state_to_hdo()
    for group in hybrid.param_groups:  # which are saved; a class in a file is not loaded, and here none is read
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]
