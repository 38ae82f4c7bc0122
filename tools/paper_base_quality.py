"""How the base of the paper in small answers before RL, in plain PyTorch:
`python tools/paper_base_quality.py build/paper_small/model`.

Prints accuracy by family, code ratio and pass ratio over the problems that are evaluated on, sampled and greedy, with and
without a tool. Programs run in a Python of their own, within a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from paper_traces import TEMPLATE
from tiny_base_quality import attempts
from transformers import AutoTokenizer, Qwen2ForCausalLM

from torl_mega.data.word_problems import held_in, held_out


def execute(code: str) -> tuple[str, bool]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=1.0, check=False
        )  # fmt: skip
    except (subprocess.TimeoutExpired, ValueError) as exc:
        return f"{type(exc).__name__}", False
    said = done.stdout.strip() or (done.stderr.strip().splitlines() or ["(no output)"])[-1]
    return said, not done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, help="problems; default all")
    parser.add_argument("--show", type=int, default=0, help="how many answers to print")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Qwen2ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    problems = [*held_in(), *held_out()][: args.limit]
    for greedy, calls in ((False, 1), (False, 0), (False, 2), (True, 1)):
        torch.manual_seed(0)
        done = attempts(
            model, tokenizer, problems, greedy=greedy, max_tool_calls=calls, max_new_tokens=256, template=TEMPLATE,
            execute=execute,
        )  # fmt: skip
        called = [a for a in done if a.called]
        by_family = defaultdict(list)
        for problem, attempt in zip(problems, done, strict=True):
            by_family[f"{problem.source}"].append(attempt.correct)
        families = "  ".join(f"{name} {sum(right) / len(right):.2f}" for name, right in by_family.items())
        print(
            f"{'greedy' if greedy else 'sampled'} C={calls}: accuracy {sum(a.correct for a in done) / len(done):.3f}, code ratio "
            f"{len(called) / len(done):.3f}, pass ratio {sum(a.passed for a in called) / max(len(called), 1):.3f}; {families}"
        )
        for attempt in done[: args.show]:
            print(tokenizer.decode(attempt.ids), "\n" + "-" * 20)
    return 0


if __name__ == "__main__":
    sys.exit(main())
