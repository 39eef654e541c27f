"""The fast greedy search makes the naive loop's choices, with fewer and shorter passes."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune2serve.activations import score_layers
from prune2serve.layer_sets import LayerSetSearch, summed_nll
from prune2serve.layers import pruned_in_memory
from prune2serve.methods import select
from prune2serve.methods.base import Selection
from prune2serve.methods.perplexity import cheapest_removal
from prune2serve.records import CalibrationSet

NUM_LAYERS = 7


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=NUM_LAYERS, vocab_size=60, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def own_words(model: LlamaForCausalLM, num_windows: int = 4, window: int = 24) -> CalibrationSet:
    """Text that the model itself samples: any real change of the model makes it less likely."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (num_windows, 1))
    ids = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, pad_token_id=0,
        min_new_tokens=window - 1, max_new_tokens=window - 1,
    )  # fmt: skip
    mask = torch.ones_like(ids)
    mask[-1, window - 5 :] = 0
    return CalibrationSet(ids, mask, "own words", 0, CalibrationSet.digest(ids, mask))


def ask(model: LlamaForCausalLM, windows: CalibrationSet, num_remove: int, candidates=range(1, NUM_LAYERS - 1)):
    search = LayerSetSearch(model, windows)
    return Selection(score_layers(model, windows), num_remove, tuple(candidates), 0, lambda: search), search


def naive_nll(model: LlamaForCausalLM, windows: CalibrationSet, kept: list[int]) -> float:
    total = 0.0
    with torch.inference_mode(), pruned_in_memory(model, kept):
        for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
            real = ids[mask.bool()]
            logits = model(real[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, real[1:], reduction="sum"))
    return total


def naive_loop(model: LlamaForCausalLM, windows: CalibrationSet, num_remove: int) -> tuple[list[int], list[float]]:
    kept, order, totals = list(range(NUM_LAYERS)), [], []
    for _ in range(num_remove):
        trials = {
            layer: naive_nll(model, windows, [other for other in kept if other != layer])
            for layer in kept
            if 0 < layer < NUM_LAYERS - 1
        }
        best = min(trials, key=trials.__getitem__)
        kept.remove(best)
        order.append(best)
        totals.append(trials[best])
    return order, totals


@pytest.mark.parametrize("seed", range(4))
def test_makes_the_naive_loops_choices(seed):
    model = make_model(seed)
    windows = own_words(model)
    plan = select("perplexity", ask(model, windows, 3)[0])
    order, totals = naive_loop(model, windows, 3)
    num_tokens = int(windows.attention_mask[:, 1:].sum())
    assert plan.settings["order"] == order
    expected = [math.exp(total / num_tokens) for total in totals]
    assert plan.settings["search_perplexities"] == pytest.approx(expected, rel=1e-5)


def test_finds_the_layer_that_does_nothing():
    for useless in (1, 3, 5):
        model = make_model(0)
        for projection in (model.model.layers[useless].self_attn.o_proj, model.model.layers[useless].mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
        assert select("perplexity", ask(model, own_words(model), 1)[0]).removed == (useless,)


def test_protected_layers_stay():
    model = make_model(0)
    plan = select("perplexity", ask(model, own_words(model), 2, candidates=(2, 4, 5))[0])
    assert set(plan.removed) < {2, 4, 5}


def test_window_sums_are_those_of_a_whole_evaluation():
    model = make_model(0)
    _, search = ask(model, own_words(model), 1)
    kept = [0, 1, 3, 5, 6]
    total = sum(search.window_nll(kept, window) for window in range(search.num_windows))
    assert math.exp(total / search.num_tokens) == search.evaluate(kept).perplexity


def test_what_earlier_trials_went_through_is_not_run_again():
    model = make_model(0)
    windows = own_words(model)
    search, fresh = LayerSetSearch(model, windows), LayerSetSearch(model, windows)
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    search.window_nll([0, 2, 3, 4, 5, 6], 1)
    assert ran == [2, 3, 4, 5, 6]
    search.rebase([0, 1, 2, 3, 5, 6])
    for kept, expected in (([0, 2, 3, 5, 6], [5, 6]), ([0, 1, 2, 3, 6], [6]), ([0, 3, 5, 6], [3, 5, 6])):
        ran.clear()
        nll = search.window_nll(kept, 1)
        assert ran == expected
        assert nll == fresh.window_nll(kept, 1)


def test_states_are_left_behind_only_while_they_fit(monkeypatch):
    model = make_model(0)
    windows = own_words(model)
    expected = select("perplexity", ask(model, windows, 3)[0])
    monkeypatch.setattr("prune2serve.layer_sets.TRAIL_BYTES", 10_000)
    assert select("perplexity", ask(model, windows, 3)[0]) == expected


def test_summed_nll_against_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(150, 40, generator=generator), torch.randint(40, (150,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert float(summed_nll(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


class Listed:
    """A search whose windows cost what a table says; counts what it is asked."""

    num_windows = 3

    def __init__(self, costs):
        self.costs = costs
        self.asked = []

    def window_nll(self, kept, window):
        removed = next(layer for layer in self.costs if layer not in kept)
        self.asked.append((removed, window))
        return self.costs[removed][window]


def test_a_hopeless_trial_is_given_up_at_once():
    search = Listed({0: (1.0, 1.0, 1.0), 1: (9.0, 0.0, 0.0), 2: (2.0, 2.0, 2.0)})
    assert cheapest_removal(search, range(3), range(3)) == (0, 3.0)
    assert sorted(search.asked) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


def test_equals_go_to_the_earlier_layer_and_broken_ones_lose():
    equal = Listed({0: (1.0, 2.0, 3.0), 1: (3.0, 2.0, 1.0), 2: (math.nan, 0.0, 0.0)})
    assert cheapest_removal(equal, range(3), range(3)) == (0, 6.0)
