"""The streaming statistics equal their naive formulas; padding does not count; the last layer is taken pre-norm."""

import math

import pytest
import torch

from prune2serve.activations import LayerStatistics, captured_states, score_layers
from prune2serve.errors import CorruptCheckpointError
from prune2serve.models import load_model, open_checkpoint
from prune2serve.records import CalibrationSet


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32)


def calibration(vocabulary: int) -> CalibrationSet:
    ids = torch.randint(0, vocabulary, (5, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[4, 9:] = 0
    return CalibrationSet(ids, mask, "test", 0, "0")


def naive_states(model, data):
    """X_0 .. X_L of all real tokens, float64, from hooks written here and not there."""
    inputs, last = [], []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, a, k, i=i: inputs.append((i, a[0] if a else k["hidden_states"])), with_kwargs=True
        )
        for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, a: last.append(a[0])))
    with torch.inference_mode():
        model(input_ids=data.input_ids, attention_mask=data.attention_mask)
    for handle in handles:
        handle.remove()
    real = data.attention_mask.bool()
    return [x[real].double() for _, x in inputs] + [last[0][real].double()], [x for _, x in inputs] + last


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_statistic_equals_its_naive_formula(model, batch_size):
    data = calibration(model.config.vocab_size)
    scores = score_layers(model, data, batch_size=batch_size)
    states, padded = naive_states(model, data)
    assert scores.tokens == 4 * 24 + 9
    for layer in range(8):
        x, y = states[layer], states[layer + 1]
        f = y - x
        cosine = torch.cosine_similarity(x, y, dim=-1)
        expected = {
            "block_influence": 1 - cosine.mean(),
            "mssd": f.square().mean(),
            "masd": f.abs().mean(),
            "relative_magnitude": (f.norm(dim=-1) / x.norm(dim=-1)).mean(),
        }
        for name, value in expected.items():
            assert scores.metrics[name][layer] == pytest.approx(float(value), rel=2e-5, abs=2e-7), (name, layer)
    for i, j in ((0, 8), (2, 5), (7, 3)):
        assert scores.cosine[i][j] == pytest.approx(
            float(torch.cosine_similarity(states[i], states[j], dim=-1).mean()), abs=1e-5
        )
        ends = [23, 23, 23, 23, 8]
        a, b = (torch.stack([padded[k][row, end] for row, end in enumerate(ends)]).double() for k in (i, j))
        angle = torch.arccos(torch.cosine_similarity(a, b, dim=-1)) / math.pi
        assert scores.angle[i][j] == pytest.approx(float(angle.mean()), abs=1e-5)


def test_a_layer_that_does_nothing_scores_lowest_on_every_metric(model):
    import copy

    still = copy.deepcopy(model)
    with torch.no_grad():
        still.model.layers[3].self_attn.o_proj.weight.zero_()
        still.model.layers[3].mlp.down_proj.weight.zero_()
    scores = score_layers(still, calibration(model.config.vocab_size))
    for name, values in scores.metrics.items():
        assert min(range(8), key=values.__getitem__) == 3, name
        assert values[3] == pytest.approx(0.0, abs=1e-6), name


def test_hooks_are_gone_after_an_exception(model):
    with pytest.raises(RuntimeError, match="stop"), captured_states(model):
        raise RuntimeError("stop")
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_memory_does_not_grow_with_samples():
    statistics = LayerStatistics(4)

    def held():
        return sum(v.numel() for v in vars(statistics).values() if isinstance(v, torch.Tensor))

    before = held()
    for _ in range(5):
        statistics.update([torch.randn(2, 8, 16) for _ in range(5)], torch.ones(2, 8))
        assert held() == before
    assert statistics.num_tokens == 80


def test_overflow_is_named():
    statistics = LayerStatistics(2)
    x = torch.ones(1, 2, 4)
    statistics.update([x, x, x * float("inf")], torch.ones(1, 2))
    with pytest.raises(CorruptCheckpointError, match="layer 1 gives block_influence = nan"):
        statistics.scores("0")
