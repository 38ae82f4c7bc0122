"""Writes docs/plans/: what `torl plan` prints for every shipped config, and for 7B on one node of eight H100.

python tools/make_plans_doc.py             writes the pages
python tools/make_plans_doc.py --check     exit code 1 when a page does not say what the planner says
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from torl_mega.launch.plan import PlanOptions, run

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/plans"
HEAD = """# {conf}

{what}

Printed by `{command}`. Times are estimates from the assumptions at the end, not measurements
(docs/cluster.md says where they come from).

```
{plan}
```
"""


def pages() -> Iterator[tuple[str, str]]:
    """(name, text) of every page."""
    confs = [
        *sorted(ROOT.glob("conf/torl_*.yaml")),
        ROOT / "conf/moe_30b_a3b.yaml",
        *sorted(ROOT.glob("conf/clusters/*.yaml")),
    ]
    for conf in confs:
        yield f"{conf.stem}.md", page(conf)
    yield "torl_7b_1xh100.md", page(ROOT / "conf/torl_7b.yaml", nodes=1)


def page(conf: Path, nodes: int | None = None) -> str:
    """The plan of one config on the nodes it names, or on `nodes`."""
    name = str(conf.relative_to(ROOT))
    what = conf.read_text().partition("\n")[0].removeprefix("# ")
    options = "" if nodes is None else f" --nodes {nodes}"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(conf, options=PlanOptions(nodes=nodes))
    plan = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
    return HEAD.format(conf=name, what=what, command=f"torl plan {name}{options}", plan=plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages differ")
    check, wrong = parser.parse_args().check, []
    for name, text in pages():
        path = PAGES / name
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            wrong.append(str(path.relative_to(ROOT)))
    if wrong:
        print(f"{', '.join(wrong)}: not what the planner says; run tools/make_plans_doc.py", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
