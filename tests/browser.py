"""Drives a headless Chromium over its DevTools pipe: opens pages, runs scripts in them, notes every console message."""

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.test_page import CHROMIUM

TIMEOUT_S = 60.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


@dataclass
class Page:
    """One tab of a browser."""

    read: int
    write: int
    session: str | None = None
    number: int = 0
    buffer: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> Any:
        """Ask the browser for something and give its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], max(0.0, until - time.monotonic()))[0], "the browser is silent"
            received = os.read(self.read, 1 << 20)
            assert received, "the browser ended"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, address: str, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Show a page at a width, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self._loaded()
        self.call("Page.navigate", url=address)
        self._loaded()

    def _loaded(self) -> None:
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]

    def run(self, script: str) -> Any:
        """Give what an expression, or the promise it gives, comes to in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true in the page, and give what it comes to."""
        limit = time.monotonic() + TIMEOUT_S
        while not (value := self.run(script)):
            assert time.monotonic() < limit, f"not in {TIMEOUT_S:.0f} s: {script}"
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text="\r" if key == "Enter" else "")

    @property
    def complaints(self) -> list[str]:
        """List what the console was told and what was thrown since the browser started, warnings too."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        self.run("1")  # what was said before is delivered before this
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in told]

    def shoot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def started(profile: Path) -> Iterator[Page]:
    """Start a browser with one tab, and end it."""
    assert CHROMIUM is not None
    (child_reads, write), (read, child_writes) = os.pipe(), os.pipe()
    # Chromium reads from 3 and writes to 4; above 10 none of the four stands in the way of another.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_reads, child_writes)]
    command = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", CHROMIUM, *FLAGS]
    command += [f"--user-data-dir={profile}", "about:blank"]
    running = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for end in (child_reads, child_writes, *ends):
        os.close(end)
    try:
        page = Page(read, write)
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
        page.session = None
        with suppress(AssertionError, OSError):  # it may be gone before it has answered
            page.call("Browser.close")
        running.wait(timeout=20)
    finally:
        running.kill()
        running.wait()
        os.close(read)
        os.close(write)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Give a tab of a headless browser, where there is one."""
    if CHROMIUM is None:
        assert os.environ.get("REQUIRE_CHROMIUM") != "1", "REQUIRE_CHROMIUM=1, but there is no chromium on PATH"
        pytest.skip("no chromium on PATH")
    with started(tmp_path_factory.mktemp("chrome")) as page:
        yield page
