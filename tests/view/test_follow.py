"""`torl view --follow` on a run that grows: the page in a real browser, and what the server answers to others."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from recorded_run import MODEL, Maker, add_step, make_run

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.view.command import view

TORL = str(Path(sys.executable).with_name("torl"))


@pytest.fixture
def following(tmp_path: Path) -> Iterator[tuple[Path, str, subprocess.Popen[str]]]:
    """A run that has not begun, and the address under which it is followed."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"model": {"path": str(MODEL)}}}))
    command = [TORL, "view", str(run), "--follow", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said, process.stderr.read() if process.stderr else ""
        yield run, json.loads(said)["url"], process
    finally:
        process.kill()
        process.communicate()


def test_new_steps_appear_without_a_reload(
    browser: Browser, following: tuple[Path, str, subprocess.Popen[str]]
) -> None:
    run, url, process = following
    maker = Maker(Tokenizer(MODEL), random.Random(0))
    browser.call("Page.navigate", url=url)
    browser.wait("document.querySelector('.nothing')?.textContent.startsWith('Waiting for the first step')")
    browser.eval("window.same = true")
    add_step(run, 0, [maker.group(n, 0, 4, n) for n in range(4)])
    browser.wait("document.title.includes('step 0') && document.querySelectorAll('ol.virtual li').length === 4", 90)
    browser.go("#step=0&group=2&sample=1")
    browser.wait("document.querySelector('.tokens')")
    add_step(run, 1, [maker.group(n, 1, 4, n) for n in range(3)])
    browser.wait("document.querySelectorAll('.where option').length === 3")  # all, step 0, step 1
    assert browser.eval("location.hash").startswith("#step=0&group=2")  # the reader stays where they are
    assert browser.text(".top .live") == "following"
    browser.go("")  # without an address the page shows what is newest
    browser.wait("document.title.includes('step 1') && document.querySelectorAll('ol.virtual li').length === 3")
    add_step(run, 2, [maker.group(n, 2, 4, n) for n in range(2)])
    browser.wait("document.title.includes('step 2') && document.querySelectorAll('ol.virtual li').length === 2")
    assert browser.eval("window.same") is True
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    browser.wait("document.querySelector('.top .live').textContent.includes('no longer served')")
    browser.complaints.clear()  # Chromium's own lines about the server that has gone
    browser.open(run / "view/index.html")
    assert browser.eval("document.querySelector('.top .live')") is None


def test_the_server_gives_the_pages_files_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, problems=2, size=2)
    assert view(run) == 0
    (run / "view/secret.txt").write_text("no")
    (run / "outside.js").write_text("no")
    os.symlink(run / "outside.js", run / "view/link.js")
    process = subprocess.Popen([TORL, "view", str(run), "--follow", "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = json.loads(process.stdout.readline())["url"].removeprefix("http://").rstrip("/")

        def ask(path: str, method: str = "GET", host: str = address) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection(address, timeout=20)
            connection.putrequest(method, path, skip_host=True)
            if host:
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert address.startswith("127.0.0.1:")
        assert ask("/")[1] == (run / "view/index.html").read_bytes()
        assert ask("/index.html")[0] == ask("/app/core.js")[0] == ask("/data/run/step_00000.index.js?1")[0] == 200
        assert ask("/", "HEAD") == (200, b"")
        headers = urllib.request.urlopen(f"http://{address}/data/manifest.js").headers
        assert (
            headers["Cross-Origin-Resource-Policy"] == "same-origin"
        )  # no page of another site can load the data as a script
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert ask("/", host="localhost:" + address.split(":")[1])[0] == 200
        for host in ("", "evil.example", "127.0.0.1", "evil.example:" + address.split(":")[1]):
            assert ask("/", host=host)[0] in (400, 421), host
        outside = [
            "/secret.txt",
            "/link.js",
            "/../outside.js",
            "/%2e%2e/outside.js",
            "/..%2foutside.js",
            "//etc/passwd",
        ]
        no_file = ["/app", "/app/", "/data/run/written.json", "/a%00b.js", "/" + "a" * 5000 + ".js"]
        for path in outside + no_file:
            assert ask(path)[0] in (404, 414), path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask("/", method)[0] == 501, method
        port = address.split(":")[1]
        taken = subprocess.run(
            [TORL, "view", str(run), "--follow", "--port", port], capture_output=True, text=True, check=False
        )
        assert taken.returncode == 1
        assert f"--port {port} cannot be used: Address already in use" in taken.stderr
        assert taken.stderr.count("\n") == 1
    finally:
        process.kill()
        process.communicate()
