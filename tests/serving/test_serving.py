"""`based serve`: answers are those of the decoder, whatever clients do."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
import uvicorn

from based_megatron.errors import ConfigError
from based_megatron.inference.engine import Engine
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.text import TextDecoder, TextRequest
from based_megatron.serving.app import build_app
from based_megatron.serving.cli import Limits, main
from based_megatron.serving.run import listening, read_token
from based_megatron.serving.worker import Worker
from support.decoding import engine_of, letters

LIMITS = Limits(queue=6, max_new_tokens=5000, max_prompt_tokens=50, max_body_bytes=4000, body_seconds=0.5)
TOKEN = "s3cret"


@dataclasses.dataclass
class Served:
    """A server in a thread."""

    port: int
    worker: Worker

    def client(self, token: str = TOKEN) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0)

    def post(self, body: bytes, **headers: str) -> tuple[int, Any]:
        """Status and decoded body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {TOKEN}", **headers})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def idle(self) -> bool:
        """Wait until nothing is decoded any more; whether that came."""
        end = time.monotonic() + 10
        while self.worker.running + self.worker.waiting and time.monotonic() < end:
            time.sleep(0.01)
        return not self.worker.running + self.worker.waiting


@pytest.fixture(autouse=True)
def quiet(caplog) -> Iterator[None]:
    """No task of the event loop is left pending."""
    yield
    assert "was destroyed" not in caplog.text


@contextlib.contextmanager
def serving(engine: Engine, limits: Limits = LIMITS) -> Iterator[Served]:
    worker = Worker(TextDecoder(engine.loop(3), letters()), limits.queue)
    with listening("127.0.0.1", 0) as bound:
        app = build_app(worker, "tiny", limits, TOKEN)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Served(bound.getsockname()[1], worker)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    from based_megatron.parallel.topology import leaving

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with leaving():
        yield engine_of()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(engine) -> dict[str, str]:
    """Greedy texts of 12 tokens, by their prompts."""
    prompts = ["hello", "x", "日本", "the world is"]
    sampling = Sampling(max_new_tokens=12, temperature=0)
    decoder = TextDecoder(engine.loop(1), letters())
    return dict(
        zip(prompts, [each.text for each in decoder.complete([TextRequest(p, sampling) for p in prompts])], strict=True)
    )


@pytest.fixture(scope="module")
def served(engine, expected) -> Iterator[Served]:
    with serving(engine) as found:
        yield found


def test_completions_are_those_of_the_decoder(served, expected):
    answer = served.client().completions.create(model="tiny", prompt=list(expected), max_tokens=12, temperature=0)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected.values()))
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    assert answer.model == "tiny" and answer.usage.prompt_tokens == sum(len(prompt.encode()) for prompt in expected)
    assert answer.usage.completion_tokens <= 48
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streams_join_to_the_same_texts(served, expected):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = served.client().completions.create(
        model="tiny", prompt=list(expected), max_tokens=12, temperature=0, **options
    )
    texts, ends, usage = [""] * 4, [None] * 4, None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == list(expected.values()) and all(ends) and usage is not None and usage.completion_tokens > 0


def test_tokens_are_prompts_too(served, expected):
    ids = [list(letters().encode(prompt)) for prompt in expected]
    for prompt, texts in ((ids[0], [expected["hello"]]), (ids, list(expected.values()))):
        answer = served.client().completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in answer.choices] == texts


def test_stop_strings_and_seeds_are_kept(served, expected):
    stop = expected["hello"][2:4]
    answer = served.client().completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0, stop=stop)
    assert answer.choices[0].text == expected["hello"].partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    drawn = [
        served.client().completions.create(model="tiny", prompt="x", seed=seed).choices[0].text for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_models_and_health_and_metrics(served):
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert served.get("/health") == (200, '{"status":"ok"}')
    assert served.get("/metrics")[0] == 401
    status, text = served.get("/metrics", Authorization=f"Bearer {TOKEN}")
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and numbers["based_slots"] == "3" and int(numbers["based_prompts_total"]) > 0


def test_another_key_is_refused(served):
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").models.list()
    assert served.get("/nothing")[0] == 401
    assert served.get("/nothing", Authorization=f"Bearer {TOKEN}")[0] == 404


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "no JSON"),
        (b"\xff", 400, "no JSON"),
        (b"[" * 3000, 400, "no JSON"),
        (b"[]", 400, "no JSON object"),
        (b"{}", 400, "prompt is None"),
        (b'{"prompt": ""}', 400, "prompt is empty"),
        (b'{"prompt": []}', 400, "neither a text"),
        (b'{"prompt": [-1]}', 400, "neither a text"),
        (b'{"prompt": [5, 9999]}', 400, "token 9999"),
        (b'{"prompt": "\\ud800"}', 400, "UTF-8"),
        (b'{"prompt": "x", "model": "gpt-4"}', 400, "'gpt-4' is not served here"),
        (b'{"prompt": "x", "n": 2}', 400, "n is 2"),
        (b'{"prompt": "x", "logprobs": 1}', 400, "logprobs is 1"),
        (b'{"prompt": "x", "messages": []}', 400, "'messages' is unknown"),
        (b'{"prompt": "x", "max_tokens": 5001}', 400, "more than the 5000"),
        (b'{"prompt": "x", "max_tokens": 1.5}', 400, "no whole number"),
        (b'{"prompt": "x", "max_tokens": 0}', 400, "--max-new-tokens is 0"),
        (b'{"prompt": "x", "temperature": 1e400}', 400, "--temperature is inf"),
        (b'{"prompt": "x", "temperature": "hot"}', 400, "no number"),
        (b'{"prompt": "x", "stream": 3}', 400, "stream is 3"),
        (b'{"prompt": "x", "stop": [3]}', 400, "stop is"),
        (b'{"prompt": "' + b"x" * 60 + b'"}', 400, "60 tokens, more than the 50"),
        (b'{"prompt": ["x", "x", "x", "x", "x", "x", "x"]}', 400, "7 texts, more than the 6"),
        (b'{"prompt": "' + b"x" * 5000 + b'"}', 413, "4000 bytes"),
    ],
)
def test_what_cannot_be_served_is_refused(served, body, status, reason):
    found, answer = served.post(body)
    assert found == status and reason in answer["error"]["message"], answer


def test_a_body_of_unknown_length_is_cut_off(served):
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 100

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    with contextlib.closing(connection), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request(
            "POST", "/v1/completions", pieces(), {"Authorization": f"Bearer {TOKEN}"}, encode_chunked=True
        )
        assert connection.getresponse().status == 413


def test_a_body_that_does_not_come_ends_the_request(served):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 50\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(head.encode())
        assert b"408" in client.recv(100)


def endless(served: Served, streams: bool) -> socket.socket:
    """A client that has asked for 5000 tokens, and does not read the answer."""
    body = json.dumps({"prompt": "x", "max_tokens": 5000, "temperature": 0, "stream": streams, "stop": ["\0"]}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    client.sendall(head.encode() + body)
    return client


def wait_for_running(served: Served, count: int) -> None:
    end = time.monotonic() + 10
    while served.worker.running < count and time.monotonic() < end:
        time.sleep(0.01)
    assert served.worker.running == count


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_slot(served, expected, streams):
    before = served.worker.counts.finished.get("cancelled", 0)
    client = endless(served, streams)
    wait_for_running(served, 1)
    client.close()
    assert served.idle()
    assert served.worker.counts.finished["cancelled"] == before + 1
    answer = served.client().completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected["hello"]


def test_a_full_queue_refuses_and_drains(served, expected):
    """3 slots and 6 places: the tenth request is refused, and others are served when clients go."""
    clients = [endless(served, True) for _ in range(3)]
    wait_for_running(served, 3)
    clients += [endless(served, True) for _ in range(6)]
    while served.worker.waiting < 6:
        time.sleep(0.01)
    status, answer = served.post(b'{"prompt": "x"}')
    assert status == 429 and "try again later" in answer["error"]["message"]
    for client in clients:
        client.close()
    assert served.idle()
    assert served.post(b'{"prompt": "x", "max_tokens": 1}')[0] == 200


def test_a_request_ends_at_its_time_with_what_it_has(engine):
    with serving(engine, dataclasses.replace(LIMITS, request_seconds=0.3)) as served:
        status, answer = served.post(b'{"prompt": "x", "max_tokens": 5000, "temperature": 0, "stop": "\\u0000"}')
        assert status == 200 and answer["choices"][0]["finish_reason"] == "timeout"
        assert answer["choices"][0]["text"] and served.idle()


def test_clients_of_a_decoder_that_fails_do_not_wait(engine, caplog):
    with serving(engine) as served:
        client = endless(served, False)
        wait_for_running(served, 1)

        def fails() -> Any:
            raise MemoryError("no room")

        served.worker.decoder.step = fails  # type: ignore[method-assign]
        assert b"500" in client.recv(1000).splitlines()[0]
        client.close()
        assert served.get("/health")[0] == 503
        assert served.post(b'{"prompt": "x"}')[0] == 503
    assert "the decoder has failed" in caplog.text and "MemoryError: no room" in caplog.text


# --- the command


def test_an_address_that_is_taken_is_one_line():
    with listening("127.0.0.1", 0) as bound, pytest.raises(ConfigError, match="cannot listen at --host"):
        listening("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff", b"a\nb"])
def test_a_token_that_is_no_word_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match="--token-file"):
        read_token(tmp_path / "token")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "0"], "--queue is 0"),
        (["--request-seconds", "0"], "--request-seconds is 0"),
        (["--slots", "-1"], "--slots is -1"),
        (["--remembered-prompts", "-1"], "--remembered-prompts is -1"),
        (["--token-file", "/nowhere"], "cannot read --token-file"),
    ],
)
def test_settings_are_checked_before_the_model_is_read(tmp_path, arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        main([str(tmp_path / "no-model"), *arguments])


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs fastapi and uvicorn.*based-megatron\[serve\]"):
        main([str(tmp_path)])
