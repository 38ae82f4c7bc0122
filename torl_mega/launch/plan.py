"""`torl plan`: what a run will do on a cluster, in seconds and without a GPU."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.launch.check_commands import Started, everything_started, faults
from torl_mega.launch.place import nvidia_smi
from torl_mega.planner import report
from torl_mega.planner.analyse import Hardware, analyse
from torl_mega.planner.hardware import Assumptions, name_of
from torl_mega.planner.search import search as search_layouts

MAX_NODES = 1024
WIDTH = 170  # of the tables where stdout is a file


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `torl plan` and of the launch scripts."""

    nodes: int | None = None  # of the allocation; None = cluster.nodes
    gpus: int | None = None  # per node; None = cluster.gpus_per_node
    gpu: str = "auto"  # a name of planner/hardware.py's table; auto = this machine's, else cluster.gpu
    search: bool = False
    json_output: bool = False
    mean_response: int | None = None  # tokens of an average response; None assumes a fraction of the limit
    hosts: str = ""  # comma-separated node names
    cores: int = 0  # per node; 0 = the usual for that GPU
    base_port: int = 20000
    out: Path | None = None  # where the placement is written for the launch scripts, if the run fits
    commands: bool = False  # also every process with command, environment, GPUs and cores


def run(conf: Path, overrides: Sequence[str] = (), options: PlanOptions = PlanOptions()) -> int:
    """Prints the plan of CONF; returns 0 when it can run and 1 when it cannot. Raises ConfigError."""
    config = load_config(conf, overrides)
    mean_response = options.mean_response
    if mean_response is not None and not 0 < mean_response <= config.rollout.max_response_tokens:
        raise ConfigError(
            f"--mean-response {mean_response}: must lie between 1 and rollout.max_response_tokens = "
            f"{config.rollout.max_response_tokens}"
        )
    hardware = Hardware(
        nodes=config.cluster.nodes if options.nodes is None else options.nodes,
        gpus=config.cluster.gpus_per_node if options.gpus is None else options.gpus,
        gpu=_which_gpu(options.gpu, config.cluster.gpu),
        hosts=tuple(name for name in options.hosts.split(",") if name),
        cores=options.cores,
        base_port=options.base_port,
    )
    if hardware.nodes > MAX_NODES:
        raise ConfigError(f"--nodes {hardware.nodes} is more than the {MAX_NODES} that a plan can be made for")
    assume = Assumptions()
    analysis = analyse(config, hardware, assume, mean_response)
    wanted = (options.search or not analysis.fits) and hardware.gpu != "cpu" and analysis.shape is not None
    found = search_layouts(config, hardware, assume, mean_response, nearest=not options.search) if wanted else []
    started = everything_started(analysis.placement, config, conf) if analysis.placement else []
    if analysis.placement:
        problems = (*analysis.problems, *faults(analysis.placement, config, started))
        analysis = replace(analysis, problems=problems)
    if options.json_output:
        tree = report.as_json(config, analysis, assume, found)
        if options.commands:
            tree["commands"] = [each.as_json() for each in started]
        print(json.dumps(tree, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        if options.commands:
            _print_commands(started)
        report.print_plan(console, config, analysis, assume, found, searched=options.search)
    if analysis.fits and options.out is not None and analysis.placement is not None:
        options.out.write_text(analysis.placement.to_json())
    return 0 if analysis.fits else 1


def _print_commands(started: Sequence[Started]) -> None:
    """For a shell: what would be typed on that node."""
    for each in started:
        mine = each.process
        gpus = f", GPUs {','.join(map(str, mine.gpus))}" if mine.gpus else ""
        print(f"# {mine.name} on {mine.host}, cores {mine.cores[0]}-{mine.cores[1] - 1}{gpus}")
        print(shlex.join(["env", *(f"{name}={value}" for name, value in each.environment.items()), *each.command]))


def _which_gpu(asked: str, configured: str) -> str:
    """The GPU that `--gpu` means. `auto` on a CPU config stays `cpu`: the config says that the engines run there."""
    if asked != "auto":
        return asked
    found = nvidia_smi("name", "memory.total") if configured != "cpu" else []
    if not found:
        return configured
    product, memory = found[0]
    known = name_of(product, int(memory))
    if known is None:
        raise ConfigError(f"--gpu auto: {product} ({memory} MiB) is not in the table; name the nearest one")
    return known


def main() -> None:
    """python -m torl_mega.launch.plan: the command line of `torl plan` plus what the launch scripts need."""
    parser = argparse.ArgumentParser(prog="torl plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("conf", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus", type=int, help="per node")
    parser.add_argument("--gpu", default="auto")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json", action="store_true", dest="json_output")
    parser.add_argument("--mean-response", type=int, help="tokens of an average response")
    parser.add_argument("--hosts", default="", help="comma-separated node names")
    parser.add_argument("--cores", type=int, default=0, help="per node")
    parser.add_argument("--base-port", type=int, default=20000)
    parser.add_argument("--commands", action="store_true", help="also every process that would be started")
    parser.add_argument("--out", type=Path, help="where the placement is written, if the run fits")
    args = vars(parser.parse_intermixed_args())
    try:
        code = run(args.pop("conf"), args.pop("overrides"), PlanOptions(**args))
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
