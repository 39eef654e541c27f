"""How similar a model with merged layers is to its parent, without running the layers that lie below all merges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from prune2serve.activations import batches, captured_states
from prune2serve.layer_sets import Inject, returns_tuple
from prune2serve.layers import decoder_layers, planned_layers, spliced
from prune2serve.records import CalibrationSet, Merge, PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MergedSimilarity:
    """Mean over samples of cos(flattened final hidden states), for many sets of merges of one model; memoised."""

    def __init__(self, model: PreTrainedModel, windows: CalibrationSet, num_windows: int) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))
        self._inject = Inject(returns_tuple(model, self.layers))
        self._memo: dict[tuple[Merge, ...], float] = {}
        self._windows = list(batches(windows, 1))[:num_windows]
        self._states: list[list[torch.Tensor]] = []
        self._final: list[torch.Tensor] = []
        with torch.inference_mode(), captured_states(model) as states:
            for input_ids, mask in self._windows:
                self._final.append(self._run(input_ids, mask))
                self._states.append(list(states))
                states.clear()

    @property
    def num_measured(self) -> int:
        return len(self._memo)

    def __call__(self, merges: tuple[Merge, ...]) -> float:
        """Similarity of the model with these merges to the parent, in [-1, 1]."""
        key = tuple(sorted(merges, key=lambda merge: merge.low))
        if key not in self._memo:
            self._memo[key] = self._measure(key)
        return self._memo[key]

    def _measure(self, merges: tuple[Merge, ...]) -> float:
        removed = tuple(layer for merge in merges for layer in range(merge.low + 1, merge.high + 1))
        plan = PruningPlan(len(self.layers), removed, "merge", merges=merges)
        shared = merges[0].low if merges else len(self.layers)
        modules, kinds = planned_layers(self.model, plan)[shared:], list(plan.kept[shared:])
        if shared:
            modules.insert(0, self._inject)
            kinds.insert(0, shared - 1)
        total = 0.0
        with torch.inference_mode(), spliced(self.model, modules, kinds):
            for (input_ids, mask), states, final in zip(self._windows, self._states, self._final, strict=True):
                self._inject.states = states[shared]
                merged = self._run(input_ids, mask)
                total += float(cosine_similarity(final, merged, dim=0))
        self._inject.states = None
        return total / len(self._windows)

    def _run(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Flattened hidden states that the head reads, [real tokens * hidden], float64: massive values lose no bits."""
        attention_mask = None if bool(mask.all()) else mask.to(self.model.device)
        out = self.model.base_model(
            input_ids=input_ids.to(self.model.device), attention_mask=attention_mask, use_cache=False
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden[mask.bool().to(hidden.device)].double().flatten()
