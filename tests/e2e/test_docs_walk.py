"""The commands of the docs that train or render, run as a reader runs them: page by page, in one folder, as written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from docs_commands import Kind, kind_of
from docs_text import PAGES, ROOT, Command, commands_of

BIN = Path(sys.executable).parent


def slow_commands() -> Iterator[Command]:
    """Each once, the first run's page first: later pages look at the runs of earlier ones."""
    seen = set()
    for page in PAGES:
        for command in commands_of(page):
            if kind_of(command) is Kind.SLOW and command.words not in seen:
                seen.add(command.words)
                yield command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has before the first command, so that runs/ is its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("conf", "examples", "tools", "launch", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs/img").mkdir(parents=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder / "examples"), "CUDA_VISIBLE_DEVICES": ""}


def run(words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=900, check=False
    )


def look_and_leave(words: tuple[str, ...], folder: Path) -> None:
    """A command that serves a page until Ctrl-C: the page is there at the address that it prints, and Ctrl-C ends it well."""
    with subprocess.Popen(words, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            printed = (re.search(r"http://127\.0\.0\.1:\d+\S*", line) for line in server.stdout)
            address = next(found[0] for found in printed if found)
            with urllib.request.urlopen(address, timeout=30) as page:
                assert b"<html" in page.read()
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("command", slow_commands(), ids=lambda command: f"{command.where} {' '.join(command.words)}")
def test_it_runs(command: Command, checkout: Path) -> None:
    if "--follow" in command.words:
        look_and_leave(command.words, checkout)
        return
    done = run(command.words, checkout)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_first_runs_page_shows_what_a_run_prints(checkout: Path) -> None:
    """Accuracies are the machine's rounding's; the shape of each line is not."""
    shown = (ROOT / "docs/first_run.md").read_text()
    words = ("torl", "train", "conf/quickstart.yaml", "name=look", "num_steps=6", "eval.every_steps=3")
    said = run(words, checkout).stdout  # complete already when it comes after the commands above
    if "is complete" not in said:
        assert "eval after 0 steps: accuracy 0.223  code ratio 0.449  pass ratio 0.693" in said
        assert [line[:12] for line in said.splitlines() if line.startswith("step ")] == [
            line[:12] for line in shown.splitlines() if line.startswith("step ")
        ]
    for name in ("metrics.jsonl", "tensorboard", "trajectories", "eval", "checkpoints", "hf", "summary.json", "logs"):
        assert (checkout / "runs/look" / name).exists()
        assert f"`{name}" in shown


@pytest.mark.slow
def test_the_cluster_pages_commands_find_what_they_need(checkout: Path) -> None:
    """With a model and data of a few bytes in the places that the page downloads to, on the CPU."""
    (checkout / "models").mkdir()
    (checkout / "models/Qwen2.5-Math-7B").symlink_to(ROOT / "conf/quickstart")
    (checkout / "data").mkdir()
    row = {
        "data_source": "math",
        "prompt": [{"role": "user", "content": "6*7"}],
        "reward_model": {"ground_truth": "42"},
    }
    for name in ("torl_train", "torl_test"):
        pq.write_table(pa.Table.from_pylist([row] * 4), checkout / f"data/{name}.parquet")
    dry = [c for c in commands_of(ROOT / "docs/first_cluster_run.md") if "--dry-run" in c.words]
    assert len(dry) == 1
    small = ("data.max_prompt_tokens=1024", "model.dtype=float32", "parallel.tensor=1", "parallel.sequence=false")
    done = run((*dry[0].words, *small), checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fail" not in done.stdout
