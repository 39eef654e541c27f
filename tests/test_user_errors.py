"""Every mistake a user can make: one line that says what was got and what to do, exit code 1, nothing left behind."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file


def prune2serve(*arguments, code=1):
    """Run the real command in a process of its own; return its stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "prune2serve", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stderr
    return result.stderr


def refused(*arguments):
    """Run in this process (importing torch once); return the error's single line."""
    from click.testing import CliRunner

    from prune2serve.cli import group
    from prune2serve.errors import Prune2ServeError

    result = CliRunner().invoke(group, [*map(str, arguments), "--quiet"])
    assert isinstance(result.exception, Prune2ServeError), result.exception
    assert result.exception.exit_code == 1
    message = str(result.exception)
    assert "\n" not in message
    return message


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def build(model, tmp_path):
    """Refused with the given options; the output must not exist, nor anything else beside the model."""

    def attempt(*options, of=model):
        message = refused("build", "--model", of, "--output", tmp_path / "out", *options)
        assert {path.name for path in tmp_path.iterdir()} <= {"model", "text.txt"}
        return message

    return attempt


def weights(model):
    return load_file(model / "model.safetensors")


def test_missing_directory(build, tmp_path):
    assert f"no model at '{tmp_path}/nowhere': give an existing directory" in build(of=tmp_path / "nowhere")


def test_empty_directory(build, model):
    shutil.rmtree(model)
    model.mkdir()
    assert "is empty: a model directory holds config.json and *.safetensors" in build()


def test_config_without_weights(build, model):
    (model / "model.safetensors").unlink()
    assert "safetensors" in build("--remove", "3")


def test_pickled_weights_are_refused_with_the_way_to_convert(build, model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights (pytorch_model.bin)" in build() and "save_pretrained" in build()


def test_truncated_shard(build, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is truncated" in build("--remove", "3")


def test_tensor_missing_from_the_index(build, model):
    tensors = weights(model)
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
    (model / "model.safetensors").unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
    lost = "model.layers.3.mlp.down_proj.weight"
    del weight_map[lost]
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert lost in build("--remove", "3")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(build, model, value):
    tensors = weights(model)
    tensors["model.layers.5.self_attn.q_proj.weight"][1, 2] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = build("--remove", "3")
    assert "model.layers.5.self_attn.q_proj.weight" in message and "NaN or infinite" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.2"], "--ratio 1.2 removes nothing or everything: give a fraction between 0 and 1"),
        (["--ratio", "0"], "--ratio 0 removes nothing or everything"),
        (["--ratio", "nan"], "--ratio nan removes nothing or everything"),
        (["--num-layers", "8"], "--num-layers 8 is not a shallower model: the parent has 8, give 1 to 7"),
        (["--remove", "99"], "layer 99 cannot be removed: the model has layers 0 to 7"),
        (["--remove", "3,3"], "layer 3 is listed twice"),
        (["--remove", "0-7"], "all 8 layers would be removed"),
        (["--remove", "three"], "--remove three: 'three' is no layer: expected a list such as 3,4,5 or 12-17,25"),
        (["--remove", ""], "no layer"),
        (["--method", "simdif"], "no method 'simdif', did you mean 'simdiff'?"),
        (["--ratio", "0.2", "--remove", "3"], "--ratio and --remove both say how many layers go"),
        (["--surgery-only"], "--surgery-only scores nothing: name the layers with --remove"),
        (["--max-shard-size", "5XB"], "--max-shard-size 5XB: expected a size such as 5GB"),
        (["--format", "gguf"], "no format 'gguf'"),
        (["--format", "onnx", "--precision", "fp16"], "precision 'fp16' cannot be exported for cpu"),
        (["--remove", "3,17-12"], "'17-12' is no layer"),
        (["--remove", "3", "--surgery-only", "--max-perplexity-ratio", "2"], "--surgery-only measures nothing"),
        (["--max-perplexity-ratio", "inf"], "--max-perplexity-ratio inf is no limit"),
        (["--max-shard-size", "0"], "--max-shard-size is 0 bytes"),
        (["--text", "nowhere.txt"], "no calibration text at nowhere.txt"),
        (["--compensate", "fold"], "no compensation 'fold'"),
        (["--device", "mps"], "--device mps has no float64"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--calibration", "nowhere.txt"], "no calibration text at nowhere.txt"),
        (["--protect-first", "7"], "2 layers should go but only 0 of 8 may"),
        (["--window", "0"], "windows of 0 tokens cannot be measured on"),
        (["--score-windows", "-1"], "-1, 8 and 8 windows of 512 tokens cannot"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(build, options, message):
    assert message in build(*options)


def test_existing_output(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused("build", "--model", tiny_model, "--output", tmp_path / "out")
    assert "out exists: choose another --output, or replace it with --force" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_the_parent_is_never_replaced(model):
    for output in (model, model.parent):
        message = refused("build", "--model", model, "--output", output, "--remove", "3", "--surgery-only", "--force")
        assert "holds the model itself" in message
    assert (model / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written(tiny_model, tiny_text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNE2SERVE_CACHE", str(tmp_path / "file" / "cache"))
    message = refused(
        "build", "--model", tiny_model, "--calibration", tiny_text, "--output", tmp_path / "out", "--window", "16"
    )
    assert message.startswith("cannot write")


def test_full_disk(tiny_model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        message = refused("build", "--model", tiny_model, "--output", disk / "out", "--remove", "3", "--surgery-only")
        assert "free some space" in message
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def configure(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_encoder_only_model(build, model):
    from transformers import BertConfig, BertModel

    shutil.rmtree(model)
    config = BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    BertModel(config).save_pretrained(model)
    assert "bert is" in build() and "encoder" in build()


def test_unknown_architecture(build, model):
    configure(model, model_type="lama")
    message = build()
    assert "lama" in message and "'llama'" in message


def test_config_that_is_not_json(build, model):
    (model / "config.json").write_text("{")
    assert "config.json is not JSON" in build()
    (model / "config.json").write_text("[]")
    assert "holds a list, expected a JSON object" in build()


def test_header_that_lies_about_its_length(build, model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "truncated or no safetensors file" in build("--remove", "3")


def test_tokenizer_missing(build, model, tiny_text):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in build("--calibration", tiny_text)


def test_too_little_calibration_text(build, tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    assert "calibration needs at least 3 documents" in build("--calibration", tmp_path / "text.txt")


def test_evaluate_needs_a_build(tiny_model, tmp_path):
    assert "no build at" in refused("evaluate", tmp_path / "nowhere")
    assert "has no prune2serve.json: it was not made by prune2serve build" in refused("evaluate", tiny_model)


def test_the_real_command_prints_one_line_and_exits_1(tmp_path):
    stderr = prune2serve("build", "--model", tmp_path / "nowhere")
    assert stderr.startswith("Error: no model at") and stderr.count("\n") == 1


def test_usage_errors_exit_2_and_suggest():
    assert "did you mean 'build'?" in prune2serve("biuld", code=2)
    assert "No such option" in prune2serve("build", "--ration", "0.2", code=2)


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["serve", "--help"], ["measure", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom prune2serve.cli import group\n"
        f"try:\n    group.main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'numpy', 'pydantic', 'rich.table'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout
