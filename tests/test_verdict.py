"""The collapse check: every sign on both sides of its limits, and real models on both ends."""

import json
from dataclasses import replace

import pytest
import torch
from test_pipeline import build, own_cache, run  # noqa: F401

from prune2serve.export.checkpoint import read_manifest
from prune2serve.models import load_model, load_tokenizer, open_checkpoint
from prune2serve.records import Perplexity, QualityReport, TaskResult
from prune2serve.repetition import Repetition, continue_prompts, distinct_share
from prune2serve.tasks import compare_items
from prune2serve.verdict import judge

FINE = QualityReport("text", 4, 400, Perplexity(20, 22, 1.1, 0.5, 0.01), 0.1, 0.01, 0.9)
CALM = Repetition(0.9, 0.85, {"parent": 256, "pruned": 256}, ())


def ratio(value):
    return replace(FINE, perplexity=replace(FINE.perplexity, ratio=value))


def task(parent_right, pruned_right, n=200, choices=4):
    """Every item the pruned model has right, the parent has too."""
    metric = compare_items([i < parent_right for i in range(n)], [i < pruned_right for i in range(n)])
    return TaskResult("quiz", "quiz.jsonl", "multiple-choice", n, 1 / choices, {"acc": metric})


def test_a_good_model_is_ok_without_reasons():
    report = judge(FINE, CALM)
    assert (report.verdict, report.reasons) == ("ok", ())
    assert report.details["repetition"]["pruned"] == 0.85


@pytest.mark.parametrize(
    ("report", "repetition", "verdict", "reason"),
    [
        (ratio(1.6), CALM, "degraded", "perplexity is 1.6 times the parent's"),
        (ratio(10.0), CALM, "collapsed", "perplexity is 10 times the parent's"),
        (ratio(float("inf")), CALM, "collapsed", "perplexity is inf times the parent's"),
        (replace(FINE, kl=0.6), CALM, "degraded", "KL to the parent is 0.60 nats per token"),
        (replace(FINE, kl=2.5), CALM, "collapsed", "KL to the parent is 2.50 nats per token"),
        (replace(FINE, top1_agreement=0.7), CALM, "degraded", "its most likely token is the parent's at 70%"),
        (replace(FINE, top1_agreement=0.25), CALM, "collapsed", "its most likely token is the parent's at 25%"),
        (FINE, replace(CALM, pruned=0.5), "degraded", "50% of the 4-grams it writes are distinct, the parent's 90%"),
        (FINE, replace(CALM, pruned=0.1), "collapsed", "10% of the 4-grams it writes are distinct"),
        (FINE, replace(CALM, parent=0.2, pruned=0.2), "ok", None),
        (FINE, replace(CALM, num_tokens={"parent": 256, "pruned": 90}), "degraded", "it stops after 90 tokens"),
        (FINE, replace(CALM, num_tokens={"parent": 256, "pruned": 0}), "collapsed", "it stops after 0 tokens"),
        (replace(FINE, tasks=(task(140, 139),)), CALM, "ok", None),
        (replace(FINE, tasks=(task(140, 90),)), CALM, "degraded", "quiz acc fell from 70% to 45% (guessing gives 25%)"),
        (replace(FINE, tasks=(task(140, 52),)), CALM, "collapsed", "quiz acc fell from 70% to 26%"),
        # The parent guesses too: nothing can be lost.
        (replace(FINE, tasks=(task(55, 30),)), CALM, "ok", None),
        # Few items: the interval of the loss reaches 0.
        (replace(FINE, tasks=(task(9, 6, n=10),)), CALM, "ok", None),
    ],
)  # fmt: skip
def test_each_sign_alone_decides(report, repetition, verdict, reason):
    judged = judge(report, repetition)
    assert judged.verdict == verdict
    assert len(judged.reasons) == (reason is not None)
    if reason:
        assert judged.reasons[0].startswith(reason)


def test_the_worst_reasons_come_first():
    judged = judge(replace(ratio(2.0), kl=3.0), CALM)
    assert judged.verdict == "collapsed"
    assert [reason.split()[0] for reason in judged.reasons] == ["KL", "perplexity"]


def test_distinct_share_by_hand():
    # 1 2 1 2 1 2 1: four 4-grams, two of them distinct; the other row has one.
    assert distinct_share([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4]]) == 3 / 5
    assert distinct_share([[1, 2, 3]]) == 1.0


def test_continuations_end_before_the_end_token(tiny_model, monkeypatch):
    checkpoint = open_checkpoint(str(tiny_model))
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)
    rows = continue_prompts(model, tokenizer)
    monkeypatch.setattr("prune2serve.repetition.end_tokens", lambda *_: {rows[0][5]})
    first = rows[0].index(rows[0][5])
    assert continue_prompts(model, tokenizer)[0] == rows[0][:first]


def test_build_and_evaluate_say_the_verdict(tiny_model, tiny_text, tmp_path):
    quiz = tmp_path / "quiz.jsonl"
    items = [{"query": f"one, two, {n}", "choices": [" three", " four"], "gold": n % 2} for n in range(6)]
    quiz.write_text("\n".join(map(json.dumps, items)))
    output = tmp_path / "out"
    answer = json.loads(build(tiny_model, tiny_text, output, "--remove", "1-6", "--tasks", quiz, "--tasks-limit", 4))
    quality = answer["quality"]
    # Random weights without six of their eight layers have nothing in common with the parent.
    assert quality["verdict"] == "collapsed" and quality["reasons"]
    assert quality["tasks"][0]["num_items"] == 4
    manifest = read_manifest(output)
    assert manifest.quality.tasks[0].metrics["acc"].interval[0] <= 0
    card = (output / "README.md").read_text()
    assert f"Verdict: **collapsed**: {'; '.join(quality['reasons'])}." in card
    assert "| quiz acc (4 items) |" in card

    shown = run("evaluate", output, "--tasks", quiz, "--dtype", "float32", "--quiet")
    assert "verdict     collapsed: " in shown and "quiz  acc " in shown and "6 items" in shown
    assert "stability" in shown


def test_several_files_after_one_option(tiny_model, tiny_text, tmp_path):
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text('{"context": "one", "continuation": " two"}\n' * 3)
    build(tiny_model, tiny_text, tmp_path / "out", "--remove", "3")
    report = json.loads(run("evaluate", "--tasks", *files, tmp_path / "out", "--dtype", "float32", "--json", "--quiet"))
    assert [task["name"] for task in report["tasks"]] == ["a", "b"]


def test_a_bad_task_file_is_named_before_any_work(tiny_model, tiny_text, tmp_path):
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"query": "q"}\n')
    message = build(tiny_model, tiny_text, tmp_path / "out", "--remove", "3", "--tasks", quiz, code=1)
    assert "quiz.jsonl line 1 has the fields 'query'" in message
