"""Reading safetensors directories: exact on good ones, one clear line on every kind of bad one."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prune2serve.errors import CorruptCheckpointError, Prune2ServeError
from prune2serve.safetensors_header import build_header, read_header
from prune2serve.tensors import check_finite, find_nonfinite, read_index, read_tensor

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 2).to(torch.bfloat16),
    "c": torch.tensor(True),
    "d": torch.zeros(0, 3, dtype=torch.int64),
    "e": torch.randn(7).to(torch.float8_e4m3fn),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / names[0])
    save_file({"b.weight": TENSORS["b.weight"], "c": TENSORS["c"]}, tmp_path / names[1])
    write_map(tmp_path, {"a.weight": names[0], "b.weight": names[1], "c": names[1]})
    return tmp_path


def write_map(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_safetensors_wrote(single: Path) -> None:
    index = read_index(single)
    assert index.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        got = read_tensor(index.entries[name])
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else torch.equal(got, tensor)
    assert index.num_bytes == 3 * 4 * 4 + 5 * 2 * 2 + 1 + 7


def test_reads_shards(sharded: Path) -> None:
    index = read_index(sharded)
    assert {name: entry.file.name[6:11] for name, entry in index.entries.items()} == {
        "a.weight": "00001",
        "b.weight": "00002",
        "c": "00002",
    }


def test_links_of_a_hub_cache_are_followed(single: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(single / "model.safetensors")
    assert read_index(snapshot).entries.keys() == TENSORS.keys()


def test_our_header_is_what_safetensors_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(build_header([("é", "F32", (2,), 8), ("b", "U8", (3,), 3)]) + struct.pack("<2f3B", 1, 2, 3, 4, 5))
    from safetensors.torch import load_file

    loaded = load_file(file)
    assert loaded["é"].tolist() == [1, 2] and loaded["b"].tolist() == [3, 4, 5]
    assert [entry.name for entry in read_header(file)] == ["é", "b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no directory"),
        ({}, "is empty"),
        ({"config.json": b"{}"}, "holds no safetensors weights: expected model.safetensors"),
        ({"pytorch_model.bin": b"x"}, r"only pickled weights \(pytorch_model.bin\).*save_pretrained"),
        ({"m.gguf": b"x"}, "holds a GGUF file: name the file itself"),
        ({"consolidated.safetensors": b"x"}, "holds consolidated.safetensors but neither model.safetensors nor"),
        ({"model.safetensors": b""}, "truncated or no safetensors file"),
        ({"model.safetensors": b"\xff" * 64}, "truncated or no safetensors file"),
        ({"model.safetensors": struct.pack("<Q", 4) + b"nope"}, "damaged JSON"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"[]"}, "holds a JSON list, expected an object"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"{}"}, "without any tensor"),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
        ({"model.safetensors.index.json": b"{"}, "damaged JSON"),
    ],
)
def test_directories_that_hold_no_model(tmp_path: Path, files: dict[str, bytes] | None, message: str) -> None:
    directory = tmp_path / "model"
    if files is not None:
        directory.mkdir()
        for name, data in files.items():
            (directory / name).write_bytes(data)
    with pytest.raises(Prune2ServeError, match=message) as error:
        read_index(directory)
    assert "\n" not in str(error.value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": ENTRY | {"dtype": "F31"}}, "unknown dtype F31"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"a": ENTRY | {"shape": [-2]}}, "expected up to 16 whole numbers"),
        ({"a": ENTRY | {"shape": [2.0]}}, "expected up to 16 whole numbers"),
        ({"a": ENTRY | {"shape": [1] * 17}}, "expected up to 16 whole numbers"),
        ({"a": ENTRY | {"shape": [3]}}, r"has 8 bytes, but F32 of shape \[3\] takes 12"),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, "has 8 bytes, but"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, r"expected \[begin, end\]"),
        ({"a": ENTRY | {"data_offsets": [True, 8]}}, r"expected \[begin, end\]"),
        ({"a": {"dtype": "F32"}}, "has no dtype, shape and data_offsets"),
        ({"a": 3}, "has no dtype, shape and data_offsets"),
        ({"a": ENTRY, "b": ENTRY}, "tensor 'b' overlaps the tensor before it"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "tensor 'a' follows a gap"),
        (
            {"a": ENTRY | {"shape": [3], "data_offsets": [0, 12]}},
            "is truncated: it is .* bytes long, its header promises",
        ),
        ({}, "followed by bytes that belong to no tensor"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', "names 'a' twice"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, message: str) -> None:
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CorruptCheckpointError, match=message):
        read_index(tmp_path)


def test_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(
        CorruptCheckpointError, match=r"model-00002-of-00002.safetensors is truncated: .* copy it again"
    ):
        read_index(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        read_index(sharded)


def test_tensor_missing_from_the_index(sharded: Path) -> None:
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    write_map(sharded, names)
    with pytest.raises(
        CorruptCheckpointError, match=r"tensor 'c' of model-00002.* is missing from model.safetensors.index"
    ):
        read_index(sharded)
    write_map(sharded, names | {"c": "model-00001-of-00002.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"'c' is in model-00002.* says it is in model-00001"):
        read_index(sharded)
    write_map(sharded, names | {"c": "model-00002-of-00002.safetensors", "z": "model-00001-of-00002.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"says tensor 'z' is in model-00001.*, but it is not there"):
        read_index(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x\0.safetensors"]
)
def test_index_cannot_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    write_map(tmp_path, {"a": name})
    with pytest.raises(CorruptCheckpointError, match=r"leads out of its directory"):
        read_index(tmp_path)


def test_index_names_only_safetensors(tmp_path: Path) -> None:
    write_map(tmp_path, {"a": "x.bin"})
    with pytest.raises(CorruptCheckpointError, match=r"expected a .safetensors file"):
        read_index(tmp_path)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"is not a regular file"):
        read_index(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finds_one_bad_weight(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(1001)
    save_file({"good": values.to(dtype)}, tmp_path / "model.safetensors")
    assert find_nonfinite(read_index(tmp_path)) is None
    values[1000] = bad
    save_file({"good": torch.ones(3), "worse": values.to(dtype)}, tmp_path / "model.safetensors")
    assert find_nonfinite(read_index(tmp_path)) == "worse"
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'worse' holds NaN or infinite weights"):
        check_finite(read_index(tmp_path))


def test_large_finite_weights_are_not_called_infinite(tmp_path: Path) -> None:
    save_file({"big": torch.full((64,), 3e38)}, tmp_path / "model.safetensors")
    assert find_nonfinite(read_index(tmp_path)) is None


def test_a_bad_weight_past_the_first_chunk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune2serve.tensors.CHUNK_BYTES", 64)
    values = torch.zeros(100)
    values[99] = float("nan")
    save_file({"a": values}, tmp_path / "model.safetensors")
    assert find_nonfinite(read_index(tmp_path)) == "a"
