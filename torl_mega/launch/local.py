"""`torl train` on one machine: side-cars and ranks, started together, watched, and ended together.

    launcher ─┬─ sandbox side-car     (torl_mega.sandbox.serve)
              ├─ server side-cars     (torl_mega.serving.serve, one SGLang server each)
              └─ ranks 0 … N-1        (torl_mega.train)

The launcher imports no engine. Every child dies with its whole tree when the launcher dies, even by SIGKILL (see
`process.py`). A side-car that a signal ended is started again in its place, however that one ends. One that ends by itself
before has said why, and the run ends with it. On a cluster srun takes this place; the ranks and side-cars are the same
programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torl_mega.config import Config
from torl_mega.errors import CheckpointError, ConfigError, DataError, ServerError, TorlError
from torl_mega.layout import check_layout, read_hf_config
from torl_mega.process import start as process
from torl_mega.process.start import GuardedProcess
from torl_mega.run.folder import RunFolder, is_complete, lock_run, open_run
from torl_mega.serving.fp8_format import check_fp8_serving

POLL_S = 0.2
GRACE_S = 60.0  # for ranks that were told to stop: finish or drop the step, write a checkpoint
MAX_RESTARTS = 20  # of one side-car in one run
STOP_S = 5.0  # for side-cars and ranks that are ended because the run is over
EXIT_REQUEUE = 85
# threads that spin while they wait take the cores from servers and sandbox, in a rank's first step for seconds
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(slots=True)
class SideCar:
    name: str
    command: Sequence[str]
    log_path: Path
    process: GuardedProcess
    num_restarts: int = 0

    @classmethod
    def start(cls, name: str, command: Sequence[str], log_path: Path) -> SideCar:
        return cls(name, command, log_path, process.start(command, name=name, log_path=log_path))

    def keep_up(self) -> None:
        """Starts it again when a signal ended it, now or before. Raises ServerError when it ended by itself, or too
        often."""
        code = self.process.poll()
        if code is None:
            return
        if (code >= 0 and not self.num_restarts) or self.num_restarts == MAX_RESTARTS:
            last = process.tail(self.log_path, 1) or "no output"
            raise ServerError(f"{self.name} ended with code {code}: {last} (log: {self.log_path})")
        self.num_restarts += 1
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"torl: {self.name} {cause}; starting it again", file=sys.stderr)
        self.process = process.start(self.command, name=self.name, log_path=self.log_path)

    def stop(self) -> None:
        self.process.stop(STOP_S)


def train(config: Config, config_args: Sequence[str]) -> int:
    """Runs the whole job; returns rank 0's exit code. `config_args`: CONF and overrides as given."""
    with _held(config) as folder:
        if is_complete(folder, config):
            print(f"{folder.path} is complete ({config.num_steps} steps): {folder.summary}; raise num_steps to go on")
            return 0
        return _train(config, config_args, folder)


def _train(config: Config, config_args: Sequence[str], folder: RunFolder) -> int:
    with _sidecars(config, config_args, folder) as (sidecars, env):
        stop = _StopSignal()
        ranks = _ranks(config, config_args, folder, env)
        try:
            return _watch(ranks, sidecars, stop, folder)
        finally:
            for rank in ranks:
                rank.stop(STOP_S)


def check_inputs(config: Config) -> None:
    """Raises TorlError for a model, layout or data file that cannot work; opens no big file."""
    hf_config = read_hf_config(config.model.path)
    problems = check_layout(hf_config, config.parallel, config.parallel.world_size)
    problems = problems or check_fp8_serving(hf_config, config)
    if problems:
        raise ConfigError("; ".join(problems))
    for setting, spec in [("data.train", config.data.train), *(("eval.data", s) for s in config.eval.data)]:
        if not spec.startswith("arithmetic:") and not Path(spec).exists():
            raise DataError(f"{setting} = {spec!r} is not there; give a parquet or jsonl file, or arithmetic:SEED")


def with_servers(config: Config, config_args: Sequence[str], program: Callable[[Config, RunFolder], int]) -> int:
    """Runs `program` in this process beside a sandbox and servers of its own, without a trainer (`torl eval`).
    `model.path` may also be a Megatron checkpoint of a run."""
    if config.serving.weight_dtype != "model":
        raise ConfigError(
            f"serving.weight_dtype = {config.serving.weight_dtype} needs a trainer that sends the weights; without one the "
            "servers serve model.path as it is: add serving.weight_dtype=model"
        )
    if (Path(config.model.path) / "manifest.json").is_file():
        hf = _converted(config)
        config_args = [*config_args, f"model.path={hf}"]
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(hf)})})
    with _held(config) as folder, _sidecars(config, config_args, folder) as (_, env):
        os.environ.update(env)
        return program(config, folder)


def _converted(config: Config) -> Path:
    """The checkpoint as an HF folder inside this run's own, with the tokenizer of the run it belongs to."""
    checkpoint = Path(config.model.path).resolve()
    owner = checkpoint.parents[1] / "config.json"
    if not owner.is_file():
        raise ConfigError(
            f"model.path = {checkpoint} is a Megatron checkpoint outside a run folder, so its tokenizer is unknown; "
            f"convert it with tools/convert_megatron_to_hf.py --tokenizer DIR"
        )
    tokenizer = json.loads(owner.read_text())["config"]["model"]["path"]
    out = RunFolder.of(config).path / f"{checkpoint.parents[1].name}_{checkpoint.name}_hf"
    if not out.exists():
        command = [
            sys.executable,
            "-m",
            "torl_mega.trainer.weights.export",
            "--checkpoint",
            str(checkpoint),
            "--out",
            str(out),
        ]
        done = subprocess.run([*command, "--tokenizer", tokenizer], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CheckpointError(f"{checkpoint} could not be converted: {last.removeprefix('error: ')}")
    return out


@contextlib.contextmanager
def _held(config: Config) -> Iterator[RunFolder]:
    """The run's folder, after everything that can be known wrong before anything is started."""
    check_inputs(config)
    folder = open_run(config)
    lock = lock_run(folder)
    try:
        yield folder
    finally:
        os.close(lock)


@contextlib.contextmanager
def _sidecars(
    config: Config, config_args: Sequence[str], folder: RunFolder
) -> Iterator[tuple[list[SideCar], dict[str, str]]]:
    """Sandbox and servers, and the environment that tells a rank where they are. Nothing when a recording is replayed."""
    if config.rollout.replay is not None:
        yield [], {}
        return
    with tempfile.TemporaryDirectory(prefix="torl-") as scratch:
        started: list[SideCar] = []
        try:
            sandbox, sandbox_address = _sandbox(config, folder, Path(scratch))
            started += sandbox
            servers, urls = _servers(config, config_args, folder)
            started += servers
            yield started, {"TORL_SANDBOX": sandbox_address, "TORL_SERVERS": urls}
        finally:
            for child in started:
                child.stop()


def _sandbox(config: Config, folder: RunFolder, scratch: Path) -> tuple[list[SideCar], str]:
    if config.sandbox.address is not None:
        return [], config.sandbox.address
    socket_path = scratch / "sandbox.sock"
    command = [sys.executable, "-m", "torl_mega.sandbox.serve", "--socket", str(socket_path), "--own-folder"]
    command += ["--settings", config.sandbox.model_dump_json()]
    return [SideCar.start("sandbox", command, _log(folder, "sandbox"))], f"unix:{socket_path}"


def _servers(config: Config, config_args: Sequence[str], folder: RunFolder) -> tuple[list[SideCar], str]:
    if config.serving.urls:
        return [], ",".join(config.serving.urls)
    started, urls = [], []
    for index in range(config.serving.num_servers):
        port = process.free_port()
        command = [_sglang_python(), "-m", "torl_mega.serving.serve", *config_args, "--port", str(port)]
        command += ["--log", str(folder.logs / f"sglang_{index}.log")]
        name = f"server_{index}"
        started.append(SideCar.start(name, command, _log(folder, name)))
        urls.append(f"http://127.0.0.1:{port}")
    return started, ",".join(urls)


def _sglang_python() -> str:
    """On GPUs SGLang's torch is not the trainer's, so it lives in an environment of its own, inside ours or named."""
    beside = Path(sys.prefix) / "sglang" / "bin" / "python"
    return os.environ.get("TORL_SGLANG_PYTHON") or str(beside if beside.exists() else sys.executable)


def _ranks(config: Config, config_args: Sequence[str], folder: RunFolder, env: dict[str, str]) -> list[GuardedProcess]:
    world_size = config.parallel.world_size
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(process.free_port()),
        **env,
    }
    command = [sys.executable, "-m", "torl_mega.train", *config_args]
    return [
        process.start(
            command,
            name=f"rank_{rank}",
            log_path=_log(folder, f"rank_{rank}") if rank else None,  # rank 0 speaks for the run
            env={**WAITING, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]


def _watch(ranks: Sequence[GuardedProcess], sidecars: Sequence[SideCar], stop: _StopSignal, folder: RunFolder) -> int:
    """Until all ranks ended well, or the first of anything ended badly, or a signal said stop."""
    deadline: float | None = None
    while True:
        codes = [r.poll() for r in ranks]
        if all(code is not None for code in codes):
            return next((c for c in codes if c), 0) or 0
        for rank, code in zip(ranks, codes, strict=True):
            if code not in (None, 0, EXIT_REQUEUE):
                return _rank_failed(rank, code, folder)
        for sidecar in sidecars:
            sidecar.keep_up()
        if stop.requested and deadline is None:
            deadline = time.monotonic() + GRACE_S
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    os.kill(rank.pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            raise TorlError(f"the ranks did not stop within {GRACE_S:g} s after {stop.requested}; killed")
        stop.wait(POLL_S)


def _rank_failed(rank: GuardedProcess, code: int, folder: RunFolder) -> int:
    if code < 0:
        raise TorlError(f"{rank.name} was killed by {signal.Signals(-code).name}; run the same command to resume")
    log = _log(folder, rank.name)
    if log.exists():  # rank 0 has spoken already
        print(f"torl: {rank.name} failed: {process.tail(log, 1)} (log: {log})", file=sys.stderr)
    return code


def _log(folder: RunFolder, name: str) -> Path:
    return folder.logs / f"{name}.log"


class _StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a flag that wakes the watcher at once."""

    def __init__(self) -> None:
        self.requested = ""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on)

    def _on(self, number: int, _frame: object) -> None:
        self.requested = signal.Signals(number).name
        os.write(self._write, b"x")

    def wait(self, timeout_s: float) -> None:
        if select.select([self._read], [], [], timeout_s)[0]:
            os.read(self._read, 64)
