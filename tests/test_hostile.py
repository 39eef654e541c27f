"""Hostile files: whatever a header, an index or a config says, the answer is a result or one clear line.

Every case must end in a Prune2ServeError or in a sound index: no other exception, no read outside the directory, no
time or memory that a few bytes of input could blow up.
"""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prune2serve.architectures import architecture_of
from prune2serve.errors import Prune2ServeError
from prune2serve.model_config import prune_config
from prune2serve.models import open_checkpoint
from prune2serve.safetensors_header import read_header
from prune2serve.tensors import find_nonfinite, read_index

CASES = settings(
    max_examples=int(os.environ.get("PRUNE2SERVE_FUZZ", "100")),
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""PRUNE2SERVE_FUZZ=5000 for a long run."""

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 200) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)
NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
DTYPES = st.sampled_from(["F32", "BF16", "U8", "F4", "F64", "BOOL", "F8_E4M3", "X"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES | JSON,
        "shape": st.lists(st.integers(0, 8), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list) | JSON,
    },
)
HEADER = st.dictionaries(st.sampled_from([*NAMES, "__metadata__", "a"]) | st.text(max_size=8), ENTRY | JSON, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The first config imports transformers, which is not what the deadline is about."""
    architecture_of({"model_type": "llama", "num_hidden_layers": 4}, NAMES)


def sound(function: Callable[[], Any]) -> Any:
    """Call it; a user's error must be one line of reasonable length."""
    try:
        return function()
    except Prune2ServeError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return None


def shard(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@CASES
@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"\xff" * 8)
@example(content=struct.pack("<Q", 2**63))
@example(content=struct.pack("<Q", 100_000_000))
def test_random_bytes_as_a_shard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    sound(lambda: read_index(tmp_path))


@CASES
@given(header=HEADER | JSON, data=st.binary(max_size=64), slip=st.integers(-3, 3))
def test_headers(tmp_path: Path, header: Any, data: bytes, slip: int) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(shard(text, data, max(0, len(text) + slip)))
    index = sound(lambda: read_index(tmp_path))
    if index:
        size = (tmp_path / "model.safetensors").stat().st_size
        assert all(e.start >= 8 and e.start + e.size_bytes <= size for e in index.entries.values())
        sound(lambda: find_nonfinite(index))


@CASES
@given(header=HEADER, data=st.binary(max_size=64))
def test_what_we_accept_safetensors_accepts(tmp_path: Path, header: Any, data: bytes) -> None:
    from safetensors import safe_open

    file = tmp_path / "model.safetensors"
    file.write_bytes(shard(json.dumps(header).encode(), data))
    entries = sound(lambda: read_header(file))
    if entries is not None and "__metadata__" not in header:
        with safe_open(file, "pt") as stream:
            assert set(stream.keys()) == {entry.name for entry in entries}


@CASES
@given(
    weight_map=st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=8),
        st.sampled_from(["a.safetensors", "../secret.safetensors", "/etc/passwd", "b/../../secret.safetensors"])
        | st.text(max_size=20).map(lambda name: name + ".safetensors")
        | JSON,
        max_size=5,
    )
    | JSON,
)
def test_index_files(tmp_path: Path, weight_map: Any) -> None:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    for place in (tmp_path / "secret.safetensors", model / "a.safetensors"):
        place.write_bytes(shard(json.dumps({NAMES[0]: entry}).encode(), b"x"))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    index = sound(lambda: read_index(model))
    assert index is None or all(file.parent == model and file.name == "a.safetensors" for file in index.shards)


FIELDS = st.sampled_from(
    [
        *("num_hidden_layers", "layer_types", "hidden_size", "num_attention_heads", "head_dim", "sliding_window"),
        *("max_window_layers", "mlp_only_layers", "decoder_sparse_step", "num_experts", "rope_scaling", "rope_theta"),
        *("rope_parameters", "attention_types", "num_layers", "n_layer", "text_config", "quantization_config"),
        *("block_types", "moe_layer_interval", "moe_layer_start_index", "first_k_dense_replace", "no_rope_layers"),
        *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "scale_depth", "per_layer_config"),
        *("vocab_size", "dtype", "torch_dtype", "architectures", "attribute_map", "get_text_config"),
    ]
)
FAMILIES = st.sampled_from(
    [
        *("llama", "qwen2", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3", "gemma4_text", "gpt_neo", "gpt2", "smollm3"),
        *("llama4_text", "deepseek_v3", "ernie4_5_moe", "jamba", "lfm2", "recurrent_gemma", "minicpm3", "gpt_oss"),
        *("glm_moe_dsa", "bert", "t5", "diffllama", "olmo_hybrid", "granite", "falcon"),
    ]
)


@pytest.mark.filterwarnings("ignore")
@CASES
@given(
    model_type=FAMILIES | JSON,
    fields=st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=5),
    num_layers=st.sampled_from([4, 4, 4, 1, 3, 0, -1, 2**40, None]),
    kept=st.sampled_from([[0, 1], [1, 3], [0], [0, 1, 2, 3], []]),
)
def test_configs(model_type: Any, fields: dict[str, Any], num_layers: Any, kept: list[int]) -> None:
    config = {
        "model_type": model_type,
        "num_hidden_layers": num_layers,
        "num_layers": num_layers,
        "n_layer": num_layers,
    }
    config |= fields
    architecture = sound(lambda: architecture_of(config, NAMES))
    if architecture:
        sound(lambda: prune_config(config, architecture, kept))


@CASES
@given(text=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
@example(text=b"[" * 100_000)
@example(text=b'{"a":' * 50_000)
@example(text=b'{"num_hidden_layers": 1' + b"0" * 5000 + b"}")
def test_config_files(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    checkpoint = sound(lambda: open_checkpoint(str(tmp_path)))
    if checkpoint:
        sound(lambda: architecture_of(checkpoint.config, NAMES))


def test_no_memory_bomb(tmp_path: Path) -> None:
    """A header, an index and a config that announce far more than they hold cost next to nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    (tmp_path / "model.safetensors").write_bytes(shard(json.dumps({"a": entry}).encode(), b"x"))
    assert sound(lambda: read_index(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 99_999_999) + b"{}")
    assert sound(lambda: read_index(tmp_path)) is None
    for count in (10**9, 10**18, 1e300):
        assert (
            sound(lambda count=count: architecture_of({"model_type": "gemma2", "num_hidden_layers": count}, NAMES))
            is None
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; most of it imports


def test_many_duplicate_names_are_not_slow(tmp_path: Path) -> None:
    text = "{" + ",".join(f'"n{i}":0' for i in range(200_000)) + ',"n199999":0}'
    (tmp_path / "model.safetensors").write_bytes(shard(text.encode(), b""))
    with pytest.raises(Prune2ServeError, match=r"names 'n199999' twice"):
        read_index(tmp_path)
