"""What the processes of a run say to each other: each of them, 0 too, has one TCP connection to the hub in process 0.

Messages are JSON objects, one a line, named by `kind`:

hello    to the hub: number, n_processes, host, pid, facts; the first one
facts    to the hub: facts by name, which must be the same in all processes, and how many seconds these may be apart
beat     both ways, every BEAT seconds; to the hub: phase, marks, waited and limit of its `Phases`
stop     both ways; to the hub: this process was asked to stop; from the hub: say how often you have asked
asked    to the hub: times, how often `Watchdog.stops` was called, where the process waits until it hears
stops    from the hub, when all have said so: at, the call at which all stop
failed   to the hub: code, sentence; an exception is on its way out of the run
out      to the hub: this process is done and waits for the others
started  from the hub, when all have come: port for JAX's own coordinator, what to call process 0, token of this start
agreed   from the hub, when all have sent the same facts
verdict  from the hub: number of the process that is to blame, code, what, where, fix, stacks: keep them?
over     from the hub: all are out
"""

import contextlib
import json
import math
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2_flax.errors import ExitCode

_LONGEST_LINE = 2**16


def receive(connection: socket.socket, rest: bytearray) -> list[dict[str, Any]]:
    """Returns the messages that have come; `rest` keeps what is not a whole line yet.

    Raises EOFError when the other side is gone or does not speak as it should.
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
    try:
        messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise EOFError from error
    if not data or len(rest) > _LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
        raise EOFError
    return messages


def send(connection: socket.socket, kind: str, **values: Any) -> None:
    """Sends a message; that the other side is gone is found out by `receive`."""
    try:
        connection.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
    except OSError:
        return


@dataclass(eq=False)
class Peer:
    """A process as the hub knows it; a stranger until it says hello."""

    connection: socket.socket
    rest: bytearray = field(default_factory=bytearray)
    heard: float = field(default_factory=time.monotonic)
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
    """The open connections of the hub, and while it is given one, a listener that brings new ones."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def listen(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ)

    def stop_listening(self, listener: socket.socket) -> None:
        self._selector.unregister(listener)
        listener.close()

    def add(self, connection: socket.socket) -> None:
        self._selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def hear(self, seconds: float) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """Waits `seconds` at most for messages; takes in new connections and lets go of closed ones."""
        for key, _ in self._selector.select(seconds):
            peer = key.data
            if peer is None:
                with contextlib.suppress(OSError):
                    connection, _ = key.fileobj.accept()
                    connection.settimeout(5.0)
                    self.add(connection)
                continue
            if peer.gone:
                continue
            try:
                messages = receive(peer.connection, peer.rest)
            except EOFError:
                self.drop(peer)
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


def facts_of(message: dict[str, Any]) -> Mapping[str, Any]:
    """Returns the facts of a message; none when it has none."""
    facts = message.get("facts")
    return facts if isinstance(facts, dict) else {}
