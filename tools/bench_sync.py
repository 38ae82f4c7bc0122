"""How fast a verified weight sync is, against a bare broadcast of the same tensors over the same wire.

    python tools/bench_sync.py [--megabytes 2048] [--bucket-mb 512] [--repeat 3] [--json]
    python tools/bench_sync.py --experts 128 --bucket-mb 16     as many names as Qwen3-30B-A3B has, of a few kilobytes each
    python tools/bench_sync.py --pairs 4 [...]      4 servers, each beside a rank: every rank hands over, or rank 0 alone

Makes a random Qwen2 of about the asked size, serves it with the real SGLang on this machine, and times `update` of all
its weights: hashing, broadcast, loading into the fused parameters, hashing on the server, comparing. The yardstick moves
the same tensors, one by one, between two processes of a gloo group: nothing is loaded, nothing is checked.
Reports bytes/s of both, their ratio, and the sender's largest extra memory in units of a bucket. CPU and loopback only.
With --pairs both ways take turns in the same processes, checks included; rank 0 alone sends the bytes, ranks beside a server share
their memory with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.process.start import free_port
from torl_mega.process.start import start as start_process
from torl_mega.serving.sglang_server import launch_command, launch_env, wait_ready
from torl_mega.serving.sync.weights import make_owner_sink, make_weight_sink

REPO = Path(__file__).parents[1]
PEER = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
sizes = [int(s) for s in sys.stdin.readline().split()]
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
tensors = [torch.empty(s, dtype=torch.uint8) for s in sizes]
for _ in range(int(sys.argv[2])):
    dist.barrier()
    for tensor in tensors:
        dist.broadcast(tensor, 0)
    dist.barrier()
"""


def make_model(folder: Path, megabytes: int) -> dict[str, torch.Tensor]:
    """A random fp32 Qwen2 with the shapes of a real one: hidden 1024, a large vocabulary, as many layers as it takes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layer = 4 * (1024 * 1024 * 2 + 2 * 1024 * 256 + 3 * 1024 * 2816) / 2**20
    vocabulary = 16384
    layers = max(1, round((megabytes - 2 * 4 * 1024 * vocabulary / 2**20) / layer))
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def make_experts(folder: Path, experts: int) -> dict[str, torch.Tensor]:
    """A random fp32 Qwen3-MoE of 48 layers of tiny experts, by the names of its checkpoint."""
    from safetensors.torch import load_file
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": experts,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "num_hidden_layers": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": 0, "dtype": "float32",
    }  # fmt: skip
    config = Qwen3MoeConfig(**sizes)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def bare_broadcast(weights: dict[str, torch.Tensor], repeat: int) -> list[float]:
    """Seconds of each repetition."""
    address = f"tcp://127.0.0.1:{free_port()}"
    peer = subprocess.Popen([sys.executable, "-c", PEER, address, str(repeat)], stdin=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    peer.stdin.write(" ".join(str(w.nbytes) for w in weights.values()) + "\n")
    peer.stdin.flush()
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=2)
    flat = [weight.contiguous().view(-1).view(torch.uint8) for weight in weights.values()]
    times = []
    for _ in range(repeat):
        dist.barrier()
        begun = time.perf_counter()
        for tensor in flat:
            dist.broadcast(tensor, 0)
        dist.barrier()
        times.append(time.perf_counter() - begun)
    dist.destroy_process_group()
    peer.wait()
    return times


class PeakMemory:
    """Largest resident memory of this process while it is entered, above what it was at the start, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._me = psutil.Process()
        self._base = self._me.memory_info().rss
        self.extra = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.extra = max(self.extra, self._me.memory_info().rss - self._base)

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()


def make_config(folder: Path, bucket_mb: int) -> Config:
    return load_config(
        REPO / "conf" / "base.yaml",
        [
            "name=bench", f"model.path={folder}", "model.dtype=float32", "data.max_prompt_tokens=32",
            "rollout.max_response_tokens=32", f"serving.bucket_mb={bucket_mb}", "serving.max_total_tokens=1024",
            "serving.extra_args=[--skip-tokenizer-init]",
        ],
    )  # fmt: skip


@contextlib.contextmanager
def serve(config: Config, folder: Path, number: int) -> Iterator[list[str]]:
    """URLs of this many servers of the model."""
    with contextlib.ExitStack() as stack:
        started = []
        for port in [free_port() for _ in range(number)]:
            command = launch_command(config, host="127.0.0.1", port=port, on_gpu=False)
            log, env = folder / f"server_{port}.log", launch_env(config, gpu_ids=())
            server = stack.enter_context(start_process(command, name="sglang", log_path=log, env=env))
            started.append((f"http://127.0.0.1:{port}", server, log))
        for url, server, log in started:
            asyncio.run(wait_ready(url, 300, process=server, log_path=log))
        yield [url for url, _, _ in started]


def synced(folder: Path, weights: dict[str, torch.Tensor], bucket_mb: int, repeat: int) -> tuple[list[Any], int]:
    """Statistics of each sync, after one that sets up the group, and the sender's largest extra memory."""
    config = make_config(folder, bucket_mb)
    with serve(config, folder, 1) as urls:
        sink = make_weight_sink(config.serving, urls)
        sink.update(iter(weights.items()), version=0)
        with PeakMemory() as memory:
            stats = [sink.update(iter(weights.items()), version=1 + n) for n in range(repeat)]
    return stats, memory.extra


def colocated(folder: Path, pairs: int, bucket_mb: int, repeat: int) -> dict[str, Any]:
    """Seconds of each sync into `pairs` servers by rank 0 alone and by the ranks beside them, in turns."""
    with serve(make_config(folder, bucket_mb), folder, pairs) as urls:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(pairs)}
        command = [sys.executable, __file__, "--as-rank-of", str(folder), "--bucket-mb", str(bucket_mb)]
        command += ["--repeat", str(repeat), "--urls", *urls]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **address, "RANK": str(n)}, stdout=subprocess.PIPE, text=True)
            for n in range(pairs)
        ]
        said = [rank.communicate()[0] for rank in ranks]
    return json.loads(said[0])


def run_as_rank(folder: Path, urls: list[str], bucket_mb: int, repeat: int) -> None:
    from safetensors.torch import load_file

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    weights = {name: w if rank == 0 else w.to("meta") for name, w in load_file(folder / "model.safetensors").items()}
    serving = make_config(folder, bucket_mb).serving.model_copy(update={"transport": "handles"})
    beside = {url: (n,) for n, url in enumerate(urls)}
    alone = make_weight_sink(serving, urls)
    together = make_owner_sink(serving, rank, owners=beside) if rank else make_weight_sink(serving, urls, owners=beside)
    assert together is not None
    found: dict[str, list[float]] = {"alone_s": [], "together_s": []}
    for version in range(repeat + 1):
        for name, sink in (("alone_s", None if rank else alone), ("together_s", together)):
            dist.barrier()
            stats = sink.update(iter(weights.items()), version=version) if sink else {}
            if rank == 0 and version:  # the first connects, and learns which slices the servers hold
                found[name].append(stats["sync_s"])
    if rank == 0:
        best = min(found["alone_s"]) / min(found["together_s"])
        print(json.dumps({"bytes": sum(w.nbytes for w in weights.values()), **found, "faster": best}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=0, help="of each of 48 layers, in the place of a dense model")
    parser.add_argument("--bucket-mb", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", type=int, default=0, help="servers with a trainer rank beside each")
    parser.add_argument("--as-rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--urls", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.as_rank_of:
        run_as_rank(args.as_rank_of, args.urls, args.bucket_mb, args.repeat)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = make_experts(folder, args.experts) if args.experts else make_model(folder, args.megabytes)
        if args.pairs:
            del weights
            print(json.dumps(colocated(Path(temporary), args.pairs, args.bucket_mb, args.repeat)))
            return
        num_bytes = sum(w.nbytes for w in weights.values())
        before = bare_broadcast(weights, args.repeat)
        stats, extra = synced(Path(temporary), weights, args.bucket_mb, args.repeat)
        bare = min(before + bare_broadcast(weights, args.repeat))  # both sides of the sync: the machine's mood drifts
    best = min(stats, key=lambda s: s["sync_s"])
    report = {
        "bytes": num_bytes,
        "tensors": len(weights),
        "bucket_mb": args.bucket_mb,
        "bare_gib_per_s": num_bytes / bare / 2**30,
        "sync_gib_per_s": num_bytes / best["sync_s"] / 2**30,
        "ratio": bare / best["sync_s"],
        "verify_s": best["verify_s"],
        "sync_s": [s["sync_s"] for s in stats],
        "extra_memory_in_buckets": extra / (args.bucket_mb * 2**20),
    }
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:>24}  {value:.3f}" if isinstance(value, float) else f"{name:>24}  {value}")


if __name__ == "__main__":
    main()
