"""docs/design.md shows the whole tree: one line for each module, with a process of the table above it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESIGN = (ROOT / "docs/design.md").read_text()


def tree_lines() -> list[tuple[str, str, str]]:
    """(path, process, what) of every module line in the tree."""
    block = DESIGN.split("## The tree", 1)[1].split("```", 2)[1]
    found, folders = [], [""]
    for line in block.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, *rest = line.split(maxsplit=2)
        if name.endswith("/"):
            folders[depth:] = [folders[depth - 1] + name if depth else name]
        else:
            process, what = rest if len(rest) == 2 else ("", "")
            found.append((folders[depth - 1] + name, process, what))
    return found


def test_tree_and_folder_are_the_same() -> None:
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "torl_mega").rglob("*.py") if p.name != "__init__.py"}
    assert sorted(path for path, _, _ in tree_lines()) == sorted(modules)


def test_every_module_says_where_it_runs_and_what_it_is() -> None:
    processes = set(re.findall(r"^\| `(\w+)` \|", DESIGN, re.M))
    assert len(processes) > 5
    for path, process, what in tree_lines():
        assert set(process.split(",")) <= processes, path
        assert what, path


def test_few_modules_stand_in_the_hall() -> None:
    assert len([p for p in (ROOT / "torl_mega").glob("*.py") if p.name != "__init__.py"]) <= 12


def test_extending_names_files_that_exist() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    named = re.findall(r"`((?:torl_mega|tests|conf|tools|docs)/[\w./-]+\.\w+)`", text)
    assert len(named) > 12
    assert [name for name in named if not (ROOT / name).exists()] == []
