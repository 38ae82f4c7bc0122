"""Prints an analysis as tables for people, or turns it into JSON for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from torl_mega.config import Config
from torl_mega.planner.analyse import Analysis
from torl_mega.planner.hardware import GIB, Assumptions
from torl_mega.planner.memory import dtype_bytes, route_bytes
from torl_mega.planner.placement import takes_turns
from torl_mega.planner.search import Candidate


def as_json(config: Config, analysis: Analysis, assume: Assumptions, found: Sequence[Candidate]) -> dict[str, Any]:
    """The tree that `torl plan --json` prints. Sizes in bytes, times in seconds."""
    tree: dict[str, Any] = {
        "name": config.name,
        "fits": analysis.fits,
        "problems": list(analysis.problems),
        "warnings": list(analysis.warnings),
        "hardware": asdict(analysis.hardware),
        "layout": config.parallel.model_dump(),
        "assumptions": asdict(assume),
    }
    if analysis.placement is not None:
        tree["placement"] = asdict(analysis.placement)
    if analysis.shape is not None:
        tree["parameters"] = analysis.shape.num_parameters
    if analysis.phases:
        tree["memory"] = [
            {"phase": p.phase, "where": p.where, "parts": p.parts, "total": p.total, "available": _finite(p.available)}
            for p in analysis.phases
        ]
    if analysis.time is not None and analysis.work is not None:
        tree["workload"] = asdict(analysis.work) | {"tokens": analysis.work.tokens}
        tree["time"] = asdict(analysis.time) | totals(config, analysis)
    if found:
        tree["search"] = [{"overrides": list(c.overrides), "step_s": c.step_s} for c in found]
    return tree


def totals(config: Config, analysis: Analysis) -> dict[str, float]:
    """Tokens/s/GPU, days and GPU-hours of the whole run at the predicted step time."""
    assert analysis.time is not None
    assert analysis.work is not None
    step = analysis.time.step_s
    return {
        "tokens_per_s_per_gpu": analysis.work.tokens / step / analysis.num_gpus,
        "days": config.num_steps * step / 86400,
        "gpu_hours": config.num_steps * step / 3600 * analysis.num_gpus,
    }


def print_plan(
    console: Console,
    config: Config,
    analysis: Analysis,
    assume: Assumptions,
    found: Sequence[Candidate],
    *,
    searched: bool,
) -> None:
    """Tables of placement, memory and times, then notes, reasons against it and the verdict."""
    hw = analysis.hardware
    console.print(f"[bold]{config.name}[/]: {config.model.path} on {hw.nodes} x {hw.gpus} {hw.gpu}", highlight=False)
    if analysis.placement is not None:
        console.print(Group(*_placement(config, analysis)), highlight=False)
    if analysis.phases and hw.gpu != "cpu":
        console.print(_memory(analysis))
    elif analysis.phases:
        console.print(_memory(analysis), "Memory per process; a node's processes share its memory.", highlight=False)
    if analysis.time is not None and hw.gpu != "cpu":
        console.print(_times(config, analysis, assume))
    if searched:
        _print_search(console, found)
    elif found:
        nearest = min(found, key=lambda c: (len(c.overrides), c.step_s))
        text = " ".join(nearest.overrides)
        console.print(f"nearest layout that fits: {text}", highlight=False, soft_wrap=True, markup=False)
    for warning in analysis.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True, markup=False)
    for problem in analysis.problems:
        console.print(f"NO: {problem}", highlight=False, soft_wrap=True, markup=False)
    console.print("verdict: fits" if analysis.fits else "verdict: cannot run as it is", highlight=False)


def _placement(config: Config, analysis: Analysis) -> list[str]:
    place, p = analysis.placement, config.parallel
    assert place is not None
    data = place.world_size // p.model_size
    lines = [
        f"  trainer: {place.world_size} ranks on nodes 0-{place.num_rank_nodes - 1}, tensor {p.tensor} x pipeline {p.pipeline} "
        f"x context {p.context} x data {data}, sequence parallel {'on' if p.sequence else 'off'}"
    ]
    if analysis.phases:
        ranks = place.world_size / place.num_rank_nodes
        save = analysis.phases[-1].total * ranks
        if takes_turns(config, place):
            parked = analysis.phases[-2].total * ranks
            lines.append(
                f"  ranks and servers take turns: {parked / GIB:,.1f} GiB of each node's host memory hold what ranks let go of"
            )
        lines.append(f"  a save: at most {save / GIB:,.1f} GiB of each training node's host memory, as much is written")
        work = analysis.work
        if work and analysis.shape and (routes := route_bytes(analysis.shape, config, work.tokens)):
            lines.append(
                f"  router replay: {routes * ranks / GIB:,.1f} GiB of each training node's host memory for the experts of a step's "
                "tokens, up to three times that while rank 0 shares them"
            )
    if config.rollout.replay is not None:
        return [*lines, f"  no servers, no sandbox: replays {config.rollout.replay}"]
    if place.num_servers:
        lines.append(
            f"  servers: {place.num_servers} of tensor {config.serving.tensor} on nodes "
            f"{len(place.hosts) - place.num_server_nodes}-{len(place.hosts) - 1}, {config.cluster.placement}"
        )
    for first, last in {pool.cores for pool in place.of("sandbox")}:
        lines.append(f"  sandbox: one pool per node ({last - first} cores)")
    if analysis.server is not None and analysis.shape is not None:
        per_token = analysis.shape.kv_bytes_per_token(dtype_bytes(config))
        lines.append(
            f"  KV cache: {analysis.server.kv_tokens:,.0f} tokens per server, "
            f"{per_token / 1024:.1f} KiB per token over its ranks"
        )
    return lines


def _memory(analysis: Analysis) -> Table:
    unit, divisor = ("GiB", GIB) if analysis.hardware.gpu != "cpu" else ("MiB", 2**20)
    table = Table(title=f"Memory at the peak of each phase, {unit} per GPU or process", title_justify="left")
    table.add_column("")
    for phase in analysis.phases:
        table.add_column(f"{phase.phase}\n({phase.where})", justify="right")
    for name in dict.fromkeys(name for phase in analysis.phases for name in phase.parts):
        table.add_row(name, *(f"{p.parts[name] / divisor:.1f}" if name in p.parts else "" for p in analysis.phases))
    table.add_section()
    table.add_row("total", *(f"{phase.total / divisor:.1f}" for phase in analysis.phases))
    available = [_finite(phase.available) for phase in analysis.phases]
    if any(available):
        table.add_row("of", *(f"{bytes_ / divisor:.1f}" if bytes_ else "" for bytes_ in available))
    return table


def _times(config: Config, analysis: Analysis, assume: Assumptions) -> Group:
    time, work = analysis.time, analysis.work
    assert time is not None
    assert work is not None
    table = Table(title="Predicted step (an estimate, nothing here was measured on these GPUs)", title_justify="left")
    columns = {
        "rollout": time.rollout_s, "log-probs": time.logprob_s, "training": time.train_s, "optimizer": time.optimizer_s,
        "sync": time.sync_s, "host": time.host_s, "step": time.step_s,
    }  # fmt: skip
    for name in columns:
        table.add_column(f"{name} s", justify="right")
    table.add_row(*(f"{value:.1f}" for value in columns.values()))
    total = totals(config, analysis)
    return Group(
        table,
        f"  {work.samples} trajectories x {work.mean_tokens:.0f} tokens, {time.concurrency} decoded together per server: "
        f"{total['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU",
        f"  {config.num_steps} steps: {total['days']:.2f} days, {total['gpu_hours']:,.0f} GPU-hours "
        "(evaluation and checkpoints not included)",
        f"  assumed: training at {assume.train_mfu:.0%} and log-probs at {assume.forward_mfu:.0%} of BF16 peak, decoding at "
        f"{assume.decode_bandwidth:.0%} of memory bandwidth + {assume.decode_overhead_s * 1000:.0f} ms a step, collectives at "
        f"{assume.collective:.0%} of link bandwidth, mean response {work.response_tokens:.0f} of {work.max_response} tokens",
    )


def _print_search(console: Console, found: Sequence[Candidate]) -> None:
    if not found:
        console.print(
            "search: no layout of this model fits on this hardware; take more or larger GPUs", highlight=False
        )
        return
    console.print("search: layouts that fit, fastest first", highlight=False)
    for candidate in found:
        text = " ".join(candidate.overrides) or "(as the config has it)"
        console.print(f"  {candidate.step_s:7.1f} s  {text}", highlight=False, soft_wrap=True, markup=False)


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
