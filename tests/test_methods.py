"""Selectors on hand-made scores, and on a model whose useless layer is known."""

import numpy as np
import pytest

from prune2serve.errors import Prune2ServeError
from prune2serve.layer_sets import SetQuality
from prune2serve.methods import SELECTORS, select
from prune2serve.methods.base import Selection, num_layers_to_remove
from prune2serve.methods.simdiff import NORMALISATIONS, along_alpha, ternary_search
from prune2serve.records import LayerScores

BI = (0.9, 0.10, 0.50, 0.20, 0.30, 0.8)
MSSD = (1.0, 9.0, 0.1, 0.2, 1000.0, 5.0)


class CountingSearch:
    """A search whose cost of a layer set is known: the sum of its layers' true importances."""

    def __init__(self, importance):
        self.importance = importance
        self.asked = []

    def evaluate_removed(self, removed):
        self.asked.append(tuple(removed))
        return SetQuality(sum(self.importance[layer] for layer in removed), 0.0)


def selection(num_remove, *, candidates=(1, 2, 3, 4), importance=(9, 1, 4, 2, 3, 9), seed=0):
    size = len(BI) + 1
    angle = [[abs(i - j) * (1.0 + (i == 2)) for j in range(size)] for i in range(size)]
    angle[2][4] = 0.01
    scores = LayerScores(
        num_layers=6,
        tokens=100,
        calibration_sha256="0",
        metrics={"block_influence": BI, "mssd": MSSD, "masd": MSSD, "relative_magnitude": BI[::-1]},
        cosine=tuple(map(tuple, np.eye(size).tolist())),
        angle=tuple(map(tuple, angle)),
    )
    search = CountingSearch(importance)
    return Selection(scores, num_remove, candidates, seed, lambda: search), search


@pytest.mark.parametrize(
    ("ratio", "layers", "expected"), [(0.25, 30, 8), (0.25, 32, 8), (0.01, 30, 1), (0.99, 30, 29), (0.5, 5, 3)]
)
def test_ratio_rounds_half_up(ratio, layers, expected):
    assert num_layers_to_remove(ratio, layers) == expected


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.2, -0.1])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(Prune2ServeError, match=f"--ratio {ratio:g} removes nothing or everything"):
        num_layers_to_remove(ratio, 30)


def test_one_shot_selectors_take_the_lowest_unprotected():
    asked, _ = selection(2)
    assert select("block-influence", asked).removed == (1, 3)
    assert select("relative-magnitude", asked).removed == (2, 4)
    assert select("last", asked).removed == (3, 4)
    assert select("mssd", asked).removed == select("masd", asked).removed == (2, 3)
    assert select("angular", asked).removed == (2, 3)


def test_random_depends_on_the_seed():
    plans = {select("random", selection(2, seed=seed)[0]).removed for seed in range(20)}
    assert len(plans) > 2
    assert select("random", selection(2, seed=3)[0]) == select("random", selection(2, seed=3)[0])


def test_angular_refuses_when_no_run_is_free():
    with pytest.raises(Prune2ServeError, match="no 2 neighbouring layers may be removed together"):
        select("angular", selection(2, candidates=(1, 3))[0])


def test_asking_for_more_than_is_allowed_is_refused():
    with pytest.raises(Prune2ServeError, match="5 layers should go but only 4 of 6 may"):
        selection(5)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_span_0_to_1_and_keep_the_order(name):
    values = np.array([3.0, 1e-9, 2000.0, 0.5])
    normalised = NORMALISATIONS[name](values)
    assert normalised.min() == 0.0 and normalised.max() == 1.0
    assert (normalised.argsort() == values.argsort()).all()
    assert NORMALISATIONS[name](np.ones(4)).tolist() in ([0, 0, 0, 0], [0, 1 / 3, 2 / 3, 1])


def test_along_alpha_goes_from_similarity_alone_to_difference_alone():
    path = along_alpha(selection(2)[0], "mssd", "rank")
    assert path[0].removed == (1, 3) and path[0].alpha == 0.0
    assert path[-1].removed == (2, 3)
    assert len({c.removed for c in path}) == len(path)


def test_simdiff_is_never_worse_than_its_ingredients_on_the_search_split_and_asks_once_a_set():
    for importance in ((9, 1, 4, 2, 3, 9), (9, 5, 1, 3, 1, 9), (9, 4, 4, 1, 2, 9)):
        asked, search = selection(2, importance=importance)
        plan = select("simdiff", asked)
        found = plan.settings["winner"]["search_perplexity"]
        assert found <= search.evaluate_removed((1, 3)).perplexity
        assert found <= search.evaluate_removed((2, 3)).perplexity
        asked_by_simdiff = search.asked[:-2]
        assert len(asked_by_simdiff) == len(set(asked_by_simdiff)) == plan.settings["num_sets"]
        assert plan.settings["runner_up"]["search_perplexity"] >= found


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20])
def test_ternary_search_finds_the_bottom_of_a_valley(length):
    for bottom in range(length):
        path = list(range(length))
        assert ternary_search(path, lambda i, b=bottom: abs(i - b)) == bottom


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(Prune2ServeError, match="no method 'simdif', did you mean 'simdiff'"):
        select("simdif", selection(1)[0])
    assert "simdiff" in SELECTORS
