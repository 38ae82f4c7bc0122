"""The pieces of `make gpu-evidence`, each a process of its own: prints one JSON object of what it measured.

    python tools/gpu_pieces.py PIECE [--cpu]

--cpu runs the same lines on a CPU with small sizes, which is how the tests run them. What needs only torch and Megatron comes
first; `doctor`, `trainer_te`, `weight_sync`, `quickstart` and `first_steps` need Transformer Engine or SGLang and end with their
own words where these are absent.
"""

# the tests' models and layouts are found by the path that is added below
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/parallel")]
GIB = 2**30
PROFILES = ("default", "fp8_hybrid_delayed", "fp8_current", "fp8_blockwise", "mxfp8")
Result = dict[str, Any]


class Bench:
    """Where a piece runs, and its sizes: full on a GPU, small on a CPU."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.device = torch.device("cpu" if cpu else "cuda")

    def size(self, full: int, small: int) -> int:
        return small if self.cpu else full

    def wait(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def seconds(self, what: Callable[[], Any], times: int = 3) -> float:
        """The fastest of `times` runs, after one that does not count."""
        taken = []
        for _ in range(times + 1):
            self.wait()
            begun = time.perf_counter()
            what()
            self.wait()
            taken.append(time.perf_counter() - begun)
        return round(min(taken[1:]), 5)

    def peak_gib(self, what: Callable[[], Any]) -> float:
        """Device memory that `what` adds at its highest."""
        if self.cpu:
            what()
            return 0.0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        what()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)


def machine(bench: Bench) -> Result:
    """What is there."""
    smi = shutil.which("nvidia-smi")
    seen = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout if smi else ""
    found: Result = {"gpus": seen.splitlines(), "shm_gib": round(shutil.disk_usage("/dev/shm").total / GIB, 1)}
    if not bench.cpu:
        from torch.cuda import nccl

        found |= {"nccl": list(nccl.version()), "memory_gib": round(torch.cuda.mem_get_info()[1] / GIB, 2)}
    return found


def checksums(bench: Bench) -> Result:
    """The GPU's checksum is the CPU's sum, and how long one over a 7B takes (15 GB of its largest matrices)."""
    from torl_mega.serving.plugin.checksum import checksums, word_sum

    sample = torch.randint(0, 255, (1_000_003,), dtype=torch.uint8)
    count, rows = bench.size(112, 3), bench.size(18944, 100)
    weights = [torch.randn(rows, 3584, device=bench.device).bfloat16() for _ in range(count)]
    total = sum(w.nbytes for w in weights)
    kind = bench.device.type
    return {
        "equal_on_both": word_sum(sample) == word_sum(sample.to(bench.device)),
        "gib": round(total / GIB, 2),
        "seconds": bench.seconds(lambda: checksums(weights, kind)),
    }


def head(bench: Bench) -> Result:
    """The chunked head of a 7B on 8,192 rows beside log_softmax in fp32, and the planner's word for its memory."""
    from torl_mega.config_file import load_config
    from torl_mega.layout import describe_model
    from torl_mega.planner.hardware import Assumptions
    from torl_mega.planner.known_models import KNOWN
    from torl_mega.planner.memory import trainer_memory
    from torl_mega.trainer.vocab_parallel import _LogProbEntropy

    with one_rank():
        hidden_size, vocab = bench.size(3584, 64), bench.size(152064, 1000)
        rows, chunk = bench.size(8192, 96), bench.size(2048, 32)
        hidden = torch.randn(rows, hidden_size, device=bench.device).bfloat16().requires_grad_()
        weight = (torch.randn(vocab, hidden_size, device=bench.device) / hidden_size**0.5).bfloat16().requires_grad_()
        targets = torch.randint(0, vocab, (rows,), device=bench.device)

        def run() -> torch.Tensor:
            logprobs, _ = _LogProbEntropy.apply(hidden, weight, targets, dist.group.WORLD, vocab, 1.0, chunk, False)  # type: ignore[misc]
            hidden.grad = weight.grad = None
            logprobs.sum().backward()
            return logprobs.detach()

        found, few = run(), slice(0, min(rows, 256))
        logits = (hidden[few].detach() @ weight.detach().T).float()
        wanted = logits.log_softmax(-1).gather(-1, targets[few, None]).squeeze(-1)
        conf = ["parallel.tensor=1", "parallel.sequence=false", f"trainer.logprob_chunk_tokens={chunk}"]
        shape, config = describe_model(KNOWN["Qwen2.5-Math-7B"]), load_config(ROOT / "conf/torl_7b.yaml", conf)
        plan = trainer_memory(shape, config, 8, 1235.0, Assumptions(), on_cpu=False)
        return {
            "largest_difference": float((found[few] - wanted).abs().max()),
            "seconds": bench.seconds(run),
            "peak_gib": bench.peak_gib(run),
            "planned_gib": round(plan.working / GIB, 3),
        }


def step_against_hf(bench: Bench) -> Result:
    """One step with Megatron's own layers against HF in bf16 (tests/gpu/gpu_worker.py)."""
    import hf_reference as ref

    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model", Path(folder) / "out.json"
        made = ref.make_model(
            "qwen2", tied=False, dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, vocab_size=512
        )
        ref.save_model(made, model)
        command = [sys.executable, "tests/gpu/gpu_worker.py", str(model), str(out), "trainer.layer_spec=local"]
        ended(command, {"CUDA_VISIBLE_DEVICES": ""} if bench.cpu else {})
        return json.loads(out.read_text())


def step_1_5b(bench: Bench) -> Result:
    """Forward, backward and update of a 1.5B with random weights on 8,192 packed tokens: seconds, and memory by recompute."""
    found: Result = {}
    for recompute in ("none", "full"):
        with random_model(bench, recompute) as (trainer, samples):
            scored = trainer.old_logprobs(samples)
            peak = bench.peak_gib(lambda scored=scored, trainer=trainer: trainer.forward_backward(scored))
            first = trainer.optim_step()

            def step(scored: Any = scored, trainer: Any = trainer) -> None:
                trainer.forward_backward(scored)
                trainer.optim_step()

            found[recompute] = {
                "peak_gib": peak,
                "step_seconds": bench.seconds(step, 2),
                "score_seconds": bench.seconds(lambda s=samples, t=trainer: t.old_logprobs(s), 2),
                "grad_norm": first["grad_norm"],
            }
    return found


def save_and_load(bench: Bench) -> Result:
    """A checkpoint of that model with the distributed optimizer: seconds, and what memory it takes beyond the run's."""
    with random_model(bench, "full") as (trainer, samples), tempfile.TemporaryDirectory() as folder:
        trainer.forward_backward(trainer.old_logprobs(samples))
        trainer.optim_step()
        path, begun, host = Path(folder) / "step", time.perf_counter(), host_gib()
        save_peak = bench.peak_gib(lambda: (trainer.save(path, extra={}), trainer.finish_saves()))
        saved, host_peak = time.perf_counter() - begun, host_gib() - host
        begun = time.perf_counter()
        load_peak = bench.peak_gib(lambda: trainer.load(path))
        return {
            "save_seconds": round(saved, 2), "save_peak_gib": save_peak, "save_host_gib": round(host_peak, 2),
            "load_seconds": round(time.perf_counter() - begun, 2), "load_peak_gib": load_peak,
            "folder_gib": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / GIB, 2),
        }  # fmt: skip


_OPEN = """
import base64, io, pickle, sys, time, torch
from torch.multiprocessing import reductions
rebuild = reductions.rebuild_cuda_tensor
def by_uuid(*a):
    seen = {str(torch.cuda.get_device_properties(n).uuid): n for n in range(torch.cuda.device_count())}
    return rebuild(*a[:6], seen[a[6]], *a[7:])
reductions.rebuild_cuda_tensor = by_uuid
data = base64.b64decode(sys.stdin.readline())
begun = time.perf_counter()
flat = pickle.loads(data)["flattened_tensor"]
copy = flat.clone()
if copy.is_cuda: torch.cuda.synchronize()
taken = time.perf_counter() - begun
right = bool((copy == torch.arange(256, device=copy.device, dtype=torch.uint8).repeat(copy.numel() // 256)).all())
print(right, taken, str(copy.device), flush=True)
"""


def ipc(bench: Bench) -> Result:
    """512 MiB by CUDA handle to a process that numbers its GPUs otherwise, and whether they are free afterwards."""
    from torl_mega.serving.sync.buckets import Bucket
    from torl_mega.serving.sync.handles import payload

    flat = torch.arange(256, dtype=torch.uint8).repeat(bench.size(512 << 20, 1 << 20) // 256).to(bench.device)
    bench.wait()
    free = torch.cuda.mem_get_info()[0] if not bench.cpu else 0
    uuid = "" if bench.cpu else f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    text = payload(Bucket((("flat", flat),)), flat).decode() + "\n"
    said = ended([sys.executable, "-c", _OPEN], {"CUDA_VISIBLE_DEVICES": uuid}, text).split()
    found: Result = {"right": said[0] == "True", "open_and_copy_seconds": float(said[1]), "device": said[2]}
    if not bench.cpu:
        torch.cuda.ipc_collect()
        found["gib_left_behind"] = round((free - torch.cuda.mem_get_info()[0]) / GIB, 3)
    return found


_TWO = """
import os, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
x = torch.ones(1, device="cuda:0" if cuda else "cpu")
dist.all_reduce(x)
print("sum", x.item())
"""


def two_ranks_on_one_gpu(bench: Bench) -> Result:
    """NCCL's word on two ranks that share a GPU, and on NCCL_MULTI_RANK_GPU_ENABLE=1."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
        program.write(_TWO)
        program.flush()
        found: Result = {}
        for name, env in (("as it is", {}), ("NCCL_MULTI_RANK_GPU_ENABLE=1", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"})):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                program.name,
            ]
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if bench.cpu else {"CUDA_VISIBLE_DEVICES": "0"}
            done = subprocess.run(
                command, env={**os.environ, **hidden, **env}, capture_output=True, text=True, timeout=120, check=False
            )
            why = [line for line in done.stderr.splitlines() if "Duplicate" in line or "Error" in line]
            found[name] = done.stdout.split("\n")[0] if done.returncode == 0 else (why or ["failed"])[0].strip()[:200]
    return found


def pinned(bench: Bench) -> Result:
    """Host to device and back, as the KL's reference and the parking of GPUs move weights: GB/s, pageable and pinned."""
    count = bench.size(4 * GIB, 1 << 20)
    device = torch.empty(count, dtype=torch.uint8, device=bench.device)
    found: Result = {}
    for name, pin in (("pageable", False), ("pinned", not bench.cpu)):
        host = torch.empty(count, dtype=torch.uint8, pin_memory=pin)
        there = bench.seconds(lambda host=host: device.copy_(host, non_blocking=True))
        back = bench.seconds(lambda host=host: host.copy_(device, non_blocking=True))
        found[name] = {"to_device_gb_s": round(count / there / 1e9, 1), "to_host_gb_s": round(count / back / 1e9, 1)}
    return found


def doctor(bench: Bench) -> Result:
    """`torl doctor --gpu`, and Transformer Engine's layer under every precision profile."""
    command = [sys.executable, "-m", "torl_mega.launch.doctor", "--gpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    checks = json.loads(done.stdout)["checks"]
    found = {
        check["name"]: f"{check['level']}: {check['detail']}" for check in checks if check["name"].startswith("gpu")
    }
    layers = [sys.executable, "-m", "torl_mega.trainer.precision_trial", *PROFILES]
    done = subprocess.run(layers, cwd=ROOT, capture_output=True, text=True, check=False)
    tried = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return found | {line["name"]: f"{'ok' if line['ok'] else 'fail'}: {line['detail']}" for line in tried}


def trainer_te(bench: Bench) -> Result:
    """tests/gpu/test_trainer_gpu.py: Transformer Engine against HF, FP8 against bf16, the fused optimizer."""
    return pytest_report("tests/gpu/test_trainer_gpu.py")


def weight_sync(bench: Bench) -> Result:
    """tests/gpu/test_weight_sync.py: real servers, every transport, the memory saver, FP8 weights."""
    return pytest_report("tests/gpu/test_weight_sync.py")


def quickstart(bench: Bench) -> Result:
    """Five steps of conf/quickstart_gpu.yaml: trainer, servers and sandbox on this machine, the shipped base model."""
    with tempfile.TemporaryDirectory() as runs:
        conf = "conf/quickstart.yaml" if bench.cpu else "conf/quickstart_gpu.yaml"
        small = ["num_steps=5", f"runs_dir={runs}", "name=quick", *(["num_steps=2"] if bench.cpu else [])]
        try:
            ended([sys.executable, "-m", "torl_mega.cli", "train", conf, *small], {})
        except RuntimeError:
            for log in sorted(Path(runs).glob("quick/logs/*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n", file=sys.stderr)
            raise
        return last_step(Path(runs) / "quick/metrics.jsonl")


def first_steps(bench: Bench) -> Result:
    """Two small steps of conf/torl_1.5b.yaml on this node: the largest log-prob gap to the server and the seconds of a step."""
    with tempfile.TemporaryDirectory() as runs:
        small = ["num_steps=2", "rollout.prompts_per_step=16", f"runs_dir={runs}", "name=first"]
        ended(["bash", "launch/local.sh", "conf/torl_1.5b.yaml", *small], {})
        return last_step(Path(runs) / "first/metrics.jsonl")


# ------------------------------------------------------------------------------------------------------ parts of pieces


def last_step(metrics: Path) -> Result:
    """What the last step of a run took, and how far servers and trainer were apart in it."""
    from torl_mega.run.metrics import read_rows

    rows = [row for row in read_rows(metrics) if row["kind"] == "train"]
    wanted = ("rollout_s", "train_s", "sync_s", "max_abs_logprob_diff", "k3", "accuracy")
    return {"steps": len(rows)} | {key: float(f"{rows[-1][key]:.3g}") for key in wanted}


@contextmanager
def one_rank() -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def random_model(bench: Bench, recompute: str) -> Iterator[tuple[Any, list[Any]]]:
    """The trainer of a 1.5B (tiny on a CPU) in bf16 with random weights and Megatron's own layers, and 8,192 tokens for it."""
    import hf_reference as ref
    from layout_cases import Layout
    from layout_worker import config_for

    from torl_mega.planner.known_models import KNOWN
    from torl_mega.trainer import parallel
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    sizes = {} if bench.cpu else {name: KNOWN["Qwen2.5-Math-1.5B"][name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        made = ref.make_model("qwen2", tied=True, dtype=torch.bfloat16, **sizes)
        ref.save_model(made, Path(folder) / "model")
        del made
        budget = bench.size(8192, 60)
        more = (
            "model.dtype=bfloat16",
            "trainer.layer_spec=local",
            f"trainer.recompute={recompute}",
            f"trainer.micro_batch_tokens={budget}",
        )
        if not bench.cpu:
            more += (
                "trainer.logprob_chunk_tokens=2048",
                "trainer.gradient_bucket_parameters=40000000",
                "rollout.max_response_tokens=1016",
            )
        config = config_for(Layout(), Path(folder) / "model", more)
        parallel.init_distributed(config.parallel, config.trainer)
        try:
            trainer = MegatronTrainer(config)
            lengths = [bench.size(1024, 12)] * bench.size(8, 4)
            yield trainer, [ref_sample(n, trainer.shape.vocab) for n in lengths]
        finally:
            parallel.destroy()


def ref_sample(length: int, vocab: int) -> Any:
    import numpy as np

    from torl_mega.types import Sample

    tokens = np.random.default_rng(length).integers(0, vocab, length)
    mask = np.arange(length) >= 8
    return Sample(
        tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32), np.where(mask, 0, -1).astype(np.int32), 0.5
    )


def ended(command: list[str], env: Mapping[str, str], stdin: str = "") -> str:
    """What a program printed. Raises RuntimeError with its last line when it failed."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-8000:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
    return done.stdout


def pytest_report(file: str) -> Result:
    """How each test of `file` ended, and why."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", file, f"--junitxml={report}"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        print(said[-40000:], file=sys.stderr)
        from xml.etree import ElementTree

        found: Result = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
            said = (
                f"{bad[0].tag}: {bad[0].get('message', '')[:200]}"
                if bad
                else f"passed in {float(case.get('time', 0)):.1f} s"
            )
            found[case.get("name", "?")] = said
    return found


def host_gib() -> float:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


PIECES: dict[str, Callable[[Bench], Result]] = {
    piece.__name__: piece
    for piece in (
        machine, checksums, head, step_against_hf, step_1_5b, save_and_load, ipc, two_ranks_on_one_gpu, pinned,
        doctor, trainer_te, weight_sync, quickstart, first_steps,
    )
}  # fmt: skip
"""In the order in which they tell most; those up to `pinned` need no Transformer Engine and no SGLang."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--cpu", action="store_true", help="small sizes on a CPU")
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from torl_mega.trainer.cpu import backend

        backend.install()
    print(json.dumps(PIECES[args.piece](Bench(args.cpu))))


if __name__ == "__main__":
    main()
