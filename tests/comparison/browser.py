# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Real headless Chromium, by its DevTools protocol: what a page looks like, and what of it can be measured."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp


@dataclass(frozen=True)
class View:
    width: int
    dark: bool

    @property
    def name(self) -> str:
        return f"{self.width}-{'dark' if self.dark else 'light'}"


@dataclass
class Seen:
    """What a view of a page has shown: the result of a script, what went wrong or was asked for, and a picture of all of it (PNG)."""

    measured: Any
    complaints: list[str]
    requests: list[str]
    screenshot: bytes


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look(
    executable: str, what: list[tuple[Path, View]], script: str, whole: bool = False
) -> dict[tuple[Path, View], Seen]:
    """Opens pages in one browser, and runs a script in each. The pictures are of the first 900 pixels, or of the `whole` page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                executable,
                "--headless=new",
                "--no-sandbox",  # which root may not use
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            lines = itertools.takewhile(bool, iter(process.stderr.readline, None))
            url = next(line.split()[-1] for line in lines if line.startswith("DevTools listening on "))
            return asyncio.run(_look(url, what, script, whole))
        finally:
            process.kill()
            process.communicate()


async def _look(url: str, what: list[tuple[Path, View]], script: str, whole: bool) -> dict[tuple[Path, View], Seen]:
    found = {}
    async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=0) as socket:
        for page, view in what:
            found[page, view] = await _look_once(_Session(socket), page, view, script, whole)
    return found


class _Session:
    """A tab of its own."""

    _ids = itertools.count(1)

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket = socket
        self.id: str | None = None
        self.events: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        message = await self.socket.receive_json(timeout=60)
        if "method" in message:
            self.events.append(message)
        return message

    async def call(self, method: str, **options: Any) -> dict[str, Any]:
        number = next(self._ids)
        session = {} if self.id is None else {"sessionId": self.id}
        await self.socket.send_json({"id": number, "method": method, "params": options, **session})
        while (message := await self.receive()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    async def wait_for(self, event: str) -> None:
        while not any(message["method"] == event for message in self.events):
            await self.receive()


async def _look_once(tab: _Session, page: Path, view: View, script: str, whole: bool) -> Seen:
    target = (await tab.call("Target.createTarget", url="about:blank"))["targetId"]
    tab.id = (await tab.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        await tab.call(f"{domain}.enable")
    await tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=view.width,
        height=900,
        deviceScaleFactor=1 if view.width > 600 else 2,
        mobile=view.width <= 600,
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if view.dark else "light"}
    await tab.call("Emulation.setEmulatedMedia", features=[scheme])
    tab.events.clear()
    await tab.call("Page.navigate", url=page.resolve().as_uri())
    await tab.wait_for("Page.loadEventFired")
    result = await tab.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result
    options = {}
    if whole:
        size = (await tab.call("Page.getLayoutMetrics"))["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
    picture = await tab.call("Page.captureScreenshot", **options)
    events = tab.events
    await tab.call("Target.closeTarget", targetId=target)
    wrong = (
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Log.entryAdded",
        "Network.loadingFailed",
        "Page.javascriptDialogOpening",
    )
    return Seen(
        measured=result["result"].get("value"),
        complaints=[f"{event['method']}: {event['params']}" for event in events if event["method"] in wrong],
        requests=[
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ],
        screenshot=base64.b64decode(picture["data"]),
    )
