"""The running server, spoken to by real clients over real sockets."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from serve_fixtures import serve_cache, tiny_model, tiny_onnx  # noqa: F401

pytest.importorskip("onnxruntime")
openai = pytest.importorskip("openai")

from prune2serve.serve.engine import served  # noqa: E402

KEY = "secret-key-ü"
NAME = "tiny@test"


@pytest.fixture(scope="module")
def server(tiny_model, tiny_onnx, tmp_path_factory):
    flags = [str(tiny_model), "--engine", "onnxruntime", "--served-model-name", NAME]
    flags += ["--max-num-seqs", "2", "--max-num-waiting", "4", "--max-model-len", "400", "--threads", "1"]
    flags += ["--max-body-mb", "0.05"]
    with served(flags, log_file=tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server, path, body, headers=None):
    """POST raw bytes or an object; return (status, parsed body, headers)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, data, {"Content-Type": "application/json", **(headers or {})}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return answer.read().decode()


def metric(server, name):
    lines = [line for line in get(server, "/metrics").splitlines() if line.startswith(f"vllm:{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_idle(server):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if metric(server, "num_requests_running") == metric(server, "num_requests_waiting") == 0:
            return True
        time.sleep(0.05)
    return False


LONG = {"prompt": "The quick brown fox", "max_tokens": 380, "ignore_eos": True, "temperature": 0}


def test_the_openai_client_completes_whole_and_streamed_alike(client):
    settings = {"model": NAME, "prompt": "The quick", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**settings)
    assert whole.usage.prompt_tokens > 0
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_uses_the_models_template(client, tiny_model):
    from prune2serve.serve.tokenization import TextModel

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello 🙂"}]
    settings = {"model": NAME, "messages": messages, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    text = TextModel(tiny_model)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello 🙂<|im_end|>\n<|im_start|>assistant\n"
    assert text.render_chat(messages) == prompt
    ids = text.encode(prompt, add_special_tokens=False)
    assert whole.usage.prompt_tokens == len(ids)
    same = client.completions.create(model=NAME, prompt=ids, max_tokens=20, temperature=0)
    assert whole.choices[0].message.content == same.choices[0].text
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    again = client.chat.completions.create(**{**settings, "messages": parts})
    assert again.choices[0].message.content == whole.choices[0].message.content


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy
        assert bytes(entry.bytes).decode() == entry.token


def test_echo_with_logprobs_scores_the_prompt(client):
    """What lm-evaluation-harness asks for."""
    prompts = [[5, 80, 17, 200, 33], [40, 41, 42]]
    answer = client.completions.create(model=NAME, prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + 1
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        for value, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
            assert value <= max(top.values()) <= 0
    nothing = client.completions.create(model=NAME, prompt=prompts[0], max_tokens=0, logprobs=0, echo=True)
    assert len(nothing.choices[0].logprobs.tokens) == 5 and nothing.usage.completion_tokens == 0


def test_several_choices_each_with_its_own_seed(client):
    settings = {"model": NAME, "prompt": ["The", "Pack"], "n": 2, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    one, two = (client.completions.create(**settings) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in two.choices]
    assert texts[0] != texts[1]


def test_a_stop_string_ends_both_kinds_of_answer(client):
    full = client.completions.create(model=NAME, **LONG_KNOWN).choices[0].text
    stop = full[10:13]
    cut = full[: full.index(stop)]
    answer = client.completions.create(model=NAME, **LONG_KNOWN, stop=stop).choices[0]
    assert (answer.text, answer.finish_reason) == (cut, "stop")
    streamed = client.completions.create(model=NAME, **LONG_KNOWN, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut


LONG_KNOWN = {"prompt": "The quick brown fox", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_models_health_version_and_unknown_paths(client, server):
    (model,) = client.models.list().data
    assert model.id == NAME and model.max_model_len == 400
    assert client.models.retrieve(NAME).id == NAME
    assert get(server, "/health") == ""
    assert "version" in json.loads(get(server, "/version"))
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist; served is 'tiny@test'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no such path"):
        client.get("/nonsense", cast_to=object)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"", 400, "Invalid JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, "Invalid JSON"),
        (b'{"prompt": "\\ud800"}', 400, "Invalid JSON"),
        (b"[" * 10000, 400, "Invalid JSON"),
        (b"[1, 2]", 400, "object"),
        ({}, 400, "prompt: Field required"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [10**30]}, 400, "is outside of the vocabulary"),
        ({"prompt": [99999]}, 400, "token id 99999 is outside of the vocabulary"),
        ({"prompt": ["a"] * 200}, 400, "more than 128 choices"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens 0 is only allowed with echo"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**40}, 400, "maximum context length is 400 tokens"),
        ({"prompt": "a", "max_tokens": 400}, 400, "maximum context length is 400 tokens"),
        ({"prompt": [5] * 400}, 400, "the prompt has 400"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature: Input should be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "seed": 2**70}, 400, "seed"),
        ({"prompt": "a", "n": 10**9}, 400, "n: "),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "stop": 7}, 400, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias: every key must be a token id"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, 400, "outside of the vocabulary"),
        ({"prompt": "a", "min_tokens": 99, "max_tokens": 3}, 400, "min_tokens"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "echo": True, "stream": True}, 400, "echo is not supported with stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ({"prompt": "x" * 60000}, 413, "larger than 52428 bytes"),
    ],
)
def test_bad_requests_get_openais_error_shape(server, body, status, message):
    got, answer, _ = post(server, "/v1/completions", body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]
    assert wait_idle(server)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_chat_requests_get_openais_error_shape(server, body, message):
    status, answer, _ = post(server, "/v1/chat/completions", body)
    assert status == 400, answer
    assert message in answer["error"]["message"]


def test_the_openapi_document_describes_every_path_and_refers_to_nothing_missing(server):
    described = json.loads(get(server, "/openapi.json"))
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"} <= set(described["paths"])
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described))
    assert "CompletionRequest" in references and set(references) <= set(described["components"]["schemas"])


def test_wrong_methods_and_types_are_refused_in_the_same_shape(server):
    status, answer, _ = post(server, "/v1/models", {})
    assert status == 405 and answer["error"]["message"] == "POST is not allowed here"
    status, answer, _ = post(server, "/v1/completions", b"prompt=x", {"Content-Type": "text/plain"})
    assert status == 415 and "expected application/json" in answer["error"]["message"]


def test_more_than_the_queue_holds_is_429_with_retry_after_and_the_rest_is_answered(server):
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(server, "/v1/completions", LONG), range(20)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4  # what the queue holds
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[2]["Retry-After"]) >= 1
    assert refused[1]["error"]["code"] == "queue_full"
    assert wait_idle(server)


def raw_request(server, body):
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_row_at_once(server, stream):
    before = metric(server, "generation_tokens_total")
    connections = [raw_request(server, {**LONG, "stream": stream}) for _ in range(4)]
    while metric(server, "generation_tokens_total") == before:
        time.sleep(0.01)
    for connection in connections:
        connection.close()
    assert wait_idle(server)
    generated = metric(server, "generation_tokens_total") - before
    assert generated < 4 * LONG["max_tokens"] * 0.9
    assert 'finished_reason="abort"' in get(server, "/metrics")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_from_the_queue_leaves_it_at_once(server, stream):
    running = [raw_request(server, {**LONG, "stream": True}) for _ in range(2)]
    while metric(server, "num_requests_running") < 2:
        time.sleep(0.01)
    queued = [raw_request(server, {**LONG, "stream": stream}) for _ in range(3)]
    while metric(server, "num_requests_waiting") < 3:
        time.sleep(0.01)
    for connection in queued:
        connection.close()
    while metric(server, "num_requests_waiting"):
        assert metric(server, "num_requests_running") == 2, "they were let through instead"
        time.sleep(0.01)
    for connection in running:
        connection.close()
    assert wait_idle(server)


def test_metrics_have_vllms_names(server, client):
    client.completions.create(model=NAME, prompt="The", max_tokens=5)
    page = get(server, "/metrics")
    for name in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "prefix_cache_queries_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
    ):
        assert re.search(rf'^vllm:{name}{{engine="0",.*model_name="{NAME}"', page, re.MULTILINE), name


def start(arguments, log_file, **env):
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "prune2serve", "serve", *arguments],
            stderr=log,
            stdout=log,
            env={**os.environ, **env},
        )


def url_of(process, log_file):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = log_file.read_text()
        if "Serving " in text:
            return text.split(" on ", 1)[1].split(" ")[0]
        time.sleep(0.1)
    raise AssertionError(log_file.read_text())


class Address:
    def __init__(self, url):
        self.url = url


def test_the_api_key_guards_v1_and_sigterm_drains_then_exits_0(tiny_model, tiny_onnx, tmp_path):
    log_file = tmp_path / "log"
    process = start(
        [str(tiny_model), "--engine", "onnxruntime", "--port", "0", "--threads", "1", "--max-model-len", "400"],
        log_file,
        PRUNE2SERVE_API_KEY=KEY,
    )
    try:
        server = Address(url_of(process, log_file))
        assert f"Serving model on {server.url} (ONNX Runtime, CPUExecutionProvider, fp32, 16 slots of 400 tokens)" in (
            log_file.read_text()
        )
        get(server, "/health")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY.encode("latin-1")}):
            status, answer, _ = post(server, "/v1/completions", b"not even json", headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        right = {"Authorization": f"Bearer {KEY}".encode()}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server, "/v1/completions", LONG, right)
            while metric(server, "num_requests_running") == 0:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            status, body, _ = answer.result(60)
        assert status == 200 and body["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_one_line_and_exit_1(tiny_model, tiny_onnx, tmp_path, server):
    port = server.url.rsplit(":", 1)[1]
    for arguments, message in (
        ([str(tmp_path / "none")], "no model directory at"),
        ([str(tiny_model), "--baseline"], "has no prune2serve.json, so no parent is known"),
        ([str(tiny_model), "--precision", "fp16"], "precision 'fp16' cannot be exported for cpu"),
        ([str(tiny_model), "--port", port], f"cannot listen on 127.0.0.1:{port}"),
        ([str(tiny_model), "--max-model-len", "99999"], "beyond the model's context of 512 tokens"),
        ([str(tiny_model), "--", "--enforce-eager"], "--enforce-eager would go to vLLM"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "prune2serve", "serve", "--engine", "onnxruntime", "--device", "cpu", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 1 and message in lines[-1] and lines[-1].startswith("Error: "), result.stderr
