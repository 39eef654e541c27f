"""`prune2serve measure` as a user runs it, over real HTTP: against mock endpoints, and on a real tiny build."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from prune2serve.records import Comparison, Manifest, PruningPlan
from prune2serve.serve import report

MOCK = Path(__file__).with_name("mock_endpoint.py")


@contextmanager
def mock_endpoint(*options):
    process = subprocess.Popen([sys.executable, str(MOCK), *options], stderr=subprocess.PIPE, text=True)
    try:
        yield process.stderr.readline().split(" on ")[1].split()[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def measure(*arguments, cwd=None, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "prune2serve", "measure", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | (environment or {}),
        timeout=300,
    )


QUICK = (
    "--rounds",
    "6",
    "--requests",
    "2",
    "--concurrency",
    "2",
    "--output-tokens",
    "6",
    "--precision-target",
    "0.0001",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    target = tmp_path_factory.mktemp("measure") / "result"
    with (
        mock_endpoint("--ttft-ms", "40", "--itl-ms", "10", "--name", "m@base") as a,
        mock_endpoint("--ttft-ms", "30", "--itl-ms", "5", "--name", "m@pruned") as b,
    ):
        done = measure("--a", a, "--b", b, *QUICK, "--json", "--output", target, "--export", "vllm")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), target


def test_known_ratios_are_found(measured):
    answer, _ = measured
    rows = {row["metric"]: row for row in answer["rows"]}
    assert answer["ideal_ratio"] is None  # two URLs: the models are not known
    for metric, true in (("p50_tpot", 0.5), ("p50_ttft", 0.75)):
        low, high = rows[metric]["interval"]
        assert low - 0.03 <= true <= high + 0.03, rows[metric]
    assert {"metric", "unit", "baseline", "candidate", "ratio"} <= set(rows["output_throughput"])
    assert rows["output_throughput"]["ratio"] > 1
    assert answer["settings"]["num_rounds"] == 6 and answer["settings"]["requests_per_arm"] == 24


def test_every_requests_timestamps_are_kept(measured):
    answer, target = measured
    made = Comparison.from_json((target / "comparison.json").read_text())
    assert "requests" not in answer
    kept = [t for t in made.requests if t.round >= 0]
    assert len(kept) == 48 and all(len(t.chunk_ns) == 6 for t in kept)
    for arm in ("baseline", "candidate"):
        pairs = {(t.round, t.prompt) for t in kept if t.arm == arm}
        assert pairs == {(r, p) for r in range(6) for p in range(4)}
    assert json.loads((target / "vllm-candidate.json").read_text())["completed"] == 24


def test_the_report_holds_both_arms_and_needs_no_network(measured):
    _, target = measured
    page = (target / "report.html").read_text()
    assert "m@base" in page and "m@pruned" in page and page.count("<svg") == 6
    assert "src=" not in page and "<link" not in page and "<script" not in page


def test_the_report_shows_what_was_removed():
    plan = PruningPlan(4, (1, 2), "block-influence")
    manifest = Manifest("0", "now", "parent", None, "f", plan, {}, {"parent": 100, "pruned": 60}, 0)
    empty = Comparison("a", "b", (), 0.7, verdict="too little was measured", settings={
        "num_rounds": 1, "requests_per_arm": 1, "seconds": 1, "stopped": "time limit", "definitions": "",
    })  # fmt: skip
    page = report.render(empty, manifest)
    assert "2 of 4 decoder layers" in page and page.count('class="bar gone"') == 2
    assert "60.0% of the parameters" in page


def test_a_hostile_name_stays_text():
    settings = {"num_rounds": 1, "requests_per_arm": 1, "seconds": 1, "stopped": "x", "definitions": ""}
    page = report.render(Comparison("<script>alert(1)</script>", "b", (), None, verdict="v", settings=settings))
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_a_gate_exits_with_3_and_keeps_the_files(tmp_path):
    with mock_endpoint("--itl-ms", "5") as a, mock_endpoint("--itl-ms", "10", "--name", "slow") as b:
        done = measure("--a", a, "--b", b, *QUICK, "--output", tmp_path / "r", "--fail-if", "mean_tpot_ratio > 1.1")
    assert done.returncode == 3
    assert "Error: mean_tpot_ratio > 1.1: mean_tpot's ratio is" in done.stderr
    assert (tmp_path / "r" / "comparison.json").is_file()


def test_one_server_on_both_arms_is_not_distinguishable(tmp_path):
    with mock_endpoint("--ttft-ms", "20", "--itl-ms", "5") as url:
        done = measure("--a", url, "--b", url, *QUICK, "--json", "--output", tmp_path / "r")
    rows = {row["metric"]: row for row in json.loads(done.stdout)["rows"]}
    low, high = rows["p50_tpot"]["interval"]
    assert low < 1.03 and high > 0.97


def test_different_engine_versions_are_refused_unless_allowed(tmp_path):
    with mock_endpoint("--version", "1") as a, mock_endpoint("--version", "2") as b:
        refused = measure("--a", a, "--b", b, *QUICK, "--output", tmp_path / "r")
        allowed = measure("--a", a, "--b", b, *QUICK, "--output", tmp_path / "r", "--allow-unfair")
    assert refused.returncode == 1 and not list(tmp_path.glob("r/*.partial*"))
    assert (
        "the arms are not comparable: engine version: version: 1 on the baseline, 2 on the candidate" in refused.stderr
    )
    assert allowed.returncode == 0
    assert "failed: engine version" in allowed.stderr


def test_a_plan_says_how_many_rounds(tmp_path):
    with mock_endpoint("--noise", "0.1", "--itl-ms", "3") as a, mock_endpoint("--noise", "0.1", "--itl-ms", "3") as b:
        done = measure("--a", a, "--b", b, *QUICK, "--plan", "0.05", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert answer["effect"] == 0.05
    assert all(3 <= needs["rounds"] <= 10_000 for needs in answer["metrics"].values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere",), "no prune2serve.json in nowhere, so its parent is unknown"),
        (("--a", "http://127.0.0.1:1"), "--a and --b go together"),
        (("--a", "http://127.0.0.1:1", "--b", "http://127.0.0.1:1"), "no endpoint answers at http://127.0.0.1:1/v1/models"),
        (("--a", "http://x", "--b", "http://y", "--a-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY holds no key"),
        (("--fail-if", "faster"), "expected METRIC_FIELD OPERATOR NUMBER"),
        (("--a", "http://x", "--b", "http://y", "--slo", "ttft"), "--slo has 'ttft'"),
        (("--a", "http://x", "--b", "http://y", "--prompts", "no.jsonl"), "no prompt file at no.jsonl"),
        (("--a", "http://x", "--b", "http://y", "--input-tokens", "9"), "--input-tokens needs a tokenizer"),
        (("--a", "http://x", "--b", "http://y", "--rate", "1", "--replay", "f"), "--rate and --replay both"),
        (("--output", "."), ". exists: choose another --output"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_line_and_leaves_nothing(arguments, expected, tmp_path):
    done = measure(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_failing_server_stops_in_the_warm_up(tmp_path):
    with mock_endpoint() as a, mock_endpoint("--fail", "1") as b:
        done = measure("--a", a, "--b", b, *QUICK, "--output", tmp_path / "r")
    assert done.returncode == 1
    assert "failed in the warm-up: HTTP 500" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_server_at_a_time_is_stopped_before_the_other_starts():
    from prune2serve.serve import compare, rows
    from prune2serve.serve.design import StoppingRule
    from prune2serve.serve.endpoint import attach
    from prune2serve.serve.workload import Arrival, Lengths, Workload

    up, most = [], []

    def starter(*options):
        def start():
            command = [sys.executable, str(MOCK), *options]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
            found = attach(process.stderr.readline().split(" on ")[1].split()[0], None, None)
            process.stderr.close()
            found.process = process
            up[:] = [p for p in up if p.poll() is None] + [process]
            most.append(len(up))
            return found

        return start

    workload = Workload(("hello",), "test", Lengths(4), Arrival(), 2)
    begin = {"baseline": starter("--itl-ms", "10"), "candidate": starter("--itl-ms", "5")}
    made = compare.run(compare.Plan(begin, workload, StoppingRule(max_rounds=2), both_resident=False))
    assert max(most) == 1 and len(most) >= 4  # two arms, and at least one change in every round
    assert all(p.poll() is not None for p in up)
    assert {(t.round, t.period) for t in made.traces if t.round >= 0} == {(r, p) for r in (0, 1) for p in range(4)}
    found = {row.metric: row.ratio for row in rows.rows_of(made.traces)}
    assert found["p50_tpot"] == pytest.approx(0.5, abs=0.15)
