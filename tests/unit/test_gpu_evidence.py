"""`make gpu-evidence` on a CPU: its pieces run small, what they leave is read back, and docs/gpu.md says just that."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHERE = {"chip": "a CPU", "torch": "x", "transformer-engine": None, "sglang": None}


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("gpu_evidence")
    finally:
        sys.path.pop(0)


def result(tool: Any, folder: Path, piece: str) -> dict[str, Any]:
    assert tool.run(piece, WHERE, folder, cpu=True), tool.read(folder, piece)
    return tool.read(folder, piece)["result"]


def test_the_table_in_the_docs_is_the_evidence(tool: Any) -> None:
    assert tool.PAGE.read_text() == tool.page(tool.FOLDER), "run `python tools/gpu_evidence.py --doc`"


def test_every_test_that_the_docs_name_is_there() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [
        name
        for name in re.findall(r"`(test_\w+)`", (ROOT / "docs/gpu.md").read_text())
        if f"def {name}(" not in written
    ]
    assert not missing


def test_the_tool_lists_every_piece(tool: Any) -> None:
    pieces = subprocess.run(
        [sys.executable, ROOT / "tools/gpu_pieces.py", "-h"], capture_output=True, text=True, check=True
    )
    assert ",".join(tool.PIECES) in "".join(pieces.stdout.split())


def test_figures_of_pieces_that_need_only_torch(tool: Any, tmp_path: Path) -> None:
    assert result(tool, tmp_path, "checksums")["equal_on_both"]
    assert result(tool, tmp_path, "head")["largest_difference"] < 1e-4
    assert result(tool, tmp_path, "ipc")["right"]


@pytest.mark.slow
def test_figures_of_pieces_that_train(tool: Any, tmp_path: Path) -> None:
    assert result(tool, tmp_path, "step_against_hf")["mean_abs_logprob_diff_to_hf"] < 2e-2
    steps = result(tool, tmp_path, "step_1_5b")
    assert steps["none"]["grad_norm"] == pytest.approx(steps["full"]["grad_norm"], rel=1e-2)
    assert result(tool, tmp_path, "save_and_load")["save_seconds"] > 0
    assert result(tool, tmp_path, "two_ranks_on_one_gpu")["as it is"] == "sum 2.0"
    assert result(tool, tmp_path, "quickstart")["max_abs_logprob_diff"] < 1e-3
    assert result(tool, tmp_path, "pinned")["pinned"]["to_device_gb_s"] > 0


def test_a_piece_that_fails_leaves_its_last_line(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PIECES", {**tool.PIECES, "nonsense": "nonsense"})
    assert not tool.run("nonsense", WHERE, tmp_path, cpu=True)
    assert "invalid choice: 'nonsense'" in tool.read(tmp_path, "nonsense")["problem"]
    assert "failed: " in tool.table(tmp_path)


def test_a_piece_that_hangs_ends(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "LIMIT_S", 0.2)
    assert not tool.run("head", WHERE, tmp_path, cpu=True)
    assert tool.read(tmp_path, "head")["problem"] == "not done after 0.2 s"


def test_what_is_there_for_this_chip_is_not_run_again(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, ran = tmp_path / "gpu.md", []
    page.write_text(f"before\n{tool.BEGIN}\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    monkeypatch.setattr(tool, "PAGE", page)
    monkeypatch.setattr(tool, "here", lambda: WHERE)
    monkeypatch.setattr(tool, "run", lambda piece, *_, **__: ran.append(piece) or True)
    known = {"piece": "head", "where": WHERE, "problem": "", "result": {"peak_gib": 4.2}}
    (tmp_path / "head.json").write_text(json.dumps(known))
    (tmp_path / "ipc.json").write_text(json.dumps({**known, "piece": "ipc", "where": {**WHERE, "chip": "another"}}))
    monkeypatch.setattr(sys, "argv", ["gpu_evidence", "machine", "head", "ipc"])
    assert tool.main() == 0
    assert ran == ["machine", "ipc"]
    assert "head: there already" in capsys.readouterr().out
    assert "| a CPU, torch x | peak gib: 4.2 |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
