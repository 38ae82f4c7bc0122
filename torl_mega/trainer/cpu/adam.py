"""AdamW whose state is kept as in Apex's and Transformer Engine's FusedAdam, for machines that have neither.

Megatron's own fallback, torch.optim.AdamW, trains correctly, but its DistributedOptimizer (0.16.1 and 0.19.2) cannot load
a checkpoint into it: `state_dict()` of a fresh optimizer fails `assert len(steps) == 1`, and loading raises
KeyError('step'). With `step` in the param group, as in the fused ones, the same checkpoint serves CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay (1711.05101) with bias correction; the arithmetic of torch.optim.AdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        assert bias_correction
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(group["eps"])
                param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)


def install() -> bool:
    """Puts FusedAdam where Megatron looks for the fused ones; False where Megatron found a real one."""
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    chosen: Any = megatron_optimizer
    sharded: Any = distributed
    if not chosen.USING_PYTORCH_OPTIMIZER:
        return chosen.Adam is FusedAdam
    chosen.Adam = sharded.Adam = FusedAdam
    chosen.USING_PYTORCH_OPTIMIZER = False
    sharded.HAVE_APEX_OR_TE, sharded.USING_APEX_OPTIMIZER = True, True
    return True
