"""The processes of a run meet: which processes are admitted, and the errors about ports, names and earlier starts."""

import contextlib
import hashlib
import hmac
import http.server
import json
import math
import os
import re
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.two_processes import ended, free_ports, start
from support.watchdogs import Stranger, wait_until

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes import joining, meeting, messages
from gpt2_flax.processes.place import Place
from gpt2_flax.processes.watchdog import Watchdog, announced

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
DOGS = []
SECRET = "correct horse battery staple"
HELLO = {"kind": "hello", "number": 1, "n_processes": 2, "host": "far", "pid": 7, "facts": {}, "nonce": "n"}


@pytest.fixture(autouse=True)
def quicker(quick, left, monkeypatch):
    monkeypatch.setattr(messages, "QUIET", 0.5)
    monkeypatch.setattr(meeting, "START", 3.0)
    monkeypatch.delenv("GPT2_FLAX_SECRET", raising=False)
    yield
    threads = [thread for thread in threading.enumerate() if thread.name in ("watchdog", "watchdog hub")]
    for dog in DOGS:
        dog._connection.close()
    DOGS.clear()
    for thread in threads:  # while `left` still records their exits
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def port():
    return free_ports()


def come(port, number, n_processes=2, attempt="", host="localhost"):
    """Join like a separate process, in a thread; return the thread and a list for its watchdog or error."""
    found = []

    def run():
        try:
            DOGS.append(Watchdog.join(Place(f"{host}:{port}", n_processes, number, attempt=attempt), {}))
            found.append(DOGS[-1])
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def result(thread, found):
    thread.join(20)
    return found[0]


class Visitor(Stranger):
    """Sends messages written by hand; it has read the greeting."""

    def __init__(self, port):
        super().__init__(f"localhost:{port}")
        self.greeting = self.wait_for("greeting")

    def say(self, message):
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def closed(self):
        """Return whether the other side closes the connection, without any message except a verdict."""
        with contextlib.suppress(EOFError):
            while True:
                assert {message["kind"] for message in messages.receive(self.socket, self.rest)} <= {"verdict"}
        return True


def proof(secret, nonce, hello):
    """Compute the proof independently of the package."""
    said = json.dumps([nonce, hello], sort_keys=True).encode()
    return hmac.new(secret.encode(), said, hashlib.sha256).hexdigest()


# The secret


class Relay:
    """Forwards two ports to two other ports, and records the bytes."""

    def __init__(self, target, ports=(0, 1)):
        self.port, self.bytes = free_ports(), b""
        for offset in ports:
            listener = socket.create_server(("localhost", self.port + offset))
            threading.Thread(target=self._accept, args=(listener, target + offset), daemon=True).start()

    def _accept(self, listener, target):
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection(("localhost", target))
            except OSError:
                near.close()
                continue
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                self.bytes += data
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


def test_a_process_with_the_secret_is_admitted_and_the_secret_is_never_sent(port, left, monkeypatch):
    monkeypatch.setenv("GPT2_FLAX_SECRET", SECRET)
    relay = Relay(port)
    processes = [come(port, 0), come(relay.port, 1)]
    dogs = [result(*process) for process in processes]
    assert len({dog.token for dog in dogs}) == 1
    said = relay.bytes.decode()
    assert '"secret": true' in said
    assert '"started"' in said
    key = SECRET.encode()
    digests = [hashlib.new(name, key).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")]
    assert not any(form in said for form in (SECRET, *SECRET.split(), key.hex(), *digests))


@pytest.mark.parametrize(
    ("of_hub", "shown", "words"),
    [
        (SECRET, None, "has no GPT2_FLAX_SECRET, process 0 has one"),
        (SECRET, "another horse, another staple", "has another GPT2_FLAX_SECRET than process 0"),
        (SECRET, "of an earlier meeting", "has another GPT2_FLAX_SECRET than process 0"),
        ("", SECRET, "has a GPT2_FLAX_SECRET, process 0 has none"),
    ],
)
def test_a_process_without_the_secret_is_dropped_and_named_and_the_run_waits(
    port, left, monkeypatch, capsys, of_hub, shown, words
):
    monkeypatch.setenv("GPT2_FLAX_SECRET", of_hub)
    process_0 = come(port, 0)
    visitor = Visitor(port)
    hello = {**HELLO, "attempt": "", "code": 0, "sentence": ""}
    if shown == "of an earlier meeting":
        hello["proof"] = proof(SECRET, "another nonce", hello)
    elif shown:
        hello["proof"] = proof(shown, visitor.greeting["nonce"], hello)
    visitor.say(hello)
    verdict = visitor.wait_for("verdict")
    assert verdict["code"] == ExitCode.USAGE
    assert verdict["what"] == f"process 1 (host far, pid 7) {words}"
    assert visitor.closed()
    assert f"warning: refused, at 127.0.0.1: process 1 (host far, pid 7) {words}\n" in capsys.readouterr().err
    assert isinstance(result(*come(port, 1)), Watchdog)
    assert isinstance(result(*process_0), Watchdog)


def test_a_proof_computed_independently_is_accepted(port, left, monkeypatch):
    monkeypatch.setenv("GPT2_FLAX_SECRET", SECRET)
    process_0, visitor = come(port, 0), Visitor(port)
    hello = {**HELLO, "attempt": "", "code": 0, "sentence": ""}
    visitor.say(hello | {"proof": proof(SECRET, visitor.greeting["nonce"], hello)})
    welcome = hmac.new(SECRET.encode(), json.dumps(["n", visitor.greeting["nonce"]]).encode(), hashlib.sha256)
    assert visitor.wait_for("welcome")["proof"] == welcome.hexdigest()
    visitor.wait_for("started")
    assert isinstance(result(*process_0), Watchdog)
    visitor.socket.close()


def test_a_process_with_another_secret_ends_and_so_does_the_run_without_it(port, monkeypatch):
    monkeypatch.setattr(meeting, "shared_secret", lambda: SECRET.encode())
    monkeypatch.setattr(joining, "shared_secret", lambda: SECRET[::-1].encode())
    processes = [come(port, 0), come(port, 1)]
    of_0, of_1 = (result(*process) for process in processes)
    assert (of_0.exit_code, of_1.exit_code) == (ExitCode.USAGE, ExitCode.USAGE)  # another start would not help
    who = rf"process 1 \(host \S+, pid {os.getpid()}\) has another GPT2_FLAX_SECRET than process 0"
    assert re.fullmatch(who, of_1.what)
    assert re.fullmatch(rf"process 1 of 2 has not come within 3 s: {who}", of_0.what)
    assert of_0.fix == of_1.fix == "give all processes the same GPT2_FLAX_SECRET"


class FakeHub:
    """Answers each connection to a port with the same messages."""

    def __init__(self, port, *answers):
        self.listener = socket.create_server(("localhost", port))
        threading.Thread(target=self._serve, args=(answers,), daemon=True).start()

    def _serve(self, answers):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                for answer in answers:
                    connection.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")
                    time.sleep(0.1)
                connection.recv(2**16)
                connection.close()


GREETING = {"kind": "greeting", "id": "i", "nonce": "n", "secret": False, "attempt": "", "name": "process 0 (host h)"}


def test_a_hub_that_does_not_know_the_secret_is_not_obeyed(port, monkeypatch):
    monkeypatch.setenv("GPT2_FLAX_SECRET", SECRET)
    started = {"kind": "started", "hub": "process 0", "token": "t"}
    FakeHub(port, GREETING, started, {"kind": "welcome", "proof": ""}, started)
    FakeHub(port + 1, GREETING)
    error = result(*come(port, 1))
    assert (error.exit_code, error.what) == (ExitCode.USAGE, "process 0 has another GPT2_FLAX_SECRET")


@pytest.mark.parametrize("number", [0, 1])
def test_a_short_secret_is_refused(port, monkeypatch, number):
    monkeypatch.setenv("GPT2_FLAX_SECRET", "password")
    error = result(*come(port, number))
    assert (error.exit_code, error.what) == (ExitCode.USAGE, "GPT2_FLAX_SECRET is shorter than 16 characters")


# Which processes are admitted

BEAT = {"kind": "beat", "phase": "step 1", "marks": 1, "waited": 1.0, "limit": 9.0}


@pytest.mark.parametrize(
    "said",
    [
        *({**HELLO, "number": number} for number in (True, 1.0, "1", None, [1], 2**63, -(2**63))),
        *({**HELLO, "n_processes": n} for n in (True, 2.0, "2", None)),
        *({**HELLO, "pid": 1.5}, {**HELLO, "host": 1}, {**HELLO, "nonce": None}, {**HELLO, "proof": 1}),
        *({**HELLO, "facts": facts} for facts in ([], "x", {"a": 1}, {"a": None}, {"a": {}})),
        *({**HELLO, "code": code} for code in (3, True, "74")),
        *({"kind": kind} for kind in ("hello", "new", "gone", "nothing", None, [], {})),
        *({"kind": "failed", "code": 74, "sentence": "s"}, {"kind": "out"}),
        *(b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b"1\n", b'"kind"\n', b"[" * 9999 + b"\n", b"1" * 9999 + b"\n"),
        *(b"x" * 70_000, b'{"kind": "hello", "number": NaN}\n'),
    ],
)
def test_a_stranger_that_sends_no_message_is_dropped_and_named(port, left, capsys, said):
    process_0, visitor = come(port, 0), Visitor(port)
    with contextlib.suppress(OSError):  # the connection may be closed before everything is sent
        visitor.say(said)
    assert visitor.closed()
    process_1 = result(*come(port, 1))
    assert isinstance(process_1, Watchdog)
    assert isinstance(result(*process_0), Watchdog)
    assert re.fullmatch(
        r"warning: a stranger at 127\.0\.0\.1, no process of this run, was dropped; it said .{1,90}\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("number", [0, 2, -1, 2**62])
def test_a_number_that_no_process_has_is_refused(port, left, capsys, number):
    process_0, visitor = come(port, 0), Visitor(port)
    visitor.say({**HELLO, "number": number})
    assert visitor.wait_for("verdict")["code"] == ExitCode.USAGE
    assert isinstance(result(*come(port, 1)), Watchdog)
    assert isinstance(result(*process_0), Watchdog)
    line = (
        f"warning: refused, at 127.0.0.1: process {number} (host far, pid 7) came to process 0, which waits for 1 to 1"
    )
    assert capsys.readouterr().err == f"{line}\n"


def test_a_port_scan_does_not_flood_the_log(port, left, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "MOST_STRANGERS", 20)
    process_0 = come(port, 0)
    visitors = [Visitor(port) for _ in range(30)]  # more open connections than are allowed
    for number in range(100):
        visitor = Visitor(port)
        visitor.say(f"{number}\r\n".encode())
        assert visitor.closed()
        visitor.socket.close()
    assert isinstance(result(*come(port, 1)), Watchdog)
    assert isinstance(result(*process_0), Watchdog)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "it said '99'" not in "".join(lines)
    assert lines[-1].startswith("warning: strangers were dropped (")
    more = re.findall(r"\((\d+) more since the last such line\)", "\n".join(lines))
    assert sum(map(int, more)) >= 105  # 100 and at least 10 open connections, less 5 lines
    for visitor in visitors:
        visitor.socket.close()


def test_a_silent_visitor_is_dropped(port, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "HELLO", 0.3)
    process_0, visitor = come(port, 0), Visitor(port)
    assert visitor.closed()
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or "it said nothing" in "".join(said))
    assert result(*process_0).exit_code == ExitCode.TRY_AGAIN


@pytest.mark.parametrize(
    "said",
    [
        *(BEAT | {"marks": marks} for marks in (True, 1.5, "1", None, 2**64)),
        *(BEAT | {"phase": phase} for phase in (0, None, ["step 1"])),
        *(BEAT | {"waited": waited} for waited in ("no", False, math.nan)),
        *(BEAT | {"limit": limit} for limit in (math.nan, True, "9", -math.inf)),
        *({"kind": "failed", "code": code, "sentence": "s"} for code in (3, 75.0, True, None)),
        *({"kind": "failed", "code": 74, "sentence": 1}, {"kind": "failed", "code": 74}),
        *({"kind": "facts", "facts": facts, "patience": 1.0} for facts in ([], None, {"a": []})),
        *({"kind": "facts", "facts": {}, "patience": "long"}, {"kind": "facts"}, {"kind": "new"}, b"[]\n"),
    ],
)
def test_a_member_that_sends_nonsense_ends_the_run_but_no_thread_crashes(port, left, said):
    process_0, visitor = come(port, 0), Visitor(port)
    visitor.say(HELLO)
    visitor.wait_for("started")
    visitor.say(said)
    wait_until(lambda: left)
    assert left[0][0] == ExitCode.TRY_AGAIN
    assert left[0][1].startswith("process 1 (host far, pid 7) of the run said what no process of a run says: '")
    assert result(*process_0)
    visitor.socket.close()


@pytest.mark.parametrize("said", [{"kind": "verdict", "number": 1, "code": 3, "what": "", "fix": ""}, b"[]\n", {}])
def test_a_hub_that_sends_nonsense_counts_as_gone(port, left, said):
    started = {"kind": "started", "hub": "process 0 (host h)", "token": "t"}
    FakeHub(port, GREETING, started, said)
    FakeHub(port + 1, GREETING)
    result(*come(port, 1))
    wait_until(lambda: left)
    assert left[1][0] == ExitCode.TRY_AGAIN
    assert left[1][1].startswith("process 0 (host h) of the run has ended")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_received_message_has_all_fields_of_its_kind(data):
    kind = data.draw(st.sampled_from(sorted(messages.FIELDS)))
    said = {"kind": kind} | {name: data.draw(VALUES) for name in messages.FIELDS[kind] if data.draw(st.booleans())}
    said |= data.draw(st.dictionaries(st.text(max_size=5), VALUES, max_size=2))
    one, other = socket.socketpair()
    with one, other:
        one.sendall(json.dumps(said).encode() + b"\n" + data.draw(st.binary(max_size=20)))
        try:
            received = messages.receive(other, bytearray())
        except EOFError:
            return
    for message in received:
        for name, wanted in messages.FIELDS[message["kind"]].items():
            assert type(message[name]) is (wanted if isinstance(wanted, type) else type(wanted)) or (
                float in (wanted, type(wanted)) and type(message[name]) is int
            )


# The two ports


def test_the_second_port_is_free_for_jax_after_the_start(port, left):
    processes = [come(port, 0), come(port, 1)]
    assert all(isinstance(result(*process), Watchdog) for process in processes)
    socket.create_server(("", port + 1)).close()


def test_a_firewall_that_opens_one_port_only_ends_all_at_once(port, monkeypatch):
    monkeypatch.setattr(meeting, "START", 60.0)
    relay = Relay(port, ports=(0,))
    processes = [come(port, 0), come(relay.port, 1)]
    begun = time.monotonic()
    of_0, of_1 = (result(*process) for process in processes)
    assert time.monotonic() - begun < 15
    second = relay.port + 1
    assert (of_0.exit_code, of_1.exit_code) == (ExitCode.USAGE, ExitCode.USAGE)
    assert of_1.what == f"port {second} of process 0 cannot be reached, port {relay.port} can (Connection refused)"
    assert of_1.where == f"localhost:{second}"
    assert of_0.fix == f"it says: {of_1}"


def test_a_second_port_that_leads_elsewhere(port):
    FakeHub(port, GREETING)
    FakeHub(port + 1, GREETING | {"id": "another"})
    error = result(*come(port, 1))
    assert error.exit_code == ExitCode.USAGE
    assert "(process 0 (host h) of another start answers)" in error.what


class _Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *arguments):
        pass


GRPC = b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x04\x00@\x00\x00\x00\x05\x00@\x00\x00"  # sent by JAX's coordinator


@pytest.fixture
def occupied(port):
    """Return a function that starts a program of a given kind on a port."""
    closing = []

    def occupy(port, by):
        if by == "a web server":
            server = http.server.ThreadingHTTPServer(("localhost", port), _Web)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            closing.append(server.shutdown)
            closing.append(server.server_close)
        else:
            answers = {"JAX": [GRPC], "a hub": [GREETING], "ssh": [b"SSH-2.0-OpenSSH_9.6\r\n"], "silence": []}[by]
            closing.append(FakeHub(port, *answers).listener.close)

    yield occupy
    for close in closing:
        close()


@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize(
    ("by", "code", "words"),
    [
        ("a web server", ExitCode.USAGE, r"a web server \(it says 'HTTP/1\.1 404 Not Found'\) has"),
        ("ssh", ExitCode.USAGE, r"another program \(it says 'SSH-2\.0-OpenSSH_9\.6'\) has"),
        ("silence", ExitCode.USAGE, r"another program \(it says nothing\) has"),
        ("JAX", ExitCode.TRY_AGAIN, "the coordinator of another JAX program has"),
        ("a hub", ExitCode.TRY_AGAIN, r"process 0 \(host h\) of another start has"),
    ],
)
def test_a_port_that_process_0_cannot_have(port, occupied, second, by, code, words):
    occupied(port + second, by)
    error = result(*come(port, 0))
    whose = ["its own", "that of JAX's coordinator"][second]
    assert re.fullmatch(f"process 0 cannot listen on port {port + second}, {whose}: {words} it", error.what)
    assert error.exit_code == code
    socket.create_server(("", port + 1 - second)).close()  # the other port is free again


@pytest.mark.parametrize(
    ("by", "code", "words"),
    [
        ("a web server", ExitCode.USAGE, r"a web server \(it says .*HTTP/1\.\d 404.*\) has the port of process 0"),
        ("ssh", ExitCode.USAGE, r"another program \(it says 'SSH-2\.0.*\) has the port of process 0"),
        ("JAX", ExitCode.TRY_AGAIN, "the coordinator of another JAX program has the port of process 0"),
        ("silence", ExitCode.TRY_AGAIN, r"another program \(it says nothing\) has the port of process 0"),
    ],
)
def test_something_else_answers_in_place_of_process_0(port, occupied, by, code, words):
    occupied(port, by)
    begun = time.monotonic()
    error = result(*come(port, 1))
    assert re.fullmatch(words, error.what)
    assert (error.exit_code, error.where) == (code, f"localhost:{port}")
    assert (time.monotonic() - begun < 2.5) == (
        code == ExitCode.USAGE
    )  # with other codes the process waits, because the program may end soon


# Names


@pytest.mark.parametrize(
    ("errno", "kubernetes", "code"),
    [
        (socket.EAI_NONAME, False, ExitCode.USAGE),
        (socket.EAI_NONAME, True, ExitCode.TRY_AGAIN),  # Kubernetes creates the name with its host
        (socket.EAI_AGAIN, False, ExitCode.TRY_AGAIN),
    ],
)
def test_a_name_that_does_not_resolve(port, monkeypatch, capsys, errno, kubernetes, code):
    monkeypatch.setattr(meeting, "START", 0.5)
    if kubernetes:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")

    def fail(*arguments, **keys):
        raise socket.gaierror(errno, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    error = result(*come(port, 1, host="host0"))
    assert error.what == "the host name of process 0 does not resolve (Name or service not known)"
    assert (error.exit_code, error.where) == (code, f"host0:{port}")
    assert f"waiting for process 0: {error.what}: host0:{port}\n" in capsys.readouterr().out


def test_a_loopback_name_as_the_address_of_process_0_gets_a_hint(port, monkeypatch):
    monkeypatch.setattr(meeting, "START", 0.3)
    error = result(*come(port, 1))
    assert (error.exit_code, error.where) == (ExitCode.TRY_AGAIN, f"localhost:{port}")
    assert error.what == "process 0 cannot be reached within 0 s (Connection refused)"
    assert "its address (localhost is the own host of each process)" in error.fix


def test_the_address_of_process_0_does_not_resolve(port, monkeypatch, capsys):
    error = result(*come(port, 0, host="no-such-host.invalid"))
    assert error.exit_code == ExitCode.USAGE
    assert re.search(r"has not come within 3 s: its address no-such-host\.invalid does not lead there \(", error.what)
    assert socket.gethostname() in error.fix
    said = capsys.readouterr().out
    assert f"process 0 runs on {socket.gethostname()}, but its address no-such-host.invalid does not lead there" in said


def test_the_address_of_process_0_leads_to_another_process_0(port, monkeypatch):
    elsewhere = free_ports()
    FakeHub(elsewhere, GREETING)
    connect = socket.create_connection
    monkeypatch.setattr(
        meeting.socket, "create_connection", lambda address, **keys: connect(("localhost", elsewhere), **keys)
    )
    error = result(*come(port, 0, host="host0"))
    assert error.exit_code == ExitCode.USAGE
    assert "its address host0 leads to 127.0.0.1, where process 0 (host h) of another start" in error.what


# Earlier starts


def test_a_process_of_an_earlier_start_is_dropped_and_named(port, left, capsys):
    processes = [come(port, 0, 3, "7.0.1"), come(port, 1, 3, "7.0.0"), come(port, 1, 3, "7.0.1")]
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or "belongs to attempt" in "".join(said))
    time.sleep(0.5)  # it connects again, and is not logged again
    processes.append(come(port, 2, 3))  # a process without an attempt is admitted
    of_0, stale, *others = (result(*process) for process in processes)
    assert all(isinstance(dog, Watchdog) for dog in (of_0, *others))
    words = r"process 1 \(host \S+, pid \d+\) belongs to attempt 7\.0\.0, process 0 to attempt 7\.0\.1"
    assert len(re.findall(words, "".join(said) + capsys.readouterr().err)) == 1  # logged once
    assert stale.exit_code == ExitCode.TRY_AGAIN


def test_a_process_waits_until_the_hub_of_an_earlier_start_is_gone(port, left):
    stale = FakeHub(port, GREETING | {"attempt": "1"})
    process_1 = come(port, 1, attempt="2")
    time.sleep(0.5)
    stale.listener.shutdown(socket.SHUT_RDWR)
    stale.listener.close()
    assert isinstance(result(*come(port, 0, attempt="2")), Watchdog)
    assert isinstance(result(*process_1), Watchdog)


def test_the_hub_of_an_earlier_start_that_stays(port):
    FakeHub(port, GREETING | {"attempt": "1"})
    error = result(*come(port, 1, attempt="2"))
    assert error.exit_code == ExitCode.TRY_AGAIN
    assert error.what == "process 0 (host h) belongs to attempt 1, this process to attempt 2"


# Processes that fail before or while they join


@pytest.mark.parametrize("number", [0, 1])
def test_a_failure_before_joining_reaches_all_processes(port, monkeypatch, number):
    monkeypatch.setattr(meeting, "START", 60.0)
    monkeypatch.setattr(meeting, "LINGER", 20.0)
    others = [come(port, other, 3) for other in {0, 1, 2} - {number}]
    begun, failure = time.monotonic(), UserError(ExitCode.NO_INPUT, "no driver", "host0", "install one")
    with pytest.raises(UserError, match="no driver"), announced(Place(f"localhost:{port}", 3, number)):
        raise failure
    for other in others:
        error = result(*other)
        assert error.exit_code == ExitCode.NO_INPUT
        assert re.fullmatch(rf"process {number} \(host \S+, pid \d+\) of the run has failed", error.what)
        assert error.fix == "it says: no driver: host0; install one"
    assert time.monotonic() - begun < 15


def test_a_process_that_comes_after_a_failure_gets_the_same_error(port, monkeypatch):
    monkeypatch.setattr(meeting, "START", 60.0)
    monkeypatch.setattr(meeting, "LINGER", 20.0)
    process_0, visitor = come(port, 0, 3), Visitor(port)
    visitor.say({**HELLO, "n_processes": 3, "code": 71, "sentence": "out of memory"})
    visitor.wait_for("verdict")
    errors = [result(*come(port, 2, 3)), result(*process_0)]
    assert {error.exit_code for error in errors} == {ExitCode.OUT_OF_MEMORY}


def test_a_run_of_one_process_announces_nothing():
    with pytest.raises(ZeroDivisionError), announced(None):
        1 / 0  # noqa: B018


# Real processes


@pytest.mark.multiprocess
def test_a_broken_installation_of_one_host_ends_all(config, tmp_path):
    broken = "import sys; sys.modules['optax'] = None"
    codes, _, errors = ended(start(config, tmp_path, before=("", broken)))
    assert codes == [ExitCode.BUG] * 2, errors
    assert "process 1 (host " in errors[0]
    assert "of the run has failed" in errors[0]
    assert "optax" in errors[0]


@pytest.mark.multiprocess
def test_a_signal_while_they_meet_ends_all(config, tmp_path):
    killed = """
import os, threading
from gpt2_flax.processes import joining
cleaned_up = joining.cleaned_up
def met(goodbye):
    threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()
    return cleaned_up(goodbye)
joining.cleaned_up = met
"""
    hurry = "import gpt2_flax.processes.meeting as meeting; meeting.LINGER = 1.0"
    codes, _, errors = ended(start(config, tmp_path, "--num-processes", "3", before=(hurry, killed)))
    assert codes == [ExitCode.TRY_AGAIN] * 2, errors
    assert "error: process 1 (host " in errors[0]
    assert "of the run has failed" in errors[0]
    assert "it says: it was asked to end before all processes had come" in errors[0]
    assert errors[1].startswith("error: interrupted: gpt2-flax train, by SIGTERM; ")
