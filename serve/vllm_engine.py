"""vLLM as a child process: its own HTTP face, our start, readiness and stop."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from prune2serve.errors import Prune2ServeError
from prune2serve.paths import cache_dir
from prune2serve.progress import say
from prune2serve.serve.engine import ServerProcess, free_port

PYTHON_VARIABLE = "PRUNE2SERVE_VLLM_PYTHON"
DEFAULT_PYTHON = Path(".venv-vllm/bin/python")
MODULE = "vllm.entrypoints.openai.api_server"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MAX_RESTART_PAUSE_S = 60.0
STABLE_S = 300.0


@dataclass(frozen=True)
class VllmSettings:
    """How one directory is served on vLLM."""

    directory: Path
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    precision: str | None = None
    """fp32, fp16 or bf16; None: vLLM's own choice."""
    shutdown_timeout_s: float = 30.0
    ready_timeout_s: float = 900.0
    python: str | None = None
    speculative_draft: Path | None = None
    """A smaller model of the same vocabulary that proposes tokens, such as a build as draft for its parent."""
    num_speculative_tokens: int = 4
    flags: tuple[str, ...] = ()
    """Any further flags of vLLM's server."""


def find_vllm_python(named: str | None = None) -> str | None:
    """Return a Python that has vLLM: the named one, the environment's, `.venv-vllm`, or this one; None if
    none."""
    chosen = named or os.environ.get(PYTHON_VARIABLE)
    if chosen:
        return chosen
    if DEFAULT_PYTHON.is_file():
        return str(DEFAULT_PYTHON.absolute())
    return sys.executable if importlib.util.find_spec("vllm") is not None else None


def vllm_version(python: str) -> str | None:
    """The version of vLLM that a Python has, under any distribution name; None if it has none."""
    code = (
        "import importlib.metadata as m, importlib.util as u\n"
        "if u.find_spec('vllm'):\n"
        "    names = m.packages_distributions().get('vllm') or ['vllm']\n"
        "    print(names[0], m.version(names[0]))\n"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def vllm_command(settings: VllmSettings, python: str, port: int) -> list[str]:
    """The command line of vLLM's server. An API key travels in the environment, where `ps` does not show
    it."""
    command = [python, "-m", MODULE, "--model", str(settings.directory.resolve())]
    command += ["--served-model-name", *settings.names, "--host", settings.host, "--port", str(port)]
    if settings.max_num_seqs is not None:
        command += ["--max-num-seqs", str(settings.max_num_seqs)]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.precision is not None:
        if settings.precision not in DTYPES:
            raise Prune2ServeError(
                f"--precision {settings.precision} is not one of vLLM's: choose {', '.join(DTYPES)}, or "
                "pass vLLM's "
                "own flags after --, such as -- --quantization ..."
            )
        command += ["--dtype", DTYPES[settings.precision]]
    if settings.speculative_draft is not None:
        draft = {
            "method": "draft_model",
            "model": str(settings.speculative_draft.resolve()),
            "num_speculative_tokens": settings.num_speculative_tokens,
        }
        command += ["--speculative-config", json.dumps(draft)]
    # The default, 0, aborts the requests in flight.
    command += ["--shutdown-timeout", str(max(1, round(settings.shutdown_timeout_s)))]
    return [*command, *settings.flags]


def vllm_environment(settings: VllmSettings) -> dict[str, str]:
    """What the child's environment adds to ours."""
    env = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if settings.api_key:
        env["VLLM_API_KEY"] = settings.api_key
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        env["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB; read on CPU only, where the default takes much of the memory
    return env


def make_vllm(settings: VllmSettings) -> ServerProcess:
    """Prepare the child process; `start` starts it.

    Raises:
        Prune2ServeError: no Python with vLLM is there, or a setting is not vLLM's.
    """
    python = find_vllm_python(settings.python)
    if python is None or vllm_version(python) is None:
        where = f"{python} has no vllm" if python else "no Python with vllm was found"
        raise Prune2ServeError(
            f"{where}: pip install 'prune2serve[vllm]' on a GPU host; for CPU `make venv-vllm`, or name "
            "another "
            f"environment's Python with --vllm-python or {PYTHON_VARIABLE}"
        )
    port = settings.port or free_port(settings.host)
    log_file = cache_dir() / "logs" / f"vllm-{port}-{os.getpid()}.log"
    return ServerProcess(
        vllm_command(settings, python, port),
        name="vLLM",
        host=settings.host,
        port=port,
        log_file=log_file,
        env=vllm_environment(settings),
    )


def serve_vllm(settings: VllmSettings) -> None:
    """Serve until SIGTERM or SIGINT; a child that dies after it was ready is started again with growing
    pauses.

    Raises:
        Prune2ServeError: vLLM is not there or dies before it is ready.
        SystemExit: 0, after a signal.
    """
    server = make_vllm(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    pause_s = 1.0
    try:
        while True:
            say(f"Starting vLLM for {settings.directory}, log in {server.log_file}")
            server.start()
            server.wait_ready(settings.ready_timeout_s)
            started_s = time.monotonic()
            say(f"Serving {settings.names[0]} on {server.url} (vLLM, {settings.precision or 'its own precision'})")
            while server.poll() is None:
                time.sleep(0.5)
            if time.monotonic() - started_s > STABLE_S:
                pause_s = 1.0
            say(f"vLLM ended with status {server.poll()}; starting it again in {pause_s:g} s:\n{server.log_tail()}")
            server.stop()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
    finally:
        server.stop(settings.shutdown_timeout_s + 10)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
