"""The two arms: `prune2serve serve` as a child process, or an endpoint that is already running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from prune2serve.errors import Prune2ServeError
from prune2serve.progress import say

READY = re.compile(r"Serving (?P<name>\S+) on (?P<url>https?://[^\s(]+)(?: \((?P<engine>[^\n]*)\))?")
CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(?P<labels>.*)\}", re.MULTILINE)
CACHE_LABELS = ("block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization")
START_TIMEOUT_S = 1800
"""Long, because the first start may export a large model."""
STOP_TIMEOUT_S = 20


@dataclass
class Endpoint:
    """A running endpoint."""

    url: str
    """Without /v1 and without a slash at the end."""
    name: str
    key: str | None = field(default=None, repr=False)
    engine: str | None = None
    """What it said of its engine, precision and KV cache when it was ready."""
    command: tuple[str, ...] = ()
    """How it was started; empty if it was running already."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    log: IO[bytes] | None = field(default=None, repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    """What it says of itself; see `describe`."""

    def stop(self) -> None:
        """Stop the child process and everything it started; harmless if there is none or it has ended."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
                break
        if self.log is not None:
            self.log.close()
        self.process = None


def start(arguments: Sequence[str], label: str) -> Endpoint:
    """Run `prune2serve serve` with `arguments` on a free port and wait until it serves.

    Raises:
        Prune2ServeError: it ended or did not become ready; the message holds its last words.
    """
    command = (sys.executable, "-m", "prune2serve", "serve", *arguments)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by Endpoint.stop
    # A group of its own, so that stopping it reaches an engine's workers too.
    process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    endpoint = Endpoint("", label, command=command, process=process, log=log)
    try:
        _wait_ready(endpoint, label)
    except BaseException:
        endpoint.stop()
        raise
    return endpoint


def _wait_ready(endpoint: Endpoint, label: str) -> None:
    assert endpoint.process is not None and endpoint.log is not None
    begun, told = time.monotonic(), 0
    while time.monotonic() - begun < START_TIMEOUT_S:
        text = _read(endpoint.log)
        # What the server says while it starts (an export that takes minutes) is passed on as it appears.
        for line in text[told:].splitlines(keepends=True):
            if line.endswith("\n"):
                told += len(line)
                say(f"  [{label}] {line.rstrip()}")
        found = READY.search(text)
        if found:
            endpoint.name, endpoint.url = found["name"], found["url"].rstrip("/").removesuffix("/v1")
            endpoint.engine = found["engine"]
            # The line may come a moment before the socket listens.
            with suppress(Prune2ServeError):
                get_text(endpoint, "/health")
                return
        if endpoint.process.poll() is not None:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
            raise Prune2ServeError(
                f"the {label} endpoint ended with exit code {endpoint.process.returncode} before it served: "
                f"{last.removeprefix('Error: ')}"
            )
        time.sleep(0.1)
    raise Prune2ServeError(f"the {label} endpoint was not ready after {START_TIMEOUT_S} s")


def _read(log: IO[bytes]) -> str:
    """Read the child's output so far without moving the offset at which it writes."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, 0).decode(errors="replace")


def attach(url: str, key: str | None, model: str | None) -> Endpoint:
    """Use an endpoint that runs already; `model` None takes the only one it lists.

    Raises:
        Prune2ServeError: nothing answers, the key is refused, or several models are listed and none was
        named.
    """
    url = url.rstrip("/").removesuffix("/v1")
    endpoint = Endpoint(url, model or "", key)
    listed = [str(entry["id"]) for entry in get_json(endpoint, "/v1/models").get("data", [])]
    if not model:
        if len(listed) != 1:
            raise Prune2ServeError(
                f"{url} serves {len(listed)} models ({', '.join(listed[:5])}): name one with --a-model or --b-model"
            )
        endpoint.name = listed[0]
    elif listed and model not in listed:
        raise Prune2ServeError(f"{url} does not serve {model!r}; it lists {', '.join(listed[:5])}")
    return endpoint


def get_text(endpoint: Endpoint, path: str, timeout_s: float = 10) -> str:
    """GET a path. Raises Prune2ServeError with the reason."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(endpoint.url + path)
    if endpoint.key:
        request.add_header("Authorization", f"Bearer {endpoint.key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        hint = ": set the key in the environment (--a-key-env, --b-key-env)" if error.code in (401, 403) else ""
        raise Prune2ServeError(f"{endpoint.url}{path} answered HTTP {error.code}{hint}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Prune2ServeError(f"no endpoint answers at {endpoint.url}{path}: {reason}") from None


def get_json(endpoint: Endpoint, path: str) -> dict[str, Any]:
    import json

    text = get_text(endpoint, path)
    try:
        found = json.loads(text)
    except ValueError:
        raise Prune2ServeError(f"{endpoint.url}{path} did not answer with JSON: {text[:80]!r}") from None
    return found if isinstance(found, dict) else {}


def describe(endpoint: Endpoint) -> dict[str, Any]:
    """Ask an endpoint what it is: version, context length, KV cache; what it does not answer is left out."""
    facts: dict[str, Any] = {"engine": endpoint.engine} if endpoint.engine else {}
    with suppress(Prune2ServeError):
        facts.update(get_json(endpoint, "/version"))
    with suppress(Prune2ServeError):
        entries = get_json(endpoint, "/v1/models").get("data", [])
        entry = next((e for e in entries if e.get("id") == endpoint.name), {})
        facts.update({key: entry[key] for key in ("max_model_len", "root", "parent") if entry.get(key)})
    with suppress(Prune2ServeError):
        info = CACHE_INFO.search(get_text(endpoint, "/metrics"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', info["labels"])) if info else {}
        told = [f"{name} {labels[name]}" for name in CACHE_LABELS if name in labels]
        if told:
            facts["kv_cache"] = ", ".join(told)
    return facts


def counters(endpoint: Endpoint) -> dict[str, float]:
    """Read the Prometheus metrics, summed over labels; empty if there are none."""
    try:
        text = get_text(endpoint, "/metrics")
    except Prune2ServeError:
        return {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if line.startswith("#") or not name:
            continue
        with suppress(ValueError):
            bare = name.split("{")[0].strip()
            found[bare] = found.get(bare, 0.0) + float(value)
    return found


def directory_arguments(directory: Path, engine: str, baseline: bool, extra: Sequence[str]) -> list[str]:
    """Return the arguments of `prune2serve serve` for one arm of a build directory."""
    # A build whose quality has collapsed is not for users, but its speed may be measured: hence --force.
    which = "--baseline" if baseline else "--force"
    return [str(directory), "--engine", engine, "--port", "0", which, *extra]
