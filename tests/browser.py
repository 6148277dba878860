"""A headless Chromium, driven over its DevTools' WebSocket with the standard library alone."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "Google Chrome")


def find() -> str | None:
    """The browser's program, None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. A context manager."""

    def __init__(self):
        self._profile = tempfile.mkdtemp()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self._process = subprocess.Popen(
            [find(), *options, "--remote-debugging-port=0", f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            file = Path(self._profile) / "DevToolsActivePort"
            self.until(lambda: file.exists() and file.read_text().count("\n"), 60)
            port = int(file.read_text().split()[0])
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            path = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"].split(str(port), 1)[1]
            self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
            key = base64.b64encode(os.urandom(16)).decode()
            lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade"]
            lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
            self._socket.sendall("\r\n".join(lines).encode())
            self._in = self._socket.makefile("rb")
            while self._in.readline().strip():
                pass
            self._number, self.events = 0, []
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for attribute in ("_in", "_socket"):
            if hasattr(self, attribute):
                getattr(self, attribute).close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters):
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": parameters}).encode()
        mask, n = os.urandom(4), len(data)
        length = bytes([0x80 | n]) if n < 126 else b"\xfe" + struct.pack(">H", n)  # below 64 kB
        self._socket.sendall(b"\x81" + length + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _read(self) -> dict:
        found = b""
        while True:
            first, second = self._in.read(2)
            n = second & 127
            if n > 125:
                n = struct.unpack(">H", self._in.read(2))[0] if n == 126 else struct.unpack(">Q", self._in.read(8))[0]
            found += self._in.read(n)
            if first & 0x80:
                return json.loads(found)

    def open(self, url: str, width: int = 1280, is_dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        self.until(lambda: self.js(f"document.readyState === 'complete' && location.href.startsWith({url!r})"))

    def js(self, text: str):
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, text: str) -> None:
        """Until an expression is true."""
        self.until(lambda: self.js(text))

    @staticmethod
    def until(is_so, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"not so after {seconds} s"
            time.sleep(0.02)

    def press(self, key: str, **more) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text | more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    @property
    def complaints(self) -> list[dict]:
        """Scripts that failed, and what the page's policy kept from being loaded or run."""
        return [e["params"] for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
