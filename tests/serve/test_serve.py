"""The server: OpenAI's completions, the limits that keep one client from hurting others, and the end of it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support.browser import browser

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.source import Source, save_as_run
from gpt2_flax.checkpoint.weights import weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.inference.generate import Generator, Sampling
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from gpt2_flax.serve.api import About
from gpt2_flax.serve.completion import Limits, StopStrings
from gpt2_flax.serve.server import listen, make_server

ROOT = Path(__file__).parents[2]
LIMITS = Limits(max_tokens=40, max_concurrent=2, body_bytes=4000, body_seconds=0.5, texts=6, closing_seconds=0.5)
POST = "/v1/completions"


@pytest.fixture(scope="module")
def source(tokenizer_folder):
    """A tiny model that says something else at each step."""
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": vocab_size, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, **dropouts, initializer_range=0.6, dtype="float32")
    model = jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(1)))()
    weights = {path: np.asarray(value) for path, value in weights_of(model).items()}
    return Source("a test", config, weights, tokenizer_folder)


@pytest.fixture(scope="module")
def generator(source):
    return Generator(source)


@contextlib.contextmanager
def serving(generator, limits=LIMITS):
    """The port of a server in a thread, and the server."""
    with listen("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        port = listener.getsockname()[1]
        server = make_server(generator, About("tiny", 1234, generator.decoder.cfg.n_positions, 7, 0), listener, limits)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield port, server
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(generator):
    with serving(generator) as (port, _):
        yield port


def call(port, method, path, fields=None, body=None, timeout=60, **headers):
    """Status, headers and body of an answer, which is parsed when it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        body = json.dumps(fields) if body is None and fields is not None else body
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        content = answer.read().decode()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content


def texts(port, **fields):
    status, _, answer = call(port, "POST", POST, fields)
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def events(content):
    lines = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(parts):
    return "".join(part["choices"][0]["text"] for part in parts)


# What is answered.


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["这是很久", ""])
def test_a_text_is_the_one_that_the_generator_makes(port, generator, prompt):
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2)
    fields = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 12}
    (expected,) = generator.texts([prompt], 12, sampling, seed=5)
    assert texts(port, prompt=prompt, seed=5, echo=True, **fields) == [expected]
    assert texts(port, prompt=prompt, seed=5, **fields) == [expected.removeprefix(prompt)]


@pytest.mark.slow
def test_samples_of_several_prompts_follow_each_other(port):
    fields = {"max_tokens": 6, "echo": True}
    together = texts(port, prompt=["这是", "我们"], n=2, seed=3, **fields)
    alone = [
        texts(port, prompt=prompt, seed=3 + i, **fields)[0] for i, prompt in enumerate(["这是"] * 2 + ["我们"] * 2)
    ]
    assert together == alone
    assert len(set(together)) == 4


@pytest.mark.slow
def test_without_a_seed_texts_differ(port):
    assert len({texts(port, prompt="这", max_tokens=20)[0] for _ in range(3)}) > 1


@pytest.mark.slow
def test_a_stream_is_the_text_in_pieces(port):
    fields = {"prompt": ["这是", "我们"], "n": 2, "max_tokens": 8, "seed": 1, "echo": True}
    status, headers, content = call(
        port, "POST", POST, fields | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    *parts, last = events(content)
    pieces, reasons = [""] * 4, [[] for _ in range(4)]
    for (choice,) in (part["choices"] for part in parts):
        pieces[choice["index"]] += choice["text"]
        reasons[choice["index"]].append(choice["finish_reason"])
    whole = call(port, "POST", POST, fields)[2]
    assert pieces == [choice["text"] for choice in whole["choices"]]
    assert [row[-1] for row in reasons] == [choice["finish_reason"] for choice in whole["choices"]]
    assert not any(reason for row in reasons for reason in row[:-1])
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == 6  # [CLS] and two characters, twice
    assert len(parts) > 8


@pytest.mark.slow
def test_a_text_ends_before_a_stop_string(port):
    fields = {"prompt": "这是很久", "max_tokens": 20, "seed": 2}
    (text,) = texts(port, **fields)
    stop = text[5:7]
    answer = call(port, "POST", POST, fields | {"stop": ["never", stop]})[2]["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")


@pytest.mark.slow
def test_why_a_text_has_ended_is_said(source, generator):
    after = generator.texts(["这"], 31, Sampling(temperature=0.0), 0)[0].removeprefix("这")
    with serving(generator) as (port, _):
        short = call(port, "POST", POST, {"prompt": "这", "temperature": 0, "max_tokens": 2})[2]
        assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 2)
        full = call(port, "POST", POST, {"prompt": "这", "temperature": 0, "max_tokens": 40})[2]
        assert full["choices"][0]["text"] == after  # cut at n_positions
        assert full["usage"]["total_tokens"] <= 32


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_comes(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    stop, shown = StopStrings(tuple(stops)), ""
    for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += stop.feed(text[first:last])
        if stop.found:
            break
    ends = [text.index(one) for one in stops if one in text]
    # What comes first as text grows: of stop strings that overlap, the one that is complete first.
    first = min((text.index(one) + len(one) for one in stops if one in text), default=None)
    if first is None:
        assert shown + stop.held == text
    else:
        assert stop.found
        assert text.startswith(shown)
        assert min(ends) <= len(shown) < first


def test_the_model_is_described(port):
    card = call(port, "GET", "/v1/models")[2]["data"][0]
    assert (card["id"], card["parameters"], card["n_positions"], card["step"]) == ("tiny", 1234, 32, 7)
    assert call(port, "GET", "/v1/models/tiny")[2] == card
    assert call(port, "GET", "/healthz")[::2] == (200, {"status": "ok"})


@pytest.mark.slow
def test_the_limits_of_a_model_are_those_of_the_errors(port):
    card = call(port, "GET", "/v1/models")[2]["data"][0]
    assert (card["max_tokens"], card["max_prompt_tokens"], card["max_texts"], card["max_stop_strings"]) == (
        40,
        30,
        6,
        16,
    )
    held = {
        "max_tokens": lambda n: {"max_tokens": n},
        "max_prompt_tokens": lambda n: {"prompt": "好" * n},
        "max_texts": lambda n: {"n": n},
        "max_stop_strings": lambda n: {"stop": [f"never {i}" for i in range(n)]},
    }
    for name, fields in held.items():
        asked = {"prompt": "好", "max_tokens": 1, "seed": 1}
        assert call(port, "POST", POST, asked | fields(card[name]))[0] == 200, name
        status, _, answer = call(port, "POST", POST, asked | fields(card[name] + 1))
        assert status == (413 if name == "max_prompt_tokens" else 400), name
        assert re.search(rf"\b{card[name]}\b", answer["error"]["message"]), name


def test_a_text_ends_before_the_first_of_many_stop_strings(port):
    fields = {"prompt": "这是很久", "max_tokens": 20, "seed": 2}
    (text,) = texts(port, **fields)
    assert texts(port, **fields, stop=[*(f"never {i}" for i in range(15)), text[6:8]]) == [
        text[: text.index(text[6:8])]
    ]


def test_the_page_loads_nothing_from_elsewhere(port):
    status, headers, page = call(port, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    for path in re.findall(r'(?:src|href)="([^"]+)"', page):
        if path != "data:,":
            status, _, more = call(port, "GET", f"/{path}")
            assert status == 200
            page += more
    assert not re.search(r"//[a-z0-9]+\.|@import|url\(|innerHTML", page)


def test_the_official_client_is_content(port):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    fields = {"model": "tiny", "prompt": "这是", "max_tokens": 8, "seed": 4}
    whole = client.completions.create(**fields)
    assert (
        "".join(part.choices[0].text for part in client.completions.create(stream=True, **fields))
        == whole.choices[0].text
    )
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(temperature=5, **fields)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**fields | {"model": "gpt-4"})


# What is refused.


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[1, 2]]}, 400, "prompt"),
        ({"prompt": "好", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "好", "max_tokens": 41}, 400, "max_tokens"),
        ({"prompt": "好", "max_tokens": "5"}, 400, "max_tokens"),
        ({"prompt": "好", "max_tokens": 10**30}, 400, "max_tokens"),
        ({"prompt": "好", "temperature": -1}, 400, "temperature"),
        ({"prompt": "好", "temperature": True}, 400, "temperature"),
        ({"prompt": "好", "top_p": 1.5}, 400, "top_p"),
        ({"prompt": "好", "top_k": -1}, 400, "top_k"),
        ({"prompt": "好", "repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"prompt": "好", "n": 7}, 400, "n"),
        ({"prompt": ["好"] * 7}, 400, "prompt"),
        ({"prompt": "好", "seed": -1}, 400, "seed"),
        ({"prompt": "好", "stop": ""}, 400, "stop"),
        ({"prompt": "好", "stop": ["a", "b" * 101]}, 400, "stop"),
        ({"prompt": "好", "stop": ["a"] * 17}, 400, "stop"),
        ({"prompt": "好", "stop": {"a": 1}}, 400, "stop"),
        ({"prompt": "好", "stop": ["a", 1]}, 400, "stop"),
        ({"prompt": "好", "stream_options": {"usage": True}}, 400, "stream_options.usage"),
        ({"prompt": "好", "stream": "yes"}, 400, "stream"),
        ({"prompt": "好", "best_of": 2}, 400, "best_of"),
        ({"prompt": "好", "logprobs": 1}, 400, "logprobs"),
        ({"prompt": "好", "temprature": 1}, 400, "temprature"),
        ({"prompt": "好", "model": "gpt-4"}, 404, "model"),
        ({"prompt": "好" * 31}, 413, "prompt"),
        ({"prompt": ["好", "好" * 31], "stream": True}, 413, "prompt"),
        ({"prompt": "a" * 5000}, 413, None),
    ],
)
def test_a_field_that_is_wrong_is_named(port, fields, status, param):
    got, _, answer = call(port, "POST", POST, fields)
    assert (got, answer["error"]["param"]) == (status, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    if param:
        assert answer["error"]["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body", ["", "[", "[]", '"a"', "[" * 3000, '{"prompt": NaN}', '{"prompt": "\\ud800"}', b"\xff\xfe"]
)
def test_a_body_that_is_no_json_is_refused(port, body):
    status, _, answer = call(port, "POST", POST, body=body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_null_is_the_default(port):
    fields = dict.fromkeys(("max_tokens", "temperature", "n", "stop", "logprobs", "stream"))
    assert texts(port, prompt="好", seed=1, **fields) == texts(port, prompt="好", seed=1, max_tokens=16)


def test_other_paths_methods_types_and_hosts_are_refused_in_the_same_form(port):
    answers = [
        (call(port, "GET", "/nothing"), 404),
        (call(port, "GET", POST), 405),
        (call(port, "GET", "/v1/models/other"), 404),
        (call(port, "POST", POST, {"prompt": "好"}, **{"Content-Type": "text/plain"}), 415),
        (call(port, "GET", "/", Host="attacker.example"), 403),
    ]
    for (status, _, answer), expected in answers:
        assert status == expected
        assert answer["error"]["message"]
    assert call(port, "GET", "/healthz", Host="localhost:9")[0] == 200


def test_a_body_that_does_not_come_is_given_up(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


# The queue, with a generator that waits for the test.


class Gated:
    """A stand-in for `Generator` that makes one token for each `allow(1)`; the tokens that were made are counted."""

    def __init__(self, tokenizer_folder):
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.decoder = SimpleNamespace(cfg=SimpleNamespace(n_positions=10**6))
        self.made, self.running, self.most_running, self.prompts = 0, 0, 0, []
        self._gate = threading.Semaphore(0)

    def allow(self, n):
        self._gate.release(n)

    def new_ids(self, prompt, max_new_tokens, sampling, seed):
        (ids,) = self.tokenizer.encode_batch(["好"])
        self.prompts.append(prompt)
        for _ in range(max_new_tokens):
            self.running += 1
            self.most_running = max(self.running, self.most_running)
            self._gate.acquire(timeout=10)
            self.running -= 1
            self.made += 1
            yield int(ids[0])


@pytest.fixture
def gated(tokenizer_folder):
    generator = Gated(tokenizer_folder)
    yield generator
    generator.allow(10**5)


@contextlib.contextmanager
def asking(port, **fields):
    """A client that has sent its request and reads nothing yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", POST, json.dumps({"prompt": "好"} | fields), {"Content-Type": "application/json"})
        yield connection


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_more_requests_than_places_are_turned_away_and_others_wait(gated):
    with serving(gated) as (port, server), asking(port, max_tokens=3) as first:
        until(lambda: gated.running)
        with asking(port, max_tokens=2, stream=True) as second:
            until(lambda: server.queue.n_requests == 2)
            status, headers, answer = call(port, "POST", POST, {"prompt": "好"})
            assert (status, headers["Retry-After"], answer["error"]["type"]) == (429, "2", "rate_limit_error")
            assert call(port, "GET", "/healthz")[0] == 200
            gated.allow(5)
            assert json.loads(first.getresponse().read())["choices"][0]["text"] == "好好好"
            assert (
                "".join(part["choices"][0]["text"] for part in events(second.getresponse().read().decode())) == "好好"
            )
        gated.allow(1)
        assert call(port, "POST", POST, {"prompt": "好", "max_tokens": 1})[0] == 200
    assert gated.most_running == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(gated, stream):
    with serving(gated) as (port, server):
        with asking(port, max_tokens=40, stream=stream) as connection:
            gated.allow(2)
            until(lambda: gated.made == 2)
            if stream:
                assert connection.getresponse().readline().startswith(b"data: ")
        until(lambda: server.queue.n_requests == 0)
        gated.allow(10**4)
        assert call(port, "POST", POST, {"prompt": "好", "max_tokens": 1})[0] == 200
    assert gated.made <= 4  # those two, the one under way, and that of the last request


def test_a_client_that_goes_away_leaves_the_queue(gated):
    with serving(gated) as (port, server), asking(port, max_tokens=2) as first:
        until(lambda: gated.running)
        with asking(port, max_tokens=40):
            until(lambda: server.queue.n_requests == 2)
        until(lambda: server.queue.n_requests == 1)
        gated.allow(10**4)
        assert first.getresponse().status == 200
    assert gated.made == 2


@pytest.mark.slow
def test_a_client_that_does_not_read_holds_nobody_up(gated):
    limits = Limits(max_tokens=1000, max_concurrent=1, texts=4)
    gated.allow(10**6)
    with serving(gated, limits) as (port, server), asking(port, max_tokens=1000, n=4, stream=True):
        until(lambda: gated.made == 4000)  # 250 bytes each: much more than the buffers on the way take
        until(lambda: server.queue.n_requests == 0)
        assert call(port, "POST", POST, {"prompt": "好", "max_tokens": 1})[0] == 200


def test_at_the_end_those_who_wait_are_told_and_what_runs_is_cut(gated):
    with serving(gated) as (port, server), asking(port, max_tokens=40, stream=True) as first:
        gated.allow(2)
        until(lambda: gated.made == 2)
        with asking(port) as second:
            until(lambda: server.queue.n_requests == 2)
            server.should_exit = True
            time.sleep(LIMITS.closing_seconds + 0.5)
            gated.allow(1)
            last = first.getresponse().read().decode().split("\n\n")[-2]
            answer = second.getresponse()
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
            assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    with pytest.raises(OSError, match="refused"):
        call(port, "GET", "/healthz")


# The command.


@contextlib.contextmanager
def served(folder, *options):
    """A process of the command, and the port it says."""
    command = [sys.executable, "-m", "gpt2_flax", "serve", str(folder), "--port", "0", *options]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process, int(re.search(r":(\d+)/", process.stdout.readline())[1])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def run_folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_as_run(source, folder)
    return folder


def test_too_little_memory_is_an_answer_and_the_server_goes_on(generator, monkeypatch, capfd):
    with serving(generator) as (port, _), monkeypatch.context() as patch:
        patch.setattr(generator, "new_ids", lambda *arguments: np.zeros(2**46))
        status, _, answer = call(port, "POST", POST, {"prompt": "这"})
        assert (status, answer["error"]["code"]) == (500, "out_of_memory")
        assert answer["error"]["message"].startswith("out of memory (512 TiB asked, this machine has ")
        patch.undo()
        assert texts(port, prompt="这", max_tokens=2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_streams_turns_away_and_ends_with_0(run_folder, generator, number):
    with served(run_folder, "--max-concurrent", "1") as (process, port):
        answers = []
        fields = {"prompt": "这是", "max_tokens": 25, "seed": 1, "stream": True}
        clients = [threading.Thread(target=lambda: answers.append(call(port, "POST", POST, fields))) for _ in range(3)]
        for client in clients:  # the first compiles for a while
            client.start()
        for client in clients:
            client.join()
        assert sorted(status for status, *_ in answers) == [200, 429, 429]
        (content,) = (content for status, _, content in answers if status == 200)
        (expected,) = generator.texts(["这是"], 25, Sampling(), 1)
        assert "这是" + joined(events(content)) == expected
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_second_signal_cuts_off_what_is_under_way(run_folder):
    with served(run_folder, "--max-tokens", "31") as (process, port):
        with asking(port, prompt=["这是"] * 16, max_tokens=31, stream=True, top_k=1) as client:
            assert client.getresponse().readline().startswith(b"data: ")
            process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_beyond_this_machine_there_is_a_warning_and_any_host_name(run_folder):
    with served(run_folder, "--host", "0.0.0.0") as (process, port):
        assert call(port, "GET", "/healthz", Host="box.example")[0] == 200
        process.terminate()
        assert process.communicate(timeout=30)[1].startswith("warning: whoever reaches this machine ")
        assert process.returncode == 0


def test_a_port_in_use_is_one_sentence(run_folder, capsys):
    with listen("127.0.0.1", 0) as other, pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(run_folder), "--port", str(other.getsockname()[1])])
    assert ended.value.code == 73
    assert re.fullmatch(r"error: port in use: 127\.0\.0\.1:\d+; give another with --port\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("host", "code", "what"),
    [("192.0.2.1", 73, "not an address of this machine"), ("no such host", 64, "host not known")],
)
def test_a_host_that_is_not_here_is_one_sentence(run_folder, capsys, host, code, what):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(run_folder), "--port", "0", "--host", host])
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(f"error: {what}: {host}")


def test_without_the_extra_it_says_what_to_install(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(run_folder)])
    assert ended.value.code == 64
    assert "needs starlette" in (error := capsys.readouterr().err)
    assert "pip install 'gpt2_flax[serve]'" in error


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (["a"] * 17, "stop: 17 strings, this server allows 16"),
        ("", "stop: each string must have 1 to 100 characters"),
        (["a", "b" * 101], "stop: each string must have 1 to 100 characters"),
        (5, "stop: a string or a list of strings, please"),
    ],
)
def test_what_is_wrong_with_stop_strings_is_said(port, stop, said):
    assert call(port, "POST", POST, {"prompt": "好", "stop": stop})[2]["error"]["message"] == said


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["NOSUCH", "NOSUCH/checkpoints/3", "empty"])
@pytest.mark.parametrize(
    "command",
    [
        ("serve", "MODEL"),
        ("generate", "MODEL"),  # without a prompt, too
        ("evaluate", "MODEL", "--data", "nowhere"),
        ("export", "MODEL", "out"),
        ("import", "MODEL", "out", "--tokenizer", "nowhere"),
        ("convert", "MODEL", "out", "--format", "uer"),
    ],
)
def test_a_model_that_is_not_there_is_seen_before_anything_else(command, name, tmp_path):
    (tmp_path / "empty").mkdir()
    code = """
import sys
for name in ("jax", "torch", "starlette", "uvicorn"):
    sys.modules[name] = None  # an import of it is an error
from gpt2_flax.__main__ import main
main(sys.argv[1:])
"""
    arguments = [name if one == "MODEL" else one for one in command]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 66, done.stderr
    assert done.stderr.startswith(f"error: no model found: {name}; give a run")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


# The page, where there is a Chromium and its driver.


@pytest.mark.parametrize(
    ("language", "generate", "stop", "is_busy"),
    [("en-US", "Generate", "Stop", "The server is busy."), ("zh-CN", "生成", "停止", "服务器正忙")],
)
def test_the_page_streams_stops_and_says_what_is_wrong(gated, tmp_path, language, generate, stop, is_busy):
    limits = Limits(max_tokens=40, max_concurrent=1)
    with serving(gated, limits) as (port, server), browser(language, tmp_path) as page:

        def see(name):
            return page.find_element("id", name).text

        page.get(f"http://127.0.0.1:{port}/")
        until(lambda: see("name") == "tiny")
        assert "1,234" in see("facts")
        assert see("generate") == generate
        page.find_element("id", "generate").click()
        until(lambda: gated.running)
        assert gated.prompts == [[gated.tokenizer.bos_id]]  # not the placeholder of the box
        page.find_element("id", "generate").click()
        gated.allow(1)
        until(lambda: server.queue.n_requests == 0)
        page.find_element("id", "prompt").send_keys("这是")
        page.find_element("id", "generate").click()
        until(lambda: gated.running)
        gated.allow(3)
        until(lambda: see("output") == "这是好好好")
        assert see("generate") == stop
        page.find_element("id", "generate").click()
        until(lambda: server.queue.n_requests == 0)
        gated.allow(1)
        assert (see("generate"), see("output")) == (generate, "这是好好好")

        with asking(port):
            until(lambda: server.queue.n_requests == 1)
            page.find_element("id", "generate").click()
            until(lambda: see("problem").startswith(is_busy))
        page.find_element("id", "language").click()
        assert see("generate") == {"Generate": "生成", "生成": "Generate"}[generate]
        assert all(element.text for element in page.find_elements("css selector", "button, h1, h2, label"))
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        problems = [line["message"] for line in page.get_log("browser") if "429" not in line["message"]]
        assert problems == []
