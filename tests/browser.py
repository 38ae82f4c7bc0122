"""A real Chromium for tests, without a window and without a network, driven through its DevTools protocol.

Contract: `chromium()` is a fixture's generator; the browser, its profile and its port are gone when it ends. Whatever the page
complains about (console errors, exceptions, violations of its policy, files that do not load) is kept in `complaints`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_S = 20.0
KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "Home": 36,
    "End": 35,
    "Enter": 13,
    "Tab": 9,
    "n": 78,
}


class Browser:
    """One tab. Every call waits for its answer."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._process, self._port = process, port
        self._number = 0
        self.complaints: list[str] = []
        self._loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{self._port}/json/list") as answer:
            pages = [t for t in await answer.json() if t["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def close(self) -> None:
        async def close() -> None:
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(close())
        self._loop.close()

    # -------------------------------------------------------------------------------------------- protocol

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), WAIT_S))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            said = json.loads((await self._socket.receive()).data)
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said.get('error')}"
                return said["result"]
            self._listen(said)

    def _listen(self, event: dict[str, Any]) -> None:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    # -------------------------------------------------------------------------------------------- what a person does

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"].get("exception", {}).get("description")
        return got["result"].get("value")

    def wait(self, expression: str, timeout_s: float = WAIT_S) -> None:
        """Waits until an expression holds."""
        end = time.monotonic() + timeout_s
        poll = f"new Promise(r => {{ const t = performance.now(); const f = () => {{ const v = !!({expression}); \
if (v || performance.now() - t > 2000) r(v); else setTimeout(f, 20); }}; f(); }})"
        while True:
            try:
                value = self.eval(poll)
            except AssertionError as exc:  # the page is being replaced
                value = None
                if time.monotonic() > end:
                    raise AssertionError(f"{expression}: {exc}; complaints: {self.complaints}") from exc
            if value:
                return
            assert time.monotonic() < end, f"{expression} does not come true; complaints: {self.complaints}"

    def open(self, address: str | Path, hash_: str = "") -> None:
        """Opens a page anew and waits until it has drawn itself."""
        url = address if isinstance(address, str) else address.resolve().as_uri()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url + hash_)
        self.wait("document.body && document.body.dataset.ready")

    def go(self, hash_: str) -> None:
        """Another address of the same page; waits until it is drawn."""
        before = self.eval("torl.rendered")
        if self.eval(
            f"(() => {{ const h = location.hash; location.hash = {json.dumps(hash_)}; return h !== location.hash; }})()"
        ):
            self.wait(f"torl.rendered > {before}")

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of an element."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector: str) -> None:
        """The same by touch."""
        x, y = self._middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _middle(self, selector: str) -> tuple[float, float]:
        """Of the widest line of an element, scrolled to where it can be seen."""
        find = f"document.querySelector({json.dumps(selector)})"
        assert self.eval(f"!!{find}"), f"{selector} is not there"
        x, y = self.eval(
            f"(() => {{ const n = {find}; n.scrollIntoView({{block: 'center'}}); "
            "const r = [...n.getClientRects()].sort((a, b) => b.width - a.width)[0]; "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y

    def press(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = KEYS[key]
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def text(self, selector: str) -> str:
        return self.eval(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def texts(self, selector: str) -> list[str]:
        return self.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def dark(self, on: bool) -> None:
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def chromium(profile: Path) -> Iterator[Browser]:
    """A browser for a fixture to yield; skips where there is none."""
    if BINARY is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` (.ci/run does)")
    flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0", "--window-size=1400,900"]
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--mute-audio",
        "--no-sandbox",
    ]
    command = [BINARY, *flags, *quiet, "--disable-dev-shm-usage", f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        browser = Browser(process, _port(process, profile))
        try:
            yield browser
        finally:
            browser.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port(process: subprocess.Popen[bytes], profile: Path) -> int:
    file = profile / "DevToolsActivePort"
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and process.poll() is None:
        if file.is_file() and (lines := file.read_text().split()):
            return int(lines[0])
        time.sleep(0.05)  # Chromium says by a file alone where it listens
    pytest.fail(f"Chromium did not start: see {profile.parent / 'chromium.log'}")
