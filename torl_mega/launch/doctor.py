"""`torl doctor`: is this machine, or each node of a job, ready for a run? Says what is wrong, where, and what to do.

    checks of one machine ─► list[Check] ─► table or JSON          (torl doctor [CONF])
                                └─► REPORT/<node>.json ─► one table of all nodes   (preflight: launch/common.sh)

Contract: every check really looks (runs a snippet, writes a file, binds a port, encodes a text) and none changes
anything. Exit code 1 when a check failed; warnings do not stop a job. A check that raises is a failed check.
Limits: bandwidth of NCCL is not measured; GPUs are seen through nvidia-smi only, so no CUDA context is made.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import TorlError
from torl_mega.launch import environments, local
from torl_mega.planner.placement import Placement, read_placement

Level = Literal["ok", "warn", "fail"]

PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "pydantic")
GPU_PACKAGES = ("transformer-engine", "apex", "nvidia-modelopt")
PROBE_MB = 32
MIN_WRITE_MB_S = 20.0  # below it a checkpoint of a 7B takes an hour
MIN_SHM_GB = 1.0  # NCCL, Gloo and SGLang share memory there
MIN_OPEN_FILES = 4096
BUSY_GPU_MIB = 2000
SANDBOX_LIMIT_S = 90.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    level: Level
    detail: str


def run(
    conf: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    json_output: bool = False,
    placement: Path | None = None,
    report: Path | None = None,
) -> int:
    """Checks this machine, for CONF when given; returns 0, or 1 when a check failed. Raises ConfigError.

    placement: what `torl plan --out` wrote; its ports and host names are checked too. report: a folder; the result is
    written there as `<node>.json` instead of being printed.
    """
    config = load_config(conf, overrides) if conf is not None else None
    plan = read_placement(placement) if placement is not None else None
    checks = [*machine_checks(), *gpu_checks(plan, config)]
    if config is not None:
        checks += config_checks(config)
    if plan is not None:
        checks += placement_checks(plan, this_node())
    failed = any(check.level == "fail" for check in checks)
    if report is not None:
        (report / f"{this_node()}.json").write_text(json.dumps([asdict(check) for check in checks]))
    elif json_output:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _print({this_node(): checks}, everything=True)
    return int(failed)


def collect(report: Path, plan: Placement) -> int:
    """Prints what is wrong on which node; 1 when anything failed or a node did not report."""
    nodes: dict[str, list[Check]] = {}
    for index, host in enumerate(plan.hosts):
        file = report / f"{host}.json"
        if file.exists():
            nodes[host] = [Check(**entry) for entry in json.loads(file.read_text())]
        else:
            log = report / f"{index}.log"
            said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
            nodes[host] = [Check("preflight", "fail", f"did not report: {said[0] if said else 'no output'}")]
    _print(nodes, everything=False)
    return int(any(check.level == "fail" for checks in nodes.values() for check in checks))


def this_node() -> str:
    """Slurm's name for this node, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


# -------------------------------------------------------------------------------------------------- checks


def machine_checks() -> list[Check]:
    return [
        *_guard("python", _python),
        *_guard("packages", _packages),
        *_guard("limits", _limits),
        *_guard("network", _network),
    ]


def gpu_checks(plan: Placement | None, config: Config | None) -> list[Check]:
    wanted = (plan.gpu if plan else config.cluster.gpu if config else "auto") != "cpu"
    per_node = plan.gpus_per_node if plan else 0
    checks = _guard("gpus", lambda: _gpus(wanted and (plan is not None), per_node))
    ready = wanted and plan is not None and all(check.level != "fail" for check in checks)
    return [*checks, *(_guard("environments", _environments) if ready else ())]


def config_checks(config: Config) -> list[Check]:
    return [
        *_guard("model", lambda: _model(config)),
        *_guard("tokenizer", lambda: _tokenizer(config)),
        *_guard("data", lambda: _data(config)),
        *_guard("run folder", lambda: _run_folder(config)),
        *_guard("sandbox", lambda: _sandbox(config)),
    ]


def placement_checks(plan: Placement, node: str) -> list[Check]:
    return [*_guard("host names", lambda: _hosts(plan)), *_guard("ports", lambda: _ports(plan, node))]


def _guard(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """All findings of a check; whatever it raises is its failure, so that one broken check hides no other."""
    found: list[Check] = []
    try:
        found.extend(check())
    except TorlError as exc:
        found.append(Check(name, "fail", str(exc)))
    except Exception as exc:  # the boundary of the doctor: a check that breaks is a finding, named as such
        found.append(Check(name, "fail", f"the check itself broke: {type(exc).__name__}: {exc}"))
    return found


def _python() -> Iterator[Check]:
    level: Level = "ok" if sys.version_info >= (3, 11) else "fail"
    yield Check(
        "python", level, f"{platform.python_version()} at {sys.executable}" + ("" if level == "ok" else "; need 3.11")
    )


def _packages() -> Iterator[Check]:
    versions = {name: _version(name) for name in (*PACKAGES, *GPU_PACKAGES)}
    missing = [name for name in ("torch", "megatron-core", "transformers", "pydantic") if versions[name] is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Check("packages", "fail" if missing else "ok", text + (f"; missing: {', '.join(missing)}" if missing else ""))
    if versions["sglang"] is None and not os.environ.get("TORL_SGLANG_PYTHON"):
        yield Check("sglang", "fail", "not installed, and TORL_SGLANG_PYTHON names no other environment that has it")
    python = os.environ.get("TORL_SGLANG_PYTHON")
    if python and not os.access(python, os.X_OK):
        yield Check("sglang", "fail", f"TORL_SGLANG_PYTHON = {python} cannot be executed")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _limits() -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = hard < MIN_OPEN_FILES
    detail = f"{soft} (hard {hard})" + (f"; raise it above {MIN_OPEN_FILES} with ulimit -n" if low else "")
    yield Check("open files", "warn" if low else "ok", detail)
    free_gb = shutil.disk_usage("/dev/shm").free / 1e9
    detail = f"{free_gb:.1f} GB free" + (
        "" if free_gb >= MIN_SHM_GB else "; in a container give it --shm-size or --ipc=host"
    )
    yield Check("/dev/shm", "ok" if free_gb >= MIN_SHM_GB else "fail", detail)


def _network() -> Iterator[Check]:
    active = [
        f"{port.parent.parent.parent.name}"
        for port in Path("/sys/class/infiniband").glob("*/ports/*/state")
        if "ACTIVE" in port.read_text()
    ]
    yield Check("InfiniBand/RoCE", "ok", f"{len(active)} active ports" if active else "none: NCCL would use TCP")
    wanted = os.environ.get("TORL_IFNAME")
    if wanted and not Path("/sys/class/net", wanted).exists():
        known = ", ".join(sorted(p.name for p in Path("/sys/class/net").iterdir()))
        yield Check("network interface", "fail", f"TORL_IFNAME = {wanted} is not here; this node has {known}")


def _gpus(wanted: bool, per_node: int) -> Iterator[Check]:
    if shutil.which("nvidia-smi") is None:
        if wanted:
            yield Check("gpus", "fail", f"no nvidia-smi: the plan wants {per_node} GPUs here; see cluster.gpu")
        else:
            yield Check("gpus", "ok", "none (no nvidia-smi); engines run on the CPU")
        return
    query = "--query-gpu=name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        yield Check(
            "gpus", "fail", f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}"
        )
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.strip().splitlines()]
    few = len(rows) < per_node
    text = f"{len(rows)} x {rows[0][0]}" if rows else "none"
    yield Check("gpus", "fail" if few else "ok", text + (f"; the plan wants {per_node}" if few else ""))
    for index, (_, _, used, ecc) in enumerate(rows):
        if int(used) > BUSY_GPU_MIB:
            yield Check("gpus", "fail", f"GPU {index} is in use ({used} MiB): another job's process is on it")
        if ecc.isdigit() and int(ecc) > 0:
            yield Check("gpus", "fail", f"GPU {index} has {ecc} uncorrected ECC errors: drain this node")
    for module, needed_for in (("transformer_engine", "training on a GPU"), ("apex", "fused weight gradients")):
        if importlib.util.find_spec(module) is None:
            level: Level = "fail" if module == "transformer_engine" and wanted else "warn"
            yield Check(module, level, f"not installed: needed for {needed_for}; use the image of the Dockerfile")


def _environments() -> Iterator[Check]:
    found, problems = environments.differences(sys.executable, local.sglang_python())
    yield from (Check("environments", "fail", text) for text in problems)
    if not problems:
        yield Check("environments", "ok", f"NCCL {found[sys.executable]['nccl']} in the trainer's and SGLang's")


def _model(config: Config) -> Iterator[Check]:
    from torl_mega.layout import describe_model, read_hf_config

    folder = Path(config.model.path)
    shape = describe_model(read_hf_config(folder))
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).exists())
        if missing:
            yield Check(
                "model", "fail", f"{folder}: {len(missing)} of {len(named)} weight files are missing, e.g. {missing[0]}"
            )
            return
    if not files:
        yield Check("model", "fail", f"{folder}: no *.safetensors there")
        return
    for file in files:
        with file.open("rb") as stream:  # unreadable by this user, or cut short by a full disk
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        end = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if file.stat().st_size != end:
            yield Check("model", "fail", f"{file}: {file.stat().st_size} bytes, its header says {end}; copy it again")
            return
    yield Check(
        "model", "ok", f"{shape.architecture}, {shape.num_parameters / 1e6:,.1f} M parameters, {len(files)} file(s)"
    )


def _tokenizer(config: Config) -> Iterator[Check]:
    from torl_mega.data.tokenizer import Tokenizer
    from torl_mega.layout import read_hf_config

    tokenizer = Tokenizer(config.model.path)
    tokenizer.check_lossless()
    rows = int(read_hf_config(config.model.path)["vocab_size"])
    if tokenizer.vocab_size > rows:
        yield Check(
            "tokenizer", "fail",
            f"{config.model.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows} rows; they do not "
            "belong together",
        )  # fmt: skip
        return
    yield Check("tokenizer", "ok", f"{tokenizer.vocab_size} tokens in {rows} rows, lossless, EOS {tokenizer.eos_id}")


def _data(config: Config) -> Iterator[Check]:
    from torl_mega.data.prompts import PromptSource
    from torl_mega.data.tokenizer import Tokenizer

    if config.rollout.replay is not None:
        there = Path(config.rollout.replay, "trajectories").is_dir()
        yield Check(
            "data", "ok" if there else "fail", f"replay of {config.rollout.replay}" + ("" if there else ": not there")
        )
        return
    source = PromptSource(config.data, Tokenizer(config.model.path).encode, seed=config.seed)
    source.next(1)
    missing = [name for name in config.eval.data if not name.startswith("arithmetic:") and not Path(name).exists()]
    if missing:
        yield Check("data", "fail", f"eval.data: {', '.join(missing)} not there")
    else:
        yield Check("data", "ok", f"{config.data.train} and {len(config.eval.data)} benchmark(s)")


def _run_folder(config: Config) -> Iterator[Check]:
    """Writable, with room for the checkpoints, and fast enough."""
    from torl_mega.layout import describe_model, read_hf_config

    folder = Path(config.runs_dir).resolve()
    base = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(base, os.W_OK):
        yield Check("run folder", "fail", f"runs_dir = {config.runs_dir}: {base} is not writable for uid {os.getuid()}")
        return
    params = describe_model(read_hf_config(config.model.path)).num_parameters
    kept = config.checkpoint.keep_last + 1  # one more while it is being written
    need = params * 14 * kept + (params * 2 if config.checkpoint.export_hf else 0)
    free = shutil.disk_usage(base).free
    if free < need:
        yield Check(
            "disk", "fail",
            f"{base}: {free / 1e9:.1f} GB free, {kept} checkpoints need {need / 1e9:.1f} GB; free some, or lower "
            "checkpoint.keep_last",
        )  # fmt: skip
    with tempfile.NamedTemporaryFile(dir=base, prefix=".torl-doctor-") as file:
        block = os.urandom(2**20)
        start = time.monotonic()
        for _ in range(PROBE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = PROBE_MB * 1.048576 / (time.monotonic() - start)
    slow = speed < MIN_WRITE_MB_S
    yield Check("run folder", "warn" if slow else "ok", f"{base}: {free / 1e9:,.0f} GB free, writes {speed:,.0f} MB/s")


def _sandbox(config: Config) -> Iterator[Check]:
    from torl_mega.sandbox.pool import SandboxPool

    if config.rollout.replay is not None:
        yield Check("sandbox", "ok", "not needed: replays recorded trajectories")
        return
    if config.sandbox.address is not None:
        yield Check("sandbox", "ok", f"runs at {config.sandbox.address}")
        return

    async def tier() -> str:
        async with SandboxPool(config.sandbox) as pool:  # starts zygotes and runs a snippet
            assert pool.setup is not None
            return f"tier {pool.setup.tier}: {', '.join(pool.setup.mechanisms)}"

    try:
        found = asyncio.run(asyncio.wait_for(tier(), SANDBOX_LIMIT_S))
    except TimeoutError:
        yield Check("sandbox", "fail", f"no snippet ran within {SANDBOX_LIMIT_S:g} s")
        return
    yield Check("sandbox", "warn" if found.startswith("tier C") else "ok", found)


def _hosts(plan: Placement) -> Iterator[Check]:
    unknown = []
    for host in plan.hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unknown.append(host)
    if unknown:
        yield Check("host names", "fail", f"{', '.join(unknown)} cannot be resolved here")
    else:
        yield Check("host names", "ok", f"{len(plan.hosts)} resolved")


def _ports(plan: Placement, node: str) -> Iterator[Check]:
    mine = {f"{p.role} {p.index}": p.port for p in plan.processes if p.host == node and p.port is not None}
    if node == plan.hosts[0]:
        mine["ranks"] = plan.master_port
    taken = [f"{port} ({name})" for name, port in mine.items() if not _bindable(port)]
    if taken:
        yield Check(
            "ports", "fail", f"taken on {node}: {', '.join(taken)}; another job of yours may still be ending there"
        )
    else:
        yield Check("ports", "ok", f"{len(mine)} free")


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


# ------------------------------------------------------------------------------------------------- output


def _print(nodes: dict[str, list[Check]], *, everything: bool) -> None:
    """All checks of one machine, or only what is not well on many."""
    rows = [
        (node, check)
        for node, checks in nodes.items()
        for check in checks
        if everything or check.level != "ok"
    ]  # fmt: skip
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


def main() -> None:
    """python -m torl_mega.launch.doctor: the command line of `torl doctor` plus what the launch scripts need."""
    parser = argparse.ArgumentParser(prog="torl doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("conf", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--json", action="store_true", dest="json_output")
    parser.add_argument("--placement", type=Path, help="what `torl plan --out` wrote")
    parser.add_argument("--report", type=Path, help="folder for <node>.json instead of a table")
    parser.add_argument("--collect", type=Path, help="print the table of that folder's reports; needs --placement")
    args = parser.parse_intermixed_args()
    try:
        if args.collect is not None:
            code = collect(args.collect, read_placement(args.placement))
        else:
            code = run(
                args.conf, args.overrides, json_output=args.json_output, placement=args.placement, report=args.report
            )
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
