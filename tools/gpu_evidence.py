"""Measures on a GPU what a CPU cannot show, piece by piece, and writes docs/gpu.md's table of it.

    python tools/gpu_evidence.py [PIECE...] [--again] [--logs DIR] [--list]     make gpu-evidence
    python tools/gpu_evidence.py --doc                             writes the table anew; --check says whether it is

Each piece (tools/gpu_pieces.py) is a process of at most eight minutes and leaves docs/gpu_evidence/PIECE.json with chip, versions,
command and result, or the line that it ended with. What is there for this chip and these versions is not run again, so an
interrupted run goes on. Exit code 1 when a piece failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torl_mega.process.start import start  # noqa: E402

FOLDER = ROOT / "docs/gpu_evidence"
PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- made by tools/gpu_evidence.py: begin -->", "<!-- end -->"
LIMIT_S = 480
PIECES = {
    "machine": "the machine",
    "checksums": "weight checksums of a 7B",
    "head": "the chunked head of a 7B, 8,192 rows",
    "step_against_hf": "one bf16 step against HF, Megatron's own layers",
    "step_1_5b": "a step of a 1.5B on 8,192 tokens, by recompute",
    "save_and_load": "a checkpoint of a 1.5B",
    "ipc": "512 MiB by CUDA IPC handle",
    "two_ranks_on_one_gpu": "two NCCL ranks on one GPU",
    "pinned": "host memory to GPU and back",
    "doctor": "`torl doctor --gpu` and a layer per precision profile",
    "trainer_te": "`tests/gpu/test_trainer_gpu.py`",
    "weight_sync": "`tests/gpu/test_weight_sync.py`",
    "quickstart": "five steps of `conf/quickstart_gpu.yaml`",
    "first_steps": "two small steps of `conf/torl_1.5b.yaml`",
}


def here() -> dict[str, str | None]:
    """Chip and versions that a figure depends on."""
    import torch

    names = ("torch", "megatron-core", "transformer-engine", "sglang")
    found: dict[str, str | None] = {"chip": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def run(piece: str, where: dict[str, str | None], folder: Path, *, cpu: bool = False, logs: Path | None = None) -> bool:
    """Runs one piece and writes its file, whole or not at all, and what it said into `logs`. Whether it succeeded."""
    command = [sys.executable, "-W", "ignore", "tools/gpu_pieces.py", piece, *(["--cpu"] if cpu else [])]
    begun, result, problem = time.monotonic(), None, ""
    with tempfile.TemporaryDirectory(prefix="torl-evidence-") as own:
        log = (logs or Path(own)) / f"{piece}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        with start(command, name=piece, log_path=log, cwd=ROOT) as process:  # its whole tree ends with it
            try:
                code = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                code, problem = -1, f"not done after {LIMIT_S} s"
        said = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    if code == 0:
        result = json.loads([line for line in said if line.startswith("{")][-1])
    problem = problem or (said[-1] if code else "")
    evidence = {
        "piece": piece, "where": where, "command": " ".join(["python", *command[3:]]),
        "seconds": round(time.monotonic() - begun, 1), "result": result, "problem": problem,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f".{piece}.json"
    half.write_text(json.dumps(evidence, indent=1) + "\n")
    half.replace(folder / f"{piece}.json")
    print(f"{piece}: {problem or json.dumps(result)[:400]} ({evidence['seconds']} s)", flush=True)
    return not problem


def read(folder: Path, piece: str) -> dict[str, Any] | None:
    try:
        return json.loads((folder / f"{piece}.json").read_text())
    except FileNotFoundError:
        return None


def table(folder: Path) -> str:
    """Markdown: a row per piece with what was measured, on what."""
    rows = ["| piece | on | measured |", "|---|---|---|"]
    for piece, what in PIECES.items():
        evidence = read(folder, piece)
        if evidence is None:
            rows.append(f"| {what} | | not measured |")
            continue
        where = evidence["where"]
        versions = ", ".join(f"{k} {where[k]}" for k in ("torch", "transformer-engine", "sglang") if where.get(k))
        said = f"failed: {evidence['problem']}" if evidence["problem"] else _words(evidence["result"])
        rows.append(f"| {what} | {where['chip']}, {versions} | {said} |")
    return "\n".join(rows)


def _words(result: Any) -> str:
    if isinstance(result, dict):
        return "; ".join(f"{key.replace('_', ' ')}: {_words(value)}" for key, value in result.items()).replace("|", "/")
    return re.sub(r" \(UUID: [^)]*\)", "", str(result))  # of one machine, and nobody's business


def page(folder: Path) -> str:
    """docs/gpu.md with the table of today's evidence in its place."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(folder)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pieces", nargs="*", metavar="PIECE")
    parser.add_argument("--again", action="store_true", help="also what has been measured here")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what each piece said in DIR/PIECE.log")
    parser.add_argument("--list", action="store_true", help="the pieces, and which are there")
    parser.add_argument("--doc", action="store_true", help="only write docs/gpu.md's table")
    parser.add_argument("--check", action="store_true", help="only say whether that table is the evidence's")
    args = parser.parse_args()
    if unknown := [piece for piece in args.pieces if piece not in PIECES]:
        print(f"torl: error: no piece {unknown[0]!r}; `--list` names them", file=sys.stderr)
        return 2
    if args.list:
        print(
            "\n".join(f"{piece:22}{'there' if read(FOLDER, piece) else 'missing'}  {PIECES[piece]}" for piece in PIECES)
        )
        return 0
    if args.check:
        return int(PAGE.read_text() != page(FOLDER))
    failed = False
    if not args.doc:
        where = here()
        if where["chip"] is None:
            print("torl: error: no CUDA device here; `--list` shows what has been measured", file=sys.stderr)
            return 1
        for piece in args.pieces or PIECES:
            known = read(FOLDER, piece)
            if not args.again and known and not known["problem"] and known["where"] == where:
                print(f"{piece}: there already")
                continue
            failed |= not run(piece, where, FOLDER, logs=args.logs)
    PAGE.write_text(page(FOLDER))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
