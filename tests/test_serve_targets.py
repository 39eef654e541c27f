"""Which model is served under which name; what doctor says; child processes that leave nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from serve_fixtures import make_model, sample_model, serve_cache, tiny_model  # noqa: F401

from prune2serve.errors import Prune2ServeError
from prune2serve.records import Manifest, Perplexity, PruningPlan, QualityReport
from prune2serve.serve.engine import ServerProcess, free_port
from prune2serve.serve.targets import choose_target
from prune2serve.serve.vllm_engine import VllmSettings, find_vllm_python, make_vllm, vllm_command, vllm_environment


def make_build(directory: Path, parent: Path, verdict: str) -> Path:
    """A build of `parent` as far as serving looks at it: a model directory with a manifest."""
    shutil.copytree(make_model(directory.with_name("weights"), num_layers=1), directory)
    perplexity = Perplexity(parent=10.0, pruned=12.0, ratio=1.2, standard_error=0.1, ratio_standard_error=0.01)
    quality = QualityReport(
        text="t",
        num_windows=1,
        num_tokens=1,
        perplexity=perplexity,
        kl=0.1,
        kl_standard_error=0.01,
        top1_agreement=0.9,
        verdict=verdict,
        reasons=("perplexity 900 times the parent's",) if verdict == "collapsed" else (),
    )
    manifest = Manifest(
        prune2serve_version="0",
        created="2026-01-01T00:00:00Z",
        model=str(parent),
        revision=None,
        parent_fingerprint="0" * 64,
        plan=PruningPlan(num_layers=2, removed=(1,), method="last"),
        files={},
        num_parameters={"parent": 2, "pruned": 1},
        seed=0,
        quality=quality,
    )
    (directory / "prune2serve.json").write_text(manifest.to_json())
    return directory


def test_a_build_and_its_parent_get_names_that_tell_them_apart(tmp_path, tiny_model):
    build = make_build(tmp_path / "build", tiny_model, "ok")
    pruned, base = choose_target(build), choose_target(build, baseline=True)
    assert (pruned.directory, pruned.name) == (build, "model@pruned-1L")
    assert (base.directory, base.name) == (tiny_model, "model@base")
    assert choose_target(tiny_model).name == "model"


def test_a_collapsed_build_is_served_only_by_force(tmp_path, tiny_model):
    build = make_build(tmp_path / "build", tiny_model, "collapsed")
    with pytest.raises(Prune2ServeError, match=r"has collapsed \(perplexity 900 times the parent's\).*--force"):
        choose_target(build)
    assert choose_target(build, force=True).directory == build
    assert choose_target(build, baseline=True).name == "model@base"  # the parent is fine


def test_a_manifest_that_does_not_fit_is_named(tmp_path, tiny_model):
    build = make_build(tmp_path / "build", tiny_model, "ok")
    (build / "prune2serve.json").write_text('{"model": 5}')
    with pytest.raises(Prune2ServeError, match=r"prune2serve\.json is not a Manifest"):
        choose_target(build)


def test_doctor_names_engines_versions_and_commands():
    from prune2serve.cli import group

    result = CliRunner().invoke(group, ["doctor", "--json", "--vllm-python", sys.executable], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["packages"]["core"]["torch"]
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert set(engines) == {"onnxruntime", "vllm"}
    if not engines["vllm"]["ready"]:
        assert engines["vllm"]["fix"] and "has no vllm" in engines["vllm"]["detail"]
    text = CliRunner().invoke(group, ["doctor"], catch_exceptions=False).stdout
    assert "Engines" in text and f"takes {found['engine']} here" in text


def test_vllms_command_line_and_environment(tmp_path):
    settings = VllmSettings(
        tmp_path,
        ("m@base", "m"),
        api_key="secret",
        max_num_seqs=8,
        max_model_len=1024,
        precision="bf16",
        shutdown_timeout_s=12,
        flags=("--enforce-eager", "--max-num-seqs", "4"),
    )
    command = vllm_command(settings, "/python", 81)
    assert command[:3] == ["/python", "-m", "vllm.entrypoints.openai.api_server"]
    line = " ".join(command)
    for part in (f"--model {tmp_path}", "--served-model-name m@base m", "--port 81", "--dtype bfloat16"):
        assert part in line
    assert "--max-model-len 1024" in line and "--shutdown-timeout 12" in line
    assert command[-3:] == ["--enforce-eager", "--max-num-seqs", "4"]  # the user's flags come last and win
    assert "secret" not in line and vllm_environment(settings)["VLLM_API_KEY"] == "secret"
    with pytest.raises(Prune2ServeError, match="--precision int4 is not one of vLLM's"):
        vllm_command(VllmSettings(tmp_path, ("m",), precision="int4"), "/python", 81)


def test_a_python_without_vllm_is_named_with_the_way_out(tmp_path):
    with pytest.raises(Prune2ServeError, match=r"/nowhere/python has no vllm: pip install .*--vllm-python"):
        make_vllm(VllmSettings(tmp_path, ("m",), python="/nowhere/python"))


def child(code, tmp_path):
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return ServerProcess(command, name="the child", host="127.0.0.1", port=port, log_file=tmp_path / "child.log")


def test_a_child_that_dies_shows_its_last_lines(tmp_path):
    server = child("print('loading'); raise SystemExit('out of memory on device 0')", tmp_path)
    server.start()
    with pytest.raises(Prune2ServeError, match=r"(?s)the child ended with status 1.*out of memory on device 0"):
        server.wait_ready(30)
    server.stop()


GRANDCHILD = """
import http.server, signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", worker.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
if len(sys.argv) > 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid):
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize("stubborn", [False, True])
def test_stop_ends_the_whole_group_even_when_it_does_not_want_to(tmp_path, stubborn):
    server = child(GRANDCHILD, tmp_path)
    if stubborn:
        server._command.append("ignore")
    server.start()
    server.wait_ready(30)
    worker = int(server.log_tail().split("worker ")[1].split()[0])
    assert is_running(worker)
    status = server.stop(timeout_s=2)
    assert status == (-signal.SIGKILL if stubborn else -signal.SIGTERM)
    assert gone(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from prune2serve.serve.engine import ServerProcess\n"
        f"server = ServerProcess([sys.executable, '-c', 'import time; time.sleep(600)'], name='x', host='127.0.0.1',"
        f" port=1, log_file=Path({str(tmp_path / 'log')!r}))\n"
        "server.start(); print(server._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert is_running(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(pid)


@pytest.mark.vllm
@pytest.mark.sample
def test_vllm_serves_a_build_for_real(sample_model, tmp_path, monkeypatch):
    """Start, ready, an answer, graceful stop; about two minutes on two cores."""
    openai = pytest.importorskip("openai")
    python = find_vllm_python()
    if python is None:
        pytest.skip("no Python with vLLM: make venv-vllm, or set PRUNE2SERVE_VLLM_PYTHON")
    from prune2serve.serve.engine import served

    flags = [str(sample_model), "--engine", "vllm", "--vllm-python", python, "--max-model-len", "512"]
    log_file = tmp_path / "serve.log"
    with served([*flags, "--", "--enforce-eager"], log_file=log_file, ready_timeout_s=400) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            (model,) = client.models.list().data
            answer = client.completions.create(model=model.id, prompt="The capital of France is", max_tokens=4)
        assert answer.usage.completion_tokens > 0
    assert server.poll() == 0


def test_rollout_names_the_arms_like_serve_does(tmp_path, tiny_model):
    from prune2serve.cli import group

    build = make_build(tmp_path / "build", tiny_model, "ok")
    arguments = ["rollout", str(build), "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert "litellm.yaml" in json.loads(result.stdout)["files"]
    text = (tmp_path / "out" / "litellm.yaml").read_text()
    assert "hosted_vllm/model@base" in text and "hosted_vllm/model@pruned-1L" in text
