"""The doctor's checks of one machine, and of what a config needs on it: each yields what it found.

Contract: every check really looks (runs a snippet, writes a file, encodes a text) and none changes anything. A check that
raises is a failed check. Limits: bandwidth of NCCL is not measured; GPUs are seen through nvidia-smi, so only the check of
the trainer makes a CUDA context.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torl_mega.config import Config
from torl_mega.errors import TorlError
from torl_mega.launch import environments
from torl_mega.launch.commands import sglang_python
from torl_mega.launch.place import nvidia_smi
from torl_mega.planner.placement import Placement
from torl_mega.run.versions import version_of

Level = Literal["ok", "warn", "fail"]

NEEDED = ("torch", "megatron-core", "transformers", "pydantic")
OTHERS = ("sglang", "transformer-engine", "apex", "nvidia-modelopt")
PROBE_MB = 32
MIN_WRITE_MB_S = 20.0  # below it a checkpoint of a 7B takes an hour
MIN_SHM_GB = 1.0  # NCCL, Gloo and SGLang share memory there
MIN_OPEN_FILES = 4096
BUSY_GPU_MIB = 2000
SANDBOX_LIMIT_S = 90.0
ADDRESS_LIMIT_S = 5.0  # for a sandbox that runs already


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    level: Level
    detail: str


def judged(name: str, well: bool, detail: str, remedy: str = "", *, otherwise: Level = "fail") -> Check:
    """`detail`, and what to do about it where it is not well."""
    return Check(name, "ok", detail) if well else Check(name, otherwise, f"{detail}; {remedy}" if remedy else detail)


def guarded(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """All findings of a check; whatever it raises is its failure, so that one broken check hides no other."""
    found: list[Check] = []
    try:
        found.extend(check())
    except TorlError as exc:
        found.append(Check(name, "fail", str(exc)))
    except Exception as exc:  # the boundary of the doctor: a check that breaks is a finding, named as such
        found.append(Check(name, "fail", f"the check itself broke: {type(exc).__name__}: {exc}"))
    return found


def machine_checks() -> list[Check]:
    named = {"python": python, "packages": packages, "limits": limits, "network": network}
    return [found for name, check in named.items() for found in guarded(name, check)]


def gpu_checks(placement: Placement | None) -> list[Check]:
    wanted = placement is not None and placement.gpu != "cpu"
    found = guarded("gpus", lambda: gpus(wanted, placement.gpus_per_node if placement else 0))
    ready = wanted and all(check.level != "fail" for check in found)
    return [*found, *(guarded("environments", both_environments) if ready else ())]


def both_environments() -> Iterator[Check]:
    found, problems = environments.differences(sys.executable, sglang_python())
    yield from (Check("environments", "fail", text) for text in problems)
    if not problems:
        yield Check("environments", "ok", f"NCCL {found[sys.executable]['nccl']} in the trainer's and SGLang's")


def config_checks(config: Config) -> list[Check]:
    named = {"model": model, "tokenizer": tokenizer, "data": data, "run folder": run_folder, "sandbox": sandbox}
    return [found for name, check in named.items() for found in guarded(name, lambda check=check: check(config))]


# ------------------------------------------------------------------------------------------------- machine


def python() -> Iterator[Check]:
    detail = f"{platform.python_version()} at {sys.executable}"
    yield judged("python", sys.version_info >= (3, 11), detail, "need 3.11")


def packages() -> Iterator[Check]:
    versions = {name: version_of(name) for name in (*NEEDED, *OTHERS)}
    missing = [name for name in NEEDED if versions[name] is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield judged("packages", not missing, text, f"missing: {', '.join(missing)}")
    theirs = sglang_python()
    if theirs != sys.executable:
        yield judged("sglang", os.access(theirs, os.X_OK), f"runs on {theirs}", "that cannot be executed")
    elif versions["sglang"] is None:
        yield Check("sglang", "fail", "not installed, and TORL_SGLANG_PYTHON names no other environment that has it")


def limits() -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"raise it above {MIN_OPEN_FILES} with ulimit -n"
    yield judged("open files", hard >= MIN_OPEN_FILES, f"{soft} (hard {hard})", remedy, otherwise="warn")
    free_gb = shutil.disk_usage("/dev/shm").free / 1e9
    remedy = "in a container give it --shm-size or --ipc=host"
    yield judged("/dev/shm", free_gb >= MIN_SHM_GB, f"{free_gb:.1f} GB free", remedy)


def network() -> Iterator[Check]:
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


def gpus(wanted: bool, per_node: int) -> Iterator[Check]:
    rows = nvidia_smi("name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
    if not rows:
        detail = "no nvidia-smi, or it finds none"
        if wanted:
            yield Check("gpus", "fail", f"{detail}: the plan wants {per_node} GPUs here; see cluster.gpu")
        else:
            yield Check("gpus", "ok", f"{detail}; engines run on the CPU")
        return
    yield judged("gpus", len(rows) >= per_node, f"{len(rows)} x {rows[0][0]}", f"the plan wants {per_node}")
    for index, (_, _, used, ecc) in enumerate(rows):
        if int(used) > BUSY_GPU_MIB:
            yield Check("gpus", "fail", f"GPU {index} is in use ({used} MiB): another job's process is on it")
        if ecc.isdigit() and int(ecc) > 0:
            yield Check("gpus", "fail", f"GPU {index} has {ecc} uncorrected ECC errors: drain this node")
    for module, needed_for in (("transformer_engine", "training on a GPU"), ("apex", "fused weight gradients")):
        if importlib.util.find_spec(module) is None:
            level: Level = "fail" if module == "transformer_engine" and wanted else "warn"
            yield Check(module, level, f"not installed: needed for {needed_for}; use the image of the Dockerfile")


def trainer(config: Config | None) -> Iterator[Check]:
    """What a step would run with. Imports torch and Megatron, which takes seconds."""
    with warnings.catch_warnings():  # in which the engines say what is said here in order
        warnings.simplefilter("ignore")
        from torl_mega.trainer.precision import check_precision, report, this_machine

        found = report(config.trainer.layer_spec if config else "auto")
    profiles = ", ".join(found["usable_profiles"])
    yield Check("trainer", "ok", f"Adam: {found['optimizer']}, layers: {found['layer_spec']}, precision: {profiles}")
    if config is not None:
        check_precision(config.trainer.precision, this_machine())


# -------------------------------------------------------------------------------------------------- config


def model(config: Config) -> Iterator[Check]:
    from torl_mega.layout import describe_model, read_hf_config

    folder = Path(config.model.path)
    shape = describe_model(read_hf_config(folder))
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).exists())
        if missing:
            detail = f"{folder}: {len(missing)} of {len(named)} weight files are missing, e.g. {missing[0]}"
            yield Check("model", "fail", detail)
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
    millions = shape.num_parameters / 1e6
    yield Check("model", "ok", f"{shape.architecture}, {millions:,.1f} M parameters, {len(files)} file(s)")


def tokenizer(config: Config) -> Iterator[Check]:
    from torl_mega.data.tokenizer import Tokenizer
    from torl_mega.layout import read_hf_config

    ours = Tokenizer(config.model.path)
    ours.check_lossless()
    rows = int(read_hf_config(config.model.path)["vocab_size"])
    if ours.vocab_size > rows:
        detail = f"{config.model.path}: the tokenizer has {ours.vocab_size} tokens, the model only {rows} rows"
        yield Check("tokenizer", "fail", f"{detail}; they do not belong together")
        return
    yield Check("tokenizer", "ok", f"{ours.vocab_size} tokens in {rows} rows, lossless, EOS {ours.eos_id}")


def data(config: Config) -> Iterator[Check]:
    from torl_mega.data.problem_files import is_missing
    from torl_mega.data.prompts import PromptSource
    from torl_mega.data.tokenizer import Tokenizer
    from torl_mega.rollout.evaluate import absent_benchmarks
    from torl_mega.rollout.tools import tool_and_prompts

    if config.rollout.replay is not None:
        there = Path(config.rollout.replay, "trajectories").is_dir()
        yield judged("data", there, f"replay of {config.rollout.replay}", "not there")
        return
    tokenizer = Tokenizer(config.model.path)
    _, encode = tool_and_prompts(config, tokenizer)
    source = PromptSource(config.data, encode, seed=config.seed)
    source.next(1)
    missing = [name for name in config.eval.data if is_missing(name)]
    detail = f"{', '.join(config.data.specs)} and {len(config.eval.data)} benchmark(s)"
    may_be_left_out = missing == absent_benchmarks(config.eval) and len(missing) < len(config.eval.data)
    level: Level = "warn" if may_be_left_out else "fail"
    yield judged("data", not missing, detail, f"eval.data: {', '.join(missing)} not there", otherwise=level)


def run_folder(config: Config) -> Iterator[Check]:
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
        detail = f"{base}: {free / 1e9:.1f} GB free, {kept} checkpoints need {need / 1e9:.1f} GB"
        yield Check("disk", "fail", f"{detail}; free some, or lower checkpoint.keep_last")
    with tempfile.NamedTemporaryFile(dir=base, prefix=".torl-doctor-") as file:
        block = os.urandom(2**20)
        start = time.monotonic()
        for _ in range(PROBE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = PROBE_MB * 1.048576 / (time.monotonic() - start)
    detail = f"{base}: {free / 1e9:,.0f} GB free, writes {speed:,.0f} MB/s"
    yield judged("run folder", speed >= MIN_WRITE_MB_S, detail, otherwise="warn")


def sandbox(config: Config) -> Iterator[Check]:
    from torl_mega.sandbox.client import SandboxClient
    from torl_mega.sandbox.pool import SandboxPool

    if config.rollout.replay is not None:
        yield Check("sandbox", "ok", "not needed: replays recorded trajectories")
        return
    if (address := config.sandbox.address) is not None:

        async def answers() -> None:
            async with SandboxClient(address.split(","), start_timeout_s=ADDRESS_LIMIT_S):
                pass

        asyncio.run(answers())
        yield Check("sandbox", "ok", f"runs at {address}")
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
