"""The ONNX Runtime engine on a real exported model: right tokens whatever the load, rows never leaked."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from serve_fixtures import serve_cache, tiny_model, tiny_onnx  # noqa: F401

pytest.importorskip("onnxruntime")

from prune2serve.serve.generation import SamplingParams, Sequence
from prune2serve.serve.ort_engine import EngineUnavailableError, OrtEngine, QueueFullError
from prune2serve.serve.ort_scheduler import Scheduler
from prune2serve.serve.ort_session import ModelRunner, RunnerOptions
from prune2serve.serve.tokenization import TextModel

PROMPTS = [
    "The quick brown fox",
    "Pack my box",
    "One, two, three, four, five; the answer is 42 and nothing else. " * 3,
    "привет мир",
    "a",
    "The naïve café owner said 🙂",
    "nothing else, nothing more, nothing",
    "0123456789" * 12,
]


class Collected:
    """Gathers one sequence's deltas."""

    def __init__(self):
        self.deltas, self.done = [], threading.Event()

    def __call__(self, delta):
        self.deltas.append(delta)
        if delta.finish_reason:
            self.done.set()

    @property
    def text(self):
        return "".join(delta.text for delta in self.deltas)

    @property
    def reason(self):
        return self.deltas[-1].finish_reason


@pytest.fixture(scope="module")
def text(tiny_model):
    return TextModel(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_onnx, text):
    options = RunnerOptions(num_rows=4, max_length=256, prefill_chunk=16, num_threads=1)
    made = OrtEngine(lambda: ModelRunner(tiny_onnx, options), text.decode, text.eos_ids, max_waiting=32)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def run(engine, prompts, wait=True, **params):
    """Submit every prompt at once; return (sequences, what came of each)."""
    settings = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **params})
    results = [Collected() for _ in prompts]
    sequences = [engine.submit(ids, settings, result) for ids, result in zip(prompts, results, strict=True)]
    if wait:
        assert all(result.done.wait(60) for result in results)
    return sequences, results


def greedy(model, ids, count):
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return output[0, len(ids) :].tolist()


def idle(engine, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while engine.num_active and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.num_active == 0


def test_greedy_tokens_are_transformers_alone_and_in_a_full_batch(engine, text, model):
    prompts = [text.encode(prompt) for prompt in PROMPTS]
    expected = [greedy(model, ids, 24) for ids in prompts]
    alone = [run(engine, [ids])[0][0].output_ids for ids in prompts]
    together = [sequence.output_ids for sequence in run(engine, prompts)[0]]  # 8 prompts in 4 rows
    assert alone == expected
    assert together == expected
    assert idle(engine)


def test_the_pieces_are_the_decoded_tokens(engine, text):
    sequences, results = run(engine, [text.encode(prompt) for prompt in PROMPTS])
    for sequence, result in zip(sequences, results, strict=True):
        whole = text.decode(sequence.prompt_ids + sequence.output_ids)
        # A character begun in the prompt may end in the answer: compare in the context of the prompt.
        assert whole.endswith(result.text.lstrip("\ufffd")) or result.text == text.decode(sequence.output_ids)
        assert sum(delta.num_tokens for delta in result.deltas) == 24
        assert result.reason == "length"


def test_a_seeded_request_is_the_same_alone_and_in_a_batch(engine, text):
    ids = text.encode(PROMPTS[0])
    others = [text.encode(prompt) for prompt in PROMPTS[1:5]]
    (alone,), _ = run(engine, [ids], temperature=1.0, seed=11, top_p=0.9)
    _, background = run(engine, others, wait=False, temperature=1.0)
    (crowded,), _ = run(engine, [ids], temperature=1.0, seed=11, top_p=0.9)
    assert all(result.done.wait(60) for result in background)
    assert alone.output_ids == crowded.output_ids


def test_logprobs_of_prompt_and_answer_are_the_models(engine, text, model):
    ids = text.encode(PROMPTS[2])  # longer than a chunk
    (sequence,), (result,) = run(engine, [ids], logprobs=3, prompt_logprobs=2, max_tokens=5)
    with torch.inference_mode():
        table = model(torch.tensor([ids + sequence.output_ids])).logits[0].log_softmax(-1)
    prompt = next(delta.prompt_logprobs for delta in result.deltas if delta.prompt_logprobs)
    assert len(prompt) == len(ids) and prompt[0] is None
    for position, entry in enumerate(prompt[1:], start=1):
        assert entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(float(table[position - 1, ids[position]]), abs=1e-3)
        assert entry.top[0][1] == pytest.approx(float(table[position - 1].max()), abs=1e-3)
    answer = [entry for delta in result.deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in answer] == sequence.output_ids
    for offset, entry in enumerate(answer):
        row = table[len(ids) + offset - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert len(entry.top) == 3


def test_prompt_logprobs_without_an_answer(engine, text):
    (sequence,), (result,) = run(engine, [text.encode(PROMPTS[2])], prompt_logprobs=0, max_tokens=0)
    assert sequence.output_ids == [] and result.reason == "length" and result.deltas[-1].num_tokens == 0
    assert len(result.deltas[-1].prompt_logprobs) == len(sequence.prompt_ids)


def test_a_stop_string_ends_the_answer_and_frees_the_row(engine, text):
    _, (full,) = run(engine, [text.encode(PROMPTS[0])])
    stop = full.text[6:9]
    _, (cut,) = run(engine, [text.encode(PROMPTS[0])], stop=(stop,))
    assert cut.reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert idle(engine)


def test_the_end_token_ends_the_answer_without_its_text(engine, text):
    (whole,), _ = run(engine, [text.encode(PROMPTS[0])])
    third = whole.output_ids[3]
    first_at = whole.output_ids.index(third)
    (cut,), (result,) = run(engine, [text.encode(PROMPTS[0])], stop_token_ids=(third,))
    assert cut.output_ids == whole.output_ids[: first_at + 1]
    assert result.reason == "stop" and result.text == text.decode(whole.output_ids[:first_at])


def test_an_answer_ends_where_the_cache_ends(engine, text):
    ids = text.encode("ab") * 124  # 248 of 256
    (sequence,), (result,) = run(engine, [ids], max_tokens=100)
    assert sequence.length == engine.max_length and result.reason == "length"


def test_cancelled_requests_give_their_rows_back_and_leave_the_others_alone(engine, text, model):
    prompts = [text.encode(prompt) for prompt in PROMPTS]
    expected = [greedy(model, ids, 40) for ids in prompts[:2]]
    doomed, _ = run(engine, prompts[2:], wait=False, max_tokens=150)
    kept, results = run(engine, prompts[:2], wait=False, max_tokens=40)
    chooser = random.Random(0)
    for sequence in chooser.sample(doomed, len(doomed)):
        time.sleep(chooser.random() * 0.02)
        engine.cancel(sequence)
    assert all(result.done.wait(60) for result in results)
    assert [sequence.output_ids for sequence in kept] == expected
    assert idle(engine)


def test_a_full_queue_refuses_and_recovers(tiny_onnx, text):
    options = RunnerOptions(num_rows=1, max_length=256, num_threads=1)
    small = OrtEngine(lambda: ModelRunner(tiny_onnx, options), text.decode, text.eos_ids, max_waiting=2)
    ids = text.encode(PROMPTS[0])
    try:
        with pytest.raises(QueueFullError, match="2 requests are waiting already"):
            for _ in range(10):
                run(small, [ids], wait=False, max_tokens=200)
        assert idle(small, 60)
        assert run(small, [ids])[1][0].reason == "length"
    finally:
        small.stop()


class FlakyRunner(ModelRunner):
    """A real session that fails its next decode step when told to."""

    fail = False

    def decode(self, tokens, lengths):
        if FlakyRunner.fail:
            FlakyRunner.fail = False
            raise RuntimeError("the device is gone")
        return super().decode(tokens, lengths)


def test_a_failing_step_answers_every_request_and_the_engine_comes_back(tiny_onnx, text, capsys):
    options = RunnerOptions(num_rows=2, max_length=256, num_threads=1)
    flaky = OrtEngine(lambda: FlakyRunner(tiny_onnx, options), text.decode, text.eos_ids)
    prompts = [text.encode(prompt) for prompt in PROMPTS[:4]]
    try:
        _, before = run(flaky, prompts)
        FlakyRunner.fail = True
        _, lost = run(flaky, prompts)
        assert {result.reason for result in lost} == {"error"}
        assert all("RuntimeError" in result.deltas[-1].error for result in lost)
        with pytest.raises(EngineUnavailableError, match="the engine is failed"):
            run(flaky, prompts)
        deadline = time.monotonic() + 30
        while flaky.state != "ready" and time.monotonic() < deadline:
            time.sleep(0.05)
        _, after = run(flaky, prompts)
        assert [result.text for result in after] == [result.text for result in before]
    finally:
        flaky.stop()
    assert "the device is gone" in capsys.readouterr().err  # the traceback is not swallowed


def blank(length, cached=0):
    made = Sequence([0] * length, SamplingParams(max_tokens=9), None, None, frozenset(), None)
    made.num_cached = cached
    return made


def test_rows_stay_dense_and_moves_carry_every_sequence_along():
    """A model of the buffer: each row holds the sequence last written there; moves copy it."""
    chooser = random.Random(1)
    for _ in range(300):
        scheduler, rows = Scheduler(num_rows=4), {}
        for _ in range(40):
            action = chooser.random()
            if action < 0.4:
                scheduler.add(blank(3))
            elif action < 0.8:
                chosen = scheduler.next_prefill()
                if chosen:
                    sequence, row = chosen
                    assert row < 4
                    assert sequence.num_cached == 0 or rows[row] is sequence
                    rows[row], sequence.num_cached = sequence, sequence.num_cached + 1
                    if sequence.num_cached == 3:
                        scheduler.promote()
            else:
                everything = [*scheduler.running, *scheduler.waiting]
                everything += [scheduler.prefilling] if scheduler.prefilling else []
                if everything:
                    for move in scheduler.release(chooser.choice(everything)):
                        assert move.length == rows[move.source].num_cached
                        rows[move.target] = rows[move.source]
            assert [rows[row] for row in range(len(scheduler.running))] == scheduler.running
            assert scheduler.num_active <= 4


def test_logits_of_a_row_do_not_depend_on_the_batch_to_the_last_bit(tiny_onnx):
    runner = ModelRunner(tiny_onnx, RunnerOptions(num_rows=6, max_length=64, num_threads=2))
    prompts = [[5 + i, 40, 7 + 3 * i, 60][: 2 + i % 3] for i in range(6)]
    for row, ids in enumerate(prompts):
        runner.prefill(row, ids, 0)
    first = runner.decode([9], [len(prompts[0]) + 1]).copy()
    for count in range(2, 7):
        lengths = [len(ids) + 1 for ids in prompts[:count]]
        assert np.array_equal(runner.decode([9] * count, lengths)[:1], first)
