"""Refinement finds the layer that does nothing, respects its budget, and never returns a worse set."""

import copy

import pytest
import torch

from prune2serve.layer_sets import LayerSetSearch
from prune2serve.models import load_model, open_checkpoint
from prune2serve.records import CalibrationSet, PruningPlan
from prune2serve.refinement import ordered_swaps, refine, swapped


@pytest.fixture(scope="module")
def search(tiny_model):
    """A model whose layers 2 and 5 do nothing."""
    model = copy.deepcopy(load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32))
    with torch.no_grad():
        for layer in (2, 5):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(3))
    return LayerSetSearch(model, CalibrationSet(ids, torch.ones_like(ids), "test", 0, "0"))


def test_it_finds_the_layers_that_do_nothing(search):
    plan = refine(PruningPlan(8, (3, 4), "random"), search, range(1, 7), budget=60)
    assert plan.removed == (2, 5)
    found = plan.settings["refinement"]
    assert found["from"] == [3, 4] and found["search_kl"]["after"] == pytest.approx(0.0, abs=1e-6)
    assert [step["search_kl"] for step in found["steps"]] == sorted(
        (step["search_kl"] for step in found["steps"]), reverse=True
    )


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_small_budget_never_makes_it_worse(search, budget):
    start = PruningPlan(8, (1, 6), "random")
    plan = refine(start, search, range(1, 7), budget=budget)
    assert plan.settings["refinement"]["sets_tried"] <= budget + 1
    assert search.evaluate_removed(plan.removed).kl <= search.evaluate_removed(start.removed).kl


def test_time_runs_out(search):
    plan = refine(PruningPlan(8, (1, 6), "random"), search, range(1, 7), budget=50, time_limit_s=0.0)
    assert plan.removed == (1, 6)


def test_every_swap_is_offered_once_and_none_touches_protected_layers():
    import random

    swaps = list(ordered_swaps((2, 3), range(1, 7), None, random.Random(0)))
    assert len(swaps) == len(set(swaps)) == 2 * 4
    assert {out for _, out in swaps} == {1, 4, 5, 6}
    assert swapped((2, 3), (2, 6)) == (3, 6)


def test_a_hopeless_rival_is_given_up_and_not_remembered_as_measured(search):
    best = search.evaluate_removed((2, 5))
    assert search.rival((0, 7), best) is None
    assert search.evaluate_removed((0, 7)).kl > best.kl
    assert search.rival((2, 5), best) == best
