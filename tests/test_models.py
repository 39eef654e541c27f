"""Every way a model or a data set can be named, offline: a hub snapshot in its cache, a local data set, the sample."""

import json
import shutil

import pytest

from prune2serve.calibration import load_calibration, read_documents
from prune2serve.errors import Prune2ServeError
from prune2serve.models import fingerprint, load_tokenizer, open_checkpoint


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """The hub's own cache layout, holding one revision of `owner/tiny`; nothing is reachable."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return commit


def test_a_hub_id_opens_from_the_hubs_cache_and_remembers_its_commit(hub, tiny_model):
    checkpoint = open_checkpoint("owner/tiny")
    assert checkpoint.source == "owner/tiny" and checkpoint.revision == hub
    assert checkpoint.fingerprint == fingerprint(tiny_model)
    assert open_checkpoint("owner/tiny", revision=hub) == checkpoint


def test_a_hub_id_that_is_not_cached_says_so_offline(hub):
    with pytest.raises(Prune2ServeError, match="cannot open 'owner/other': HF_HUB_OFFLINE is set and it is not cached"):
        open_checkpoint("owner/other")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(Prune2ServeError, match=r"is a \.txt file: give a model directory"):
        open_checkpoint(str(tmp_path / "notes.txt"))
    with pytest.raises(Prune2ServeError, match="no GGUF file at"):
        open_checkpoint(str(tmp_path / "missing.gguf"))


def test_a_data_set_is_read_through_datasets(tiny_model, tmp_path):
    from prune2serve.calibration import Sizes

    pytest.importorskip("datasets")
    rows = [{"text": f"document {i}: " + "words and more words " * 10} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    checkpoint = open_checkpoint(str(tiny_model))
    sizes = Sizes(2, 1, 1, window=32)
    dealt = load_calibration(f"hub:{tmp_path}::train", checkpoint, load_tokenizer(checkpoint), sizes, 0, lambda: None)
    assert dealt.score.num_tokens == 64 and dealt.report.num_tokens == 32
    with pytest.raises(Prune2ServeError, match=r"cannot read hub:.*expected hub:NAME"):
        load_calibration(f"hub:{tmp_path}::test", checkpoint, load_tokenizer(checkpoint), sizes, 0, lambda: None)


def test_the_bundled_sample_is_converted_once(sample):
    assert sample.source == "sample" and sample.config["num_hidden_layers"] == 30
    assert open_checkpoint("sample") == sample
    assert sample.config["_name_or_path"].startswith("SmolLM2")
    assert load_tokenizer(sample).chat_template


def test_the_shared_texts_split_into_documents(shared_data):
    assert len(read_documents(shared_data / "calibration" / "c4.txt")) > 500
    assert 50 < len(read_documents(shared_data / "wikitext2" / "test.raw")) < 80
