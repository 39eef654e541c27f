"""`build` from end to end on a tiny real model: the directory, its proof, its answer, and nothing left behind."""

import json

import pytest
import torch
from click.testing import CliRunner

from prune2serve.cli import group
from prune2serve.export.checkpoint import read_manifest, verify_files
from prune2serve.methods import SELECTORS
from prune2serve.models import load_model, load_tokenizer, open_checkpoint

SMALL = ["--score-windows", "4", "--search-windows", "2", "--report-windows", "2", "--window", "32"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PRUNE2SERVE_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(*arguments, code=0):
    """Run the command line in this process; return what it printed on stdout, or the error when it fails."""
    from prune2serve.errors import Prune2ServeError

    result = CliRunner().invoke(group, [str(a) for a in arguments])
    if isinstance(result.exception, Prune2ServeError):
        assert result.exception.exit_code == code, result.exception
        return str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def build(tiny_model, tiny_text, output, *more, code=0):
    return run(
        "build", "--model", tiny_model, "--calibration", tiny_text, "--output", output, "--dtype", "float32",
        "--json", "--quiet", *SMALL, *more, code=code,
    )  # fmt: skip


def test_build_answers_in_json_and_leaves_a_stock_directory(tiny_model, tiny_text, tmp_path):
    output = tmp_path / "out"
    answer = json.loads(build(tiny_model, tiny_text, output, "--ratio", "0.25"))
    assert answer["num_layers"] == {"parent": 8, "pruned": 6}
    assert len(answer["removed"]) == 2 and not {0, 7} & set(answer["removed"])
    assert answer["method"]["name"] == "simdiff"
    assert answer["num_parameters"]["pruned"] < answer["num_parameters"]["parent"]
    assert set(answer["quality"]["perplexity"]) >= {"parent", "pruned", "ratio", "standard_error"}
    assert 0 <= answer["quality"]["top1_agreement"] <= 1 and answer["quality"]["kl"] > 0
    assert {"open", "calibration", "scores", "selection", "surgery", "proof", "quality"} <= set(answer["seconds"])
    assert answer["peak_rss_bytes"] > 10**7
    assert answer["reload_proof"]["max_logit_difference"] == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    pruned = open_checkpoint(str(output))
    assert pruned.config["num_hidden_layers"] == 6
    assert (
        load_tokenizer(pruned)("one, two")["input_ids"]
        == load_tokenizer(open_checkpoint(str(tiny_model)))("one, two")["input_ids"]
    )
    verify_files(output, read_manifest(output))


def test_the_pruned_model_is_the_parent_without_those_layers(tiny_model, tiny_text, tmp_path):
    build(tiny_model, tiny_text, tmp_path / "out", "--remove", "2,5-6", "--compensate", "none")
    parent = load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32)
    pruned = load_model(open_checkpoint(str(tmp_path / "out")), dtype=torch.float32)
    ids = torch.arange(20)[None]
    hidden = parent.model.embed_tokens(ids)
    rotary = parent.model.rotary_emb(hidden, torch.arange(20)[None])
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        for layer in (0, 1, 3, 4, 7):
            hidden = parent.model.layers[layer](hidden, attention_mask=mask, position_embeddings=rotary)
        expected = parent.lm_head(parent.model.norm(hidden))
        assert torch.allclose(pruned(ids).logits, expected, atol=1e-5)


def test_the_model_card_says_what_was_done(tiny_model, tiny_text, tmp_path):
    import yaml

    build(tiny_model, tiny_text, tmp_path / "out", "--remove", "3")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "depth-pruning" in front["tags"]
    assert "**Removed layers** (the parent's numbering, from 0): 3" in card
    assert "| perplexity |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("method", [name for name in SELECTORS if name != "simdiff"])
def test_every_selector_builds(tiny_model, tiny_text, tmp_path, method):
    answer = json.loads(build(tiny_model, tiny_text, tmp_path / "out", "--num-layers", "5", "--method", method))
    assert len(answer["removed"]) == 3 and answer["method"]["name"] == method


def test_the_gate_keeps_the_artifact_marks_it_and_exits_3(tiny_model, tiny_text, tmp_path):
    output = tmp_path / "out"
    message = build(tiny_model, tiny_text, output, "--remove", "1-6", "--max-perplexity-ratio", "0.01", code=3)
    assert "max_perplexity_ratio is" in message and "is kept and marked as failed" in message
    gate = read_manifest(output).gates["max_perplexity_ratio"]
    assert gate["passed"] is False and gate["limit"] == 0.01
    assert "failed its gate" in (output / "README.md").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_model, tiny_text, tmp_path):
    plan = json.loads(build(tiny_model, tiny_text, tmp_path / "out", "--method", "last", "--dry-run"))
    assert plan["removed"] == [5, 6]
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_replaced_only_with_force(tiny_model, tiny_text, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    message = build(tiny_model, tiny_text, output, "--remove", "3", code=1)
    assert "out exists: choose another --output, or replace it with --force" in message
    assert (output / "precious").read_text() == "x"
    build(tiny_model, tiny_text, output, "--remove", "3", "--surgery-only", "--force")
    assert not (output / "precious").exists() and (output / "model.safetensors").is_file()


def test_self_calibration_is_seeded_and_cached(tiny_model, tmp_path, monkeypatch):
    # Random weights write noise: what counts as degenerate is lowered so that it is accepted.
    monkeypatch.setattr("prune2serve.self_samples.degenerate", lambda tokens, least: len(tokens) < 2)
    common = ["build", "--model", tiny_model, "--method", "block-influence", "--dtype", "float32", "--json", "--quiet"]
    first = json.loads(run(*common, "--output", tmp_path / "a", *SMALL))

    def no_more(*_):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr("prune2serve.self_samples.generate", no_more)
    second = json.loads(run(*common, "--output", tmp_path / "b", *SMALL))
    assert first["quality"] == second["quality"] and first["removed"] == second["removed"]


def test_resume_takes_up_finished_stages(tiny_model, tiny_text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prune2serve.pipeline.write_pruned", full)
        result = CliRunner().invoke(
            group,
            ["build", "--model", str(tiny_model), "--calibration", str(tiny_text), "--output", str(tmp_path / "out"),
             "--dtype", "float32", "--quiet", *SMALL],
        )  # fmt: skip
        assert result.exit_code != 0
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("prune2serve.planning.score", lambda _: pytest.fail("scored again"))
    build(tiny_model, tiny_text, tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "config.json").is_file()


def test_refine_and_fold_are_in_the_plan_and_the_reloaded_model(tiny_model, tiny_text, tmp_path):
    answer = json.loads(
        build(
            tiny_model, tiny_text, tmp_path / "out", "--method", "last", "--refine", "5", "--compensate", "linear-fold"
        )
    )
    assert answer["method"]["refinement"]["sets_tried"] <= 6
    assert answer["method"]["compensation"]["kind"] == "linear-fold"
    assert answer["reload_proof"]["max_logit_difference"] == 0.0
    plan = read_manifest(tmp_path / "out").plan
    assert plan.replacements and all("/" not in replacement.path for replacement in plan.replacements)


@pytest.mark.parametrize(
    ("stored", "run_as"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize(
    "method", [["last", "--compensate", "linear-fold"], ["sliding-merge", "--merge-rule", "average"]]
)
def test_what_is_computed_is_proven_in_every_dtype(tiny_model, tiny_text, tmp_path, stored, run_as, method):
    """Folds and merges are rounded to the parent's dtype on disk: the proof must see the same numbers."""
    from transformers import AutoModelForCausalLM

    parent = tmp_path / "parent"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, stored)).save_pretrained(parent)
    load_tokenizer(open_checkpoint(str(tiny_model))).save_pretrained(parent)
    answer = json.loads(build(parent, tiny_text, tmp_path / "out", "--method", *method, "--dtype", run_as))
    proof = answer["reload_proof"]
    assert proof["max_logit_difference"] <= proof["tolerance"] * proof["logit_range"]


def test_evaluate_refuses_text_that_has_changed(tiny_model, tiny_text, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny_text.read_text())
    build(tiny_model, text, tmp_path / "out", "--remove", "3", "--compensate", "none")
    text.write_text(tiny_text.read_text()[::-1])
    assert "no longer gives the windows" in run("evaluate", tmp_path / "out", "--quiet", code=1)


def test_evaluate_repeats_what_build_measured(tiny_model, tiny_text, tmp_path):
    built = json.loads(build(tiny_model, tiny_text, tmp_path / "out", "--remove", "3"))
    again = json.loads(run("evaluate", tmp_path / "out", "--dtype", "float32", "--json", "--quiet"))
    assert again["perplexity"] == built["quality"]["perplexity"] and again["kl"] == built["quality"]["kl"]
    other = json.loads(
        run(
            "evaluate",
            tmp_path / "out",
            "--text",
            tiny_text,
            "--text-windows",
            "2",
            "--window",
            "16",
            "--json",
            "--quiet",
        )
    )
    assert other["num_windows"] == 2 and other["num_tokens"] == 30


def test_score_prints_a_table_and_json(tiny_model, tiny_text, tmp_path):
    common = ["score", "--model", tiny_model, "--calibration", tiny_text, "--window", "32", "--quiet"]
    table = run(*common)
    assert "block_influence" in table and "█" in table
    scores = json.loads(run(*common, "--json"))
    assert len(scores["metrics"]["mssd"]) == 8
    message = run(*common, "--chart", "block_influense", code=1)
    assert "no metric 'block_influense', did you mean 'block_influence'?" in message
