"""An endpoint as a child process: started, waited for, and stopped, whichever engine answers."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from prune2serve.errors import Prune2ServeError

LOG_TAIL_LINES = 15
READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0


class Engine(Protocol):
    """Something that answers OpenAI's API at `url` between `start` and `stop`."""

    url: str

    def start(self) -> None: ...

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None: ...

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None: ...


class ServerProcess:
    """A server in a process group of its own, with its output in a log file."""

    def __init__(
        self,
        command: list[str],
        *,
        name: str,
        host: str,
        port: int,
        log_file: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        """`name` stands in messages; `env` is added to this process's environment."""
        self.name, self.log_file = name, log_file
        self.url = f"http://{_reachable(host)}:{port}"
        self._command = command
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        """Start the child.

        Raises:
            Prune2ServeError: the program is not there.
        """
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_file.open("wb")
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            self._log.close()
            raise Prune2ServeError(f"cannot start {self.name}: {self._command[0]}: {error.strerror}") from None

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return once /health answers 200.

        Raises:
            Prune2ServeError: the child died (with its last lines) or is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            self.check_alive()
            if time.monotonic() > deadline:
                raise Prune2ServeError(
                    f"{self.name} was not ready within {timeout_s:g} s; the end of {self.log_file}:\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def check_alive(self) -> None:
        """Raise Prune2ServeError with the log's last lines when the child has ended."""
        status = self.poll()
        if status is not None:
            raise Prune2ServeError(
                f"{self.name} ended with status {status}; the end of {self.log_file}:\n{self.log_tail()}"
            )

    def poll(self) -> int | None:
        """The child's exit status, None while it runs."""
        if self._process is None:
            raise Prune2ServeError(f"{self.name} has not been started")
        return self._process.poll()

    @property
    def pid(self) -> int:
        """The child's process id, also its group's."""
        self.poll()
        assert self._process is not None
        return self._process.pid

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Ask the child to end, then end its whole group; nothing of it is left. Return its exit status."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # the group is ended below
                process.wait(timeout_s)
        self._end_group(process)
        status = process.wait()
        if self._log is not None:
            self._log.close()
        return status

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log that are not empty."""
        text = self.log_file.read_bytes()[-65536:].decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @staticmethod
    def _end_group(process: subprocess.Popen[bytes]) -> None:
        # Workers of the child may outlive it; its session leader's id is the group's.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(
    arguments: list[str],
    *,
    log_file: Path,
    name: str = "prune2serve serve",
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Iterator[ServerProcess]:
    """Run `prune2serve serve ARGUMENTS` on a free local port for the length of a with block.

    `arguments` are the command line's, such as `["DIR", "--precision", "int4"]`, without --host and --port.
    """
    port = free_port()
    own = ["--host", "127.0.0.1", "--port", str(port)]
    # What follows -- belongs to the engine.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    command = [sys.executable, "-m", "prune2serve", "serve", *arguments[:cut], *own, *arguments[cut:]]
    server = ServerProcess(command, name=name, host="127.0.0.1", port=port, log_file=log_file)
    server.start()
    try:
        server.wait_ready(ready_timeout_s)
        yield server
    finally:
        server.stop()


def _reachable(host: str) -> str:
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
