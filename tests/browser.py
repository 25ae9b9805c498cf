"""A real browser for tests of pages: headless Chromium, controlled over loopback with the WebDriver protocol."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

LOADED_S = 120.0
NO_BROWSER = "no chromium with its chromedriver is installed here"
needs_browser = pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason=NO_BROWSER)

_QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")
_QUIET += ("disable-sync", "no-first-run", "disable-dev-shm-usage", "hide-scrollbars")
_QUIET += ("autoplay-policy=no-user-gesture-required",)


class Browser:
    def __init__(self, server: str, profile: Path, more: Sequence[str] = ()) -> None:
        options = {
            "args": [f"--{option}" for option in (*_QUIET, *more)] + [f"--user-data-dir={profile}"],
            "binary": shutil.which("chromium"),
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = f"{server}/session"
        self._session += "/" + self._post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _post(self, command: str, body: dict[str, Any]) -> Any:
        answer = requests.post(self._session + command, json=body, timeout=60).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["message"])
        return answer

    def open(self, uri: str) -> None:
        """Open a page and wait until it is loaded: of long pages the driver returns some while they are being read."""
        self._post("/url", {"url": uri})
        ends_s = time.monotonic() + LOADED_S
        while self._post("/execute/sync", {"script": "return document.readyState", "args": []}) != "complete":
            assert time.monotonic() < ends_s, f"{uri} is not loaded"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Run the body of an async function and return its result. Raises AssertionError with what it throws."""
        body = f"(async () => {{ {script} }})().then(it => arguments[0]([it]), err => arguments[0]([null, `${{err}}`]))"
        value, *thrown = self._post("/execute/async", {"script": body, "args": []})
        assert not thrown, thrown[0]
        return value

    def console(self) -> list[str]:
        """Lines of the page's console since the last call, including violations of its content security policy."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def devtools(self, command: str, **params: Any) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": params})

    def close(self) -> None:
        requests.delete(self._session, timeout=60)


@contextmanager
def browser(profile: Path, *options: str) -> Iterator[Browser]:
    """Chromium with a new profile, until the block ends. `options` are further ones of its command line."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        started = next(found for line in driver.stdout if (found := re.search(r"success.* on port (\d+)", line)))
        opened = Browser(f"http://127.0.0.1:{started[1]}", profile, options)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        driver.terminate()
        driver.wait(60)
