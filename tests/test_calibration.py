"""Documents are found, dealt out without overlap, and packed into windows."""

import json

import pytest

from prune2serve.calibration import Sizes, deal, pack, read_documents, shuffled, text_windows
from prune2serve.errors import Prune2ServeError
from prune2serve.self_samples import degenerate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\nc\n", ["a", "b", "c"]),
        ("a one\na two\n\nb\n\nc", ["a one\na two", "b", "c"]),
        ("T1\n\na\n\n\nT2\n\nb\n\n\nT3\n\nc", ["T1\n\na", "T2\n\nb", "T3\n\nc"]),
        (" = A = \n x\n = = S = = \n y\n = B = \n z\n", [" = A = \n x\n = = S = = \n y\n", " = B = \n z\n"]),
    ],
)
def test_text_is_split_at_its_strongest_boundaries(tmp_path, text, expected):
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert read_documents(file) == expected


def test_jsonl_gives_its_text_fields(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in ("one", "two")) + "\n\n")
    assert read_documents(file) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "line 2 has no string field 'text'"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text \\(byte 0\\)"),
        ("a.txt", b" \n \n", "holds no text"),
        (None, b"", "no calibration text at"),
    ],
)
def test_unusable_text_is_refused_in_one_line(tmp_path, name, content, message):
    file = tmp_path / (name or "missing.txt")
    if name:
        file.write_bytes(content)
    with pytest.raises(Prune2ServeError, match=message) as error:
        read_documents(file)
    assert "\n" not in str(error.value)


def test_splits_share_no_document_and_have_their_sizes():
    documents = [[i] * 10 for i in range(1, 101)]
    dealt = deal(documents, Sizes(6, 3, 2, window=32), "x", 0, separator=0)
    seen = [set(split.input_ids[split.attention_mask.bool()].tolist()) - {0} for split in vars(dealt).values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert [len(s.input_ids) for s in (dealt.score, dealt.search, dealt.report)] == [6, 3, 2]
    assert dealt.score.sha256 != dealt.search.sha256


def test_little_text_shrinks_every_split_alike():
    dealt = deal([[i] * 20 for i in range(1, 31)], Sizes(24, 12, 12, window=64), "x", 0, separator=0)
    tokens = [dealt.score.num_tokens, dealt.search.num_tokens, dealt.report.num_tokens]
    assert min(tokens) > 100 and sum(tokens) <= 630


def test_too_little_text_is_refused_with_the_numbers():
    with pytest.raises(Prune2ServeError, match="x holds 2 documents with 22 tokens: calibration needs at least 3"):
        deal([[1] * 10, [2] * 10], Sizes(), "x", 0, separator=0)


def test_pack_pads_the_last_window_on_the_right():
    packed = pack([[5, 6, 7]], 4, 2, "x", 0, separator=9)
    assert packed.input_ids.tolist() == [[5, 6], [7, 9]]
    odd = pack([[5, 6, 7]], 4, 2, "x", 0, separator=None)
    assert odd.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert odd.num_tokens == 3


def test_shuffling_depends_on_the_seed_alone():
    texts = [str(i) for i in range(50)]
    assert shuffled(texts, 3) == shuffled(texts, 3) != shuffled(texts, 4)


def test_text_windows_are_the_first_ones_in_order(tmp_path):
    from serve_fixtures import make_tokenizer

    tokenizer = make_tokenizer()
    file = tmp_path / "t.txt"
    file.write_text("one, two, three\n\nfour\n" * 20)
    windows = text_windows(file, tokenizer, 3, window=16)
    whole = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    assert windows.input_ids.flatten().tolist() == whole[:48]


def test_repetition_is_called_degenerate():
    assert degenerate([1, 2, 3, 4] * 20, 0.4)
    assert degenerate(list(range(10)), 0.4)
    assert not degenerate(list(range(80)), 0.4)
