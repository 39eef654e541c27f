"""The bake-off on a tiny real model: rows as builds give them, resumed, drawn, and open to a new selector."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from test_pipeline import SMALL, build, own_cache, run  # noqa: F401

from prune2serve import methods
from prune2serve.bakeoff import BakeoffRow, row_options
from prune2serve.bakeoff_report import MEASURES, pareto, ranges
from prune2serve.options import BuildOptions
from prune2serve.records import Perplexity, QualityReport


def bake(tiny_model, tiny_text, output, *more, code=0):
    return run(
        "bakeoff", "--model", tiny_model, "--calibration", tiny_text, "--output", output, "--dtype", "float32",
        "--json", "--quiet", *SMALL, *more, code=code,
    )  # fmt: skip


def baked(*arguments):
    return json.loads(bake(*arguments))


@pytest.fixture
def quiz(tmp_path):
    file = tmp_path / "quiz.jsonl"
    items = [{"query": f"one, two, {n}", "choices": [" three", " four"], "gold": n % 2} for n in range(6)]
    file.write_text("\n".join(map(json.dumps, items)))
    return file


def test_a_row_is_what_build_and_evaluate_say(tiny_model, tiny_text, tmp_path, quiz):
    result = baked(
        tiny_model, tiny_text, tmp_path / "b", "--methods", "block-influence", "--ratios", "0.25", "--tasks", quiz
    )
    (row,) = result["rows"]
    built = json.loads(
        build(tiny_model, tiny_text, tmp_path / "out", "--method", "block-influence", "--ratio", "0.25",
              "--compensate", "none", "--tasks", quiz)
    )  # fmt: skip
    assert row["removed"] == built["removed"] and row["num_layers"] == 6
    assert row["num_parameters"] == built["num_parameters"]["pruned"]
    assert result["num_parameters"] == built["num_parameters"]["parent"] and result["num_layers"] == 8
    assert row["quality"]["perplexity"] == pytest.approx(built["quality"]["perplexity"], rel=1e-6)
    assert row["quality"]["kl"] == pytest.approx(built["quality"]["kl"], rel=1e-6)
    assert row["quality"]["tasks"] == built["quality"]["tasks"]
    assert row["quality"]["verdict"] == built["quality"]["verdict"]
    assert {"selection", "quality"} <= set(row["seconds"]) and row["peak_memory_bytes"] > 10**7


def test_every_method_at_every_ratio_with_one_scoring_pass_and_one_parent(tiny_model, tiny_text, tmp_path, monkeypatch):
    from prune2serve import bakeoff, quality

    calls = {"score": 0, "parent": 0}
    score, continue_prompts = bakeoff.score, quality.continue_prompts

    def counted_score(bench):
        calls["score"] += 1
        return score(bench)

    def counted_prompts(model, tokenizer):
        calls["parent"] += len(model.model.layers) == 8
        return continue_prompts(model, tokenizer)

    monkeypatch.setattr(bakeoff, "score", counted_score)
    monkeypatch.setattr(quality, "continue_prompts", counted_prompts)
    result = baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "simdiff,last,random", "--ratios", "0.2,0.4")
    assert [(row["method"], row["ratio"]) for row in result["rows"]] == [
        (method, ratio) for ratio in (0.2, 0.4) for method in ("simdiff", "last", "random")
    ]
    assert [row["num_layers"] for row in result["rows"]] == [6, 6, 6, 5, 5, 5]
    assert calls == {"score": 1, "parent": 1}
    assert len({row["quality"]["perplexity"]["parent"] for row in result["rows"]}) == 1


def test_a_new_selector_is_one_line_and_shows_up(tiny_model, tiny_text, tmp_path, monkeypatch):
    def every_other(selection):
        return selection.plan(selection.candidates[::2][: selection.num_remove], "every-other", "one in two")

    monkeypatch.setitem(methods.SELECTORS, "every-other", every_other)
    result = baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "last,every-other", "--ratios", "0.25")
    assert [row["method"] for row in result["rows"]] == ["last", "every-other"]
    assert result["rows"][1]["removed"] == [1, 3] and result["rows"][1]["settings"]["why"] == "one in two"


def test_stages_follow_a_selector(tiny_model, tiny_text, tmp_path):
    result = baked(
        tiny_model, tiny_text, tmp_path / "b", "--methods", "random,random+refine,random+linear-fold",
        "--ratios", "0.25", "--refine", "6",
    )  # fmt: skip
    plain, refined, folded = result["rows"]
    assert "refinement" in refined["seconds"] and "refinement" not in plain["seconds"]
    assert folded["removed"] == plain["removed"] and folded["num_parameters"] == plain["num_parameters"]
    assert folded["settings"]["compensation"]["kind"] == "linear-fold"
    assert folded["quality"]["kl"] != plain["quality"]["kl"]


def test_what_is_done_is_not_done_again(tiny_model, tiny_text, tmp_path, monkeypatch):
    from prune2serve.bakeoff import Oven

    first = baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "last,random", "--ratios", "0.25")
    made = []
    bake_row = Oven.bake

    def counted(self, method, ratio, options):
        made.append((method, ratio))
        return bake_row(self, method, ratio, options)

    monkeypatch.setattr(Oven, "bake", counted)
    assert baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "last,random", "--ratios", "0.25") == first
    assert made == []
    more = baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "last,random,angular", "--ratios", "0.25")
    assert made == [("angular", 0.25)] and more["rows"][:2] == first["rows"]

    message = bake(
        tiny_model, tiny_text, tmp_path / "b", "--methods", "last", "--ratios", "0.25", "--seed", "1", code=1
    )
    assert "last-0.25.json was made with other settings" in message
    baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "last", "--ratios", "0.25", "--seed", "1", "--force")
    assert made[1:] == [("last", 0.25)]


def test_an_interrupted_run_keeps_its_rows(tiny_model, tiny_text, tmp_path, monkeypatch):
    from prune2serve.bakeoff import Oven

    bake_row = Oven.bake

    def stops(self, method, ratio, options):
        if method == "random":
            raise KeyboardInterrupt
        return bake_row(self, method, ratio, options)

    with monkeypatch.context() as patch:
        patch.setattr(Oven, "bake", stops)
        with pytest.raises(AssertionError):
            bake(tiny_model, tiny_text, tmp_path / "b", "--methods", "last,random", "--ratios", "0.25")
    assert [file.name for file in (tmp_path / "b" / "rows").iterdir()] == ["last-0.25.json"]


def test_a_method_that_cannot_do_it_says_why_and_the_others_go_on(tiny_model, tiny_text, tmp_path, monkeypatch):
    from prune2serve.errors import Prune2ServeError

    def never(_):
        raise Prune2ServeError("not with this model")

    monkeypatch.setitem(methods.SELECTORS, "never", never)
    result = baked(tiny_model, tiny_text, tmp_path / "b", "--methods", "never,last", "--ratios", "0.25")
    assert result["rows"][0]["error"] == "not with this model" and result["rows"][0]["quality"] is None
    assert result["rows"][1]["quality"]["kl"] > 0
    assert not (tmp_path / "b" / "rows" / "never-0.25.json").exists()
    message = bake(tiny_model, tiny_text, tmp_path / "c", "--methods", "never", "--ratios", "0.25", code=1)
    assert message == "no method gave a model: never: not with this model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "simdif"], "no method 'simdif', did you mean 'simdiff'?"),
        (["--methods", "simdiff+refin"], "no stage 'refin' in 'simdiff+refin', did you mean 'refine'?"),
        (["--methods", ","], "--methods ',' names nothing"),
        (["--ratios", "a"], "--ratios: 'a' is no number"),
        (["--ratios", "1.5"], "--ratio 1.5 removes nothing or everything"),
        (["--tasks", "nothing.jsonl"], "no task file at nothing.jsonl"),
    ],
)
def test_user_errors_come_before_any_work(tiny_model, tiny_text, tmp_path, arguments, message):
    assert message in bake(tiny_model, tiny_text, tmp_path / "b", *arguments, code=1)
    assert not (tmp_path / "b").exists()


def test_the_table_the_chart_and_the_page(tiny_model, tiny_text, tmp_path, quiz):
    shown = run(
        "bakeoff", "--model", tiny_model, "--calibration", tiny_text, "--output", tmp_path / "b", "--dtype", "float32",
        "--quiet", *SMALL, "--methods", "last,block-influence", "--ratios", "0.25,0.5", "--tasks", quiz,
    )  # fmt: skip
    lines = shown.splitlines()
    assert lines[0].split()[:3] == ["method", "ratio", "removed"] and "quiz acc_norm" in lines[0]
    assert lines[1].split()[0] == "parent" and sum(line.startswith("*") for line in lines) >= 1
    assert len(lines) == 1 + 1 + 4 + 1 and lines[-1].endswith("bakeoff.html: the chart and this table")

    svg = ElementTree.parse(tmp_path / "b" / "bakeoff.svg").getroot()
    namespace = "{http://www.w3.org/2000/svg}"
    titles = [element.text for element in svg.iter(f"{namespace}title")]
    assert len(titles) == 3 * 4 and any(title.startswith("last at 0.25: ") for title in titles)
    assert len(list(svg.iter(f"{namespace}polyline"))) == 3
    page = (tmp_path / "b" / "bakeoff.html").read_text()
    assert "<svg" in page and "<script" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def row(method, num_parameters, kl):
    quality = QualityReport("t", 1, 1, Perplexity(1, 1, 1, 0, 0), kl, 0.0, 1.0)
    return BakeoffRow(method, 0.1, (), 1, num_parameters, quality, {}, 0)


def test_the_pareto_front_by_hand():
    a, b, c, d, e = row("a", 10, 5.0), row("b", 10, 4.0), row("c", 20, 4.0), row("d", 20, 1.0), row("e", 30, 2.0)
    failed = replace(row("f", 5, 0.0), quality=None)
    assert [r.method for r in pareto([e, d, failed, c, b, a], MEASURES[0])] == ["b", "d"]
    # Equals are both on it.
    assert [r.method for r in pareto([a, b, row("g", 10, 4.0)], MEASURES[0])] == ["b", "g"]


def test_suffixes_become_options():
    found = row_options(BuildOptions(refine=7), ["simdiff", "simdiff+refine+auto"], [0.25], 8)
    plain, refined = found["simdiff", 0.25], found["simdiff+refine+auto", 0.25]
    assert (plain.refine, plain.compensate) == (0, "none")
    assert (refined.method, refined.refine, refined.compensate) == ("simdiff", 7, "auto")


def test_ranges():
    assert ranges((1, 3, 4, 5, 9)) == "1,3-5,9"
