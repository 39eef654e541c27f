"""Run stretches of a model's decoder layers over many windows, from hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune2serve.activations import batches
from prune2serve.layer_sets import Inject, returns_tuple
from prune2serve.layers import decoder_layers, spliced
from prune2serve.records import CalibrationSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = list[torch.Tensor]
"""One [1, T, hidden] a window."""


class SegmentRunner:
    """Carries hidden states of a calibration set from layer to layer; only the states asked for are kept."""

    def __init__(self, model: PreTrainedModel, windows: CalibrationSet) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))
        self.windows = list(batches(windows, 1))
        self._inject = Inject(returns_tuple(model, self.layers))

    def run(
        self,
        modules: Sequence[nn.Module],
        stands_for: Sequence[int],
        states: States | None,
        each: Callable[[int, torch.Tensor], None] | None = None,
    ) -> States:
        """Return the states after `modules`.

        Args:
            stands_for: the parent's layer that each module stands for, ascending.
            states: entering the first module; None for the embeddings.
            each: called with the window's number and its state as soon as it is there.
        """
        if not modules:
            raise ValueError("a segment holds at least one layer")
        kinds = list(stands_for)
        chain = list(modules)
        if states is not None:
            # The model is given a stand-in for everything below; it needs a layer number of its own.
            chain, kinds = [self._inject, *chain], [kinds[0] - 1, *kinds]
        out: States = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            out.append(output[0] if isinstance(output, tuple) else output)

        handle = modules[-1].register_forward_hook(keep)
        try:
            with torch.inference_mode(), spliced(self.model, chain, kinds):
                for number, (input_ids, mask) in enumerate(self.windows):
                    self._inject.states = None if states is None else states[number]
                    self._forward(input_ids, mask)
                    if each is not None:
                        each(number, out[number])
        finally:
            handle.remove()
            self._inject.states = None
        return out

    def real(self, number: int, state: torch.Tensor) -> torch.Tensor:
        """[1, T, hidden] -> [real tokens, hidden], float32."""
        return state[self.windows[number][1].bool().to(state.device)].float()

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        attention_mask = None if bool(mask.all()) else mask.to(self.model.device)
        self.model(
            input_ids=input_ids.to(self.model.device), attention_mask=attention_mask, use_cache=False, logits_to_keep=1
        )
