"""`torl doctor`: is this machine, or each node of a job, ready for a run? Says what is wrong, where, and what to do.

    checks of one machine ─► list[Check] ─► table or JSON          (torl doctor [CONF] [--gpu])
                                └─► REPORT/<node>.json ─► one table of all nodes   (preflight: launch/common.sh)

Exit code 1 when a check failed; warnings do not stop a job.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torl_mega.config_file import load_config
from torl_mega.errors import TorlError
from torl_mega.launch import checks, gpu_trial
from torl_mega.launch.checks import Check
from torl_mega.launch.preflight import collected, placement_checks, this_node, with_node_addresses, write_report
from torl_mega.planner.placement import read_placement


def run(
    conf: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    json_output: bool = False,
    gpu: bool = False,
    placement: Path | None = None,
    report: Path | None = None,
) -> int:
    """Checks this machine, for CONF when given; returns 0, or 1 when a check failed. Raises ConfigError.

    gpu: also run the engines on the GPUs (gpu_trial.py), as is done for a placement that has some.
    placement: what `torl plan --out` wrote; its ports and host names are checked too. report: a folder; the result is
    written there as `<node>.json` instead of being printed, with this node's address in that placement.
    """
    config = load_config(conf, overrides) if conf is not None else None
    placed = read_placement(placement) if placement is not None else None
    found = [*checks.machine_checks(), *checks.gpu_checks(placed)]
    on_gpus = placed is not None and placed.gpu != "cpu"
    if gpu or (on_gpus and all(check.level != "fail" for check in found)):
        found += checks.guarded("gpu", lambda: gpu_trial.trial(config))
    if report is None:  # a job's ranks say it themselves, seconds later
        found += checks.guarded("trainer", lambda: checks.trainer(config))
    if config is not None:
        found += checks.config_checks(config)
    if placed is not None:
        found += placement_checks(placed, this_node())
    failed = any(check.level == "fail" for check in found)
    if report is not None and placed is not None:
        write_report(report, placed, this_node(), found)
    elif json_output:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}, indent=1))
    else:
        print_checks({this_node(): found}, everything=True)
    return int(failed)


def collect(report: Path, file: Path) -> int:
    """Prints what is wrong on which node; 1 when anything failed or a node did not report. Else the nodes' addresses go into
    the placement of that file."""
    placement = read_placement(file)
    nodes = collected(report, placement)
    print_checks(nodes, everything=False)
    failed = any(check.level == "fail" for found in nodes.values() for check in found)
    if not failed:
        file.write_text(with_node_addresses(placement, report).to_json())
    return int(failed)


def print_checks(nodes: dict[str, list[Check]], *, everything: bool) -> None:
    """All checks of one machine, or only what is not well on many."""
    rows = [(node, check) for node, found in nodes.items() for check in found if everything or check.level != "ok"]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    if not rows:
        console.print(f"preflight: {len(nodes)} nodes, all well")
        return
    table = Table(box=None)
    for column in ("node", "check", "", "what"):
        table.add_column(column, overflow="fold")
    for node, check in rows:
        table.add_row(node, check.name, check.level.upper() if check.level != "ok" else "ok", check.detail)
    console.print(table)
    for line in summed_up([check for _, check in rows]):
        console.print(line, soft_wrap=True, markup=False)


def summed_up(checks: Sequence[Check]) -> list[str]:
    """How many are not well, and each cause with its remedy once, under the checks that it fails."""
    lines = []
    for level, verb in (("fail", "fail"), ("warn", "warn")):
        causes: dict[str, list[str]] = {}
        for check in checks:
            if check.level == level:
                causes.setdefault(check.detail, []).append(check.name)
        number = sum(map(len, causes.values()))
        if number:
            lines.append(f"{number} of {len(checks)} checks {verb}:")
            lines += [f"  {', '.join(dict.fromkeys(names))}: {detail}" for detail, names in causes.items()]
    return lines or [f"{len(checks)} checks, all well"]


def main() -> None:
    """python -m torl_mega.launch.doctor: the command line of `torl doctor` plus what the launch scripts need."""
    parser = argparse.ArgumentParser(prog="torl doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("conf", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--json", action="store_true", dest="json_output")
    parser.add_argument("--gpu", action="store_true", help="also run the engines on the GPUs, about a minute")
    parser.add_argument("--placement", type=Path, help="what `torl plan --out` wrote")
    parser.add_argument("--report", type=Path, help="folder for <node>.json instead of a table")
    parser.add_argument("--collect", type=Path, help="print the table of that folder's reports; needs --placement")
    args = parser.parse_intermixed_args()
    try:
        if args.collect is not None:
            code = collect(args.collect, args.placement)
        else:
            code = run(
                args.conf,
                args.overrides,
                json_output=args.json_output,
                gpu=args.gpu,
                placement=args.placement,
                report=args.report,
            )
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
