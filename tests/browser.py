"""A real browser for the tests of HTML pages."""

import json
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = (1400, 900), (420, 800)


class Browser:
    """A headless Chromium, driven over a pipe by its DevTools protocol."""

    def __init__(self, program, folder):
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        # The sandbox needs rights that containers lack; only pages of these tests are opened.
        flags += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        # The protocol is spoken on file descriptors 3 (in) and 4 (out).
        shell = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", shell, program, *flags, "about:blank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.buffer, self.sent, self.session, self.events = b"", 0, None, []
        # A browser that hangs is ended, which ends the pipe, which fails the test that waits on it.
        self.guard = threading.Timer(120, self.process.kill)
        self.guard.start()

    def close(self):
        self.guard.cancel()
        if self.process.poll() is None:
            self.session = None
            self.process.stdin.write(b'{"id":0,"method":"Browser.close"}\0')
            self.process.stdin.flush()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def send(self, method, **parameters):
        """The result of a command; events that come before it are kept."""
        self.sent += 1
        number = self.sent
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        answer = self.read(lambda received: received.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self, wanted):
        while True:
            while b"\0" not in self.buffer:
                chunk = self.process.stdout.read1(1 << 16)
                assert chunk, "the browser ended"
                self.buffer += chunk
            message, self.buffer = self.buffer.split(b"\0", 1)
            received = json.loads(message)
            if "method" in received:
                self.events.append(received)
            if wanted(received):
                return received

    def open(self, path, size=WIDE, scheme="light"):
        """Loads a page in a tab of its own; returns when it is drawn."""
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")
        width, height = size
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        if "Page.loadEventFired" not in self.names():
            self.read(lambda received: received.get("method") == "Page.loadEventFired")
        return self

    def names(self):
        return [event["method"] for event in self.events]

    def run(self, script):
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, selector, click=False):
        """Moves the mouse to the middle of an element, as a hand would."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                       f"(document.querySelector('{selector}').getBoundingClientRect())")  # fmt: skip
        place = {"x": box[0], "y": box[1]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def key(self, name, code=0):
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def choose(self, control, value):
        """Sets a control and lets the page know, which is what a browser's own drop-down list does."""
        self.run(
            f"(control => {{ control.value = '{value}'; "
            "control.dispatchEvent(new Event('change', {bubbles: true})); })"
            f"(document.getElementById('{control}'))"
        )

    def texts(self, selector):
        return self.run(f"Array.from(document.querySelectorAll('{selector}'), found => found.textContent)")

    def complaints(self):
        """Errors and warnings on the console, and exceptions."""
        found = [event for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        calls = [event for event in self.events if event["method"] == "Runtime.consoleAPICalled"]
        return found + [call for call in calls if call["params"]["type"] in ("error", "warning", "assert")]

    def requests(self):
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@contextmanager
def opened(profile, kind=Browser):
    """A browser with its profile in an empty folder; the test is skipped where none is installed."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is on PATH: the page is not opened in a browser")
    browser = kind(program, profile)
    try:
        yield browser
    finally:
        browser.close()
