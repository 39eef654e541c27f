"""Prove, for each model family, that removing decoder layers on disk computes what it should.

    python benchmarks/architectures.py [MODEL_TYPE ...] [--all] [--json]

For a tiny random model of each family and several random sets of layers, the pruned directory, loaded by stock
transformers, must give the logits of the parent with those layers skipped (identity hooks: each kept layer stays in
its own place, so nothing of the pruned config is shared with this oracle), and the logits of `pruned_in_memory`; cached
greedy generation must choose the tokens that the model chooses without a cache; and the pruned model, pruned again,
must equal the parent with both sets of layers skipped. A model with two other layers removed must *not* pass, or the
comparison would be blind.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prune2serve import progress
from prune2serve.errors import UnsupportedArchitectureError
from prune2serve.families import refuse_family
from prune2serve.layers import decoder_layers, pruned_in_memory
from prune2serve.models import open_checkpoint
from prune2serve.records import PruningPlan
from prune2serve.surgery import write_pruned

NUM_LAYERS = 6
SEQUENCE = 20
"""Longer than the sliding windows, so that a window on the wrong layer shows."""

MAX_PARAMETERS = 20_000_000

SMALL: dict[str, Any] = {
    **{"num_hidden_layers": NUM_LAYERS, "n_layer": NUM_LAYERS, "n_layers": NUM_LAYERS, "num_layers": NUM_LAYERS},
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "intermediate_size": 48},
    **{"ffn_dim": 48, "n_inner": 48, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128, "n_positions": 128},
    **{
        "max_seq_len": 128,
        "rotary_dim": 4,
        "sliding_window": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    **{
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "moe_k": 2,
    },
    **{"topk_group": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0},
    **{"dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "attention_probs_dropout_prob": 0.0},
    **{"hidden_dropout_prob": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
"""Values for the fields that a family's config has; the rest keeps its default."""

S, F, R = "sliding_attention", "full_attention", "linear_attention"
KINDS = {"layer_types": [S, F, S, S, F, S]}
DENSE_FIRST = {"first_k_dense_replace": 3}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
STEPS = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 3}
HYBRID = {"layer_types": [R, F, R, F, R, F]}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "exaone4", "ministral", "olmo3", "vaultgemma"), KINDS
    ),
    **dict.fromkeys(
        ("afmoe", "cwm", "granite_swa", "laguna", "mimo_v2_flash", "mellum", "exaone_moe", "kolibri1"), KINDS
    ),
    "qwen2": WINDOWS,
    "qwen3": WINDOWS,
    "qwen2_moe": WINDOWS | STEPS,
    "qwen3_moe": STEPS,
    "qwen3_next": HYBRID | GATED_DELTA | STEPS,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), HYBRID | GATED_DELTA),
    "olmo_hybrid": HYBRID,
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 1, 0, 1, 0, 1], **KINDS},
    "llama4_text": {"moe_layers": [1, 2, 5], "no_rope_layers": [1, 1, 0, 1, 0, 1], "attention_chunk_size": 8},
    "deepseek_v2": {**LATENT, **DENSE_FIRST, "topk_method": "greedy"},
    **dict.fromkeys(("deepseek_v3", "youtu", "axk1", "axk2"), LATENT | DENSE_FIRST),
    **dict.fromkeys(("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), LATENT),
    **dict.fromkeys(("glm4_moe", "dots1"), DENSE_FIRST),
    "lfm2_moe": {"layer_types": ["conv", F, "conv", F, "conv", F], "num_dense_layers": 2},
    "lfm2": {"layer_types": ["conv", F, "conv", F, "conv", F]},
    "ernie4_5_moe": {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_dt_rank": 4,
    },
    "bamba": {
        "attn_layer_indices": [1, 4],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 3,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "shared_intermediate_size": 24,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {**KINDS, "rope_parameters": {F: None, S: {"rope_type": "default", "rope_theta": 10000.0}}},
    "gemma4_text": {**KINDS, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gemma4_unified_text": {**KINDS, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "kimi_linear": {**LATENT, "layer_types": HYBRID["layer_types"], "num_experts_per_token": 2},
    "bailing_hybrid": {
        **LATENT,
        "layer_types": HYBRID["layer_types"],
        "head_dim": 8,
        "num_kv_heads_for_linear_attn": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
}
"""What makes a family's layers differ from each other, so that losing track of their place would show."""

LISTED = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "stablelm"),
    *("olmo", "olmo2", "granite", "granitemoe", "cohere", "cohere2", "smollm3", "starcoder2", "glm4", "deepseek_v3"),
    *("gpt_oss", "exaone4", "lfm2"),
)


class NoTinyConfigError(Exception):
    """Nothing in this file makes the family small."""


@dataclass(frozen=True)
class Proof:
    """The result for one family."""

    model_type: str
    verdict: str
    """`exact`, `close` (1e-5 of the logits' spread), `refused`, `untested` or `FAILED`."""
    subsets: int = 0
    largest_difference: float = 0.0
    """Over all comparisons: max |logit difference|, divided by the parent's logit standard deviation."""
    detail: str = ""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return a config of the family with six small layers."""
    chosen = CONFIG_MAPPING[model_type]
    if model_type == "gemma3":
        return chosen(
            text_config=tiny_config("gemma3_text").to_dict(),
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = set(chosen().to_dict()) | set(chosen.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in known and name not in chosen.attribute_map}
    # A config may edit the lists that it is given.
    return chosen(**copy.deepcopy(fields | SPECIAL.get(model_type, {}) | overrides))


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random model of the family whose every weight is away from its initial value."""
    config = tiny_config(model_type, **overrides)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise NoTinyConfigError(f"no tiny config for this family here: {size:.1e} parameters with SMALL's values")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@contextmanager
def skipped(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """Inside the block every layer outside `kept` hands on its input: the oracle, blind to configs and indices."""

    def hand_on(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden

    hooks = [
        layer.register_forward_hook(hand_on, with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
        if index not in kept
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def subsets(seed: int, count: int = 4) -> list[tuple[int, ...]]:
    """Random sets of two to five kept layers, the first and last ones among those removed at times."""
    draw = random.Random(seed)
    return [tuple(sorted(draw.sample(range(NUM_LAYERS), draw.randint(2, NUM_LAYERS - 1)))) for _ in range(count)]


def prove(model_type: str, *, count: int = 4, seed: int = 0, **overrides: Any) -> Proof:
    """Prune a tiny model of the family `count` times, once more on top, and compare; see the top of this file."""
    parent = tiny_model(model_type, seed, **overrides)
    input_ids = torch.randint(3, 96, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        source = Path(scratch) / "parent"
        parent.save_pretrained(source)
        parent = load(source)
        whole = parent(input_ids, use_cache=False).logits
        worst, proven, refusal = 0.0, 0, ""
        for number, kept in enumerate(subsets(seed, count)):
            target = Path(scratch) / str(number)
            try:
                prune(source, target, kept, NUM_LAYERS)
            except UnsupportedArchitectureError as error:
                refusal = f"set {list(kept)} is refused: {error}"
                continue
            pruned = load(target)
            with skipped(parent, kept):
                truth = parent(input_ids, use_cache=False).logits
            with pruned_in_memory(parent, kept):
                in_memory = parent(input_ids, use_cache=False).logits
                tokens = greedy(parent, input_ids)
            got = pruned(input_ids, use_cache=False).logits
            worst = max(worst, *(difference(other, truth, whole) for other in (got, in_memory)))
            check_generation(pruned, input_ids, tokens)
            if proven == 0:
                check_sensitive(parent, input_ids, kept, truth, whole)
            worst = max(worst, again(parent, target, kept, input_ids, whole, Path(scratch) / "again"))
            proven += 1
    if not proven:
        raise UnsupportedArchitectureError(refusal)
    verdict = "exact" if worst == 0 else "close" if worst < 1e-5 else "FAILED"
    return Proof(model_type, verdict, proven, worst, refusal if worst < 1e-5 else "logits differ from skipped layers")


def again(parent: PreTrainedModel, pruned: Path, kept: Sequence[int], input_ids: Any, whole: Any, to: Path) -> float:
    """Remove one more layer, the middle one, from the pruned directory."""
    left = [new for new in range(len(kept)) if new != len(kept) // 2]
    shutil.rmtree(to, ignore_errors=True)
    try:
        prune(pruned, to, left, len(kept))
    except UnsupportedArchitectureError:
        return 0.0
    with skipped(parent, [kept[new] for new in left]):
        truth = parent(input_ids, use_cache=False).logits
    return difference(load(to)(input_ids, use_cache=False).logits, truth, whole)


def prune(source: Path, target: Path, kept: Sequence[int], num_layers: int) -> None:
    removed = tuple(layer for layer in range(num_layers) if layer not in kept)
    target.mkdir()
    write_pruned(open_checkpoint(str(source)), PruningPlan(num_layers, removed, "benchmark"), target)


def load(directory: Path) -> PreTrainedModel:
    """Stock transformers; a missing or an unused tensor is an error."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    loose = {kind: sorted(names) for kind, names in report.items() if names}
    if loose:
        raise RuntimeError(f"loading {directory} left {loose}")
    return model.eval()


def greedy(model: PreTrainedModel, input_ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
    mask = torch.ones_like(input_ids)
    return model.generate(
        input_ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache
    )


def check_generation(pruned: PreTrainedModel, input_ids: torch.Tensor, in_memory: torch.Tensor) -> None:
    cached = greedy(pruned, input_ids)
    if not torch.equal(cached, in_memory):
        raise RuntimeError("cached greedy tokens differ between the pruned directory and the layers removed in memory")
    if not torch.equal(cached, greedy(pruned, input_ids, use_cache=False)):
        raise RuntimeError("greedy tokens with a KV cache differ from those without")


def check_sensitive(parent: Any, input_ids: Any, kept: Sequence[int], truth: Any, whole: Any) -> None:
    """One layer exchanged for another must show, or the comparison proves nothing."""
    other = next(layer for layer in range(NUM_LAYERS) if layer not in kept)
    with skipped(parent, [*kept[1:], other]):
        wrong = parent(input_ids, use_cache=False).logits
    if difference(wrong, truth, whole) < 1e-3:
        raise RuntimeError("the comparison is blind: another set of layers gives the same logits")


def difference(got: torch.Tensor, truth: torch.Tensor, whole: torch.Tensor) -> float:
    if not bool(torch.isfinite(truth).all()):
        raise RuntimeError("the tiny model's logits are not finite")
    return float((got - truth).abs().max() / whole.std())


def prove_or_say(model_type: str) -> Proof:
    """`prove`, with a refusal or a failure as its result."""
    try:
        refuse_family(model_type, False)
        return prove(model_type)
    except UnsupportedArchitectureError as error:
        return Proof(model_type, "refused", detail=str(error))
    except NoTinyConfigError as error:
        return Proof(model_type, "untested", detail=str(error))
    except Exception as error:  # a table of all families: what went wrong with one is its row
        return Proof(model_type, "FAILED", detail=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--all", action="store_true", help="every family that transformers maps to a causal LM")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress.set_quiet(True)
    chosen = options.model_types or (sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if options.all else LISTED)
    proofs = []
    for model_type in chosen:
        proof = prove_or_say(model_type)
        proofs.append(proof)
        if not options.json:
            figures = f"{proof.subsets:2} {proof.largest_difference:8.1e}"
            print(f"{proof.model_type:24} {proof.verdict:8} {figures}  {proof.detail}", flush=True)
    if options.json:
        print(json.dumps([asdict(proof) for proof in proofs], indent=2))
    else:
        counts = {
            verdict: sum(p.verdict == verdict for p in proofs)
            for verdict in ("exact", "close", "refused", "untested", "FAILED")
        }
        print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {counts}")
    return int(any(proof.verdict == "FAILED" for proof in proofs))


if __name__ == "__main__":
    sys.exit(main())
