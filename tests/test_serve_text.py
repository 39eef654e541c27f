"""From tokens to text and from logits to tokens: the parts that need no model."""

import itertools

import numpy as np
import pytest
from serve_fixtures import SENTENCES, make_tokenizer

from prune2serve.serve.detokenize import IncrementalDecoder, TextStream
from prune2serve.serve.generation import SamplingParams, Sequence
from prune2serve.serve.sampling import NotFiniteError, choose

TOKENIZER = make_tokenizer()


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(text):
    return TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize("text", SENTENCES)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text):
    decoder = IncrementalDecoder(decode, encode("The "))
    pieces = [decoder.push(token) for token in encode(text)]
    assert "".join([*pieces, decoder.flush()]) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(len(piece) for piece in pieces) < 12  # it streams, rather than saving everything for the end


def test_any_tokens_at_all_join_to_what_the_tokenizer_decodes():
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(3, len(TOKENIZER), size=40).tolist()  # mostly bytes that are no characters
        decoder = IncrementalDecoder(decode)
        assert "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == decode(ids)


def test_a_character_cut_off_by_the_end_is_flushed_as_the_tokenizer_spells_it():
    ids = encode("🙂")[:-1]
    decoder = IncrementalDecoder(decode)
    assert [decoder.push(token) for token in ids] == [""] * len(ids)
    assert decoder.flush() == decode(ids) == "\ufffd"


def stream(text, stop, include=False):
    made = TextStream(IncrementalDecoder(decode), tuple(stop), include)
    shown = ""
    for token in encode(text):
        shown += made.push(token)
        assert not any(word in shown for word in stop) or include
        if made.stopped:
            return shown, True
    shown += made.finish()
    return shown, made.stopped


def test_a_stop_string_is_found_across_token_boundaries_and_cut():
    assert len(encode("zqxjk")) > 2
    assert stream("abc zqxjk def", ["zqxjk"]) == ("abc ", True)
    assert stream("abc zqxjk def", ["zqxjk"], include=True) == ("abc zqxjk", True)
    assert stream("abc zqxj def", ["zqxjk"]) == ("abc zqxj def", False)


def test_the_first_of_several_stop_strings_wins_wherever_it_begins():
    text = "one two three four"
    for first, second in itertools.permutations(["three", "two th"]):
        assert stream(text, [first, second]) == ("one ", True)


def test_an_unfinished_stop_string_is_shown_at_the_end():
    assert stream("ends with zqx", ["zqxjk"]) == ("ends with zqx", False)


def sequence(**params):
    settings = SamplingParams(**{"max_tokens": 10, **params})
    random = np.random.default_rng(settings.seed)
    text = TextStream(IncrementalDecoder(decode))
    return Sequence([1, 2], settings, lambda delta: None, text, frozenset({0}), random)


LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], dtype=np.float32))


def frequencies(num=4000, **params):
    drawn = sequence(seed=0, **params)
    tokens = [choose(LOGITS.copy(), drawn)[0] for _ in range(num)]
    return np.bincount(tokens, minlength=5) / num


def test_draws_follow_the_models_distribution():
    np.testing.assert_allclose(frequencies(), np.exp(LOGITS), atol=0.03)


def test_temperature_sharpens_the_distribution():
    expected = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(frequencies(temperature=0.5), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1, 2}),  # 0.4 is not enough, 0.7 is
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.3}, {1, 2, 3}),  # at least 0.3 * 0.4
        ({"top_k": 3, "top_p": 0.5}, {1, 2}),  # of 0.85 that top_k left
    ],
)
def test_filters_keep_exactly_the_tokens_they_should(params, kept):
    assert {int(token) for token in np.flatnonzero(frequencies(1000, **params))} == kept


def test_top_p_over_a_flat_distribution_wider_than_the_first_candidates():
    flat = np.zeros(5000, dtype=np.float32)
    drawn = sequence(top_p=0.9, seed=1)
    tokens = {choose(flat.copy(), drawn)[0] for _ in range(300)}
    assert max(tokens) - min(tokens) > 2000
    assert len(tokens) > 250


def test_greedy_takes_the_first_of_the_largest():
    assert choose(np.array([0, 2, 2, 1], dtype=np.float32), sequence(temperature=0))[0] == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature):
    drawn = sequence(temperature=temperature, seed=3)
    assert {choose(LOGITS.copy(), drawn)[0] for _ in range(50)} == {1}


def test_the_same_seed_draws_the_same_tokens():
    one, two, other = (sequence(seed=seed) for seed in (5, 5, 6))
    draws = [[choose(LOGITS.copy(), s)[0] for _ in range(30)] for s in (one, two, other)]
    assert draws[0] == draws[1] != draws[2]


def test_penalties_and_bias_change_the_choice_as_documented():
    seen = sequence(temperature=0, frequency_penalty=1.0)
    seen.output_ids = [1]
    assert choose(LOGITS.copy(), seen)[0] == 2  # log 0.4 - 1 < log 0.3
    seen.output_ids = [1, 2, 2]
    assert choose(LOGITS.copy(), seen)[0] == 3  # two of token 2 cost 2
    present = sequence(temperature=0, presence_penalty=0.5)
    present.output_ids = [1, 1, 1]
    assert choose(LOGITS.copy(), present)[0] == 2
    assert choose(LOGITS.copy(), sequence(temperature=0, logit_bias={4: 100.0}))[0] == 4
    repeated = sequence(temperature=0, repetition_penalty=2.0)  # the prompt holds 1 and 2
    assert choose(np.array([0.0, 3.0, 2.9, 2.0, 1.0], dtype=np.float32), repeated)[0] == 3


def test_the_end_is_impossible_before_min_tokens():
    assert choose(np.array([9, 1, 0], dtype=np.float32), sequence(temperature=0, min_tokens=1))[0] == 1


def test_logprobs_are_the_unmodified_models():
    _, found = choose(LOGITS.copy(), sequence(temperature=0, logprobs=2, logit_bias={4: 100.0}))
    assert found.token_id == 4
    assert found.logprob == pytest.approx(np.log(0.1), abs=1e-5)
    assert [token for token, _ in found.top] == [1, 2]
    assert found.top[0][1] == pytest.approx(np.log(0.4), abs=1e-5)


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(NotFiniteError, match="NaN"):
        choose(np.array([1.0, np.nan, 2.0], dtype=np.float32), sequence(temperature=0))
