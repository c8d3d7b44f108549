"""A headless Chromium, spoken to over a pipe: what a page looks like to a reader, for tests."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
_PLAYWRIGHT = ("chrome-linux*/chrome", "chrome-headless-shell-linux*/*shell", "chrome-linux*/headless_shell")
_SECONDS = 60.0


def find_browser() -> str | None:
    """A Chromium on the path, or playwright's; None where there is none that a pipe can be given to."""
    if os.name == "nt":
        return None
    on_path = (shutil.which(name) for name in NAMES)
    kept = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    downloaded = (str(file) for pattern in _PLAYWRIGHT for file in sorted(kept.glob(f"chromium*/{pattern}")))
    return next((path for path in (*on_path, *downloaded) if path), None)


@dataclass
class Seen:
    """What a browser saw of a page."""

    headings: list[str]
    width: int
    text: str
    figures: list[tuple[float, float]]
    smallest: float  # height of the smallest letters in a figure, in pixels
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


_LOOK = """JSON.stringify({
  headings: [...document.querySelectorAll("h1, h2")].map(e => e.textContent),
  width: document.documentElement.scrollWidth,
  text: document.body.innerText,
  figures: [...document.querySelectorAll("figure svg")].map(e => [e.clientWidth, e.clientHeight]),
  smallest: Math.min(...[...document.querySelectorAll("figure svg text")].filter(e => e.getClientRects().length)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().d)),
})"""


class Browser:
    """One Chromium process, and the Chrome DevTools protocol on its descriptors 3 and 4."""

    def __init__(self, program: str, profile: Path) -> None:
        from_us, self._write = os.pipe()
        self._read, to_us = os.pipe()

        def give_descriptors() -> None:
            spare = (os.dup(from_us), os.dup(to_us))
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        options = ("--headless", "--disable-gpu", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}"],
            preexec_fn=give_descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._buffer, self._number, self._events = b"", 0, list[dict[str, Any]]()
        self._deadline = time.monotonic() + _SECONDS

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)

    def look(self, page: Path, *, width: int, dark: bool) -> Seen:
        """Open a file in a new tab of a screen so wide, and tell what is there."""
        self._events.clear()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", tab)
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", tab, **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", tab, features=[scheme])
        self._call("Page.navigate", tab, url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._message())
        found = self._call("Runtime.evaluate", tab, expression=_LOOK, returnByValue=True)["result"]["value"]
        seen = Seen(**json.loads(found))
        for event in self._events:
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                seen.errors.append(json.dumps(event["params"])[:500])
            elif event["method"] == "Network.requestWillBeSent":
                seen.requests.append(event["params"]["request"]["url"])
        return seen

    def _call(self, method: str, tab: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": tab} if tab else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, self._deadline - time.monotonic()))
            assert ready, "the browser did not answer in time"
            got = os.read(self._read, 1 << 16)
            assert got, "the browser went away"
            self._buffer += got
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
