"""One SGLang server as a program: its command line, its environment, and how to tell that it is up.

Contract: imports no sglang; the server is started as a process and spoken to over HTTP. serve.py keeps one running.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from torl_mega.config import Config
from torl_mega.errors import ServerError
from torl_mega.process.start import GuardedProcess, port_in_use, tail
from torl_mega.serving.fp8_format import QUANTIZATION_CONFIG

CONTEXT_SLACK = 8
"""SGLang 0.5.23 refuses prompts of context - 6 tokens and clips prompt + answer at context - 2 (tp_worker.py)."""
POLL_S = 0.2
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")  # SGLang's warm-up would ask one for the server itself
ON_CPU = (
    "--device", "cpu",
    "--sleep-on-idle",  # else an idle scheduler polls without pause and takes a whole core away from the trainer
    "--disable-overlap-schedule",  # there is no GPU to overlap with, and every answer would decode one token too many
    "--prefill-decode-interval", "4",  # answers of the tool come one by one; a prefill for each would stop all others
    "--prefill-decode-interval-min-bs", "1",
    "--scheduler-recv-interval", "4",  # steps between looks at the sockets
    "--gc-threshold", "100000", "50", "100",
    "--skip-server-warmup",  # waits a second and compiles nothing here
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Room:
    """What the plan gives a server on its GPUs."""

    kv_tokens: int | None = None  # most tokens of its KV cache; None = serving.max_total_tokens
    mem_fraction: float | None = None  # SGLang's mem-fraction-static; None = serving.mem_fraction
    in_turns: bool = False  # it must be able to let go of its memory


PLAIN = Room()


def launch_command(config: Config, *, host: str, port: int, on_gpu: bool, room: Room = PLAIN) -> list[str]:
    """`sglang.launch_server` for the policy. Raises ServerError when the model cannot serve the context it needs."""
    serving = config.serving
    context = config.max_context_tokens + CONTEXT_SLACK
    _check_context(Path(config.model.path), config.max_context_tokens)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", config.model.path, "--host", host]
    command += ["--port", str(port), "--dtype", config.model.dtype, "--tp-size", str(serving.tensor)]
    if serving.expert > 1:
        command += ["--ep-size", str(serving.expert)]
    # left to itself SGLang draws one, perhaps one that another server here will listen on once it has loaded
    command += ["--nccl-port", str(ranks_port(port))]
    # servers of one run must not draw the same numbers, or a group spread over two of them repeats itself
    command += ["--random-seed", str(config.seed + port)]
    command += ["--context-length", str(context), "--log-level-http", "warning"]
    if config.model.fp32_head:
        command += ["--enable-fp32-lm-head"]
    if config.algo.router_replay == "rollout":
        command += ["--enable-return-routed-experts"]
        if on_gpu:  # what 0.5.23 takes by itself on Blackwell routes inside its kernel and tells zeros
            command += ["--moe-runner-backend", "triton"]
    if serving.weight_dtype == "fp8_block":
        command += _fp8_arguments(on_gpu=on_gpu)
    if (tokens := room.kv_tokens or serving.max_total_tokens) is not None:
        command += ["--max-total-tokens", str(max(tokens, context))]
    running = 1 if serving.deterministic and not on_gpu else serving.max_running_requests
    if running is not None:
        command += ["--max-running-requests", str(running)]
    if serving.deterministic and on_gpu:
        command += ["--enable-deterministic-inference"]
    if not serving.prefix_cache or (serving.deterministic and not on_gpu):
        command += ["--disable-radix-cache"]
    command += ["--mem-fraction-static", str(room.mem_fraction or serving.mem_fraction)] if on_gpu else ON_CPU
    if room.in_turns and on_gpu:  # without GPUs plugin/sleep.py does it
        command += ["--enable-memory-saver"]
    return [*command, *serving.extra_args]


def launch_env(config: Config, *, gpu_ids: Sequence[int], base: dict[str, str] | None = None) -> dict[str, str]:
    """The server's environment: ours (or `base`) without what belongs to a trainer rank; no `gpu_ids` means the CPU."""
    env = dict(os.environ if base is None else base)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SGLANG_USE_CPU_ENGINE", *PROXIES):
        env.pop(name, None)
    env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for CONTEXT_SLACK; _check_context refuses more
    env["TORL_SYNC_TIMEOUT_S"] = str(config.serving.sync_timeout_s)
    if gpu_ids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpu_ids))
        env["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # NVIDIA's image asks for TF32 where a model says fp32
        if config.cluster.placement == "colocated":  # ranks hold memory of these GPUs, not all of them alike
            env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"  # distributed/bootstrap.py:449 of 0.5.23
        return env
    env.setdefault("OMP_NUM_THREADS", "1")
    # the seeded sampler is decorated with torch.compile; on a CPU it runs eagerly
    env.setdefault("TORCHDYNAMO_DISABLE", "1")
    # --scheduler-recv-interval is for busy schedulers; an idle one looks at its sockets at once
    env.setdefault("SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_NONE", "1000")
    # by default glibc maps and unmaps every large block anew, which costs more than copying a weight bucket
    env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
    env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
    if config.serving.tensor > 1:  # SGLang insists on a NUMA map otherwise
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(config.serving.tensor))
        env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
    return env


def _fp8_arguments(*, on_gpu: bool) -> list[str]:
    """Loads a model of block-wise FP8 with dummy weights until the first sync: what lies at `model.path` has no scales."""
    if not on_gpu:
        raise ServerError("serving.weight_dtype = fp8_block needs GPUs: SGLang has no FP8 kernels for CPUs; take model")
    override = json.dumps({"quantization_config": QUANTIZATION_CONFIG})
    return ["--json-model-override-args", override, "--load-format", "dummy"]


def _check_context(model_path: Path, needed: int) -> None:
    try:
        tree: dict[str, Any] = json.loads((model_path / "config.json").read_text())
    except FileNotFoundError:
        raise ServerError(f"model.path = {model_path}: no config.json there; give a folder in HF layout") from None
    _check_rope(model_path, tree.get("rope_scaling") or tree.get("rope_parameters") or {})
    most = tree.get("max_position_embeddings")
    if most is not None and needed > most:
        raise ServerError(
            f"the longest prompt (data.max_prompt_tokens, eval.max_prompt_tokens) + rollout.max_response_tokens = {needed} "
            f"tokens, but {model_path} has max_position_embeddings {most}; lower one of them"
        )


def _check_rope(model_path: Path, rope: dict[str, Any]) -> None:
    """SGLang 0.5.23 has no `attention_factor` (layers/rotary_embedding/factory.py): it computes yarn's own."""
    given, scale = rope.get("attention_factor"), rope.get("factor")
    if given is None or not scale:
        return
    pair = [float(rope.get(name) or 0.0) for name in ("mscale", "mscale_all_dim")]
    of, over = (0.1 * weight * math.log(scale) + 1 for weight in (pair if all(pair) else (1.0, 0.0)))
    if abs(given - of / over) > 1e-6:
        raise ServerError(
            f"model.path = {model_path}: config.json has attention_factor = {given}, which SGLang leaves out: it takes "
            f"{of / over:.6g}, and would sample from another model than is trained; serve a model without it"
        )


def ranks_port(port: int) -> int:
    """Where the ranks of the server at `port` meet."""
    return port + 1


def check_port(host: str, port: int) -> None:
    """Raises ServerError when `host:port` is taken."""
    if port_in_use(host, port):
        raise ServerError(f"port {port} on {host} is in use; stop what listens there or choose another --port")


async def wait_ready(
    url: str, timeout_s: float, *, process: GuardedProcess | None = None, log_path: Path | None = None
) -> None:
    """Returns at the first 200 of `/ready`. Raises ServerError, with the end of the log, when the process dies or
    `timeout_s` passes first."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if process is not None and (code := process.poll()) is not None:
                raise ServerError(f"server {url} died while starting (exit code {code}){_log_end(log_path)}")
            if await is_ready(session, url):
                return
            if loop.time() > deadline:
                raise ServerError(f"server {url} was not ready after {timeout_s:g} s{_log_end(log_path)}")
            await asyncio.sleep(POLL_S)


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the server answers `/ready` with 200; False while it starts or is gone."""
    try:
        async with session.get(f"{url}/ready") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _log_end(log_path: Path | None) -> str:
    if log_path is None:
        return ""
    return f"; the end of {log_path}:\n{tail(log_path, 15)}"
