"""Is this answer the gold answer? Pure, deterministic, the same in a main process, a thread and a worker.

    answer, gold ─► normalize ─► same text? ─► same form (list, interval, matrix, relation …) ─► same scalars, by value
                                                    └─ one of them is not read ─► math-verify, with its numbers checked

False positives are worse than false negatives: the policy finds and farms them. So an answer is wrong unless it was
shown right; math-verify is never asked about two forms that are read and differ.

`check` asks for mathematical equality. `grade` asks besides that the answer is one: that no arithmetic is left to do
where the gold answer is a number, and that it is not the problem's own expression copied into the box.

Limits: no signal is used and no time limit kept here (`grader_process.py` kills what takes too long); answers above
MAX_ANSWER_CHARS are wrong unread. Order does not matter in a bare list of values (roots), it does in brackets.
"""

from __future__ import annotations

import contextlib
import re

from torl_mega.reward.answers.compare import same
from torl_mega.reward.answers.expression import at_full_precision
from torl_mega.reward.answers.finished import is_finished
from torl_mega.reward.answers.forms import Form, is_name, letters, read_form, renamed
from torl_mega.reward.answers.normalize import normalize
from torl_mega.reward.answers.scalars import CHOICE, read_scalar, same_choice, same_text, text_words, without_label
from torl_mega.reward.answers.symbolic import math_verify_grade, second_opinion
from torl_mega.reward.answers.syntax import Unreadable, symbols

MAX_ANSWER_CHARS = 1000
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_INFINITE = re.compile(r"\s*[-+]?\s*\\infty\s*")


def check(answer: str, gold: str) -> bool:
    """Whether `answer` states the same as `gold`. Never raises for what a string holds, but may take long or much memory."""
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    if _WHOLE_NUMBER.fullmatch(answer) and _WHOLE_NUMBER.fullmatch(gold):  # most answers there are
        return int(answer) == int(gold)
    a, g = normalize(answer), normalize(gold)
    if not a or not g:
        return False
    if same_text(a, g) or same_choice(a, g):
        return True
    if (plain := without_label(a, g)) is not None:
        return check(*plain)
    form, gold_form = _readable(_constants_as_in(a, g)), _readable(_constants_as_in(g, a))
    if form is None or gold_form is None:
        return _without_reading(answer, gold, gold_form)
    with contextlib.suppress(Unreadable), at_full_precision():
        if same(form, gold_form):
            return True
        # gold `100,200` may be a list after all when the prediction is one
        listed = form.kind == "list" and gold_form.kind != "list" and "," in g
        return listed and same(form, read_form(g.replace(",", ", ")))
    return False


def _constants_as_in(text: str, other: str) -> str:
    """sympy's `I` and `E` as i and e where the other side writes these; E alone is a letter to choose."""
    for printed, constant in (("I", "i"), ("E", "e")):
        if printed in text and constant in other and text.strip("() ") != "E":
            own, others = letters(text), letters(other)
            if printed in own and constant not in own and constant in others and printed not in others:
                text = renamed(text, printed, constant)
    return text


def _without_reading(answer: str, gold: str, gold_form: Form | None) -> bool:
    """One of both is not read. A gold answer that is read must be an expression with variables to be asked about."""
    if gold_form is None:
        return not CHOICE.match(normalize(gold)) and second_opinion(answer, gold)
    scalar = gold_form.kind == "scalar" and not _INFINITE.fullmatch(gold_form.text)
    node = read_scalar(gold_form.text).node if scalar else None
    return node is not None and bool(symbols(node)) and second_opinion(answer, gold, node)


def grade(answer: str, gold: str, problem: str = "") -> bool:
    """What the reward asks: right, and really an answer to `problem`."""
    return check(answer, gold) and is_finished(answer, gold, problem)


CHECKERS = {"own": grade, "math_verify": math_verify_grade}  # for `reward.checker`


def is_understood(gold: str) -> bool:
    """Whether a gold answer is read here: a value, list, interval, matrix or relation, a few words, or a choice letter."""
    text = normalize(gold)
    if not text or len(gold) > MAX_ANSWER_CHARS:
        return False
    return _readable(text) is not None or 1 <= len(text_words(text).split()) <= 4


def is_readable(gold: str) -> bool:
    """Whether answers can be compared with this gold: it is understood and equal to itself; long prose and lost text are not."""
    return len(gold) <= MAX_ANSWER_CHARS // 4 and is_understood(gold) and check(gold, gold)


def warm_up() -> None:
    """Pays for imports and parser tables once, before workers are forked."""
    for text in ("5", "\\frac{3}{4}", "(-\\infty,2)\\cup(3,\\infty)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "y=2x+3"):
        check(text, "1+x")
        math_verify_grade(text, text)
    second_opinion("\\sum_{k=1}^{n} k", "\\sum_{k=1}^{n} k")


def _readable(text: str) -> Form | None:
    """The form of a normalised answer; None where it or a scalar in it is not read."""
    try:
        form = read_form(text)
        check_readable(form)
    except Unreadable:
        return None
    return form


def check_readable(form: Form) -> None:
    """Raises Unreadable when a scalar of the form is not an expression."""
    if form.kind == "scalar":
        if not _INFINITE.fullmatch(form.text):
            read_scalar(form.text)
        return
    parts = form.parts
    if form.kind == "relation":
        sides = (read_form(side.text) for side in parts if not is_name(side.text))
        parts = tuple(side for side in sides if side != form)
    if form.kind == "cases":
        parts = tuple(row.parts[0] for row in parts)
    for part in parts:
        check_readable(part)
