"""A real browser without a window, for pages: what it loads, says, runs and draws.

Chromium is spoken to through two pipes, in the DevTools protocol, so no port and no client library is needed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.object_store import Unavailable

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
_CONTRASTS = """
(() => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const linear = value => value <= 10 ? value / 3295 : ((value / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const paper = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] > .99) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    if (ink[3] < .01) continue;
    const [dark, light] = [luminance(ink), luminance(paper(element))].sort((one, other) => one - other);
    const contrast = (light + .05) / (dark + .05);
    if (contrast < 4.5) poor.push(`${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return poor;
})()
"""


@dataclass
class Loaded:
    """What came of a page."""

    requests: list[str] = field(default_factory=list)
    """URLs asked for, but for those that hold their content themselves."""
    complaints: list[str] = field(default_factory=list)
    """Of the console: errors, warnings, what a policy forbade; and exceptions."""


class Browser:
    """One tab.

    Args:
        program: its path.
        home: a folder for its files.
    """

    def __init__(self, program: str, home: Path) -> None:
        ours_to, to = os.pipe()
        back, ours_back = os.pipe()
        # the shell gives the pipes the numbers 3 and 4, which Chromium wants
        command = f'exec "$0" "$@" 3<&{ours_to} 4>&{ours_back}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *_FLAGS, f"--user-data-dir={home}", "about:blank"],
            pass_fds=(ours_to, ours_back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(home)},
        )
        os.close(ours_to)
        os.close(ours_back)
        self._to, self._back = os.fdopen(to, "wb", buffering=0), os.fdopen(back, "rb")
        self._numbers, self._buffer, self._session = itertools.count(1), b"", ""
        self._page = Loaded()
        targets = self._ask("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, page: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> Loaded:
        """Load a file at a width, in pixels, and wait until it is drawn."""
        self._page = Loaded()
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._next()
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")
        return self._page

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to in the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise ValueError(found["exceptionDetails"])
        return found["result"].get("value")

    def poor_contrasts(self) -> list[str]:
        """Texts that are seen, and have less contrast than 4.5:1 (WCAG 2, level AA), with their contrast."""
        found: list[str] = self.value(_CONTRASTS)
        return found

    def close(self) -> None:
        """End it."""
        with suppress(OSError, EOFError):
            self._session = ""
            self._ask("Browser.close")
        for pipe in (self._to, self._back):
            pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        self._to.write(json.dumps(request).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise ValueError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._back.fileno(), 1 << 16)
            if not piece:
                raise EOFError(f"the browser has ended with {self._process.poll()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            self._page.requests += [] if url.startswith("data:") else [url]
        elif method == "Runtime.exceptionThrown":
            self._page.complaints.append(json.dumps(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self._page.complaints.append(json.dumps(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self._page.complaints.append(said["entry"]["text"])


@contextmanager
def running(home: Path) -> Iterator[Browser]:
    """A browser.

    Raises:
        Unavailable: there is none.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        raise Unavailable("chromium: not found; apt-get install chromium")
    browser = Browser(program, home)
    try:
        yield browser
    finally:
        browser.close()
