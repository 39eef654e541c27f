"""Open an ONNX export as a service and run it until a signal ends it."""

from __future__ import annotations

import json
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.errors import MissingExtraError, Prune2ServeError
from prune2serve.progress import say

if TYPE_CHECKING:
    from prune2serve.serve.ort_service import Service

DEFAULT_MAX_LENGTH = 4096
KV_MEMORY_SHARE = 0.5
"""The KV buffer may grow to this share of the device's memory unless --max-model-len says otherwise."""


@dataclass(frozen=True)
class ServeSettings:
    """How one directory is served on ONNX Runtime."""

    directory: Path
    """The model: config, tokenizer, weights."""
    names: tuple[str, ...]
    precision: str = "fp32"
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_waiting: int = 256
    num_threads: int | None = None
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 600.0
    shutdown_timeout_s: float = 30.0
    extra: dict[str, Any] = field(default_factory=dict)


def serve_onnx(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight get `shutdown_timeout_s` to end.

    Raises:
        Prune2ServeError: the model cannot be served, or the address is taken.
        SystemExit: 0, after a signal.
    """
    _check_packages()
    import uvicorn

    from prune2serve.serve.ort_server import create_app

    # Also before the server runs, and for the signal that uvicorn raises again after it has drained.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    listener = _bind(settings.host, settings.port)
    try:
        service = open_service(settings)
        config = uvicorn.Config(
            create_app(service, api_key=settings.api_key),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
        )
        say(_banner(service, settings, listener))
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            service.engine.stop(5)
    finally:
        listener.close()


def open_service(settings: ServeSettings) -> Service:
    """Export if needed, open the session, and start the engine."""
    from prune2serve.export.onnx_graph import ensure_onnx, onnx_home
    from prune2serve.serve.exposition import EngineMetrics
    from prune2serve.serve.ort_engine import OrtEngine
    from prune2serve.serve.ort_service import Service, ServiceLimits
    from prune2serve.serve.ort_session import ModelRunner, RunnerOptions
    from prune2serve.serve.tokenization import TextModel

    text = TextModel(settings.directory)
    onnx = ensure_onnx(settings.directory, settings.precision, settings.device, cache=onnx_home(settings.directory))
    max_length = choose_max_length(settings, text.context_length, onnx)
    options = RunnerOptions(settings.device, settings.max_num_seqs, max_length, num_threads=settings.num_threads)
    metrics = EngineMetrics(settings.names[0])

    def open_runner() -> ModelRunner:
        runner = ModelRunner(onnx, options)
        runner.warm_up()
        return runner

    engine = OrtEngine(
        open_runner,
        text.decode,
        text.eos_ids,
        max_waiting=settings.max_num_waiting,
        metrics=metrics,
    )
    limits = ServiceLimits(settings.max_body_bytes, settings.request_timeout_s)
    return Service(text, engine, settings.names, metrics, limits, int(time.time()))


def choose_max_length(settings: ServeSettings, context_length: int | None, onnx_directory: Path) -> int:
    """Return how many tokens a sequence may have: what was asked for, or what the model and the memory
    allow."""
    asked = settings.max_model_len
    if asked is not None:
        if context_length is not None and asked > context_length:
            raise Prune2ServeError(
                f"--max-model-len {asked} is beyond the model's context of {context_length} tokens: ask for less"
            )
        return asked
    room = int(KV_MEMORY_SHARE * _device_memory(settings.device) / kv_bytes_per_token(onnx_directory))
    chosen = min(context_length or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH, room // settings.max_num_seqs)
    if chosen < 2:
        raise Prune2ServeError(
            f"the KV buffer of {settings.max_num_seqs} sequences does not fit into memory: lower --max-num-seqs"
        )
    return chosen


def kv_bytes_per_token(onnx_directory: Path) -> int:
    """Bytes of keys and values that a token takes over all layers."""
    from prune2serve.export.onnx_graph import RECORD

    decoder = json.loads((onnx_directory / "genai_config.json").read_text())["model"]["decoder"]
    record = json.loads((onnx_directory / RECORD).read_text())
    element = 4 if record["device"] == "cpu" else 2
    return int(2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * element)


def _device_memory(device: str) -> int:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Prune2ServeError("no CUDA device is visible to torch, which holds the KV buffer: use --device cpu")
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def _banner(service: Service, settings: ServeSettings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return (
        f"Serving {service.names[0]} on http://{shown}:{port} (ONNX Runtime, "
        f"{service.engine.runner.provider}, "
        f"{settings.precision}, {settings.max_num_seqs} slots of {service.engine.max_length} tokens)"
    )


def _bind(host: str, port: int) -> socket.socket:
    """Take the address now, listen later: a client that comes too early is refused rather than kept
    waiting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise Prune2ServeError(
            f"cannot listen on {host}:{port}: {why}: choose another --port (0 picks a free one)"
        ) from None
    listener.set_inheritable(True)
    return listener


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _check_packages() -> None:
    import importlib.util

    for package, module in (
        ("onnxruntime", "onnxruntime"),
        ("starlette", "starlette"),
        ("uvicorn", "uvicorn"),
        ("prometheus-client", "prometheus_client"),
    ):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("serving on ONNX Runtime", package, "onnx")
