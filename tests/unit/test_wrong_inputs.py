"""A user's mistake is one line and a code, in every command: no traceback, no silence, nothing broken by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torl_mega.config_file import load_config, origins
from torl_mega.errors import ConfigError
from torl_mega.run.files import write_text

TORL = str(Path(sys.executable).with_name("torl"))
QUICK = os.path.abspath("conf/quickstart.yaml")
BASE = f"base: {QUICK}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "are missing"),
        (b"\x00\x01\xff\xfe" * 99, "not readable as YAML"),
        ((BASE + "name: u\n").encode("utf-16"), "not readable as YAML"),
        (BASE + "\tname: x\n", "not readable as YAML"),
        (BASE + "name: a\nname: b\n", "key 'name' stands twice"),
        (BASE + "name: *nope\n", "undefined alias"),
        (BASE + "optim: &o\n  lr: 1\n  betas: *o\n", "ircular"),
        (BASE + "---\nname: b\n", "single document"),
        (BASE + "name: !!python/object:os.system x\n", "could not determine a constructor"),
        (BASE + "? [a, b]\n: 1\n", "unhashable"),
        (BASE + "1: 2\n", "1 = 1: keys should be strings"),
        (BASE + "null: 2\n", "keys should be strings"),
        (BASE + "optim:\n", "optim"),
        (BASE + "optim: [1]\n", "optim"),
        (BASE + "name: 2024-01-01\n", "name = datetime.date"),
        ("- a\n", "expected a mapping"),
        ("hello", "expected a mapping"),
        ("base: wrong.yaml\n", "goes round in a circle"),
        ("base: [a]\n", "not the name of a file"),
        ("base: 3\n", "not the name of a file"),
        ("base: .\n", "is no file"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (load_config, origins):
        if read is origins and said not in ("goes round in a circle", "ircular", "is no file"):
            continue
        with pytest.raises(ConfigError) as error:
            read(path)
        assert said in str(error.value)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ((BASE + "name: crlf\n").replace("\n", "\r\n").encode(), "crlf"),
        (b"\xef\xbb\xbf" + (BASE + "name: bom\n").encode(), "bom"),
        (json.dumps({"base": QUICK, "name": "js"}).encode(), "js"),
        ((BASE + "optim: &o {lr: 1.0e-5}\n").encode(), "quickstart"),
        ((BASE + "data: {columns: {problem: &p x, answer: *p}}\n").encode(), "quickstart"),
        ((BASE + "optim:\n  <<: {lr: 1.0e-5}\nname: merged\n").encode(), "merged"),
    ],
)
def test_a_config_that_is_only_unusual(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "sp ace" / "ü.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    assert load_config(path).name == name


def test_a_ring_of_links_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for read in (load_config, origins):
        with pytest.raises(ConfigError, match="not a config file"):
            read(tmp_path / "a")


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_text(pipe, "x")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("torl config QUICK > /dev/full", 1, "torl: error: no space is left on the device"),
        ("torl --help > /dev/full", 1, "torl: error: no space is left on the device"),
        ("torl --version > /dev/full", 1, "torl: error: no space is left on the device"),
        ("torl config QUICK > /dev/full 2>&1", 1, ""),
        ("torl config QUICK --only name >&-", 0, ""),
        ("torl config QUICK --json | head -1", 0, ""),
        ("LC_ALL=C PYTHONUTF8=0 torl config QUICK --only name", 0, ""),
        ("env -u HOME torl config QUICK --only name", 0, ""),
        ("torl report RUN", 1, "torl: error: "),
        ("torl train QUICK name=a runs_dir=/dev/null", 1, "torl: error: runs_dir"),
        ("torl try RUN x", 1, "torl: error: "),
    ],
)
def test_in_a_shell(tmp_path: Path, line: str, code: int, said: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        (run / name).write_bytes(b"\xf8\x00\xff" * 50)
    line = line.replace("torl", TORL, 1).replace("QUICK", QUICK).replace("RUN", str(run))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == (1 if said else 0), done.stderr
