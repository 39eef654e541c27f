"""The nouns survive JSON, and refuse what does not fit."""

import json

import pytest

from prune2serve.errors import Prune2ServeError
from prune2serve.records import LayerScores, Merge, PruningPlan, Replacement


def test_plan_survives_json_and_lists_what_is_kept():
    plan = PruningPlan(
        6,
        (4, 1, 2),
        "simdiff",
        {"winner": {"alpha": 0.5}},
        merges=(Merge(0, 2, "delta-sum"),),
        replacements=(Replacement(3, "linear-fold", "fold.safetensors", "00"),),
    )
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.removed == (1, 2, 4) and again.kept == (0, 3, 5)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((9,), "layer 9 cannot be removed: the model has layers 0 to 5"),
        ((-1,), "layer -1 cannot be removed: the model has layers 0 to 5"),
        ((3, 3), r"layer 3 is listed twice in \[3, 3\]: name each layer once"),
        (tuple(range(6)), "all 6 layers would be removed: keep at least one"),
    ],
)
def test_plan_refuses_impossible_layers(removed, message):
    with pytest.raises(Prune2ServeError, match=message):
        PruningPlan(6, removed, "manual")


def test_plan_refuses_a_merge_that_keeps_what_it_swallows():
    with pytest.raises(Prune2ServeError, match="the merge of layers 1 to 3 must keep 1 and remove the others"):
        PruningPlan(6, (2,), "sliding-merge", merges=(Merge(1, 3, "average"),))


def test_plan_refuses_a_replacement_of_a_removed_layer():
    with pytest.raises(Prune2ServeError, match="layer 2 has replaced tensors but is not kept"):
        PruningPlan(6, (2,), "m", replacements=(Replacement(2, "linear-fold", "f", "00"),))


def test_edited_json_is_checked_field_by_field():
    text = json.dumps({"num_layers": 6, "removed": ["two"], "method": "m"})
    with pytest.raises(
        Prune2ServeError, match=r"plan\.json is not a PruningPlan: removed\.0: Input should be a valid int"
    ):
        PruningPlan.from_json(text, origin="plan.json")


def test_a_record_never_holds_nan():
    scores = LayerScores(1, 1, "x", {"mssd": (float("nan"),)}, ((1.0,),), ((0.0,),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        scores.to_json()
