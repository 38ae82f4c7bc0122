"""Data of your own: anything that yields rows, in columns of any name.

PYTHONPATH=examples torl train examples/own_data.yaml
"""

from collections.abc import Iterator
from typing import Any


def sums(how_many: str) -> Iterator[dict[str, Any]]:
    """Called with the `path` of data.train; here it says how many problems there are to be."""
    for n in range(int(how_many)):
        a, b = 12 + 7 * n % 88, 3 + 5 * n % 61
        yield {"task": f"{a}*{b}+{n % 10}", "result": a * b + n % 10, "digits": len(str(a * b))}
