"""A headless Chromium, driven over the pipe of its DevTools protocol: nothing has to be installed beside the browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60


def find_browser() -> str | None:
    """The program of a Chromium or Chrome; None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class Browser:
    """A browser with one page."""

    def __init__(self, program: str):
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        # The browser reads commands from descriptor 3 and writes answers to 4.
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self._profile.name}", "--no-first-run", "--disable-dev-shm-usage", "about:blank"]
        shell = ["bash", "-c", f'exec 3<&{commands} 4>&{answers}; exec "$@"', "bash", *command]
        self._process = subprocess.Popen(
            shell, pass_fds=(commands, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._number, self._buffer, self.events = 0, b"", []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol for the page; returns its result."""
        return self._call(method, self._session, **parameters)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file and waits until it is loaded. A width below 600 is that of a telephone."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read(end)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; raises AssertionError if it throws."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def problems(self) -> list[str]:
        """What the browser has complained of since the page was opened, and what the page has asked for beside itself."""
        found = [str(event) for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        requests = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return found + requests[1:]

    def picture(self, path: Path, whole: bool = True) -> None:
        """Writes a PNG of the page, or of what the window shows."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=SECONDS)
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._commands, content) :]
        end = time.monotonic() + SECONDS
        while (answer := self._read(end)).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self, end: float) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], max(end - time.monotonic(), 0))[0], f"the browser says nothing for {SECONDS} s"
            content = os.read(self._answers, 1 << 20)
            assert content, "the browser has ended"
            self._buffer += content
        content, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(content)
        if "method" in message:
            self.events.append(message)
        return message
