"""ensure_onnx: made once, belongs to its weights, whole or absent; the serving graph computes what is asked for."""

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from serve_fixtures import make_model, serve_cache, tiny_model, tiny_onnx  # noqa: F401

from prune2serve.errors import Prune2ServeError

pytest.importorskip("onnxruntime_genai")

from prune2serve.export import onnx_graph, parity
from prune2serve.export.onnx_graph import ensure_onnx


def test_the_export_is_reused_while_the_weights_are_the_same(tiny_model, tiny_onnx):
    before = (tiny_onnx / "model.onnx").stat().st_mtime_ns
    again = ensure_onnx(tiny_model, cache=tiny_onnx.parent)
    assert again == tiny_onnx
    assert (again / "model.onnx").stat().st_mtime_ns == before


def test_other_weights_replace_an_export(tmp_path, serve_cache):
    model = make_model(tmp_path / "model", seed=1, num_layers=1)
    first = ensure_onnx(model)
    assert first == model / "onnx" / "fp32-cpu"
    fingerprint = json.loads((first / "export.json").read_text())["fingerprint"]
    make_model(model, seed=2, num_layers=1)
    second = ensure_onnx(model)
    assert second == first
    assert json.loads((second / "export.json").read_text())["fingerprint"] != fingerprint
    assert parity.check_parity(model, second)["passed"]


def test_a_failing_builder_is_one_line_and_leaves_nothing(tmp_path, serve_cache):
    model = make_model(tmp_path / "model", num_layers=1)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(Prune2ServeError, match=r"builder cannot export .* as fp32 for cpu: .*: try another precision"):
        ensure_onnx(model)
    assert list((model / "onnx").iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("fp16", "cpu", "precision 'fp16' cannot be exported for cpu: choose fp32 or int4"),
        ("fp32", "cuda", "precision 'fp32' cannot be exported for cuda: choose fp16 or bf16 or int4"),
        ("fp32", "gpu", "no ONNX device 'gpu'.*choose cpu or cuda"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(tmp_path, precision, device, message):
    with pytest.raises(Prune2ServeError, match=message):
        ensure_onnx(tmp_path, precision, device)


def test_the_serving_graph_gives_the_rows_asked_for_and_no_others(tiny_onnx):
    import onnxruntime as ort

    ids = np.array([[5, 80, 17, 200, 33]])
    past = {
        f"past_key_values.{layer}.{kind}": np.zeros((1, 2, 0, 16), np.float32)
        for layer in (0, 1)
        for kind in ("key", "value")
    }
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
    whole = ort.InferenceSession(str(tiny_onnx / "model.onnx"), providers=["CPUExecutionProvider"])
    serving = ort.InferenceSession(str(tiny_onnx / "model_serving.onnx"), providers=["CPUExecutionProvider"])
    every = whole.run(["logits"], feeds)[0]
    some = serving.run(["logits"], feeds | {"logits_indices": np.array([4, 1])})[0]
    assert some.shape == (1, 2, every.shape[-1])
    np.testing.assert_allclose(some[0], every[0, [4, 1]], rtol=1e-5, atol=1e-5)


def test_parity_holds_and_notices_another_models_weights(tmp_path, tiny_model, tiny_onnx):
    good = parity.check_parity(tiny_model, tiny_onnx)
    assert good["passed"] and good["greedy_equal"] == 64 and good["top1_agreement"] == 1
    parity.require_parity(good)
    other = make_model(tmp_path / "other", seed=7)
    bad = parity.check_parity(other, tiny_onnx)
    assert bad["passed"] is False
    with pytest.raises(Prune2ServeError, match="the ONNX export differs from the checkpoint"):
        parity.require_parity(bad)


def test_int4_quantises_every_matrix_alike_and_is_reported_not_judged(tiny_model, tiny_onnx):
    import onnx

    directory = ensure_onnx(tiny_model, "int4", cache=tiny_onnx.parent)
    graph = onnx.load(str(directory / "model_serving.onnx"), load_external_data=False).graph
    layouts = {
        (a.i) for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    }
    assert layouts == {4}
    assert parity.check_parity(tiny_model, directory)["passed"] is None


def test_exports_of_a_build_lie_inside_it_and_of_others_in_the_cache(tmp_path, tiny_model, serve_cache):
    assert onnx_graph.onnx_home(tiny_model).parent == serve_cache / "onnx"
    build = tmp_path / "build"
    shutil.copytree(tiny_model, build)
    (build / "prune2serve.json").write_text("{}")
    assert onnx_graph.onnx_home(build) == build / "onnx"
    if os.geteuid() != 0:
        build.chmod(0o500)
        assert onnx_graph.onnx_home(build).parent == serve_cache / "onnx"


def test_the_command_exports_checks_and_prints(tmp_path, serve_cache):
    from prune2serve.cli import group

    model = make_model(tmp_path / "model", seed=3, num_layers=1)
    result = CliRunner().invoke(group, ["export", str(model), "--json", "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    (export,) = json.loads(result.stdout)["exports"]
    assert export["output"] == str(model / "onnx" / "fp32-cpu")
    assert export["parity"]["greedy_equal"] == 64


def test_the_command_needs_a_model_directory(tmp_path):
    from prune2serve.cli import group

    result = CliRunner().invoke(group, ["export", str(tmp_path)])
    assert isinstance(result.exception, Prune2ServeError)
    assert "no model directory at" in str(result.exception)
