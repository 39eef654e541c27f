"""The client against an endpoint whose latencies are known exactly."""

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from prune2serve.serve import client
from prune2serve.serve.workload import Arrival, Lengths, Request, Workload, requests_for

MOCK = Path(__file__).with_name("mock_endpoint.py")


@contextmanager
def mock_endpoint(*options):
    process = subprocess.Popen([sys.executable, str(MOCK), *options], stderr=subprocess.PIPE, text=True)
    try:
        yield process.stderr.readline().split(" on ")[1].split()[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def run(url, requests, concurrency, api="completions"):
    async def go():
        async with client.open_session() as session:
            target = client.Target(url, "mock", api)
            await client.send(session, target, Request(0, "warm up", 2))
            return await client.run_period(session, target, requests, concurrency)

    return asyncio.run(go())


def test_known_latencies_are_measured_within_one_millisecond_or_one_percent():
    requests = [Request(i, f"prompt {i}", 20) for i in range(5)]
    with mock_endpoint("--ttft-ms", "50", "--itl-ms", "10", "--exact") as url:
        for _ in range(4):  # A busy machine may deschedule the mock or the client, which can only add time.
            outcomes = run(url, requests, concurrency=1)
            assert [(o.error, o.output_tokens) for o in outcomes] == [(None, 20)] * 5
            ttft = np.quantile([o.chunk_ns[0] - o.start_ns for o in outcomes], 0.25) / 1e6
            tpot = np.quantile([(o.chunk_ns[-1] - o.chunk_ns[0]) / 19 for o in outcomes], 0.25) / 1e6
            if abs(ttft - 50) < 1.0 and abs(tpot - 10) < 0.1:
                break
    assert ttft == pytest.approx(50, abs=1.0)
    assert tpot == pytest.approx(10, abs=0.1)


def test_open_loop_sends_on_schedule_while_others_are_in_flight():
    requests = [Request(i, "p", 2, offset_s=0.05 * i) for i in range(5)]
    with mock_endpoint("--ttft-ms", "300") as url:
        outcomes = run(url, requests, concurrency=None)
    starts = np.array([o.start_ns for o in outcomes]) / 1e6
    assert np.allclose(np.diff(starts), 50, atol=15)
    assert outcomes[-1].start_ns < outcomes[0].chunk_ns[0]  # the last went out before the first was answered


def test_closed_loop_never_exceeds_its_concurrency():
    requests = [Request(i, "p", 3) for i in range(9)]
    with mock_endpoint("--ttft-ms", "20", "--itl-ms", "5") as url:
        outcomes = run(url, requests, concurrency=3)
    events = sorted([(o.start_ns, 1) for o in outcomes] + [(o.chunk_ns[-1], -1) for o in outcomes])
    assert max(np.cumsum([step for _, step in events])) == 3


def test_failures_are_recorded_with_their_reason():
    with mock_endpoint("--fail", "1") as url:
        (outcome,) = run(url, [Request(0, "p", 3)], concurrency=1)
    assert outcome.error == 'HTTP 500: {"error": {"message": "mock failure"}}'
    (outcome,) = run("http://127.0.0.1:1", [Request(0, "p", 3)], concurrency=1)
    assert outcome.error.startswith("ClientConnectorError: ")


@pytest.mark.parametrize("cut", [1, 7, 10_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_event_stream_survives_any_cut(cut, newline):
    raw = b'data: {"a": 1}\n\n: a comment\n\ndata:{"b":\ndata: 2}\n\ndata: [DONE]\n\n'.replace(b"\n", newline)
    stream = client.EventStream()
    found = [p for i in range(0, len(raw), cut) for p in stream.feed(raw[i : i + cut])]
    assert found == [{"a": 1}, {"b": 2}]


def test_a_mere_end_mark_is_no_token_but_an_empty_token_is_one():
    def read(payloads):
        reading = client._Reading()
        for now, payload in enumerate(payloads):
            reading.take(payload, now)
        reading.finish()
        return reading.chunk_ns

    def chunk(text, end=None):
        return {"choices": [{"text": text, "finish_reason": end}]}

    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    assert read([chunk("a"), chunk("b"), chunk("c"), chunk("", "length"), usage]) == [0, 1, 2]
    assert read([chunk("a"), chunk(""), chunk("", "length"), usage]) == [0, 1, 2]
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    words = [{"choices": [{"delta": {"content": w}}]} for w in "abc"]
    assert read([role, *words, {"choices": [{"delta": {}, "finish_reason": "length"}]}, usage]) == [1, 2, 3]


def workload(**changes):
    settings = dict(
        prompts=("one", "two", "three"),
        source="test",
        output=Lengths(8),
        arrival=Arrival(),
        num_requests=3,
    )
    return Workload(**{**settings, **changes})


def test_a_half_round_is_the_same_for_both_arms_and_new_in_the_next():
    made = workload(output=Lengths(20, 0.5), arrival=Arrival("poisson", None, 5.0))
    assert requests_for(made, 0) == requests_for(made, 0)
    first, second = requests_for(made, 0), requests_for(made, 1)
    assert {r.prompt.split("] ")[1] for r in first} == {"one", "two", "three"}  # each used before any twice
    assert not {r.prompt for r in first} & {r.prompt for r in second}
    assert all(10 <= r.output_tokens <= 30 for r in first + second)
    assert first[0].offset_s == 0 and first[1].offset_s > 0


def test_one_server_for_both_arms_gets_prompts_that_differ_only_in_their_mark():
    a, b = requests_for(workload(), 0), requests_for(workload(), 0, salt=1)
    assert all(x.prompt != y.prompt and len(x.prompt) == len(y.prompt) for x, y in zip(a, b, strict=True))


def test_shared_prefixes_leave_the_prompts_alone():
    assert {r.prompt for r in requests_for(workload(share_prefixes=True), 5)} == {"one", "two", "three"}


def test_replay_keeps_the_gaps_of_the_timestamps():
    arrival = Arrival("replay", None, timestamps_s=(100.0, 100.5, 102.0, 103.0))
    assert arrival.offsets(3, 0, np.random.default_rng(0)) == [0.0, 0.5, 2.0]
    assert arrival.offsets(3, 2, np.random.default_rng(0)) == [0.0, 1.0, 1.0]  # wraps round
