"""What removing layers can give at best, from bytes and operations per token, and where the rest went.

Decode is bound by memory: every weight is read once a step, whatever the batch, and so is the KV cache of
every sequence. Prefill is bound by arithmetic: two operations a weight and token, plus attention; the output
head runs for the last position only. The embedding table is looked up, not read; with tied embeddings the
same tensor is read whole once, as the head. So removing a quarter of the layers never gives 1 / 0.75: the
head stays.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune2serve.errors import Prune2ServeError


@dataclass(frozen=True)
class ModelCost:
    """The sizes that decide speed, in parameters; multiply by the bytes of a weight where needed."""

    num_layers: int
    layer_parameters: int
    """Of all decoder layers together."""
    head_parameters: int
    """Output head (the embedding table when tied)."""
    other_parameters: int
    """Final norm and the like, without the embedding table."""
    kv_values_per_token: int
    """Keys and values of all layers that one token adds."""
    attention_width: int
    """Heads times head size, summed over layers."""

    @property
    def read_per_step(self) -> int:
        """Parameters read in one decode step."""
        return self.layer_parameters + self.head_parameters + self.other_parameters

    def decode_values(self, context: float, batch: float) -> float:
        """Values read in one decode step: the weights, and each sequence's KV cache."""
        return self.read_per_step + batch * context * self.kv_values_per_token

    def prefill_operations(self, prompt_tokens: float) -> float:
        """Operations of one prefill: 2 a layer weight and token, the head once, causal attention."""
        attention = 2 * prompt_tokens**2 * self.attention_width  # QK' and PV, 2 each, half masked
        return 2 * self.layer_parameters * prompt_tokens + 2 * self.head_parameters + attention


@dataclass(frozen=True)
class Ideal:
    """Ratios candidate / baseline that bytes and operations alone would give."""

    decode: float
    prefill: float
    layers: float
    """Layers kept / layers: what one might expect, and cannot get."""
    weights: float
    """Decode without the KV cache."""

    def end_to_end(self, prefill_share: float) -> float:
        """Of a request whose baseline spends `prefill_share` of its time in prefill."""
        return prefill_share * self.prefill + (1 - prefill_share) * self.decode


def ideal_ratios(baseline: ModelCost, candidate: ModelCost, prompt: float, output: float, batch: float) -> Ideal:
    """Return the ideal ratios for requests of `prompt` and `output` tokens, `batch` of them at once."""
    context = prompt + output / 2
    return Ideal(
        decode=candidate.decode_values(context, batch) / baseline.decode_values(context, batch),
        prefill=candidate.prefill_operations(prompt) / baseline.prefill_operations(prompt),
        layers=candidate.num_layers / baseline.num_layers,
        weights=candidate.read_per_step / baseline.read_per_step,
    )


def cost_of(directory: Path) -> ModelCost:
    """Read a model directory's config and the headers of its safetensors files (no weights).

    Raises:
        Prune2ServeError: there is no config.json, or no safetensors file.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise Prune2ServeError(f"no config.json in {directory}: name a model directory")
    config = json.loads(config_path.read_text())
    config = config.get("text_config") or config
    sizes = _tensor_sizes(directory)
    layers = sum(size for name, size in sizes.items() if ".layers." in name or ".h." in name)
    embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name or name.endswith("wte.weight"))
    head = sum(size for name, size in sizes.items() if "lm_head" in name)
    tied = bool(config.get("tie_word_embeddings")) or head == 0
    num_layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 0)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    head_size = int(config.get("head_dim") or (hidden // heads if heads else 0))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return ModelCost(
        num_layers=num_layers,
        layer_parameters=layers,
        head_parameters=embedding if tied else head,
        other_parameters=sum(sizes.values()) - layers - embedding - head,
        kv_values_per_token=2 * num_layers * kv_heads * head_size,
        attention_width=num_layers * heads * head_size,
    )


def _tensor_sizes(directory: Path) -> dict[str, int]:
    """Return tensor name -> number of values, from the files' headers (the safetensors format)."""
    sizes: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        sizes |= {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not sizes:
        raise Prune2ServeError(f"no safetensors files in {directory}")
    return sizes


def attribute(
    ideal: Ideal,
    baseline: dict[str, float],
    candidate: dict[str, float],
    intervals: dict[str, tuple[float, float] | None] | None = None,
) -> dict[str, Any]:
    """Split a request's mean time into parts and say how each fell short of its ideal.

    Both arms are {part: mean ms a request}: `queue` (waiting in the server, where it reports that), `prefill` (TTFT
    without queue), `decode` (E2E - TTFT). A part's own ratio against its ideal says how well that part scaled.

    What did not shrink follows from time = fixed + scaling: with the ideal ratio r of a part and its measured ratio m,
    the share 1 - (1 - m) / (1 - r) of the baseline's time is overhead that no removed layer can save (launch costs,
    tokenizer, HTTP, sampling). `intervals` are the 95% intervals of m; they give the overhead's.
    """
    ideals = {"prefill": ideal.prefill, "decode": ideal.decode}
    parts: dict[str, Any] = {}
    for part in ("queue", "prefill", "decode"):
        if part not in baseline or part not in candidate:
            continue
        a, b = baseline[part], candidate[part]
        entry: dict[str, Any] = {"baseline_ms": a, "candidate_ms": b, "ratio": b / a if a > 0 else None}
        if part in ideals and a > 0:
            entry["ideal_ratio"] = r = ideals[part]
            bounds = (intervals or {}).get(part)
            if r < 1:
                entry["overhead_ms"] = _overhead(a, b / a, r)
                entry["overhead_interval_ms"] = [_overhead(a, m, r) for m in bounds] if bounds else None
        parts[part] = entry
    total_a = sum(entry["baseline_ms"] for entry in parts.values())
    total_b = sum(entry["candidate_ms"] for entry in parts.values())
    scaled = sum(e["baseline_ms"] * e.get("ideal_ratio", 1.0) for e in parts.values())
    return {
        "parts": parts,
        "layers_ratio": ideal.layers,
        "weights_ratio": ideal.weights,
        "decode_ideal_ratio": ideal.decode,
        "prefill_ideal_ratio": ideal.prefill,
        "request_ratio": total_b / total_a if total_a > 0 else None,
        "request_ideal_ratio": scaled / total_a if total_a > 0 else None,
    }


def _overhead(baseline_ms: float, ratio: float, ideal_ratio: float) -> float:
    """Return the fixed part, between nothing and everything."""
    return baseline_ms * min(max(1 - (1 - ratio) / (1 - ideal_ratio), 0.0), 1.0)
