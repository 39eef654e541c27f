"""The engine lint says `wrong` exactly where an engine's own position rule and the config part ways."""

import pytest

from prune2serve.lint import lint

S, F = "sliding_attention", "full_attention"


def verdicts(model_type: str, architecture: str, **fields: object) -> dict[str, str]:
    config = {"model_type": model_type, "architectures": [architecture], **fields}
    return {finding.engine: finding.verdict for finding in lint(config)}


@pytest.mark.parametrize(("kinds", "expected"), [([S, F, S, F], "ok"), ([S, F, F], "wrong"), ([F, S], "wrong")])
def test_gpt_oss_alternates_by_position(kinds: list[str], expected: str) -> None:
    found = verdicts("gpt_oss", "GptOssForCausalLM", num_hidden_layers=len(kinds), layer_types=kinds)
    assert found == {"transformers": "ok", "vllm": expected, "onnxruntime": expected, "llama.cpp": expected}


def test_llama_goes_everywhere() -> None:
    assert set(verdicts("llama", "LlamaForCausalLM", num_hidden_layers=5).values()) == {"ok"}


def test_gemma3_is_read_by_layer_types_but_for_llama_cpp() -> None:
    found = verdicts("gemma3_text", "Gemma3ForCausalLM", num_hidden_layers=3, layer_types=[S, F, S])
    assert found == {"transformers": "ok", "vllm": "ok", "onnxruntime": "ok", "llama.cpp": "wrong"}


def test_mixed_qwen2_is_refused_by_vllm() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert verdicts("qwen2", "Qwen2ForCausalLM", num_hidden_layers=3, **window)["vllm"] == "refused"
    assert verdicts("qwen2", "Qwen2ForCausalLM", num_hidden_layers=3)["vllm"] == "ok"


@pytest.mark.parametrize(("rope", "expected"), [([1, 1, 1, 0, 1], "ok"), ([1, 0, 1], "wrong")])
def test_smollm3_rotary_layers(rope: list[int], expected: str) -> None:
    found = verdicts("smollm3", "SmolLM3ForCausalLM", num_hidden_layers=len(rope), no_rope_layers=rope)
    assert (found["llama.cpp"], found["onnxruntime"], found["vllm"]) == (expected, "ok", "unknown")


def test_llama4_experts_by_step() -> None:
    moe = {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}
    assert verdicts("llama4_text", "Llama4ForCausalLM", **moe, moe_layers=[1, 3])["vllm"] == "ok"
    assert verdicts("llama4_text", "Llama4ForCausalLM", **moe, moe_layers=[1, 2])["vllm"] == "refused"


def test_unknown_to_an_engine() -> None:
    found = verdicts("mpt", "MptForCausalLM", n_layers=2)
    assert (found["vllm"], found["onnxruntime"], found["llama.cpp"]) == ("unknown", "refused", "ok")
