"""`prune2serve measure` on a tiny real build: both arms are real servers on ONNX Runtime."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from prune2serve.errors import Prune2ServeError
from prune2serve.records import Manifest, PruningPlan
from prune2serve.serve import endpoint

pytest.importorskip("onnxruntime_genai", reason="needs the [onnx] extra")

LOAD = [
    *("--engine", "onnxruntime", "--rounds", "3", "--precision-target", "0.001"),
    *("--input-tokens", "24", "--output-tokens", "24"),
]


@pytest.fixture(scope="module")
def build(tiny_model, tmp_path_factory):
    """The tiny model without its layers 3 and 4, as `build` leaves it: checkpoint, tokenizer, manifest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("build") / "pruned"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    plan = PruningPlan(8, (3, 4), "manual")
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in plan.kept])
    model.config.num_hidden_layers = len(plan.kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(plan.kept)]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    manifest = Manifest("0", "now", str(tiny_model), None, "f", plan, {}, {"parent": 8, "pruned": 6}, 0)
    (directory / "prune2serve.json").write_text(manifest.to_json())
    return directory


@pytest.fixture
def environment(tmp_path_factory):
    return os.environ | {"PRUNE2SERVE_CACHE": str(tmp_path_factory.getbasetemp() / "measure-cache")}


def measure(*arguments):
    return [sys.executable, "-m", "prune2serve", "measure", *map(str, arguments)]


def test_parent_and_pruned_are_served_and_compared(build, tmp_path, environment):
    done = subprocess.run(
        measure(build, *LOAD, "--json", "--output", tmp_path / "r"),
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    checks = {check["name"]: check["status"] for check in answer["checks"]}
    for name in ("engine", "engine version", "context length", "failures", "same tokens"):
        assert checks[name] == "ok", answer["checks"]
    rows = {row["metric"]: row for row in answer["rows"]}
    assert rows["mean_tpot"]["baseline"] > 0
    # 8 layers to 6, with the embeddings in between: the ideal is above 6/8 and below 1
    assert 0.75 < answer["ideal_ratio"] < 1
    assert rows["mean_tpot"]["ideal_ratio"] == answer["ideal_ratio"]
    assert answer["attribution"]["layers_ratio"] == 0.75
    assert "2 of 8 decoder layers" in (tmp_path / "r" / "report.html").read_text()


def test_sigterm_stops_both_servers_and_leaves_no_files(build, tmp_path, environment):
    command = measure(build, *LOAD, "--rounds", "10000", "--time-limit", "600", "--output", tmp_path / "r")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if "[candidate] Serving" in line:
                break
        time.sleep(1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_start_is_quoted():
    with pytest.raises(Prune2ServeError, match=r"ended with exit code 1 before it served: no model"):
        endpoint.start(["/no/such/directory"], "baseline")
