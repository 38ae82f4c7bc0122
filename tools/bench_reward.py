"""How fast answers are graded, and what hanging ones cost. Prints one JSON object.

    python tools/bench_reward.py [--answers 2048] [--hanging 0.01] [--workers 2] [--timeout-s 5]

`ordinary`: golds of mixed kinds with right, differently written and wrong answers, every pair fresh (nothing comes from
the cache), through the grader process. `with_hanging`: the same with a share of answers that never finish; what is lost
must be 0 and the time at most the ideal time of the ordinary ones plus one time limit. `answers_per_cpu_s` counts the CPU time
of the grader process with all its workers (start-up left out), which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import time

from torl_mega.reward.grader import Grader, Verdict

# the same commands and numbers put together otherwise: sympy tries for long
_HANGING = "\\int \\sqrt{\\sin(x^%d+%dx)+\\cos(x^%d)}\\ln(x+\\sqrt{x^5+1})e^{x^2} dx"


def ordinary(n: int) -> list[tuple[str, str]]:
    """(answer, gold) in the mix of MATH and AIME: mostly integers, one in three an expression, half of them wrong."""
    pairs = []
    for i in range(n):
        off = i % 2
        gold, answer = [
            (str(i), str(i + off)),
            (str(7 * i), f"{7 * i + off}.0"),
            (str(i + 1000), f"x = {i + 1000 + off}"),
            (f"\\frac{{{2 * i + 1}}}{{{i + 5}}}", f"\\dfrac{{{2 * i + 1 + off}}}{{{i + 5}}}"),
            (f"{i + 2}\\sqrt{{{i + 3}}}", f"\\sqrt{{{(i + 2) ** 2 * (i + 3) + off}}}"),
            (f"({i}, {i + 3}]", f"{i} < x \\le {i + 3 + off}"),
            (str(i), f"{i + off}\\text{{ cm}}"),
            (f"{i}x^2+{i}x+1", f"1+{i}x(x+{1 + off})"),
            (f"{i + 1},{-i}", f"{-i - off}, {i + 1}"),
        ][i % 9]
        pairs.append((answer, gold))
    return pairs


def cpu_s() -> float:
    """CPU time of ended children and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


async def run(pairs: list[tuple[str, str]], args: argparse.Namespace) -> tuple[float, list[Verdict]]:
    grader = Grader(args.workers, args.timeout_s)
    await grader.start()
    try:
        await asyncio.gather(*(grader.check(f"{i}+x", f"x+{i}") for i in range(4 * args.workers)))  # workers are forked
        start = time.perf_counter()
        verdicts = list(await asyncio.gather(*(grader.check(a, g) for a, g in pairs)))
        return time.perf_counter() - start, verdicts
    finally:
        await grader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2048)
    parser.add_argument("--hanging", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout-s", type=float, default=5.0)
    args = parser.parse_args()
    pairs = ordinary(args.answers)
    asyncio.run(run([], args))
    start_up_s = cpu_s()
    ideal_s, verdicts = asyncio.run(run(pairs, args))
    ordinary_cpu_s = cpu_s() - 2 * start_up_s
    num_hanging = round(args.answers * args.hanging)
    mixed = list(pairs)
    for k in range(num_hanging):
        mixed[k * args.answers // num_hanging] = (_HANGING % (3, k + 7, 2), _HANGING % (2, k + 7, 3))
    mixed_s, mixed_verdicts = asyncio.run(run(mixed, args))
    count = {v.value: mixed_verdicts.count(v) for v in Verdict}
    report = {
        "workers": args.workers,
        "answers": args.answers,
        "ordinary": {
            "wall_s": round(ideal_s, 3),
            "answers_per_s": round(args.answers / ideal_s, 1),
            "answers_per_s_per_worker": round(args.answers / ideal_s / args.workers, 1),
            "answers_per_cpu_s": round(args.answers / ordinary_cpu_s, 1),
            "right": verdicts.count(Verdict.RIGHT),
        },
        "with_hanging": {
            "hanging": num_hanging,
            "wall_s": round(mixed_s, 3),
            "allowed_s": round(ideal_s + args.timeout_s, 3),
            "lost": args.answers - sum(count.values()) + count["fault"],
            **count,
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
