"""Perplexity, KL and agreement against plain formulas; layer sets against whole forward passes."""

import math

import pytest
import torch

from prune2serve.evaluation import WindowSums, evaluate, summarise
from prune2serve.layer_sets import LayerSetSearch
from prune2serve.layers import pruned_in_memory
from prune2serve.models import load_model, open_checkpoint
from prune2serve.records import CalibrationSet


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(model):
    ids = torch.randint(0, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[2, 11:] = 0
    return CalibrationSet(ids, mask, "test", 0, "0")


def whole_model(model, windows, kept):
    """NLL and KL of the pruned model from log-softmax over everything at once."""
    teacher, student = [], []
    with torch.inference_mode():
        for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True):
            real = ids[mask.bool()][None]
            teacher.append((model(real).logits[0, :-1].double().log_softmax(-1), real[0, 1:]))
            with pruned_in_memory(model, kept):
                student.append(model(real).logits[0, :-1].double().log_softmax(-1))
    nll = torch.cat([-q.gather(-1, y[:, None])[:, 0] for q, (_, y) in zip(student, teacher, strict=True)])
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for q, (p, _) in zip(student, teacher, strict=True)])
    agree = torch.cat([p.argmax(-1) == q.argmax(-1) for q, (p, _) in zip(student, teacher, strict=True)])
    return math.exp(nll.mean()), float(kl.mean()), float(agree.double().mean())


def test_evaluate_equals_the_plain_formulas(model, windows):
    kept = [0, 1, 3, 4, 6, 7]
    report = evaluate(model, model, windows, as_pruned=lambda: pruned_in_memory(model, kept))
    perplexity, kl, agreement = whole_model(model, windows, kept)
    assert report.num_tokens == 19 + 19 + 10
    assert report.perplexity.pruned == pytest.approx(perplexity, rel=1e-5)
    assert report.kl == pytest.approx(kl, rel=1e-4)
    assert report.top1_agreement == pytest.approx(agreement)


def test_a_model_beside_itself_costs_nothing(model, windows):
    report = evaluate(model, model, windows)
    assert report.perplexity.ratio == 1.0 and report.top1_agreement == 1.0
    assert report.kl == pytest.approx(0.0, abs=1e-9)
    assert report.perplexity.ratio_standard_error == 0.0


def test_standard_error_by_hand():
    # Two windows of 10 tokens with mean NLL 1 and 3: the mean is 2, its standard error sqrt(2) / sqrt(2) = 1.
    sums = WindowSums(*(torch.tensor(v, dtype=torch.float64) for v in ([10, 10], [10, 10], [10, 30], [0, 0], [5, 10])))
    report = summarise(sums, "hand")
    assert report.perplexity.pruned == pytest.approx(math.exp(2))
    assert report.perplexity.standard_error == pytest.approx(math.exp(2) * 1.0)
    assert report.perplexity.ratio == pytest.approx(math.e)
    assert report.top1_agreement == 0.75


@pytest.mark.parametrize("removed", [(), (1,), (7,), (0, 3), (2, 3, 4, 6)])
def test_layer_sets_equal_whole_forward_passes(model, windows, removed):
    search = LayerSetSearch(model, windows)
    quality = search.evaluate_removed(removed)
    kept = [layer for layer in range(8) if layer not in removed]
    perplexity, kl, _ = whole_model(model, windows, kept)
    assert quality.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert quality.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)


def test_rebase_changes_no_result_and_sets_are_remembered(model, windows):
    fresh = LayerSetSearch(model, windows)
    moved = LayerSetSearch(model, windows)
    moved.rebase([0, 1, 2, 4, 5, 6, 7])
    moved.rebase([0, 1, 2, 4, 6, 7])
    for kept in ([0, 1, 2, 4, 7], [0, 1, 3, 4, 6, 7], [0, 1, 2, 4, 6, 7], [1, 2, 3]):
        assert moved.evaluate(kept) == fresh.evaluate(kept)
    count = moved.num_evaluations
    moved.evaluate([1, 2, 3])
    assert moved.num_evaluations == count


def test_teacher_logits_that_do_not_fit_are_computed_again(model, windows, monkeypatch):
    kept = LayerSetSearch(model, windows).evaluate([0, 2, 4, 6])
    monkeypatch.setattr("prune2serve.layer_sets.LOGITS_BYTES", 0)
    assert LayerSetSearch(model, windows).evaluate([0, 2, 4, 6]) == kept
