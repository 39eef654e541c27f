"""Which engines will take a pruned directory: some derive a layer's kind from its position, whatever the config says.

The checks compare what an engine derives with what config.json states. Sources: vLLM 0.32 (`model_executor/models`),
onnxruntime-genai 0.18 (`models/builders`), llama.cpp (`n_no_rope_layer_step`, `set_swa_pattern` per architecture).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prune2serve.architectures import decoder_config, expand
from prune2serve.model_config import decoder_fields
from prune2serve.records import Record

Engine = Literal["transformers", "vllm", "onnxruntime", "llama.cpp"]
Verdict = Literal["ok", "wrong", "refused", "unknown"]


@dataclass(frozen=True)
class EngineFinding(Record):
    """What one engine will do with the directory."""

    engine: Engine
    verdict: Verdict
    """`wrong`: it loads and computes something else. `refused`: it does not load. `unknown`: no claim is made."""
    why: str = ""


LLAMA_CPP_PERIODS = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "cohere2": 4, "exaone4": 4, "olmo3": 4}
"""Every n-th layer has full attention, all others a sliding window."""

VLLM = frozenset(
    {
        *("AfmoeForCausalLM", "ApertusForCausalLM", "ArceeForCausalLM", "BloomForCausalLM", "CohereForCausalLM"),
        *("Cohere2ForCausalLM", "DbrxForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        *("Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM"),
        *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        *("Gemma4ForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel"),
        *("GPTJForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM"),
        *("JambaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "LlamaForCausalLM", "Llama4ForCausalLM"),
        *("MiniCPM3ForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        *("NemotronForCausalLM", "NemotronHForCausalLM", "OlmoeForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM"),
        *("PhiMoEForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "StableLmForCausalLM"),
    }
)
"""Classes that vLLM implements itself; others run, if at all, on its transformers backend."""

ONNX = frozenset(
    {
        *("Ernie4_5ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM"),
        *("Gemma3ForConditionalGeneration", "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM", "Lfm2ForCausalLM"),
        *("Lfm2MoeForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM"),
        *("PhiForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        *("SmolLM3ForCausalLM",),
    }
)
"""Classes that onnxruntime-genai's model builder exports."""

LLAMA_CPP = frozenset(
    {
        *("bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2"),
        *("gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "lfm2", "llama"),
        *("llama4_text", "mistral", "mixtral", "mpt", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2"),
        *("qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Model types that llama.cpp's converter takes."""


def lint(config: Mapping[str, Any]) -> tuple[EngineFinding, ...]:
    """Say for each engine whether it will serve this (pruned) model as its config.json describes it.

    Raises:
        Prune2ServeError: the config is not one that prune2serve writes.
    """
    full = expand(config)
    fields = decoder_fields(decoder_config(full)[1])
    architecture = next(iter(config.get("architectures") or []), "")
    return (
        EngineFinding("transformers", "ok", "the reload proof of a build compares logits with it"),
        _vllm(str(architecture), fields),
        _onnxruntime(str(architecture), fields),
        _llama_cpp(fields),
    )


def _vllm(architecture: str, fields: Mapping[str, Any]) -> EngineFinding:
    family, kinds = fields["model_type"], _kinds(fields)
    if family == "gpt_oss" and not _periodic(kinds, 2):
        return EngineFinding("vllm", "wrong", "it gives even layers the sliding window, whatever layer_types says")
    if family == "qwen2" and len(set(kinds)) > 1:
        return EngineFinding("vllm", "refused", "it asserts that Qwen2's layers are all of one attention kind")
    if family == "llama4_text":
        step, sparse = fields.get("interleave_moe_layer_step") or 0, fields.get("moe_layers") or []
        derived = [layer for layer in range(len(kinds)) if step and (layer + 1) % step == 0]
        if derived != list(sparse):
            return EngineFinding("vllm", "refused", "it places experts by interleave_moe_layer_step, not by moe_layers")
    if architecture not in VLLM:
        return EngineFinding("vllm", "unknown", f"it has no {architecture or family} of its own; try --model-impl auto")
    return EngineFinding("vllm", "ok")


def _onnxruntime(architecture: str, fields: Mapping[str, Any]) -> EngineFinding:
    if architecture not in ONNX:
        return EngineFinding(
            "onnxruntime", "refused", f"its model builder does not export {architecture or 'this model'}"
        )
    if fields["model_type"] == "gpt_oss" and not _periodic(_kinds(fields), 2):
        return EngineFinding("onnxruntime", "wrong", "its builder gives even layers the sliding window")
    return EngineFinding("onnxruntime", "ok")


def _llama_cpp(fields: Mapping[str, Any]) -> EngineFinding:
    family, kinds = fields["model_type"], _kinds(fields)
    if family not in LLAMA_CPP:
        return EngineFinding("llama.cpp", "unknown", f"nothing is known here of its support for {family}")
    period = LLAMA_CPP_PERIODS.get(family)
    if period and not _periodic(kinds, period):
        return EngineFinding("llama.cpp", "wrong", f"it gives every layer but each {period}th the sliding window")
    rope = fields.get("no_rope_layers") if family in ("smollm3", "llama4_text") else None
    if any(bool(uses) != bool((layer + 1) % 4) for layer, uses in enumerate(rope or [])):
        return EngineFinding("llama.cpp", "wrong", "it leaves out rotary positions in every 4th layer")
    return EngineFinding("llama.cpp", "ok")


def _kinds(fields: Mapping[str, Any]) -> Sequence[str]:
    kinds = fields.get("layer_types")
    return kinds if isinstance(kinds, list) else []


def _periodic(kinds: Sequence[str], period: int) -> bool:
    """True when layer i slides exactly where i % period < period - 1."""
    return all((kind == "sliding_attention") == (i % period < period - 1) for i, kind in enumerate(kinds))
