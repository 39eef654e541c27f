"""The exported graph on ONNX Runtime: prefill one row, or advance many rows by one token.

A row is a sequence's place in the shared KV buffer. Both calls bind views of the buffer as inputs and
outputs at once, so keys and values are appended in place and nothing is copied.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2serve.errors import MissingExtraError, Prune2ServeError
from prune2serve.export.onnx_graph import SERVING_GRAPH
from prune2serve.serve.ort_cache import CacheShape, KVCache

if TYPE_CHECKING:
    import onnxruntime as ort

ELEMENT_TYPES = {
    "tensor(float)": (1, "float32"),
    "tensor(float16)": (10, "float16"),
    "tensor(bfloat16)": (16, "bfloat16"),
}
"""The session's name for a type -> ONNX's number for it, torch's name for it."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TOKEN_INPUTS = {"input_ids", "attention_mask", "logits_indices", "position_ids"}


@dataclass(frozen=True)
class RunnerOptions:
    """How much is served at once, and on what."""

    device: str = "cpu"
    num_rows: int = 16
    max_length: int = 4096
    prefill_chunk: int = 64
    """Tokens of a prompt between two decode steps. Constant: a prompt's values must not depend on the
    load."""
    num_threads: int | None = None
    """None: every core this process may use."""


class ModelRunner:
    """An open session with its KV buffer. Not thread-safe: one thread owns it."""

    def __init__(self, onnx_directory: Path, options: RunnerOptions) -> None:
        import torch

        self.options = options
        self.session = _open(onnx_directory, options)
        self.provider = self.session.get_providers()[0]
        self._inputs = {wanted.name: wanted for wanted in self.session.get_inputs()}
        shape, kv_type = _cache_shape(self.session, onnx_directory)
        self._kv_element, kv_name = ELEMENT_TYPES[kv_type]
        self._device = torch.device(options.device)
        self.cache = KVCache(shape, options.num_rows, options.max_length, getattr(torch, kv_name), self._device)
        logits = next(output for output in self.session.get_outputs() if output.name == "logits")
        self.vocab_size = int(logits.shape[-1])
        self._logits_element, logits_name = ELEMENT_TYPES[logits.type]
        most = max(options.num_rows, options.prefill_chunk)
        self._logits = torch.empty((most, self.vocab_size), dtype=getattr(torch, logits_name), device=self._device)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def warm_up(self) -> None:
        """Run the two kinds of step once, so that the first request does not pay for what is set up lazily."""
        self.prefill(0, [0] * min(self.options.prefill_chunk, self.options.max_length), 0)
        self.decode([0] * self.options.num_rows, [1] * self.options.num_rows)

    def prefill(self, row: int, ids: list[int], start: int, *, every: bool = False) -> np.ndarray:
        """Append `ids` to a row that holds `start` tokens.

        Returns:
            float32 logits [len(ids), vocab] with `every`, else [1, vocab] of the last one; valid until the
            next call.
        """
        total = start + len(ids)
        wanted = np.arange(len(ids)) if every else np.array([len(ids) - 1])
        return self._run(
            row,
            1,
            np.array([ids], dtype=np.int64),
            np.ones((1, total), dtype=np.int64),
            np.arange(start, total, dtype=np.int64)[None],
            wanted.astype(np.int64),
        )

    def decode(self, tokens: list[int], lengths: list[int]) -> np.ndarray:
        """Append one token to each of the rows 0 .. n - 1, which then hold `lengths` tokens.

        Returns:
            float32 logits [n, vocab]; valid until the next call.
        """
        ends = np.array(lengths, dtype=np.int64)[:, None]
        mask = (np.arange(int(ends.max()))[None] < ends).astype(np.int64)
        ids = np.array(tokens, dtype=np.int64)[:, None]
        return self._run(0, len(tokens), ids, mask, ends - 1, np.zeros(1, dtype=np.int64))

    def _run(
        self,
        row: int,
        count: int,
        ids: np.ndarray,
        mask: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
    ) -> np.ndarray:
        binding = self._bindings.get((row, count))
        if binding is None:
            binding = self._bindings[row, count] = self._bind_cache(row, count)
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "logits_indices": wanted,
        }
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        num_logits = count * len(wanted)
        binding.bind_output(
            "logits",
            self._device.type,
            0,
            self._logits_element,
            [count, len(wanted), self.vocab_size],
            self._logits.data_ptr(),
        )
        self.session.run_with_iobinding(binding)
        if self._device.type == "cuda":
            binding.synchronize_outputs()
        result: np.ndarray = self._logits[:num_logits].float().cpu().numpy()
        return result

    def _bind_cache(self, row: int, count: int) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, tensor in self.cache.tensors.items():
            view = tensor[row : row + count]
            place = (self._device.type, 0, self._kv_element, list(view.shape), view.data_ptr())
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        return binding


def _open(onnx_directory: Path, options: RunnerOptions) -> ort.InferenceSession:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError:
        extra = "onnx-gpu" if options.device == "cuda" else "onnx"
        raise MissingExtraError("serving on ONNX Runtime", "onnxruntime", extra) from None
    provider = PROVIDERS[options.device]
    if provider not in ort.get_available_providers():
        raise Prune2ServeError(
            f"this onnxruntime has {', '.join(ort.get_available_providers())}, expected {provider}: "
            "pip install 'prune2serve[onnx-gpu]' in place of onnxruntime, or use --device cpu"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.num_threads or len(os.sched_getaffinity(0))
    settings.inter_op_num_threads = 1
    # Threads that spin between two operators halve the speed as soon as anything else wants a core, and the HTTP
    # side of this very process does.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(onnx_directory / SERVING_GRAPH), settings, providers=[provider])
    if session.get_providers()[0] != provider:
        raise Prune2ServeError(
            f"ONNX Runtime fell back to {session.get_providers()[0]}, expected {provider}: check the "
            "CUDA and cuDNN "
            "libraries that onnxruntime-gpu names in its log, or use --device cpu"
        )
    return session


def _cache_shape(session: ort.InferenceSession, onnx_directory: Path) -> tuple[CacheShape, str]:
    """Read the graph's cache inputs; refuse a graph whose state is more than a plain KV cache."""
    config: dict[str, Any] = json.loads((onnx_directory / "genai_config.json").read_text())
    head_size = int(config["model"]["decoder"]["head_size"])
    past = [wanted for wanted in session.get_inputs() if wanted.name.startswith("past_key_values.")]
    known = TOKEN_INPUTS | {wanted.name for wanted in past}
    strange = [wanted.name for wanted in session.get_inputs() if wanted.name not in known]
    if strange or not past:
        raise Prune2ServeError(
            f"the exported graph has the inputs {', '.join(strange) or 'of no KV cache'}, expected a "
            "plain KV cache: "
            "this architecture is served with --engine vllm"
        )
    kinds = {wanted.type for wanted in past}
    if len(kinds) != 1 or not kinds <= set(ELEMENT_TYPES):
        raise Prune2ServeError(f"the exported graph's KV cache is {', '.join(sorted(kinds))}, expected one float type")
    kind = kinds.pop()
    shape = CacheShape(
        tuple(wanted.name.removeprefix("past_key_values.") for wanted in past),
        tuple(int(wanted.shape[1]) for wanted in past),
        tuple(wanted.shape[3] if isinstance(wanted.shape[3], int) else head_size for wanted in past),
        4 if kind == "tensor(float)" else 2,
    )
    return shape, kind
