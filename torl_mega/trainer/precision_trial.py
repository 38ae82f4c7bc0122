"""One linear layer of Transformer Engine per precision profile, forward and backward, against an exact product.

    python -m torl_mega.trainer.precision_trial PROFILE...     prints {"name", "ok", "detail"} as JSON, a line for each

In a process of its own: a kernel that this GPU lacks may end it. Used by `torl doctor --gpu` (launch/gpu_trial.py).
"""

from __future__ import annotations

import json
import sys
import time

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig

from torl_mega.trainer.precision import check_precision, precision_settings, this_machine

SIZE, ROWS = 1024, 256
WITHIN = {"default": 0.01}  # relative error of the whole product: bf16 rounds to 2^-9
WITHIN_FP8 = 0.1  # e4m3 rounds to 2^-4 at most, both factors


def try_linear(profile: str, device: str = "cuda") -> str:
    """What was measured. Raises ConfigError for a profile that this machine lacks, RuntimeError for wrong numbers."""
    check_precision(profile, this_machine())
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    settings = precision_settings(profile, torch.bfloat16)
    config = TransformerConfig(
        num_layers=1, hidden_size=SIZE, num_attention_heads=8, bf16=True, params_dtype=torch.bfloat16, **settings
    )
    begun = time.monotonic()
    layer = te.Linear(SIZE, SIZE, bias=False, params_dtype=torch.bfloat16).to(device)
    x = torch.randn(ROWS, SIZE, device=device, dtype=torch.bfloat16, requires_grad=True)
    with get_fp8_context(config):
        y = layer(x)
    y.backward(torch.ones_like(y))
    exact = x.detach().float() @ layer.weight.detach().float().T
    gradient = x.detach().float().sum(0).expand(SIZE, SIZE)  # of every row of the weight, where y's gradient is 1
    forward, backward = (
        ((found.float() - wanted).norm() / wanted.norm()).item()
        for found, wanted in ((y.detach(), exact), (layer.weight.grad, gradient))
    )
    said = f"relative error {forward:.4f} forward, {backward:.4f} backward, {time.monotonic() - begun:.1f} s"
    if not max(forward, backward) < WITHIN.get(profile, WITHIN_FP8):
        raise RuntimeError(f"{said}: more than {WITHIN.get(profile, WITHIN_FP8)}")
    return said


def main(profiles: list[str]) -> int:
    failed = False
    for profile in profiles:
        try:
            detail, well = try_linear(profile), True
        except Exception as exc:  # the boundary of this program: what fails is what it is to find
            detail, well = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}", False
        print(json.dumps({"name": f"linear {profile}", "ok": well, "detail": detail}), flush=True)
        failed |= not well
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
