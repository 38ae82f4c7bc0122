"""The text protocol: which program runs, and what the policy is told."""

import pytest

from torl_mega.rollout.code_block import frame, last_code_block, render_observation
from torl_mega.types import ExecutionResult, ExecutionStatus

S = ExecutionStatus


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("no code at all", None),
        ("```python\nprint(1)\n```\n```output", "print(1)\n"),
        ("```python\nprint(1)\n```output", "print(1)\n"),  # the closing fence forgotten
        ("```python\na=1\n```\nthen\n```python\nb=2\n```\n```output", "b=2\n"),
        ("So ```python\nprint(1)\n```\n", "print(1)\n"),  # opened at the end of a line, as the released code allows
        ("```python\nprint(1)", None),  # never closed
        ("```python\na=1\n```\n```python\nb=2", None),  # the last block is still open
        ("```\nprint(1)\n```\n", None),  # not python
        ("```python\n```\n", "\n"),
        ("```python\nif x:\n    print('```')\n```\n", "if x:\n    print('```')\n"),
    ],
)
def test_last_code_block(text, program):
    assert last_code_block(text) == program


def result(status=S.OK, rc=0, out="", err=""):
    return ExecutionResult(status, rc, out, err, 0.1, 0.1, 10.0)


@pytest.mark.parametrize(
    ("executed", "body"),
    [
        (result(out="42\n"), "42"),
        (result(out=""), "(no output)"),
        (
            result(S.ERROR, 1, "", "Traceback …\n  File …\nNameError: name 'x' is not defined\n"),
            "NameError: name 'x' is not defined",
        ),
        (result(S.ERROR, 1, "partial\n", "ValueError: no"), "partial"),
        (result(S.ERROR, 3), "the program exited with code 3"),
        (result(S.TIMEOUT_WALL, None, "partial"), "TimeoutError: the program ran longer than 5 seconds"),
        (result(S.MEMORY, None), "MemoryError: the program used more than 512 MB"),
        (result(S.SIGNAL, -11), "the program was killed by signal 11"),
    ],
)
def test_observations(executed, body):
    assert render_observation(executed, wall_s=5.0, memory_mb=512) == f"\n{body}\n```\n"


def test_long_observations_keep_128_characters_of_each_end():
    text = frame("a" * 200 + "b" * 200)
    assert text == "\n" + "a" * 128 + "..." + "b" * 128 + "\n```\n"
    assert frame("c" * 256) == "\n" + "c" * 256 + "\n```\n"


def test_the_policy_is_never_shown_an_infrastructure_fault():
    with pytest.raises(AssertionError):
        render_observation(result(S.INFRA, None), wall_s=5.0, memory_mb=512)
