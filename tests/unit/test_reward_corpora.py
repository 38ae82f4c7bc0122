"""The grader on what others wrote: kinds of fault that users found, pairs from public threads, golds of the benchmarks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from torl_mega.reward.answers.check import check, grade, is_understood
from torl_mega.reward.grader import Grader, Verdict

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_every_kind_of_fault_is_mended_with_its_neighbours() -> None:
    """Labels come from mathematics; each kind has answers that must be accepted and answers that must be refused."""
    cases = rows("grader_corpus_kinds.jsonl")
    assert len(cases) >= 600
    verdicts = [grade(r["answer"], r["gold"], r.get("problem", "")) for r in cases]
    assert [r for r, v in zip(cases, verdicts, strict=True) if v is not r["expected"]] == []


# by rule: an answer, the gold answer that it states, one that it must not be taken for
RULES = {
    "fraction": ("\\dfrac12", "0.5", "0.6"), "unit": ("5\\text{ cm}", "5", "5.1"), "other unit": ("5", "5\\text{ cm}", "4"),
    "thousands": ("12{,}345", "12345", "12346"), "scale": ("1.2\\text{ million}", "1200000", "1200001"),
    "degrees": ("90^\\circ", "90", "91"), "infix": ("{1 \\over 2}", "\\frac12", "{2\\over 1}"),
    "factorial": ("n(n-1)!", "n!", "(n-1)!"), "number on the right": ("(n-1)2^n", "2^n(n-1)", "(n+1)2^n"),
    "root": ("\\sqrt{1/m}", "\\frac{1}{\\sqrt m}", "\\frac1m"), "sympy": ("Rational(5, 6)", "\\frac56", "Rational(6, 5)"),
    "complex": ("3 - 5*I", "3-5i", "3+5*I"), "function in words": ("\\operatorname{ln}(2)", "\\ln 2", "\\ln 3"),
    "colour": ("\\textcolor{red}{7}", "7", "\\textcolor{red}{8}"), "mixed": ("7 3/4", "\\frac{31}{4}", "7 1/4"),
    "letters": ("2gm", "2mg", "2gmx"), "cycle": ("0.\\overline{3}", "\\frac13", "0.3"), "work": ("1665", "1665", "37*45"),
    "power": ("2^{10}", "1024", "2^{11}"), "exponent": ("1e3", "1000", "1e4"), "money": ("\\$18.90", "18.9", "18.8"),
}  # fmt: skip
FORMS = (
    "%s", "x=%s", "f(2)=%s", "%s, 99", "99; %s", "%s \\text{ or } 99", "(%s, 99)", "(1, %s, 99)", "(%s; 99)", "\\{%s, 99\\}",
    "\\begin{pmatrix}%s & 99\\\\ 1 & 2\\end{pmatrix}", "A=\\begin{pmatrix}%s & 99\\\\ 1 & 2\\end{pmatrix}", "(%s, 1), (2, 99)",
    "x=%s, y=99", "(x,y)=(%s,99)", "\\boxed{%s}", "(%s)",
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_holds_on_every_form(rule: str) -> None:
    right, gold, wrong = RULES[rule]
    forms = FORMS
    if not re.search(r"[nmgi]|text|circ", gold + right):
        forms += ("[%s, 1999999)", "(-\\infty, %s]", "x<%s", "(-9,-5)\\cup(%s,\\infty)", "x>%s, x<1999999")
    assert [form for form in forms if not grade(form % right, form % gold)] == []
    assert [form for form in forms if grade(form % wrong, form % gold)] == []


def test_pairs_from_public_threads() -> None:
    """Math-Verify's own test-suite and reports, with the prose around the boxes left out. Left out are five labels of that
    suite about which two people would disagree: `1,22` for 1.22, `0,111` for 0.111 and false chains such as `3+3 = 2`."""
    cases = rows("grader_public_pairs.jsonl")
    assert len(cases) >= 170
    for judge in (check, grade):
        assert [r for r in cases if judge(r["answer"], r["gold"]) is not r["expected"]] == []


REWRITINGS: dict[str, Callable[[str], str]] = {
    "dollars": lambda g: "$" + re.sub(r"(?<!\\)\$", "", g) + "$",
    "display": lambda g: "\\[" + re.sub(r"(?<!\\)\$", "", g) + "\\]",
    "sized brackets": lambda g: re.sub(
        r"(?<!\\left)(?<!\\right)([()\[\]])(?![^{]*\})", lambda m: f"\\{'left' if m[1] in '([' else 'right'}{m[1]}", g
    ),
    "dfrac": lambda g: g.replace("\\frac", "\\dfrac"),
    "more space": lambda g: re.sub(r" ?([-+=<>/]) ?", r" \1  ", g) if not re.search(r"[0-9]e-?[0-9]", g) else f"  {g} ",
    "boxed": lambda g: f"\\boxed{{{g}}}",
    "full stop": lambda g: f"{g}.",
    "display style": lambda g: f"\\displaystyle {g}",
    "braces": lambda g: f"{{{g}}}",
    "dots": lambda g: re.sub(r"(?<=[0-9]) ?(?=\\(?:sqrt|pi))", r" \\cdot ", g),
    "braced exponents": lambda g: re.sub(r"\^([0-9A-Za-z])", r"^{\1}", g),
    "bold": lambda g: f"**{g}**",
}


NOT_READ = {  # compared as text: a differential equation in primes, a family of functions, a set that is called t
    "y^{\\prime}+r y-r x(t)=0",
    "x^{\\prime}+\\frac{r}{V} x-r c=0",
    "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer with $\\mho(a)=0$",
    "$t(0,4]$",
}


@pytest.mark.parametrize("benchmark", ["math500", "olympiadbench", "minerva", "aime24", "aime25", "amc23"])
def test_golds_of_the_benchmarks_are_their_own_answers_in_twelve_spellings(benchmark: str) -> None:
    golds = [r["gold"] for r in rows("benchmark_golds.jsonl") if r["benchmark"] == benchmark]
    assert len(golds) >= {"math500": 500, "olympiadbench": 674, "minerva": 272}.get(benchmark, 25)
    golds = list(dict.fromkeys(golds))
    failed = [(g, "as it is") for g in golds if is_understood(g) == (g in NOT_READ) or not grade(g, g)]
    failed += [(g, name) for g in golds for name, rewrite in REWRITINGS.items() if not grade(rewrite(g), g)]
    assert failed == []


def value(gold: str) -> object:
    """Golds with the same value have the same one here, where that is plain to see; else it is the text."""
    text = re.sub(r"\^\{?\\circ\}?|\\!|\\?\$| |^[A-Za-z]=", "", gold).replace("\\dfrac", "\\frac")
    text = re.sub(r"\\frac\{?(\d+?)\}?\{?(\d+)\}?$", r"\1/\2", text)
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return tuple(sorted(text.split(",")))


def test_no_gold_of_a_benchmark_is_another_ones_answer() -> None:
    golds = sorted({r["gold"] for r in rows("benchmark_golds.jsonl")})
    values = {g: value(g) for g in golds}
    different = [(a, g) for a in golds for g in golds if values[a] != values[g] and a != g.replace(".", ",")]
    pairs = [(a, g) for a, g in different[::29] if not re.fullmatch(r"-?[0-9]+", a + g)]
    assert len(pairs) > 20_000
    assert [p for p in pairs if check(*p)] == []


def test_math_verify_can_be_the_checker() -> None:
    async def verdicts() -> list[Verdict]:
        grader = Grader(1, 60.0, checker="math_verify")
        await grader.start()
        try:
            pairs = [("\\frac{1}{2}", "0.5"), ("3", "4"), ("\\frac{1}{2006!}", "\\frac{1}{2004!}")]
            return list(await asyncio.gather(*(grader.check(*pair) for pair in pairs)))
        finally:
            await grader.close()

    # the last one is math-verify's own: what is tiny is zero to it
    assert asyncio.run(verdicts()) == [Verdict.RIGHT, Verdict.WRONG, Verdict.RIGHT]


def test_the_tool_lists_on_what_the_checkers_disagree(tmp_path: Path) -> None:
    pairs = [
        {"gold": "5", "answer": "x=5", "expected": True},
        {"gold": "\\frac{1}{2004!}", "answer": "\\frac{1}{2006!}", "expected": False},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    command = [sys.executable, ROOT / "tools/grade.py", file, "--timeout-s", "60", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    disagreement, counts = [json.loads(line) for line in done.stdout.splitlines()]
    assert (disagreement["own"], disagreement["math_verify"]) == ("wrong", "right")
    assert counts["answers"] == 2
    assert counts["own"]["precision"] == 1.0
    assert counts["math_verify"]["wrongly_right"] == 1
    (tmp_path / "theirs.py").write_text(
        "def as_text(answer, gold):\n    return answer == gold or 1 / ('!' not in gold) == 0"
    )
    also = [*command, "--also", "theirs:as_text"]
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(also, capture_output=True, text=True, check=True, env=path)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["theirs:as_text"]["recall"], counts["theirs:as_text"]["fault"]) == (0.0, 1)
    refused = subprocess.run(also, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "error: --also = theirs:as_text" in refused.stderr
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"gold": "5"}\n')
    refused = subprocess.run([sys.executable, ROOT / "tools/grade.py", broken], capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"{broken}:1: a row without gold or answer" in refused.stderr
