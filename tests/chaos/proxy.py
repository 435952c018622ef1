"""What can a network do to a conversation with Redis? A TCP proxy that does it on purpose.

Threads, not asyncio: tests drive it from synchronous code and programs in other processes use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import socket
import threading
import time
from importlib.resources import files
from urllib.parse import urlsplit

COMMIT_SCRIPT = files("worker").joinpath("commit.lua").read_bytes()
COMMIT = hashlib.sha1(COMMIT_SCRIPT, usedforsecurity=False).hexdigest()
"""By which a commit is recognised when it passes."""
PATIENCE_S = 30.0


class Trap:
    """Holds one commit: its request before the server sees it, or its reply before the client does.

    Attributes:
        sprung: set when the commit is held; then somebody must `release` it.
    """

    def __init__(self, when: str, after: int, mark: str = COMMIT) -> None:
        self.when = when
        self.mark = mark.encode()
        self.sprung = threading.Event()
        self._left = after
        self._released = threading.Event()
        self._forward = False

    def release(self, *, forward: bool) -> None:
        """Let the held bytes go on, or drop them together with the connection."""
        self._forward = forward
        self._released.set()

    def counts(self, data: bytes) -> bool:
        """Return True for the request that the trap waits for."""
        if self.mark in data and not self.sprung.is_set():
            self._left -= 1
            return self._left == 0
        return False

    def hold(self) -> bool:
        """Hold until released; return whether to forward."""
        self.sprung.set()
        self._released.wait(PATIENCE_S)
        return self._forward


class _Line:
    """One client's connection."""

    def __init__(self) -> None:
        self.trap: Trap | None = None  # its reply is awaited


class Proxy:
    """Passes bytes between clients and a server.

    Attributes:
        url: where clients connect.
        target_url: where they get to; those who are connected stay where they are.
        lose_replies: this many of the server's next answers are swallowed and the connection cut.
        down: refuse everybody; `cut` ends those who are connected.
        trap: holds one commit.
        slow_s: longest pause between two slices of a message; 0 passes messages whole.
    """

    def __init__(self, target_url: str) -> None:
        self.target_url = target_url
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._rng = random.Random(0)
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.lose_replies = 0
        self.down = False
        self.trap: Trap | None = None
        self.slow_s = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def set_trap(self, when: str, after: int = 1, mark: str = COMMIT) -> Trap:
        """Hold the `after`-th commit from now on, at its "request" or its "reply"."""
        self.trap = Trap(when, after, mark)
        return self.trap

    def stall(self) -> None:
        """Let nothing pass any more, while every connection stays open (a black hole)."""
        self._flowing.clear()

    def flow(self) -> None:
        """End a stall; what was held goes on its way."""
        self._flowing.set()

    def cut(self) -> None:
        """Close every connection now."""
        for link in list(self._open):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and cut everybody."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self.trap is not None:
            self.trap.release(forward=False)
        self.flow()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.down or (server := self._dial()) is None:
                    client.close()
                    continue
                self._open |= {client, server}
                line = _Line()
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=(*pair, line), daemon=True).start()

    def _dial(self) -> socket.socket | None:
        parts = urlsplit(self.target_url)
        try:
            return socket.create_connection((str(parts.hostname), int(parts.port or 0)))
        except OSError:
            return None

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool, line: _Line) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._flowing.wait()
                if not (self._reply_passes(line) if replies else self._request_passes(data, line)):
                    break
                self._send(sink, data)
        for link in (source, sink):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()

    def _request_passes(self, data: bytes, line: _Line) -> bool:
        trap = self.trap
        if trap is None or not trap.counts(data):
            return True
        if trap.when == "request":
            return trap.hold()
        line.trap = trap
        return True

    def _reply_passes(self, line: _Line) -> bool:
        if line.trap is not None:
            trap, line.trap = line.trap, None
            return trap.hold()
        with self._lock:
            lost = self.lose_replies > 0
            self.lose_replies -= lost
        return not lost

    def _send(self, sink: socket.socket, data: bytes) -> None:
        """Pass a message on: whole, or its first bytes one by one and the rest in slices."""
        if not self.slow_s:
            sink.sendall(data)
            return
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cuts = [*range(min(8, len(data))), *range(8, len(data), 4_096), len(data)]
        for first, last in itertools.pairwise(cuts):
            sink.sendall(data[first:last])
            time.sleep(self._rng.random() * self.slow_s)
