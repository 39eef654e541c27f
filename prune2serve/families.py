"""What is known of model families by name. Everything else about them is found out from config and tensors.

`benchmarks/architectures.py` proves the families in PROVEN, one by one, and prints the table.
"""

from __future__ import annotations

from prune2serve.errors import UnsupportedArchitectureError, near_match

_KV_SHARING = "its last layers read the KV cache of earlier ones, and its per-layer embeddings are one matrix"
_SHARED_WEIGHTS = "its attention layers share weights by position"
_PREFIX = "it is no next-token model over one sequence"

REFUSED: dict[str, str] = {
    "beam": "its residual stream is read back at indices computed from each layer's position",
    "blt": "it is made of three decoders, over bytes and patches",
    "cpmant": _PREFIX,
    "ctrl": "its layers lie outside the common layout",
    "diffllama": "each layer's lambda_init is computed from its position, and no config field can state it",
    "dots3_note": "its per-layer configuration cannot be renumbered",
    "dots3_note_text": "its per-layer configuration cannot be renumbered",
    "gemma3n": _KV_SHARING,
    "gemma3n_text": _KV_SHARING,
    "gemma4_assistant": "it drafts for another model and reads that model's KV cache",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's KV cache",
    "gpt_neox_japanese": "only its last layer has a bias on the attention output",
    "hrm_text": "it runs the same stacks of layers several times",
    "inkling2_text": "its residual stream is read back at positions fixed by n_layers_per_attn_res_block",
    "longcat_flash": "each of its layers holds two attention and two MLP layers, counted twice in the config",
    "minimax": "the decay slopes of its linear attention are computed from each layer's position",
    "mllama": "its cross-attention layers are interleaved with self-attention layers of another class",
    "modernbert-decoder": "its first layer alone has no attention norm",
    "moshi": "it is a speech model with a second decoder over codebooks",
    "musicgen": "it generates audio codes, not text",
    "musicgen_melody": "it generates audio codes, not text",
    "prophetnet": _PREFIX,
    "reformer": "its layers are reversible and compute on two streams",
    "rwkv": "its first layer holds an extra norm and weights are rescaled by position",
    "trocr": "it is the decoder half of an image-to-text model",
    "xlm": "it keeps each part of a layer in a list of its own",
    "xlnet": _PREFIX,
    "xlstm": "its state cache is not renumbered",
    "zaya": "its first layer alone has a router without the state of the layer before",
    "zamba": _SHARED_WEIGHTS,
    "zamba2": _SHARED_WEIGHTS,
}
"""Model type -> why removing decoder layers cannot be right."""

ENCODERS = frozenset(
    {
        *("albert", "bert", "bert-generation", "big_bird", "camembert", "clip", "convbert", "data2vec-text"),
        *("deberta", "deberta-v2", "dinov2", "distilbert", "electra", "ernie", "esm", "eurobert", "fnet", "funnel"),
        *("hubert", "layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "longformer", "markuplm", "megatron-bert"),
        *("mobilebert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm"),
        *("roc_bert", "roformer", "siglip", "squeezebert", "vit", "wav2vec2", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Bidirectional encoders: they have no next-token distribution to keep."""

ENCODER_DECODERS = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian"),
        *("mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "speech_to_text", "switch_transformers"),
        *("t5", "t5gemma", "udop", "umt5", "whisper", "encoder-decoder", "vision-encoder-decoder"),
    }
)
"""Two stacks that read each other; some also have a decoder-only class, which nothing serves."""

PROVEN = frozenset(
    {
        *("afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bamba", "biogpt", "bitnet", "bloom", "codegen"),
        *("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dbrx", "deepseek_v2", "deepseek_v3"),
        *("deepseek_v32", "deepseek_v4", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe"),
        *("falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3", "gemma3_text"),
        *(
            "gemma4_text",
            "gemma4_unified_text",
            "glm",
            "glm4",
            "glm4_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "gpt-sw3",
            "gpt2",
            "gpt_bigcode",
            "gpt_neo",
            "gpt_neox",
            "gpt_oss",
            "gptj",
            "granite",
            "granite_swa",
        ),
        *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense"),
        *("hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling_text", "internlm3", "iquestcoder", "jais2"),
        *("jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text"),
        *("mamba", "mamba2", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral"),
        *("ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3"),
        *("olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe"),
        *("qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "seed_oss"),
        *("smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu"),
    }
)
"""Families for which the benchmark's proof holds; any other is compared layer by layer before it is written."""


def refuse_family(model_type: str, is_encoder_decoder: bool) -> None:
    """Raise UnsupportedArchitectureError unless `model_type` is a decoder-only causal LM that can be cut."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type in PROVEN and not is_encoder_decoder:
        return
    expected = "prune2serve prunes decoder-only causal LMs such as llama or qwen3"
    if model_type in ENCODERS:
        raise UnsupportedArchitectureError(f"{model_type} is an encoder-only model: {expected}")
    if is_encoder_decoder or model_type in ENCODER_DECODERS:
        raise UnsupportedArchitectureError(f"{model_type} is an encoder-decoder model: {expected}")
    if model_type in REFUSED:
        raise UnsupportedArchitectureError(f"{model_type} cannot be pruned by removing layers: {REFUSED[model_type]}")
    known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(REFUSED) - ENCODERS - ENCODER_DECODERS)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedArchitectureError(
            f"the installed transformers knows no model_type {model_type!r}{near_match(model_type, known)}"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedArchitectureError(
            f"{model_type} is no causal LM in the installed transformers{near_match(model_type, known)}"
        )
