"""What the sandbox can do on this machine, for `torl doctor`: tries each tier for real and says why a higher one fails."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from torl_mega.config import SandboxConfig
from torl_mega.errors import ServerError
from torl_mega.sandbox import tiers
from torl_mega.sandbox.host import Zygote
from torl_mega.sandbox.jail import landlock


def report(config: SandboxConfig | None = None) -> dict[str, Any]:
    """`{"tier", "user", "kernel", "landlock_abi", "tiers": {"A": {"works", "mechanisms", "warnings", "why_not"}, …}}`.

    Starts one empty zygote per tier, about 0.3 s each. `tier` is None when only tier C, which must be asked for, is left.
    """
    return asyncio.run(_report(config or SandboxConfig()))


async def _report(config: SandboxConfig) -> dict[str, Any]:
    found = {tier: await _try(config, tier) for tier in ("A", "B")}
    return {
        "tier": next((tier for tier, answer in found.items() if answer["works"]), None),
        "user": "root" if os.getuid() == 0 else f"uid {os.getuid()}",
        "kernel": os.uname().release,
        "landlock_abi": landlock.abi(),
        "tiers": found,
    }


async def _try(config: SandboxConfig, tier: str) -> dict[str, Any]:
    plan: tiers.Plan | None = None
    zygote: Zygote | None = None
    try:
        plan = await asyncio.to_thread(tiers.plan, config, tier)
        settings = dataclasses.replace(plan.settings("math"), preload=[], warm="", slots=1)
        zygote = Zygote("math", settings)
        plan.note_ready(await zygote.start())
        return {"works": True, "mechanisms": plan.mechanisms, "warnings": plan.warnings, "why_not": ""}
    except ServerError as e:
        return {"works": False, "mechanisms": [], "warnings": [], "why_not": str(e)}
    finally:
        if zygote is not None:
            await zygote.stop()
        if plan is not None:
            plan.remove_scratch()
