"""Do the trainer's Python and SGLang's fit together? Asked while an image is built, by `make install` and by the preflight.

    python -m torl_mega.launch.environments TRAINER_PYTHON SGLANG_PYTHON

Weights travel over one NCCL communicator whose ranks live in both environments, and NCCL refuses a peer of another version
(init.cc: «Mismatched NCCL version detected»). Exit code 1 and one line per difference; no GPU is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_IMPORTS_S = 300.0  # a cold file system under three large packages

# Each program prints versions as JSON; what cannot be imported ends it with that error as its last line.
_NCCL = "nccl = '.'.join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None"
_TRAINER = f"""
import json, torch, megatron.core, megatron.core.dist_checkpointing
{_NCCL}
print(json.dumps({{"torch": torch.__version__, "nccl": nccl, "megatron-core": megatron.core.__version__}}))
"""
_SGLANG = f"""
import json, torch
from importlib.metadata import version
{_NCCL}
print(json.dumps({{"torch": torch.__version__, "nccl": nccl, "sglang": version("sglang")}}))
"""


def versions(python: str, program: str) -> tuple[dict[str, str | None], str | None]:
    """What `program` prints under `python`, and the line that it ended with when it failed."""
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=_IMPORTS_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {}, f"{python} cannot be used: {exc}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {}, f"{python} lacks what it must import: {last}"
    return json.loads(done.stdout.strip().splitlines()[-1]), None


def differences(trainer: str, sglang: str) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """Versions of both environments, and one line for each reason why they cannot work together."""
    ours, first = versions(trainer, _TRAINER)
    theirs, second = versions(sglang, _SGLANG)
    problems = [text for text in (first, second) if text is not None]
    if not problems and ours["nccl"] != theirs["nccl"]:
        problems.append(
            f"NCCL is {ours['nccl']} under {trainer} and {theirs['nccl']} under {sglang}, and one weight group cannot span "
            "both; pin the trainer's nvidia-nccl-cu13 in group sglang-gpu, or take the image that has SGLang's"
        )
    return {trainer: ours, sglang: theirs}, problems


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found, problems = differences(*argv)
    for problem in problems:
        print(f"torl: error: {problem}", file=sys.stderr)
    print("\n".join(f"{python}: {', '.join(f'{k} {v}' for k, v in seen.items())}" for python, seen in found.items()))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
