"""Every family of the table: pruned directories compute what the parent computes with those layers skipped.

The proof itself, its oracle and its tiny models are in benchmarks/architectures.py; this runs it and shows that it can
fail.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prune2serve import families, position_rules, progress
from prune2serve.architectures import architecture_of, expand
from prune2serve.errors import CorruptCheckpointError, UnsupportedArchitectureError
from prune2serve.model_config import prune_config
from prune2serve.structure import check_structure


def load_benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "architectures.py"
    spec = importlib.util.spec_from_file_location("benchmark_architectures", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


proof = load_benchmark()
LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    progress.set_quiet(True)
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [*proof.LISTED, "llama4_text", "qwen3_next", "ernie4_5_moe", "gemma4_text"])
def test_family(model_type: str) -> None:
    result = proof.prove(model_type, count=2)
    assert result.verdict in ("exact", "close"), result
    assert result.subsets > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gemma2", {"tie_word_embeddings": False}),
        ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": []}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ],
)
def test_variants(model_type: str, overrides: dict[str, object]) -> None:
    assert proof.prove(model_type, count=2, **overrides).verdict in ("exact", "close")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "smollm3", "qwen2"])
def test_the_proof_fails_when_kinds_are_cut_from_the_front(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_the_front(decoder, num_layers, kept):
        right = position_rules.per_layer(decoder, num_layers, kept)
        return {name: decoder[name][: len(kept)] for name in right}

    rules = tuple(from_the_front if rule is position_rules.per_layer else rule for rule in position_rules.RULES)
    monkeypatch.setattr(position_rules, "RULES", rules)
    monkeypatch.setattr("prune2serve.model_config._verify", lambda *_: None)
    assert proof.prove_or_say(model_type).verdict == "FAILED"


@pytest.mark.parametrize("model_type", sorted(families.REFUSED))
def test_refused_by_name(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as error:
        architecture_of({"model_type": model_type}, NAMES)
    assert model_type in str(error.value) and families.REFUSED[model_type] in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json names no model_type"),
        ({"model_type": 3}, "config.json names no model_type"),
        ({"model_type": "bert"}, "bert is an encoder-only model: prune2serve prunes decoder-only causal LMs"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        ({"model_type": "llama", "is_encoder_decoder": True}, "llama is an encoder-decoder model"),
        ({"model_type": "lama"}, "knows no model_type 'lama', did you mean 'llama'"),
        ({"model_type": "resnet"}, "resnet is no causal LM in the installed transformers"),
    ],
)
def test_refusals(config: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        architecture_of(config, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000: expected 1 to 2048"),
        ({"num_hidden_layers": 0}, "says num_hidden_layers 0: expected at least 1"),
        ({"num_hidden_layers": "4"}, "does not fit model_type 'llama'"),
        ({"num_hidden_layers": 5}, r"says 5 layers, but no tensor is named model.layers.4.\*"),
        ({"get_text_config": 1}, "has a field named 'get_text_config', which is no setting"),
        ({"attribute_map": []}, "has a field named 'attribute_map', which is no setting"),
        ({"hidden_size": {}}, "does not fit model_type 'llama'"),
    ],
)
def test_configs_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message) as error:
        architecture_of(LLAMA | change, NAMES)
    assert "\n" not in str(error.value)


def test_no_decoder_layers_among_the_tensors() -> None:
    with pytest.raises(CorruptCheckpointError, match="no tensor belongs to a decoder layer"):
        architecture_of(LLAMA, ["vision_tower.layers.0.weight", "x"])


def tiny(model_type: str, **changes: object):
    config = proof.tiny_config(model_type).to_dict() | changes
    return config, [f"model.layers.{layer}.x.weight" for layer in range(6)]


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "divides each layer's attention scores by its position"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "its last 2 layers read the KV cache of earlier ones"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "are one matrix over all layers"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 makes layers sparse by position"),
    ],
)
def test_settings_that_tie_a_layer_to_its_place(model_type: str, change: dict[str, object], message: str) -> None:
    config, names = tiny(model_type, **change)
    names = [name.replace("model.layers", "transformer.h") for name in names] if model_type == "gpt2" else names
    with pytest.raises(UnsupportedArchitectureError, match=message):
        prune_config(config, architecture_of(config, names), [0, 1, 4, 5])


def pruned(model_type: str, kept: list[int], **changes: object) -> dict[str, object]:
    config, names = tiny(model_type, **changes)
    return prune_config(config, architecture_of(config, names), kept)


def test_position_coded_fields_become_explicit() -> None:
    assert pruned("deepseek_v3", [0, 2, 3, 5])["first_k_dense_replace"] == 2
    qwen = pruned("qwen2_moe", [1, 2, 3, 5])
    assert (qwen["decoder_sparse_step"], qwen["mlp_only_layers"]) == (1, [1, 2])  # 2 by the step, 3 as listed
    assert pruned("qwen2", [0, 2, 3, 5])["max_window_layers"] == 2
    smol = pruned("smollm3", [1, 2, 5])
    assert smol["no_rope_layers"] == [1, 0, 1] and smol["layer_types"] == [proof.F, proof.S, proof.S]
    assert pruned("llama4_text", [0, 2, 5])["moe_layers"] == [1, 2]
    assert pruned("ernie4_5_moe", [0, 3, 4, 5])["moe_layer_start_index"] == 1
    assert pruned("jamba", [0, 1, 4, 5])["attn_layer_period"] == 2


def test_an_order_that_a_period_cannot_state_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="in an order that attn_layer_period cannot state"):
        pruned("jamba", [1, 3, 4])


def test_a_config_that_transformers_would_read_differently_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="transformers reads layer_types of the pruned config as"):
        pruned("gemma4_text", [0, 1, 2])  # its config turns the last layer into a full-attention one


def test_a_hybrid_keeps_an_attention_layer() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="no attention layer would be left: keep at least one"):
        pruned("qwen3_next", [0, 2, 4])


def test_a_shared_indexer_keeps_its_source() -> None:
    kinds = ["full", "shared", "full", "shared", "shared", "full"]
    with pytest.raises(UnsupportedArchitectureError, match="layer 3 shares the sparse-attention indexer of layer 2"):
        pruned("glm_moe_dsa", [0, 1, 3, 5], indexer_types=kinds)
    assert pruned("glm_moe_dsa", [0, 2, 4], indexer_types=kinds)["indexer_types"] == ["full", "full", "shared"]


def test_derived_layer_types_are_written_out_and_the_pattern_dropped() -> None:
    config, names = tiny("gemma3_text", sliding_window_pattern=3)
    del config["layer_types"]
    result = prune_config(config, architecture_of(config, names), [1, 2, 3])
    assert result["layer_types"] == [proof.S, proof.F, proof.S] and "sliding_window_pattern" not in result
    assert expand(result).layer_types == result["layer_types"]


def test_multi_token_prediction_layers_are_declared_gone() -> None:
    assert pruned("deepseek_v3", [0, 5], num_nextn_predict_layers=1)["num_nextn_predict_layers"] == 0


def test_quantization_config_follows_the_layers() -> None:
    skip = ["lm_head", "model.layers.1.mlp", "model.layers.4.self_attn.q_proj", "model.layers.3"]
    config = LLAMA | {"num_hidden_layers": 6, "quantization_config": {"ignore": skip, "groups": {"layers.5": 1}}}
    names = [f"model.layers.{layer}.x.weight" for layer in range(6)]
    result = prune_config(config, architecture_of(config, names), [0, 1, 4, 5])
    assert result["quantization_config"] == {
        "ignore": ["lm_head", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"],
        "groups": {"layers.3": 1},
    }


def test_the_parent_config_is_not_changed() -> None:
    config, names = tiny("gemma2")
    before = repr(config)
    prune_config(config, architecture_of(config, names), [1, 4])
    assert repr(config) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "kept", "what"),
    [
        ("diffllama", [0, 2, 4], "lambda_init"),
        ("gpt_neox_japanese", [0, 1, 2], "dense_bias|layer_number"),
        ("modernbert-decoder", [1, 2, 3], "attn_norm"),
        ("beam", [0, 2, 4], "attn_residual_add_idx"),
    ],
)
def test_structure_guard_needs_no_table(
    model_type: str, kept: list[int], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(families.REFUSED, model_type)
    config = proof.tiny_config(model_type).to_dict()
    names = proof.tiny_model(model_type).state_dict()
    architecture = architecture_of(config, names)
    pruned_config = prune_config(config, architecture, kept)
    with pytest.raises(UnsupportedArchitectureError, match=f"would change with its place: .*({what})"):
        check_structure(config, pruned_config, architecture, kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "minicpm3"])
def test_structure_guard_lets_sound_families_pass(model_type: str) -> None:
    config, names = tiny(model_type)
    architecture = architecture_of(config, names)
    check_structure(config, prune_config(config, architecture, [0, 3, 5]), architecture, [0, 3, 5])
