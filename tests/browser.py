"""A real browser without a window: Chromium, told what to do by its DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import websocket  # websocket-client

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


class Browser:
    """One tab. What the page reports (errors, refused loads, hosts asked) is in `complaints` and `hosts`."""

    def __init__(self, profile: Path) -> None:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium's sandbox does not work for
        options = ["--headless=new", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}", *root]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file = profile / "DevToolsActivePort"
        self._until(lambda: port_file.is_file() and "\n" in port_file.read_text(), "Chromium did not start")
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as reply:
            (target,) = [target for target in json.load(reply) if target["type"] == "page"]
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=30)
        self.ids = itertools.count(1)
        self.complaints, self.hosts, self.loads = [], set(), 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=20)

    def call(self, method: str, **parameters: object) -> dict:
        """One command of the protocol, and its result."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._take_note(message)

    def _take_note(self, event: dict) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])
        elif event.get("method") == "Page.loadEventFired":
            self.loads += 1
        elif event.get("method") == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            self.hosts.add("" if url.startswith("data:") else url.partition("://")[2].partition("/")[0])

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> object:
        """Evaluate until it is true, and return what it is; a node counts as true."""
        found, once = None, f"(value => value instanceof Node || value)({expression})"

        def look() -> bool:
            nonlocal found
            found = self.evaluate(f"new Promise(done => setTimeout(() => done({once}), 20))")
            return bool(found)

        self._until(look, expression)
        return found

    def open(self, url: str) -> None:
        self._and_load("Page.navigate", url=url)

    def reload(self) -> None:
        self._and_load("Page.reload")

    def _and_load(self, method: str, **parameters: object) -> None:
        before = self.loads
        self.call(method, **parameters)
        self._until(lambda: self.evaluate("true") and self.loads > before, f"{method} {parameters}")

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does."""
        self.wait_for(f"document.querySelector({json.dumps(selector)})")
        box = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **middle)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, **more: object) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text, **more
            )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @staticmethod
    def _until(condition, what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)
