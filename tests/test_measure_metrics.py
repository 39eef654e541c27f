"""Latency formulas in whole nanoseconds, the arithmetic written out."""

import pytest

from prune2serve.errors import Prune2ServeError
from prune2serve.records import RequestTrace
from prune2serve.serve import metrics


def trace(chunks, tokens, *, start=1_000, error=None):
    return RequestTrace("baseline", 0, 0, 0, start, start, tuple(chunks), 5, tokens, error)


def test_latencies_of_one_request():
    t = trace([1_500, 1_700, 2_000, 2_600], 4)
    assert metrics.ttft_ns(t) == 500  # 1500 - 1000
    assert metrics.e2e_ns(t) == 1_600  # 2600 - 1000
    assert metrics.tpot_ns(t) == pytest.approx(1_100 / 3)  # (1600 - 500) / (4 - 1)
    assert metrics.itl_ns(t) == (200, 300, 600)  # 1700-1500, 2000-1700, 2600-2000


def test_chunks_of_several_tokens_count_tokens_for_tpot_and_chunks_for_itl():
    t = trace([2_000, 3_000, 5_000], 7)
    assert metrics.tpot_ns(t) == 500  # (4000 - 1000) / (7 - 1)
    assert metrics.itl_ns(t) == (1_000, 2_000)


@pytest.mark.parametrize("t", [trace([1_500], 1), trace([], 0), trace([1_500, 1_600], 2, error="HTTP 500")])
def test_fewer_than_two_tokens_or_a_failure_has_no_value(t):
    assert metrics.ttft_ns(t) is None
    assert metrics.e2e_ns(t) is None
    assert metrics.tpot_ns(t) is None
    assert metrics.itl_ns(t) == ()


def test_all_tokens_in_one_chunk_has_no_tpot():
    t = trace([9_000], 8)
    assert metrics.ttft_ns(t) == metrics.e2e_ns(t) == 8_000
    assert metrics.tpot_ns(t) is None


def test_rates_of_a_period():
    traces = [trace([2_000, 3_000], 2), trace([4_000, 9_000], 6, start=2_500), trace([], 3, error="HTTP 500")]
    assert metrics.span_seconds(traces) == 8_000 / 1e9  # last chunk 9000 - first start 1000
    assert metrics.output_tokens(traces) == 8  # 2 + 6; the failed request counts for nothing


def test_goodput_needs_every_limit_met():
    slo = metrics.parse_slo("ttft=1,tpot=2")
    on_the_limit = trace([1_001_000, 3_001_000], 2)  # TTFT 1 ms, TPOT 2 ms
    too_slow = trace([1_001_001, 3_001_000], 2)
    assert [slo.met_by(on_the_limit), slo.met_by(too_slow)] == [True, False]
    assert metrics.num_good([on_the_limit, too_slow, trace([1_500], 1)], slo) == 1


def test_bad_slo_says_what_was_expected():
    with pytest.raises(Prune2ServeError, match="--slo has 'itl=3'; expected ttft=MS, tpot=MS or e2e=MS"):
        metrics.parse_slo("ttft=100,itl=3")
