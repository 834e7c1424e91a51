"""Chromium without a window, driven through the DevTools protocol over a pipe; no package is needed."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
ANSWER_SECONDS = 30


def find():
    """The browser's path, or ``None``."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page. `requests` are the addresses it asked for, `complaints` what was thrown or written to its console."""

    def __init__(self, profile, *, language="en-US", size=(1280, 900), dark=False, login=None):
        self.login, self.events, self.answers = login, [], {}
        self.requests, self.complaints, self.numbers = [], [], itertools.count(1)
        self.replies = queue.Queue()
        read_end, self.to = os.pipe()
        self.heard, write_end = os.pipe()
        command = [find(), *FLAGS, f"--user-data-dir={profile}", f"--lang={language}", "about:blank"]
        script = f'exec "$@" 3<&{read_end} 4>&{write_end}'  # the browser reads 3 and writes 4
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(read_end, write_end),
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_end)
        os.close(write_end)
        self.session, self.lock = None, threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{name}.enable")
        if login:
            self.send("Fetch.enable", handleAuthRequests=True)
        self.send("Emulation.setLocaleOverride", locale=language)
        self.send("Emulation.setUserAgentOverride", userAgent="test", acceptLanguage=language)
        self.look(size, dark=dark)

    def _listen(self):
        rest = b""
        with contextlib.suppress(OSError):
            while data := os.read(self.heard, 1 << 16):
                *whole, rest = (rest + data).split(b"\0")
                for message in map(json.loads, whole):
                    self._heard(message)
        os.close(self.heard)
        self.replies.put(None)

    def _heard(self, message):
        if "id" in message:
            self.replies.put(message)
            return
        kind, facts = message["method"], message["params"]
        if kind == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            thrown = facts["exceptionDetails"]
            self.complaints.append(thrown.get("exception", {}).get("description") or thrown["text"])
        elif kind == "Runtime.consoleAPICalled":
            self.complaints.append(str(facts["args"]))
        elif kind == "Log.entryAdded":
            self.complaints.append(facts["entry"]["text"])
        elif kind == "Fetch.requestPaused":
            self._post("Fetch.continueRequest", requestId=facts["requestId"])
        elif kind == "Fetch.authRequired":
            answer = {"response": "ProvideCredentials", "username": self.login[0], "password": self.login[1]}
            self._post("Fetch.continueWithAuth", requestId=facts["requestId"], authChallengeResponse=answer)

    def _post(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        with self.lock:
            os.write(self.to, json.dumps(message).encode() + b"\0")
        return number

    def send(self, method, **parameters):
        """A command's result."""
        number = self._post(method, **parameters)
        while True:
            reply = self.replies.get(timeout=ANSWER_SECONDS)
            if reply is None:
                raise RuntimeError("the browser ended")
            if reply["id"] == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def look(self, size, *, dark=False):
        """The window's size in pixels, and which colours the person prefers."""
        wide, high = size
        self.send("Emulation.setDeviceMetricsOverride", width=wide, height=high, deviceScaleFactor=1, mobile=wide < 600)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script):
        """The value of an expression, promises awaited."""
        made = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in made:
            raise AssertionError(made["exceptionDetails"]["exception"]["description"])
        return made["result"].get("value")

    def open(self, url):
        """Go to a page and wait until it has begun."""
        self.send("Page.navigate", url=url)
        self.wait("document.body && document.body.dataset.ready")

    def wait(self, script, seconds=20):
        """The first value of an expression that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):
                if value := self.run(script):
                    return value
            time.sleep(0.03)
        raise AssertionError(f"{script!r} was never true; the page says {self.run('document.body.innerText')!r}")

    def press(self, key, *, ctrl=False):
        """A key as a person presses it."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") and not ctrl else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, field, text):
        """Replace what a field holds."""
        self.run(f"(e => {{ e.closest('details') && (e.closest('details').open = true); e.focus(); e.select(); }})"
                 f"(document.getElementById({json.dumps(field)}))")  # fmt: skip
        self.send("Input.insertText", text=text)

    def click(self, selector):
        """A click in the middle of an element."""
        box = self.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
                       f" return [b.x + b.width / 2, b.y + b.height / 2]; }})"
                       f"(document.querySelector({json.dumps(selector)}))")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def shot(self, path, *, whole=False):
        """A PNG of what is seen."""
        made = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(made["data"]))

    def close(self):
        """End the browser."""
        with contextlib.suppress(Exception):
            self.session = None
            self.send("Browser.close")
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            os.close(self.to)
