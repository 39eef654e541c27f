"""Writing pruned checkpoints: exact bytes, right names, tied weights, merges by their formulas, nothing half done."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prune2serve import progress
from prune2serve.errors import CorruptCheckpointError, Prune2ServeError
from prune2serve.layers import plan_in_memory
from prune2serve.models import open_checkpoint
from prune2serve.records import Checkpoint, Merge, PruningPlan, Replacement
from prune2serve.surgery import write_pruned

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 5,
    "vocab_size": 40,
}
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet() -> None:
    progress.set_quiet(True)


def make(
    directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", tied: bool = True, kind: str = "llama"
):
    """Write a random model with q/k norms (qwen3) or biases (llama) and return its checkpoint."""
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "LICENSE").write_text("free")
    (directory / "pytorch_model.bin").write_bytes(b"never copied")
    return open_checkpoint(str(directory))


def write(parent: Checkpoint, plan: PruningPlan, target: Path, **settings) -> dict[str, torch.Tensor]:
    target.mkdir()
    result = write_pruned(parent, plan, target, **settings)
    assert sorted(result.files) == sorted(str(f.relative_to(target)) for f in target.rglob("*"))
    return weights(target)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_removed_is_the_same_model(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    parent = make(tmp_path / "parent", dtype, tied=tied)
    got = write(parent, PruningPlan(5, (), "none"), tmp_path / "out")
    expected = weights(parent.path)
    assert got.keys() == expected.keys() and ("lm_head.weight" in got) == (not tied)
    assert all(torch.equal(got[name], expected[name]) and got[name].dtype == dtype for name in got)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == parent.config


@pytest.mark.parametrize("parent_shard", ["5GB", "8KB"])
@pytest.mark.parametrize("shard_size", [5_000_000_000, 6_000, 1])
def test_equals_a_model_built_fresh_from_the_kept_weights(tmp_path: Path, parent_shard: str, shard_size: int) -> None:
    parent = make(tmp_path / "parent", shard=parent_shard)
    write(parent, PruningPlan(5, (0, 3), "hand"), tmp_path / "out", max_shard_size=shard_size)
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 3}), attention_bias=True, tie_word_embeddings=True)
    fresh = LlamaForCausalLM(config).eval()
    kept = {}
    for name, tensor in weights(parent.path).items():
        layer = name.split(".")[2] if ".layers." in name else None
        if layer not in ("0", "3"):
            new = {"1": "0", "2": "1", "4": "2"}.get(layer or "", "")
            kept[name.replace(f"layers.{layer}.", f"layers.{new}.")] = tensor
    fresh.load_state_dict(kept, strict=False)
    fresh.tie_weights()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(IDS).logits, fresh(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shards_respect_the_limit_and_the_index_is_right(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    write(parent, PruningPlan(5, (1,), "hand"), tmp_path / "out", max_shard_size=8_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "out").values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 8_000 for file in files)


def test_mixed_dtypes_stay_aligned(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    tensors = weights(parent.path) | {"odd": torch.ones(3, dtype=torch.uint8), "zz": torch.ones(3, dtype=torch.float64)}
    save_file(tensors, parent.path / "model.safetensors", metadata={"format": "pt"})
    got = write(parent, PruningPlan(5, (2,), "hand"), tmp_path / "out")
    assert torch.equal(got["odd"], tensors["odd"]) and torch.equal(got["zz"], tensors["zz"])


def test_companions_and_counts(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    (tmp_path / "out").mkdir()
    result = write_pruned(parent, PruningPlan(5, (2, 3), "hand"), tmp_path / "out")
    expected = ("LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    assert result.files == expected
    for directory, count in (
        (parent.path, result.num_parameters_parent),
        (tmp_path / "out", result.num_parameters_pruned),
    ):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(directory).parameters()) == count


def test_mtp_layers_are_dropped(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    extra = {"model.layers.5.mlp.up_proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(2)}
    save_file(weights(parent.path) | extra, parent.path / "model.safetensors", metadata={"format": "pt"})
    config = parent.config | {"num_nextn_predict_layers": 1}
    got = write(dataclasses.replace(parent, config=config), PruningPlan(5, (0,), "hand"), tmp_path / "out")
    assert not extra.keys() & got.keys() and "model.layers.4.mlp.up_proj.weight" not in got
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


PROJECTIONS = ("mlp.down_proj.weight", "self_attn.q_proj.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@pytest.mark.parametrize("rule", ["telescoped", "delta-sum", "average"])
@pytest.mark.parametrize(
    ("kind", "special"), [("llama", "self_attn.q_proj.bias"), ("qwen3", "self_attn.q_norm.weight")]
)
def test_merge_rules(tmp_path: Path, rule, kind: str, special: str) -> None:
    parent = make(tmp_path / "parent", kind=kind)
    old = weights(parent.path)
    plan = PruningPlan(5, (2, 3), "merge", merges=(Merge(1, 3, rule),))
    got = write(parent, plan, tmp_path / "out")
    for inside in (*PROJECTIONS, special):
        low, middle, top = (old[f"model.layers.{layer}.{inside}"] for layer in (1, 2, 3))
        expected = {
            "telescoped": top,
            "delta-sum": low + (middle - low) + (top - low),
            "average": (low + middle + top) / 3,
        }[rule]
        torch.testing.assert_close(got[f"model.layers.1.{inside}"], expected, rtol=0, atol=1e-6)
    for inside in NORMS:
        low, middle, top = (old[f"model.layers.{layer}.{inside}"] for layer in (1, 2, 3))
        expected = (low + middle + top) / 3 if rule == "average" else low
        torch.testing.assert_close(got[f"model.layers.1.{inside}"], expected, rtol=0, atol=1e-6)
    assert torch.equal(got["model.layers.2.mlp.down_proj.weight"], old["model.layers.4.mlp.down_proj.weight"])


def test_telescoped_is_the_published_loop_and_delta_sum_is_not(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    name = "model.layers.{}.mlp.up_proj.weight"
    run = [weights(parent.path)[name.format(layer)].double() for layer in (1, 2, 3)]
    running = run[0].clone()
    for weight in run[1:]:
        running += weight - running
    merged = {}
    for rule in ("telescoped", "delta-sum"):
        plan = PruningPlan(5, (2, 3), "merge", merges=(Merge(1, 3, rule),))
        merged[rule] = write(parent, plan, tmp_path / rule)[name.format(1)].double()
    torch.testing.assert_close(merged["telescoped"], running, rtol=0, atol=1e-7)
    assert (merged["delta-sum"] - running).abs().max() > 0.01


def test_merging_equal_layers_changes_nothing(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent", torch.bfloat16)
    tensors = weights(parent.path)
    for name in [name for name in tensors if ".layers.2." in name]:
        tensors[name] = tensors[name.replace(".2.", ".1.")].clone()
    save_file(tensors, parent.path / "model.safetensors", metadata={"format": "pt"})
    for rule in ("telescoped", "delta-sum", "average"):
        got = write(parent, PruningPlan(5, (2,), "m", merges=(Merge(1, 2, rule),)), tmp_path / rule)
        assert all(torch.equal(got[n], tensors[n]) for n in tensors if ".layers.1." in n)


def replacement(folder: Path, tensors: dict[str, torch.Tensor], layer: int = 1) -> Replacement:
    file = folder / "new.safetensors"
    save_file(tensors, file)
    return Replacement(layer, "linear-fold", str(file), hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacement_takes_the_parents_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    parent = make(tmp_path / "parent", dtype)
    new = torch.randn(16, 24)
    plan = PruningPlan(5, (0, 2), "fold", replacements=(replacement(tmp_path, {"mlp.down_proj.weight": new}),))
    got = write(parent, plan, tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    assert got.dtype == dtype and torch.equal(got, new.to(dtype))


def test_bad_replacements(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")

    def attempt(item: Replacement) -> None:
        write(
            parent, PruningPlan(5, (0,), "fold", replacements=(item,)), tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        )

    with pytest.raises(Prune2ServeError, match=r"as F32 \[3\], expected the shape of the layer's own, F32 \[16, 24\]"):
        attempt(replacement(tmp_path, {"mlp.down_proj.weight": torch.ones(3)}))
    with pytest.raises(Prune2ServeError, match=r"replaces 'mlp.x', which layer 1 of the parent does not have"):
        attempt(replacement(tmp_path, {"mlp.x": torch.ones(3)}))
    good = replacement(tmp_path, {"mlp.down_proj.weight": torch.ones(16, 24)})
    with pytest.raises(CorruptCheckpointError, match=r"is not the file of the plan: its sha256 is"):
        attempt(dataclasses.replace(good, sha256="0" * 64))
    with pytest.raises(CorruptCheckpointError, match=r"is missing"):
        attempt(dataclasses.replace(good, path=str(tmp_path / "gone")))


def test_disk_equals_memory_for_merges_and_replacements(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent", kind="qwen3")
    plan = PruningPlan(
        5,
        (0, 2, 4),
        "both",
        merges=(Merge(1, 2, "delta-sum"),),
        replacements=(replacement(tmp_path, {"mlp.down_proj.weight": torch.randn(16, 24)}, layer=3),),
    )
    write(parent, plan, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(parent.path).eval()
    before = model(IDS).logits
    with plan_in_memory(model, plan):
        expected = model(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(model(IDS).logits, before)


def test_wrong_plan_and_shard_size(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    with pytest.raises(Prune2ServeError, match=r"the plan is for a model of 7 layers, .* has 5"):
        write(parent, PruningPlan(7, (1,), "x"), tmp_path / "a")
    with pytest.raises(Prune2ServeError, match=r"the shard size is 0 bytes, expected at least 1"):
        write(parent, PruningPlan(5, (1,), "x"), tmp_path / "b", max_shard_size=0)


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make(tmp_path / "parent")
    copy = os.copy_file_range

    def touched(*arguments: int) -> int:
        os.utime(parent.path / "model.safetensors")
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", touched)
    with pytest.raises(CorruptCheckpointError, match=r"model.safetensors changed while it was being read: wait until"):
        write(parent, PruningPlan(5, (1,), "x"), tmp_path / "out")


def test_a_shard_cut_short_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make(tmp_path / "parent")
    copy = os.copy_file_range

    def cut(*arguments: int) -> int:
        os.truncate(parent.path / "model.safetensors", 5000)
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", cut)
    with pytest.raises(CorruptCheckpointError, match=r"ended while it was being read"):
        write(parent, PruningPlan(5, (1,), "x"), tmp_path / "out")


def test_without_copy_file_range_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make(tmp_path / "parent")
    plan = PruningPlan(5, (1,), "x")
    expected = write(parent, plan, tmp_path / "a")

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr("prune2serve.shard_writer.COPY_BYTES", 100)
    got = write(parent, plan, tmp_path / "b")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(Prune2ServeError, match=r"is full: free some space or choose another --output$"):
        write_pruned(parent, PruningPlan(5, (1,), "x"), out)


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = make(tmp_path / "parent")
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("prune2serve.surgery.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Prune2ServeError, match=r"the pruned weights take \d+ bytes, but .* has 10 free"):
        write(parent, PruningPlan(5, (1,), "x"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.sample
def test_the_sample_pruned_equals_layers_removed_in_memory(tmp_path: Path, sample: Checkpoint) -> None:
    from prune2serve.layers import pruned_in_memory

    removed = (12, 13, 14, 15, 16, 17, 25, 26)
    plan = PruningPlan(30, removed, "hand")
    write(sample, plan, tmp_path / "out")
    ids = torch.randint(0, 49152, (1, 32), generator=torch.Generator().manual_seed(0))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    parent = AutoModelForCausalLM.from_pretrained(sample.path).eval()
    with torch.inference_mode(), pruned_in_memory(parent, plan.kept):
        assert torch.equal(pruned(ids).logits, parent(ids).logits)
