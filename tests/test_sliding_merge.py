"""Sliding merge: the window's walk by hand, the threshold, and the similarity against whole forward passes."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune2serve.activations import score_layers
from prune2serve.calibration import Calibration
from prune2serve.errors import Prune2ServeError
from prune2serve.layers import plan_in_memory
from prune2serve.methods import select
from prune2serve.methods.base import Selection, SelectorOptions
from prune2serve.methods.sliding_merge import bisect_threshold, mergeable_runs, num_removed, slide, trim
from prune2serve.records import CalibrationSet, Merge, PruningPlan
from prune2serve.similarity import MergedSimilarity

NUM_LAYERS = 8
RULES = ("telescoped", "delta-sum", "average")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=NUM_LAYERS, vocab_size=60, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows() -> CalibrationSet:
    ids = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return CalibrationSet(ids, mask, "test", 0, "0")


def ask(model, windows, num_remove, candidates=range(1, NUM_LAYERS - 1), rule="telescoped") -> Selection:
    return Selection(
        score_layers(model, windows),
        num_remove,
        tuple(candidates),
        0,
        search=lambda: pytest.fail("no layer set is asked for"),
        model=lambda: model,
        calibration=lambda: Calibration(windows, windows, windows),
        options=SelectorOptions(merge_rule=rule),
    )


def as_plan(merges) -> PruningPlan:
    removed = tuple(layer for merge in merges for layer in range(merge.low + 1, merge.high + 1))
    return PruningPlan(NUM_LAYERS, removed, "test", merges=tuple(merges))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("runs", [[(5, 6)], [(1, 3)], [(0, 2), (4, 6)], [(2, 3), (5, 6)], []])
def test_similarity_equals_whole_forward_passes(model, windows, runs, rule) -> None:
    merges = tuple(Merge(low, high, rule) for low, high in runs)
    expected = []
    with torch.inference_mode():
        for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
            real = ids[mask.bool()][None]
            parent = model.model(real).last_hidden_state.double().flatten()
            with plan_in_memory(model, as_plan(merges)):
                merged = model.model(real).last_hidden_state.double().flatten()
            expected.append(float(parent @ merged / parent.norm() / merged.norm()))
    measured = MergedSimilarity(model, windows, 3)
    assert measured(merges) == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert measured(merges[::-1]) == measured(merges) and measured.num_measured == 1
    assert MergedSimilarity(model, windows, 1)(merges) == pytest.approx(expected[0], abs=1e-5)


def test_the_walk_by_hand() -> None:
    """Layers 0 to 6 may merge, 4-6 fit together, 3 fits with nothing, 0-2 fit together."""
    asked = []

    def similarity(merges) -> float:
        window = (merges[-1].low, merges[-1].high)
        asked.append(window)
        return 0.9 if window in {(5, 6), (4, 6), (1, 2), (0, 2)} else 0.1

    assert slide([range(0, 7)], 0.5, "average", similarity) == (Merge(4, 6, "average"), Merge(0, 2, "average"))
    assert asked == [(5, 6), (4, 6), (3, 6), (2, 3), (1, 2), (0, 2)]


def test_committed_merges_count_in_later_similarities() -> None:
    seen = []

    def similarity(merges) -> float:
        seen.append([(merge.low, merge.high) for merge in merges])
        return float(merges[-1].low > 3)

    slide([range(2, 6), range(0, 2)], 0.5, "average", similarity)
    assert seen == [[(4, 5)], [(3, 5)], [(4, 5), (2, 3)], [(4, 5), (0, 1)]]


@pytest.mark.parametrize("num_remove", range(1, 7))
def test_the_threshold_is_bisected_until_exactly_k_are_gone(num_remove) -> None:
    def similarity(merges) -> float:
        return 1 - 0.07 * num_removed(merges)

    merges, threshold = bisect_threshold([range(0, 7)], num_remove, "average", similarity)
    assert num_removed(merges) == num_remove
    assert threshold == -1 or merges == slide([range(0, 7)], threshold, "average", similarity)


def test_the_most_similar_exact_answer_wins() -> None:
    """The walk from the top meets a fair pair first; a higher threshold passes it over for the best."""
    quality = {(5, 6): 0.6, (2, 3): 0.95}

    def similarity(merges) -> float:
        return min(quality.get((merge.low, merge.high), 0.0) for merge in merges)

    assert slide([range(0, 7)], 0.5, "average", similarity) == (Merge(5, 6, "average"), Merge(2, 3, "average"))
    assert bisect_threshold([range(0, 7)], 1, "average", similarity)[0] == (Merge(2, 3, "average"),)


def test_an_overshoot_is_trimmed_where_it_costs_least() -> None:
    def all_or_nothing(merges) -> float:
        return 0.5

    merges, _ = bisect_threshold([range(0, 7)], 2, "average", all_or_nothing)
    assert num_removed(merges) == 6
    worth = [0, 0, 3, 4, 3, 0, 0]  # of layers that stand in the merge
    trimmed = trim(merges, 2, lambda merges: sum(worth[layer] for m in merges for layer in range(m.low, m.high + 1)))
    assert trimmed == (Merge(2, 4, "average"),)
    pairs = (Merge(0, 1, "average"), Merge(3, 4, "average"))
    assert trim(pairs, 1, lambda merges: -merges[0].low) == (Merge(0, 1, "average"),)


@pytest.mark.parametrize("rule", ["telescoped", "delta-sum"])
@pytest.mark.parametrize("useless", [1, 3, 5])
def test_a_layer_that_does_nothing_is_merged_into_the_one_above(model, windows, useless, rule) -> None:
    """With the lower of two layers an identity that differs by nothing else, both rules leave the upper one."""
    low, high = model.model.layers[useless], model.model.layers[useless + 1]
    low.load_state_dict(high.state_dict())
    for projection in (low.self_attn.o_proj, low.mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)
    plan = select("sliding-merge", ask(model, windows, 1, rule=rule))
    assert plan.merges == (Merge(useless, useless + 1, rule),) and plan.removed == (useless + 1,)
    assert plan.settings["similarity"] == pytest.approx(1.0, abs=1e-5)
    ids = windows.input_ids[:1]
    with torch.inference_mode():
        expected = model(ids).logits
        with plan_in_memory(model, plan):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_remove", [1, 2, 4, 5])
def test_exactly_k_layers_go_and_protected_ones_stay_as_they_are(model, windows, num_remove, rule) -> None:
    plan = select("sliding-merge", ask(model, windows, num_remove, rule=rule))
    assert len(plan.removed) == num_remove == num_removed(plan.merges)
    assert all(1 <= merge.low < merge.high <= 6 and merge.rule == rule for merge in plan.merges)
    assert plan.settings["merge_rule"] == rule and rule in plan.why


def test_the_last_layer_is_never_merged(model, windows) -> None:
    assert mergeable_runs(model, range(NUM_LAYERS)) == [range(0, NUM_LAYERS - 1)]
    assert mergeable_runs(model, (0, 1, 3, 4, 5, 7)) == [range(3, 6), range(0, 2)]
    with pytest.raises(Prune2ServeError, match=r"7 layers should go but only 6 can be merged into a neighbour"):
        select("sliding-merge", ask(model, windows, 7, candidates=range(NUM_LAYERS)))


def test_layers_of_different_shapes_are_not_merged(model) -> None:
    model.model.layers[3].mlp.up_proj = torch.nn.Linear(32, 50, bias=False)
    assert mergeable_runs(model, range(1, 7)) == [range(4, 7), range(3, 4), range(1, 3)]


def test_an_unknown_rule_is_refused(model, windows) -> None:
    with pytest.raises(Prune2ServeError, match=r"--merge-rule is 'mean': choose among telescoped, delta-sum, average"):
        replace(SelectorOptions(), merge_rule="mean")
