"""Perplexity and KL of many layer sets of one model, fast: what search-based selectors and refinement ask.

The hidden states that enter each layer of a *base* set are kept. A set that shares its first p layers with the
base is then run from layer p on, which gives exactly what the whole model would: the same operations on the
same numbers. `rebase` moves the base along with a search. Results are memoised on the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune2serve.activations import batches, captured_states
from prune2serve.evaluation import CHUNK_TOKENS, next_token_logits
from prune2serve.layers import decoder_layers, planned_layers, spliced
from prune2serve.records import CalibrationSet, PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIVE_UP_AFTER = 2
"""Windows after which a hopeless set may be abandoned."""
GIVE_UP_MARGIN = 1.1
"""How far behind its rival, on the windows they share, a set is hopeless."""
LOGITS_BYTES = 2**30
"""Parent logits are kept up to this size; beyond it they are computed again from the last hidden states."""


TRAIL_BYTES = 2 * 2**30
"""Hidden states that `window_nll` leaves behind for later sets are kept up to this size."""


@dataclass(frozen=True)
class SetQuality:
    """How one layer set does on the search split."""

    perplexity: float
    kl: float
    """Mean KL(parent || pruned), nats per token."""
    window_kl: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """Summed KL of each window."""


class Inject(nn.Module):
    """Stands where a skipped prefix of layers was, and hands on the hidden states that prefix would give."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.states: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.states,) if self.as_tuple else self.states


@dataclass
class _Window:
    input_ids: torch.Tensor
    mask: torch.Tensor
    states: list[torch.Tensor]
    """[1, T, hidden] entering each layer of the base set, and after its last one."""
    final: torch.Tensor
    """The parent's X_L, [1, T, hidden]."""
    logits: torch.Tensor | None
    """The parent's [T - 1, V], when they fit."""
    trails: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """Layers run -> the states after them, beside those of the base set."""


class LayerSetSearch:
    """Evaluates layer sets of `model` on the windows of a search split."""

    def __init__(self, model: PreTrainedModel, windows: CalibrationSet) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))
        self.num_evaluations = 0
        self._memo: dict[tuple[int, ...], SetQuality] = {}
        self._base = tuple(range(len(self.layers)))
        self._inject = Inject(returns_tuple(model, self.layers))
        self._windows: list[_Window] = []
        fits = windows.input_ids.numel() * model.config.get_text_config().vocab_size * 2 <= LOGITS_BYTES
        with torch.inference_mode(), captured_states(model) as states:
            for input_ids, mask in batches(windows, 1):
                states.clear()
                logits = _real_rows(next_token_logits(model, input_ids, mask), mask)
                self._windows.append(_Window(input_ids, mask, list(states), states[-1], logits if fits else None))

    def evaluate_removed(self, removed: Sequence[int]) -> SetQuality:
        """Quality without these layers."""
        return self.evaluate(self._without(removed))

    def rival(self, removed: Sequence[int], best: SetQuality) -> SetQuality | None:
        """Quality without these layers, or None as soon as its KL is hopelessly above the best's."""
        kept = tuple(self._without(removed))
        if kept not in self._memo:
            self.num_evaluations += 1
            shared = _shared_prefix(self._base, kept)
            quality = self._measure(self._own(kept), kept, shared, best)
            if quality is None:
                return None
            self._memo[kept] = quality
        return self._memo[kept]

    def evaluate(self, kept: Sequence[int]) -> SetQuality:
        """Quality with these layers, in this order."""
        key = tuple(kept)
        if key not in self._memo:
            self.num_evaluations += 1
            self._memo[key] = self._full(self._own(key), key, _shared_prefix(self._base, key))
        return self._memo[key]

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    @property
    def num_tokens(self) -> int:
        """Predicted tokens of all windows."""
        return sum(int(window.mask[0, 1:].sum()) for window in self._windows)

    def window_nll(self, kept: Sequence[int], window: int) -> float:
        """Summed NLL of one window in nats: what a search that may give a set up early asks for; not memoised.

        Starts from the longest run of first layers that the base set or an earlier call has gone through.
        """
        chosen, kept = self._windows[window], tuple(kept)
        base = _shared_prefix(self._base, kept)
        shared = next((n for n in range(len(kept) - 1, base, -1) if kept[:n] in chosen.trails), base)
        logits, states = self._run(chosen, self._own(kept), kept, shared, chosen.trails.get(kept[:shared]))
        if sum(len(w.trails) for w in self._windows) * states[0].nbytes < TRAIL_BYTES:
            chosen.trails.update((kept[: shared + n], states[n]) for n in range(1, len(states) - 1))
        return float(summed_nll(logits, _labels(chosen, logits)))

    def evaluate_plan(self, plan: PruningPlan) -> SetQuality:
        """Quality of a plan with its merges and replacements; not memoised, since replaced weights have no name."""
        modules = planned_layers(self.model, plan)
        unchanged = [m is self.layers[layer] for m, layer in zip(modules, plan.kept, strict=True)]
        first_change = unchanged.index(False) if False in unchanged else len(unchanged)
        shared = min(_shared_prefix(self._base, plan.kept), first_change)
        return self._full(modules, plan.kept, shared)

    def rebase(self, kept: Sequence[int]) -> None:
        """Keep the hidden states along this set, so that sets which begin like it are cheap."""
        kept = tuple(kept)
        shared = _shared_prefix(self._base, kept)
        if shared < len(kept):
            for window in self._windows:
                window.states[shared:] = self._run(window, self._own(kept), kept, shared)[1]
        for window in self._windows:
            del window.states[len(kept) + 1 :]
            window.trails = {run: state for run, state in window.trails.items() if set(run) <= set(kept)}
        self._base = kept

    def _without(self, removed: Sequence[int]) -> list[int]:
        gone = set(removed)
        return [layer for layer in range(len(self.layers)) if layer not in gone]

    def _own(self, kept: Sequence[int]) -> list[nn.Module]:
        return [self.layers[layer] for layer in kept]

    def _full(self, modules: Sequence[nn.Module], kept: Sequence[int], shared: int) -> SetQuality:
        quality = self._measure(modules, kept, shared, None)
        assert quality is not None
        return quality

    def _measure(
        self, modules: Sequence[nn.Module], kept: Sequence[int], shared: int, best: SetQuality | None
    ) -> SetQuality | None:
        """Sum over the windows; None when `best` is out of reach."""
        total = torch.zeros(3, dtype=torch.float64)
        window_kl: list[float] = []
        for window in self._windows:
            logits, _ = self._run(window, modules, kept, shared)
            teacher = window.logits if window.logits is not None else self._teacher(window)
            sums = nll_and_kl(teacher, logits, _labels(window, logits))
            total += sums
            window_kl.append(float(sums[1]))
            seen = len(window_kl)
            if best and seen >= GIVE_UP_AFTER and sum(window_kl) > GIVE_UP_MARGIN * sum(best.window_kl[:seen]):
                return None
        nll, kl, count = total.tolist()
        return SetQuality(math.exp(min(nll / count, 690.0)), kl / count, tuple(window_kl))

    def _run(
        self,
        window: _Window,
        modules: Sequence[nn.Module],
        kept: Sequence[int],
        shared: int,
        state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run modules[shared:] on the states after the first `shared`; return real-row logits and the states passed.

        Without `state` these are the base set's.
        """
        modules, kinds = list(modules[shared:]), list(kept[shared:])
        if shared:
            self._inject.states = window.states[shared] if state is None else state
            modules.insert(0, self._inject)
            kinds.insert(0, kept[shared - 1])
        with (
            torch.inference_mode(),
            spliced(self.model, modules, kinds),
            captured_states(self.model) as states,
        ):
            logits = next_token_logits(self.model, window.input_ids, window.mask)
        self._inject.states = None
        return _real_rows(logits, window.mask), states[1:] if shared else states

    def _teacher(self, window: _Window) -> torch.Tensor:
        self._inject.states = window.final
        last = len(self.layers) - 1
        with torch.inference_mode(), spliced(self.model, [self._inject], [last]):
            logits = next_token_logits(self.model, window.input_ids, window.mask)
        self._inject.states = None
        return _real_rows(logits, window.mask)


def nll_and_kl(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[T, V] logits of both and [T] labels -> [3] float64: summed NLL of the student, summed KL, T.

    KL is written with the teacher's p as sum p (z_p - z_q) - lse_p + lse_q, one pass less than two log-softmaxes.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for p, q, label in zip(
        teacher.split(CHUNK_TOKENS), student.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True
    ):
        zp, zq = p.float(), q.float()
        lse_p, lse_q = zp.logsumexp(-1), zq.logsumexp(-1)
        total[0] += (lse_q - zq.gather(-1, label[:, None])[:, 0]).sum(dtype=torch.float64).cpu()
        weights = (zp - lse_p[:, None]).exp_()
        gap = (weights * (zp - zq)).sum(-1)
        total[1] += (gap - lse_p + lse_q).sum(dtype=torch.float64).cpu()
    total[2] = len(labels)
    return total


def summed_nll(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[T, V] logits and [T] labels -> float64 scalar, the very sum that `nll_and_kl` gives."""
    total = torch.zeros((), dtype=torch.float64)
    for q, label in zip(student.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        z = q.float()
        total += (z.logsumexp(-1) - z.gather(-1, label[:, None])[:, 0]).sum(dtype=torch.float64).cpu()
    return total


def _labels(window: _Window, logits: torch.Tensor) -> torch.Tensor:
    """[real] tokens that the rows of `logits` predict."""
    return window.input_ids[0, 1:][window.mask[0, 1:].bool()].to(logits.device)


def _real_rows(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[1, T - 1, V] -> [real, V]."""
    real = mask[0, 1:].bool()
    return logits[0] if bool(real.all()) else logits[0][real.to(logits.device)]


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def returns_tuple(model: PreTrainedModel, layers: Sequence[nn.Module]) -> bool:
    """Some architectures' layers return (hidden_states, ...), most return hidden_states."""
    seen: list[bool] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))

    handle = layers[0].register_forward_hook(look)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
