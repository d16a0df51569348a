"""Messages between the processes of a run and the hub. Each process, also process 0, has one TCP connection to the hub.

A message is a JSON object on one line. Its field `kind` is one of these:

greeting hub to process, the first message: id of the hub, a nonce, whether the hub has a secret, its attempt, and the
         name of process 0
hello    process to hub, the first message: number, n_processes, host, pid, facts, nonce, attempt, proof of the secret;
         code and sentence if the process has failed already
welcome  hub to process: proof that the hub knows the secret too
facts    process to hub: facts by name, which must be equal in all processes; patience, the most seconds between the
         facts of two processes
beat     both ways, every BEAT seconds; to the hub: phase, marks, waited and limit of the process's `Phases`
stop     process to hub: this process was asked to stop; hub to process: report your number of `Watchdog.stops` calls
asked    process to hub: times, the number of calls; from here on a call waits until `stops` arrives
stops    hub to process, when all processes have reported: at, the call at which all processes stop
failed   process to hub: code and sentence of an exception that will end the process
out      process to hub: this process is done and waits for the others
started  hub to process, when all processes have come: the name of process 0, and a token of this start
agreed   hub to process, when all processes have sent equal facts
verdict  hub to process, end now: number of the process at fault, code, what, where, fix; whether to log stacks
over     hub to process, when all processes are out
"""

import contextlib
import hmac
import json
import math
import os
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode, UserError, quote

SECRET = "GPT2_FLAX_SECRET"  # environment variable
BEAT = 2.0  # seconds between the heartbeats of a process, and of the hub
SILENCE = 30.0  # seconds without a heartbeat after which a process counts as dead
QUIET = 5.0  # seconds to wait for the first bytes of an unknown server; a hub greets at once
_SHORTEST_SECRET = 16  # characters; an eavesdropper could find a shorter secret by trying all of them
_LONGEST_LINE = 2**16
_LARGEST = 2**63
_HTTP2_SETTINGS = 4  # type of the first HTTP/2 frame of a gRPC server, such as JAX's coordinator

# The fields of each kind of message: a type, or the default of an optional field.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "greeting": {"id": str, "nonce": str, "secret": bool, "attempt": str, "name": str},
    "hello": {
        **{"number": int, "n_processes": int, "host": str, "pid": int, "facts": {}},
        **{"nonce": "", "attempt": "", "proof": "", "code": 0, "sentence": ""},
    },
    "welcome": {"proof": str},
    "facts": {"facts": dict, "patience": float},
    "beat": {"phase": "nothing", "marks": 0, "waited": 0.0, "limit": math.inf},
    "stop": {},
    "asked": {"times": int},
    "stops": {"at": int},
    "failed": {"code": int, "sentence": str},
    "out": {},
    "started": {"hub": str, "token": str},
    "agreed": {},
    "verdict": {"number": int, "code": int, "what": str, "where": "", "fix": str, "stacks": False},
    "over": {},
}


class Nonsense(EOFError):
    """The other side sent something that is no message; the text quotes its beginning."""


def send(connection: socket.socket, kind: str, **values: Any) -> None:
    """Send a message. A connection that the other side closed is found by `receive`, not here."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")


def receive(connection: socket.socket, rest: bytearray) -> list[dict[str, Any]]:
    """Return the messages that have arrived, each with all fields of its kind.

    Args:
        connection: blocks at most as long as its timeout.
        rest: the bytes of an incomplete line, kept between calls.

    Raises:
        EOFError: when the other side has closed the connection.
        Nonsense: when it sent something that is no message.
    """
    try:
        data = connection.recv(_LONGEST_LINE)
    except (BlockingIOError, TimeoutError):
        return []
    except OSError as error:
        raise EOFError from error
    rest += data
    *lines, last = bytes(rest).split(b"\n")
    rest[:] = last
    messages = [_message(line) for line in lines]
    if len(rest) > _LONGEST_LINE:
        raise Nonsense(quoted_beginning(rest))
    if not data:
        raise EOFError
    return messages


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
        fields = FIELDS[message["kind"]]
        message |= {name: message.get(name, kind) for name, kind in fields.items()}
        good = all(_is(message[name], kind if isinstance(kind, type) else type(kind)) for name, kind in fields.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise Nonsense(quoted_beginning(line)) from error
    if not good or ("code" in fields and message["code"] not in tuple(ExitCode)):
        raise Nonsense(quoted_beginning(line))
    return message


def _is(value: Any, kind: type) -> bool:
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(fact, str) for fact in value.values())
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        return number and value == value and (abs(value) < _LARGEST or value == math.inf)
    return isinstance(value, kind)


def quoted_beginning(data: bytes | bytearray) -> str:
    """Return the first line of `data`, shortened, quoted and printable."""
    return quote(bytes(data[:60]).split(b"\n")[0].rstrip(b"\r").decode("utf-8", "backslashreplace"))


def shared_secret() -> bytes:
    """Return the secret in the environment, or nothing; raise `UserError` (USAGE) if the secret is too short."""
    secret = os.environb.get(SECRET.encode(), b"")
    if secret and len(secret) < _SHORTEST_SECRET:
        fix = "set it to a long random text in all processes, such as what `openssl rand -hex 32` prints"
        what = f"{SECRET} is shorter than {_SHORTEST_SECRET} characters"
        raise UserError(ExitCode.USAGE, what, "environment", fix)
    return secret


def proof(secret: bytes, *values: Any) -> str:
    """Return an HMAC of `values`, which include the nonce of the other side; empty without a secret."""
    return hmac.digest(secret, json.dumps(values, sort_keys=True).encode(), "sha256").hex() if secret else ""


def proves(shown: str, secret: bytes, *values: Any) -> bool:
    """Return whether `shown` is the proof of the same secret, or empty when this process has no secret."""
    return hmac.compare_digest(shown.encode("utf-8", "backslashreplace"), proof(secret, *values).encode())


class Answer(NamedTuple):
    """The program that listens at an address where the hub of a run should be."""

    who: str
    """Its name in an error."""
    is_passing: bool = False
    """Whether it may be gone at the next start."""
    greeting: Mapping[str, Any] | None = None
    """The greeting, if the program is a hub."""
    is_silent: bool = False


def answer_of(connection: socket.socket) -> Answer:
    """Identify the program on the other side of a new connection; ask it as a web client if it says nothing."""
    said = bytearray()
    for question in (b"", b"GET / HTTP/1.0\r\n\r\n"):
        patience = time.monotonic() + QUIET
        try:
            connection.settimeout(min(0.5, QUIET / 5))
            connection.sendall(question)
            while time.monotonic() < patience:
                messages = receive(connection, said)
                if messages and messages[0]["kind"] == "greeting":
                    return Answer(f"{messages[0]['name']} of another start", is_passing=True, greeting=messages[0])
                if said and not said.startswith(b"{"):
                    raise Nonsense(quoted_beginning(said))
        except Nonsense as error:
            if len(said) > 3 and said[3] == _HTTP2_SETTINGS:
                return Answer("the coordinator of another JAX program", is_passing=True)
            kind = "a web server" if "HTTP/" in str(error) else "another program"
            return Answer(f"{kind} (it says {error})")
        except (EOFError, OSError):
            break
    return Answer("another program (it says nothing)", is_silent=True)


def unresolved() -> ExitCode:
    """Return the exit code for a host name that does not resolve; Kubernetes may create the name later."""
    return ExitCode.TRY_AGAIN if "KUBERNETES_SERVICE_HOST" in os.environ else ExitCode.USAGE


def verdict_of(error: UserError, number: int = -1) -> dict[str, Any]:
    """Return the fields of the message that ends a process with `error`; process `number` is at fault."""
    return {"number": number, "code": int(error.exit_code), "what": error.what, "where": error.where, "fix": error.fix}


def error_of(verdict: Mapping[str, Any], where: str) -> UserError:
    """Return the error of a verdict; `where` replaces an empty place."""
    return UserError(ExitCode(verdict["code"]), verdict["what"], verdict["where"] or where, verdict["fix"])


@dataclass(eq=False)
class Peer:
    """A process as the hub knows it; a stranger until it says hello."""

    connection: socket.socket
    address: str = ""  # empty for process 0 itself
    port: int = 0  # port of the hub that it connected to
    rest: bytearray = field(default_factory=bytearray)
    heard: float = field(default_factory=time.monotonic)  # when its last message arrived
    nonce: str = ""  # in its greeting
    nonsense: str | None = None  # what it sent, if that was no message
    number: int = -1
    name: str = ""
    phase: str = "nothing"
    marks: int = 0
    waited: float = 0.0
    limit: float = math.inf
    failed: float = math.inf  # when it failed
    code: int = ExitCode.OK
    sentence: str = ""
    out: bool = False
    asked_times: int | None = None  # calls of `Watchdog.stops`, once a process was asked to stop
    facts: Mapping[str, Any] | None = None  # set while the process waits for the facts of the others
    patience: float = math.inf  # seconds that the process waits
    asked: float = 0.0  # when it sent the facts

    @property
    def gone(self) -> bool:
        return self.connection.fileno() == -1


class Connections:
    """The open connections of the hub; new connections are accepted while it listens."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)  # a client may be gone before `accept`
        self._selector.register(listener, selectors.EVENT_READ, listener)

    def stop_listening(self, listener: socket.socket) -> None:
        self._selector.unregister(listener)
        listener.close()

    def add(self, connection: socket.socket, address: str = "", port: int = 0) -> Peer:
        peer = Peer(connection, address, port)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def hear(self, seconds: float) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """Wait at most `seconds` for messages; yield each message with its sender.

        Yields also the kinds `new` and `gone` for connections that were opened and closed. No process can send these.
        """
        for key, _ in self._selector.select(seconds):
            peer = key.data
            if isinstance(peer, socket.socket):
                with contextlib.suppress(OSError):
                    connection, address = peer.accept()
                    connection.settimeout(5.0)
                    yield (
                        self.add(connection, address[0].removeprefix("::ffff:"), peer.getsockname()[1]),
                        {"kind": "new"},
                    )
                continue
            if peer.gone:
                continue
            try:
                messages = receive(peer.connection, peer.rest)
            except EOFError as error:
                peer.nonsense = str(error) if isinstance(error, Nonsense) else None
                self.drop(peer)
                yield peer, {"kind": "gone"}
                continue
            peer.heard = time.monotonic()
            for message in messages:
                yield peer, message

    def drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def peers(self) -> list[Peer]:
        return [key.data for key in list(self._selector.get_map().values()) if isinstance(key.data, Peer)]

    def tell_all(self, kind: str, **values: Any) -> None:
        for peer in self.peers():
            send(peer.connection, kind, **values)
