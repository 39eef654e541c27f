"""From traces to rows, ideal ratios, gates, checks and other tools' files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prune2serve.errors import GateFailedError, Prune2ServeError
from prune2serve.records import Comparison, ComparisonRow, RequestTrace
from prune2serve.serve import gates, ideal, interchange, preflight, rows, table
from prune2serve.serve.metrics import Slo

MS = 1_000_000


def make_traces(num_rounds=6, ratio=0.8, noise=0.01, tokens=5):
    """Four periods a round; the baseline has TTFT 20 ms and gaps of 10 ms, the candidate `ratio` times that."""
    generator = np.random.default_rng(0)
    traces, now = [], 0
    for r in range(num_rounds):
        for period, arm in enumerate(("baseline", "candidate", "candidate", "baseline")):
            scale = (ratio if arm == "candidate" else 1.0) * float(np.exp(generator.normal() * noise))
            chunks = [now + round((20 + 10 * i) * MS * scale) for i in range(tokens)]
            traces.append(RequestTrace(arm, r, period, period // 2, now, now, tuple(chunks), 7, tokens))
            now = chunks[-1] + MS
    return traces


def found(traces, **options):
    return {row.metric: row for row in rows.rows_of(traces, **options)}


def test_rows_hold_the_ratio_its_interval_and_a_verdict():
    made = found(make_traces(), slo=Slo(ttft_ms=18))
    assert made["mean_tpot"].ratio == pytest.approx(0.8, abs=0.02)
    assert made["mean_tpot"].interval[0] < 0.8 < made["mean_tpot"].interval[1]
    assert made["mean_tpot"].verdict == "better"
    assert made["mean_tpot"].difference == pytest.approx(-2, abs=0.2)  # 8 ms - 10 ms
    assert made["output_throughput"].baseline == pytest.approx(5 / 0.060, rel=0.02)  # 5 tokens in 20 + 4 * 10 ms
    assert made["output_throughput"].verdict == "better"
    assert made["goodput"].baseline == 0 or made["goodput"].ratio is None  # no baseline request within 18 ms
    assert made["p99_ttft"].interval is None and made["p99_ttft"].verdict is None


def test_equal_arms_are_not_distinguishable_and_a_floor_hides_small_effects():
    assert found(make_traces(ratio=1.0))["mean_tpot"].verdict == "not distinguishable"
    small = make_traces(ratio=0.97, noise=0.001)
    assert found(small)["mean_tpot"].verdict == "better"
    assert found(small, floor={"mean_tpot": 0.05})["mean_tpot"].verdict == "not distinguishable"


def test_noise_floor_is_the_farther_bound():
    row = ComparisonRow("mean_tpot", "ms", 1.0, 1.0, 1.0, interval=(0.95, 1.02))
    assert rows.noise_floor([row])["mean_tpot"] == pytest.approx(1 / 0.95 - 1)


def test_warm_up_and_failures_stay_out():
    traces = make_traces(num_rounds=3)
    slow = replace(traces[0], round=-1, chunk_ns=(0, 10**12))
    failed = replace(traces[1], error="HTTP 500", chunk_ns=(), output_tokens=0)
    assert found([*traces, slow, failed])["mean_tpot"] == found(traces)["mean_tpot"]


PARENT = ideal.ModelCost(4, 4000, 1000, 10, 8, 16)
PRUNED = ideal.ModelCost(3, 3000, 1000, 10, 6, 12)


def test_ideal_ratios_are_the_written_out_arithmetic():
    made = ideal.ideal_ratios(PARENT, PRUNED, prompt=10, output=4, batch=2)
    # decode: weights 4000 + 1000 + 10, KV 2 sequences * 12 tokens * 8; pruned 3000 + 1000 + 10 and 2 * 12 * 6
    assert made.decode == (4010 + 144) / (5010 + 192)
    # prefill: 2 * 4000 * 10 + 2 * 1000 + 2 * 10^2 * 16; pruned 2 * 3000 * 10 + 2000 + 200 * 12
    assert made.prefill == (60_000 + 2_000 + 2_400) / (80_000 + 2_000 + 3_200)
    assert (made.layers, made.weights) == (0.75, 4010 / 5010)


def test_cost_of_a_model_directory(tmp_path):
    import torch
    from safetensors.torch import save_file

    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {
        "model.embed_tokens.weight": torch.zeros(16, 8),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 8),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8),
        "model.norm.weight": torch.zeros(8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    # layers 2 * 64, head = tied embeddings 16 * 8, norm 8; KV 2 * 2 layers * 2 heads * 2; attention 2 * 4 * 2
    assert ideal.cost_of(tmp_path) == ideal.ModelCost(2, 128, 128, 8, 16, 16)
    with pytest.raises(Prune2ServeError, match=r"no config.json in .*: name a model directory"):
        ideal.cost_of(tmp_path / "nowhere")


def test_attribution_finds_a_fixed_overhead():
    ratios = ideal.Ideal(decode=0.8, prefill=0.75, layers=0.7, weights=0.8)
    # decode: 10 ms fixed + 90 ms that scale by 0.8 -> 82 ms
    made = ideal.attribute(ratios, {"prefill": 40.0, "decode": 100.0}, {"prefill": 30.0, "decode": 82.0})
    assert made["parts"]["decode"]["overhead_ms"] == pytest.approx(10)
    assert made["parts"]["prefill"]["overhead_ms"] == pytest.approx(0, abs=1e-9)
    # bounds of the ratio 0.78 and 0.84: 1 - 0.22 / 0.2 is below nothing, 1 - 0.16 / 0.2 is a fifth of 100 ms
    made = ideal.attribute(
        ratios, {"prefill": 40.0, "decode": 100.0}, {"prefill": 30.0, "decode": 82.0}, {"decode": (0.78, 0.84)}
    )
    assert made["parts"]["decode"]["overhead_interval_ms"] == pytest.approx([0, 20])
    assert made["request_ideal_ratio"] == pytest.approx((40 * 0.75 + 100 * 0.8) / 140)
    assert made["request_ratio"] == pytest.approx(112 / 140)


def comparison():
    traces = make_traces()
    return Comparison("m@base", "m@pruned", rows.rows_of(traces), None, requests=tuple(traces))


def test_a_gate_is_judged_on_the_interval_not_on_the_point():
    made = comparison()
    row = found(made.requests)["mean_tpot"]
    between = (row.ratio + row.interval[1]) / 2
    gates.check([gates.parse("mean_tpot_ratio > 0.9")], made)
    assert row.ratio < between
    with pytest.raises(GateFailedError, match=r"mean_tpot's ratio is 0.8\d* \(95% interval 0.7\d* to 0.8\d*\)"):
        gates.check([gates.parse(f"mean_tpot_ratio > {between}")], made)
    with pytest.raises(GateFailedError, match=r"p99_ttft_ratio > 2: ratio is .*too little was measured"):
        gates.check([gates.parse("p99_ttft_ratio > 2")], made)
    gates.check([gates.parse("output_throughput_ratio < 1.1"), gates.parse("mean_ttft_candidate >= 18")], made)
    assert GateFailedError.exit_code == 3


def test_bad_conditions_say_what_was_expected():
    with pytest.raises(Prune2ServeError, match="expected METRIC_FIELD OPERATOR NUMBER such as"):
        gates.parse("p95 ttft > 0.9")
    with pytest.raises(Prune2ServeError, match="no metric 'p95_tpt', did you mean 'p95_t"):
        gates.check([gates.parse("p95_tpt_ratio > 1")], comparison())


def observed(**changes):
    settings = dict(
        calibration_ms=(10.0, 10.1),
        load_before=0.05,
        client_cpu_share=0.1,
        loop_lag_p99_ms=0.2,
        counters={},
        same_server=False,
    )
    return preflight.Observed(**{**settings, **changes})


def statuses(traces, **changes):
    return {check.name: check.status for check in preflight.after(traces, observed(**changes))}


def test_a_clean_run_passes_every_check():
    hits = {"vllm:prefix_cache_queries_total": 100.0, "vllm:prefix_cache_hits_total": 5.0}
    made = statuses(make_traces(), counters={"baseline": hits, "candidate": hits})
    assert set(made.values()) == {"ok"}


@pytest.mark.parametrize(
    ("name", "status", "changes"),
    [
        ("drift", "warning", {"calibration_ms": (10.0, 11.0)}),
        ("other load", "warning", {"load_before": 0.6}),
        ("client not the bottleneck", "failed", {"client_cpu_share": 0.95}),
        ("client not the bottleneck", "warning", {"loop_lag_p99_ms": 3.0}),
        ("prefix cache", "skipped", {"counters": {"baseline": {}, "candidate": {}}}),
        (
            "prefix cache",
            "warning",
            {
                "counters": {
                    "baseline": {"vllm:prefix_cache_queries": 100.0, "vllm:prefix_cache_hits": 0.0},
                    "candidate": {"vllm:prefix_cache_queries": 100.0, "vllm:prefix_cache_hits": 50.0},
                }
            },
        ),
    ],
)
def test_each_check_sees_its_fault(name, status, changes):
    assert statuses(make_traces(), **changes)[name] == status


def test_failed_requests_and_unequal_tokens_are_seen():
    traces = make_traces()
    traces[0] = replace(traces[0], error="HTTP 500: no", chunk_ns=(), output_tokens=0)
    made = statuses(traces)
    assert (made["failures"], made["same tokens"]) == ("failed", "failed")  # 1 of 12 on the baseline


def test_vllm_and_guidellm_files_agree_with_our_rows(tmp_path):
    made = comparison()
    ours = found(made.requests)
    for tool in ("vllm", "guidellm"):
        (path, _) = interchange.export(made, tmp_path, tool)
        read = interchange.read(path)
        for name in ("mean_ttft", "mean_tpot", "p95_e2e"):
            assert read[name] == pytest.approx(ours[name].baseline), (tool, name)
    assert interchange.read(tmp_path / "vllm-baseline.json")["output_throughput"] == pytest.approx(
        ours["output_throughput"].baseline
    )
    theirs = json.loads((tmp_path / "guidellm-baseline.json").read_text())["benchmarks"][0]["requests"]["successful"][0]
    # guidellm divides the whole latency by all tokens: 60 ms / 5, where our TPOT is 40 ms / 4
    assert theirs["time_per_output_token_ms"] == pytest.approx(12, rel=0.05)
    assert theirs["inter_token_latency_ms"] == pytest.approx(10, rel=0.05)


def test_unknown_result_files_are_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{}")
    with pytest.raises(Prune2ServeError, match="is a result of neither `vllm bench serve` nor guidellm"):
        interchange.read(file)


def test_a_comparison_survives_its_json():
    made = comparison()
    assert Comparison.from_json(made.to_json()) == made
    assert "requests" not in made.summary()


def test_numbers_are_shown_without_exponents():
    assert [table.number(v) for v in (None, 0.01234, 12.345, 123.45, 12345.6)] == [
        "-", "0.012", "12.35", "123.5", "12,346",
    ]  # fmt: skip


def test_nothing_in_the_report_reaches_for_the_network():
    page = (Path(rows.__file__).parent / "templates" / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "@import" not in page
