"""What the processes of a run say to each other: each of them, 0 too, has one TCP connection to the hub in process 0.

Messages are JSON objects, one a line, named by `kind`:

greeting from the hub, the first one: its id, a nonce, whether it has a secret, its attempt, what to call process 0
hello    to the hub, the first one: number, n_processes, host, pid, facts, nonce, attempt, proof of the secret; code and
         sentence of a process that has failed already
welcome  from the hub: proof that it knows the secret too
facts    to the hub: facts by name, which must be the same in all processes, and how many seconds these may be apart
beat     both ways, every BEAT seconds; to the hub: phase, marks, waited and limit of its `Phases`
stop     both ways; to the hub: this process was asked to stop; from the hub: say how often you have asked
asked    to the hub: times, how often `Watchdog.stops` was called, where the process waits until it hears
stops    from the hub, when all have said so: at, the call at which all stop
failed   to the hub: code, sentence; an exception is on its way out of the run
out      to the hub: this process is done and waits for the others
started  from the hub, when all have come: what to call process 0, token of this start
agreed   from the hub, when all have sent the same facts
verdict  from the hub: number of the process that is to blame, code, what, where, fix, stacks: keep them?
over     from the hub: all are out
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
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, quote

SECRET = "GPT2_FLAX_SECRET"  # in the environment
_SHORTEST_SECRET = 16  # characters: who listens in could try all that are shorter
_LONGEST_LINE = 2**16

# The fields of each kind of message: a type, or the default of a field that may be missing.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
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
_LARGEST = 2**63


class Nonsense(EOFError):
    """What came is no message; the text is its beginning, quoted."""


def receive(connection: socket.socket, rest: bytearray) -> list[dict[str, Any]]:
    """Returns the messages that have come, all fields there and of their types; `rest` keeps what is no whole line yet.

    Raises EOFError when the other side is gone, `Nonsense` when it does not speak as it should.
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
        fields = _FIELDS[message["kind"]]
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


def quoted_beginning(said: bytes | bytearray) -> str:
    """Returns how something begins that is no message, printable."""
    return quote(bytes(said[:60]).split(b"\n")[0].rstrip(b"\r").decode("utf-8", "backslashreplace"))


def send(connection: socket.socket, kind: str, **values: Any) -> None:
    """Sends a message; that the other side is gone is found out by `receive`."""
    try:
        connection.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
    except OSError:
        return


def shared_secret() -> bytes:
    """Returns the secret of the environment, empty where there is none. Raises `UserError` (USAGE) for a short one."""
    secret = os.environb.get(SECRET.encode(), b"")
    if secret and len(secret) < _SHORTEST_SECRET:
        fix = "set it to a long random text in all processes, such as what `openssl rand -hex 32` prints"
        what = f"{SECRET} is shorter than {_SHORTEST_SECRET} characters"
        raise UserError(ExitCode.USAGE, what, "environment", fix)
    return secret


def proof(secret: bytes, *said: Any) -> str:
    """Returns what only one who knows the secret can say; empty when there is none. `said` holds the other's nonce."""
    return hmac.digest(secret, json.dumps(said, sort_keys=True).encode(), "sha256").hex() if secret else ""


def proves(shown: str, secret: bytes, *said: Any) -> bool:
    """Whether `shown` is the proof of the same secret; of none, when there is none here."""
    return hmac.compare_digest(shown.encode("utf-8", "backslashreplace"), proof(secret, *said).encode())


@dataclass(eq=False)
class Peer:
    """A process as the hub knows it; a stranger until it says hello."""

    connection: socket.socket
    address: str = ""  # empty for process 0 itself
    port: int = 0  # of the hub, that it came to
    rest: bytearray = field(default_factory=bytearray)
    heard: float = field(default_factory=time.monotonic)
    nonce: str = ""  # that it was greeted with
    nonsense: str | None = None  # that it has said
    number: int = -1
    name: str = ""
    phase: str = "nothing"
    marks: int = 0
    waited: float = 0.0
    limit: float = math.inf
    failed: float | None = None  # since when
    code: int = ExitCode.OK
    sentence: str = ""
    out: bool = False
    asked_times: int | None = None  # about stopping, when one was asked to
    facts: Mapping[str, Any] | None = None  # while it waits until all have sent theirs
    patience: float = math.inf  # so long, since
    asked: float = 0.0

    @property
    def gone(self) -> bool:
        return self.connection.fileno() == -1


class Connections:
    """The open connections of the hub, and those that come while it listens."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)  # who has come may be gone again
        self._selector.register(listener, selectors.EVENT_READ)

    def stop_listening(self, listener: socket.socket) -> None:
        self._selector.unregister(listener)
        listener.close()

    def add(self, connection: socket.socket, address: str = "", port: int = 0) -> None:
        self._selector.register(connection, selectors.EVENT_READ, Peer(connection, address, port))

    def hear(self, seconds: float) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """Waits `seconds` at most for messages; takes in new connections and lets go of closed ones.

        These two are yielded too, as the kinds `new` and `gone`, which no process can send.
        """
        for key, _ in self._selector.select(seconds):
            peer = key.data
            if peer is None:
                with contextlib.suppress(OSError):
                    connection, address = key.fileobj.accept()
                    connection.settimeout(5.0)
                    self.add(connection, address[0].removeprefix("::ffff:"), key.fileobj.getsockname()[1])
                    yield self._selector.get_key(connection).data, {"kind": "new"}
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
        return [key.data for key in list(self._selector.get_map().values()) if key.data is not None]

    def tell_all(self, kind: str, **values: Any) -> None:
        for peer in self.peers():
            send(peer.connection, kind, **values)
