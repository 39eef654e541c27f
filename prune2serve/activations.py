"""One streaming pass over a calibration set -> statistics of every decoder layer, in constant memory.

Notation (also in the docs): X_l is the input of layer l and X_{l+1} its output, [tokens, hidden], padding
removed; X_L is the output of the last layer *before* the final norm, which is why everything is captured by
hooks: `hidden_states[-1]` of transformers has the norm applied. F = X_{l+1} - X_l. Sums run in float64, the
terms are float32, whatever the model's dtype.

| metric | formula | source |
|---|---|---|
| `block_influence` | 1 - mean_t cos(X_l[t], X_{l+1}[t]) | ShortGPT, arXiv 2403.03853 |
| `mssd` | mean_{t,d} F^2, mean squared successive difference | SimDiff, arXiv 2604.19520 |
| `masd` | mean_{t,d} abs(F), mean absolute successive difference | SimDiff |
| `relative_magnitude` | mean_t norm(F[t]) / norm(X_l[t]) | |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from prune2serve.errors import CorruptCheckpointError
from prune2serve.layers import decoder_layers
from prune2serve.progress import track
from prune2serve.records import CalibrationSet, LayerScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ELEMENTS = 16 * 2**20
"""Float32 values held at once while a batch's hidden states are summed up (64 MiB)."""


class LayerStatistics:
    """Running sums over tokens; memory is O(L^2 + L), whatever the number of samples."""

    def __init__(self, num_layers: int) -> None:
        size = num_layers + 1
        self.num_layers = num_layers
        self.num_tokens = 0
        self.num_samples = 0
        self._cosine = torch.zeros(size, size, dtype=torch.float64)
        self._angle = torch.zeros(size, size, dtype=torch.float64)
        self._squared = torch.zeros(num_layers, dtype=torch.float64)
        self._absolute = torch.zeros(num_layers, dtype=torch.float64)
        self._relative = torch.zeros(num_layers, dtype=torch.float64)
        self._hidden = 0

    def update(self, hidden: Sequence[torch.Tensor], attention_mask: torch.Tensor) -> None:
        """Add one batch.

        Args:
            hidden: X_0 .. X_L, each [B, T, hidden].
            attention_mask: [B, T], 1 for real tokens.
        """
        real = attention_mask.bool().to(hidden[0].device)
        self._hidden = hidden[0].shape[-1]
        tokens = [x[real] for x in hidden]
        chunk = max(1, CHUNK_ELEMENTS // (len(hidden) * self._hidden))
        for start in range(0, len(tokens[0]), chunk):
            self._add_tokens(torch.stack([x[start : start + chunk].float() for x in tokens]))
        last = real.shape[1] - 1 - real.int().flip(1).argmax(1)
        rows = real.any(1).nonzero()[:, 0]
        self._add_last_tokens(torch.stack([x[rows, last[rows]].float() for x in hidden]))

    def _add_tokens(self, x: torch.Tensor) -> None:
        """x: [L + 1, tokens, hidden]."""
        norms = torch.linalg.vector_norm(x, dim=-1)
        unit = (x / norms.clamp_min(1e-20).unsqueeze(-1)).transpose(0, 1)
        self._cosine += torch.bmm(unit, unit.transpose(1, 2)).sum(0, dtype=torch.float64).cpu()
        del unit
        step = x[1:] - x[:-1]
        length = torch.linalg.vector_norm(step, dim=-1)
        self._relative += (length / norms[:-1].clamp_min(1e-20)).sum(1, dtype=torch.float64).cpu()
        self._squared += length.double().square().sum(1).cpu()
        self._absolute += step.abs().sum((1, 2), dtype=torch.float64).cpu()
        self.num_tokens += x.shape[1]

    def _add_last_tokens(self, x: torch.Tensor) -> None:
        """x: [L + 1, samples, hidden]."""
        unit = torch.nn.functional.normalize(x, dim=-1).transpose(0, 1)
        cosine = torch.bmm(unit, unit.transpose(1, 2)).double().clamp(-1.0, 1.0)
        self._angle += (torch.arccos(cosine) / math.pi).sum(0).cpu()
        self.num_samples += x.shape[1]

    def scores(self, calibration_sha256: str) -> LayerScores:
        """Turn the sums into means.

        Raises:
            CorruptCheckpointError: a statistic is not finite; the message names the first such layer.
        """
        cosine = self._cosine / self.num_tokens
        values = self.num_tokens * self._hidden
        metrics = {
            "block_influence": 1 - cosine.diagonal(1),
            "mssd": self._squared / values,
            "masd": self._absolute / values,
            "relative_magnitude": self._relative / self.num_tokens,
        }
        for name, metric in metrics.items():
            broken = (~metric.isfinite()).nonzero()
            if len(broken):
                raise CorruptCheckpointError(
                    f"layer {int(broken[0])} gives {name} = {float(metric[broken[0, 0]])}: its weights or activations "
                    "overflow; use --dtype float32, or repair the checkpoint"
                )
        angle = self._angle / self.num_samples
        angle.fill_diagonal_(0.0)
        return LayerScores(
            num_layers=self.num_layers,
            tokens=self.num_tokens,
            calibration_sha256=calibration_sha256,
            metrics={name: tuple(metric.tolist()) for name, metric in metrics.items()},
            cosine=tuple(tuple(row) for row in cosine.tolist()),
            angle=tuple(tuple(row) for row in angle.tolist()),
        )


def score_layers(model: PreTrainedModel, calibration: CalibrationSet, batch_size: int = 2) -> LayerScores:
    """Run the calibration set through the model once and return the statistics of every decoder layer."""
    statistics = LayerStatistics(len(decoder_layers(model)))
    with torch.inference_mode(), captured_states(model) as states:
        for input_ids, mask in track(list(batches(calibration, batch_size)), "Scoring layers"):
            states.clear()
            run_body(model, input_ids, mask)
            statistics.update(states, mask)
    return statistics.scores(calibration.sha256)


def batches(calibration: CalibrationSet, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ([B, T] input_ids, [B, T] attention_mask)."""
    yield from zip(calibration.input_ids.split(batch_size), calibration.attention_mask.split(batch_size), strict=True)


def run_body(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Run the decoder layers; of the logits, only the last position's are computed."""
    mask = None if bool(attention_mask.all()) else attention_mask.to(model.device)
    model(input_ids=input_ids.to(model.device), attention_mask=mask, use_cache=False, logits_to_keep=1)


@contextmanager
def captured_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Yield a list that each forward pass fills with X_0 .. X_L; the caller clears it between passes."""
    states: list[torch.Tensor] = []
    layers = decoder_layers(model)

    def keep_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(_: Any, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(keep_output))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
