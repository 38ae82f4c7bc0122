"""The platform class that `entry.activate` names; imported by SGLang's processes only."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """torch on the CPU, no compiled sgl-kernel. Source: SGLang srt/platforms/interface.py."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def empty_cache(self) -> None:
        """Nothing: SGLang collects garbage here, at each flush of the prefix cache, over everything it ever imported. What
        a flush lets go of is in no cycle."""
