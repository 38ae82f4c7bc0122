"""Precision profiles: what each sets in Megatron, what it needs, and what is active on this machine.

FP8 runs with the trainer's own numbers: policy and old log-probs must be computed alike, or every ratio starts off 1.
Delayed scaling is unfit for that: Transformer Engine moves its scales only where an autocast ends with gradients on, so the
log-prob pass of the first step runs with a scale of 1 and every later one with older scales than the update.

    profile             Megatron                              chip (compute capability)   Transformer Engine
    default             model.dtype                           any                         -
    fp8_hybrid_delayed  fp8=hybrid, recipe delayed            8.9 (Ada) or later          >= 1.0
    fp8_current         fp8=hybrid, recipe tensorwise         8.9 or later                >= 2.2
    fp8_blockwise       fp8=e4m3, recipe blockwise            9.0 (Hopper), not 10.x      >= 2.3, CUDA >= 12.9
    mxfp8               fp8=e4m3, recipe mxfp8                10.0 (Blackwell)            >= 2.1

Contract: `precision_settings` and `kernel_environment` are pure and need no GPU; `check_precision` refuses with one line
what this machine lacks.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch

from torl_mega.config import TrainerConfig
from torl_mega.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Profile:
    """One FP8 profile: Megatron's settings, and the least (and latest) hardware and software that runs it."""

    fp8: str
    recipe: str
    min_capability: tuple[int, int]
    max_capability: tuple[int, int]
    min_te: tuple[int, int]
    min_cuda: tuple[int, int]
    chips: str


PROFILES = {
    "fp8_hybrid_delayed": Profile("hybrid", "delayed", (8, 9), (99, 0), (1, 0), (12, 1), "Ada, Hopper or later"),
    "fp8_current": Profile("hybrid", "tensorwise", (8, 9), (99, 0), (2, 2), (12, 1), "Ada, Hopper or later"),
    "fp8_blockwise": Profile("e4m3", "blockwise", (9, 0), (9, 9), (2, 3), (12, 9), "Hopper"),
    "mxfp8": Profile("e4m3", "mxfp8", (10, 0), (11, 9), (2, 1), (12, 8), "Blackwell"),
}


def precision_settings(profile: str, dtype: torch.dtype) -> dict[str, Any]:
    """TransformerConfig settings of a profile. Raises ConfigError when FP8 is asked for with fp32 weights."""
    if profile == "default":
        return {}
    if dtype is not torch.bfloat16:
        raise ConfigError(f"trainer.precision = {profile} needs model.dtype = bfloat16, found {dtype}")
    chosen = PROFILES[profile]
    settings: dict[str, Any] = {"fp8": chosen.fp8, "fp8_recipe": chosen.recipe, "fp8_param": False}
    if chosen.recipe == "delayed":
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max", "fp8_margin": 0}
    return settings


def token_multiple(profile: str) -> int:
    """The packed tokens of a rank must be a multiple of this: FP8 matrix products take 16; MXFP8's blocks are 32 long; a
    sequence-parallel shard that does not fill Transformer Engine's blocks of 128 is gathered in bf16."""
    return {"default": 1, "mxfp8": 32, "fp8_blockwise": 128}.get(profile, 16)


def kernel_environment(trainer: TrainerConfig) -> dict[str, str]:
    """What a rank's environment must say before torch and Transformer Engine read it."""
    found = {}
    if trainer.precision == "fp8_blockwise":
        found["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # as the servers round; by default scales are powers of two
    if trainer.deterministic:
        found |= {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_NVLS_ENABLE": "0",  # sums in the switch, in the order of arrival
        }
    return found


@dataclass(frozen=True, slots=True)
class Machine:
    """What the check needs to know; `this_machine` reads it."""

    capability: tuple[int, int] | None  # None = no CUDA device
    te: tuple[int, int] | None  # Transformer Engine's version, None = absent
    cuda: tuple[int, int] | None


def this_machine() -> Machine:
    """Chip, Transformer Engine and CUDA of this process."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    cuda = torch.version.cuda
    return Machine(capability, _te_version(), _two(cuda) if cuda else None)


def _te_version() -> tuple[int, int] | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    for name in ("transformer-engine", "transformer_engine"):
        try:
            return _two(version(name))
        except PackageNotFoundError:
            continue
    return (0, 0)


def _two(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def check_precision(profile: str, machine: Machine) -> None:
    """Raises ConfigError saying what the profile needs and what was found."""
    if profile == "default":
        return
    need, where = PROFILES[profile], f"trainer.precision = {profile}"
    if machine.capability is None:
        raise ConfigError(f"{where} needs a {need.chips} GPU, found none; take precision: default")
    if not need.min_capability <= machine.capability <= need.max_capability:
        found = ".".join(map(str, machine.capability))
        raise ConfigError(f"{where} needs a {need.chips} GPU, found compute capability {found}; take another profile")
    if machine.te is None or machine.te < need.min_te:
        found = "none" if machine.te is None else ".".join(map(str, machine.te))
        wanted = ".".join(map(str, need.min_te))
        raise ConfigError(f"{where} needs Transformer Engine >= {wanted}, found {found}; use NVIDIA's PyTorch image")
    if machine.cuda is None or machine.cuda < need.min_cuda:
        found = "none" if machine.cuda is None else ".".join(map(str, machine.cuda))
        wanted = ".".join(map(str, need.min_cuda))
        raise ConfigError(f"{where} needs CUDA >= {wanted}, found {found}; use a newer PyTorch image")


def warn_if_unfit(profile: str) -> None:
    """For a run that asks for `profile`."""
    if profile in PROFILES and PROFILES[profile].recipe == "delayed":
        log.warning(
            "trainer.precision = %s is unfit for RL: scoring and update run with different scales; take fp8_current",
            profile,
        )


def report(layer_spec: Literal["auto", "local"] = "auto") -> dict[str, Any]:
    """For `torl doctor`: chip, Transformer Engine, which profiles would run, and which Adam Megatron takes. `layer_spec`: the
    config's."""
    machine = this_machine()
    usable = ["default"]
    for name in PROFILES:
        try:
            check_precision(name, machine)
        except ConfigError:
            continue
        usable.append(name)
    return {
        "compute_capability": machine.capability,
        "transformer_engine": machine.te,
        "cuda": machine.cuda,
        "layer_spec": "te" if layer_spec == "auto" and machine.capability and machine.te else "local",
        "usable_profiles": usable,
        "optimizer": active_optimizer(),
    }


def active_optimizer() -> str:
    """Module path of the Adam that training uses on this machine."""
    from torl_mega.trainer.cpu import backend as cpu_backend

    if cpu_backend.install():
        from torl_mega.trainer.cpu import adam as cpu_adam

        cpu_adam.install()
    import megatron.core.optimizer as megatron_optimizer

    adam: Any = megatron_optimizer
    return f"{adam.Adam.__module__}.{adam.Adam.__qualname__}"
