"""Process 0's half of the watchdog: hears all processes of a run, and tells them when the run must end and why.

Each process, 0 too, keeps one TCP connection to the hub. Messages are JSON objects, one a line, named by `kind`:

hello    to the hub: number, n_processes, host, pid, facts; the first one
facts    to the hub: facts by name, which must be the same in all processes, and how many seconds these may be apart
beat     both ways, every BEAT seconds; to the hub: step, paused, limit
stop     both ways; to the hub: this process was asked to stop; from the hub: say how often you have asked
asked    to the hub: times, how often `Watchdog.stops` was called, where the process waits until it hears
stops    from the hub, when all have said so: at, the call at which all stop
failed   to the hub: code, sentence; an exception is on its way out of the run
out      to the hub: this process is done and waits for the others
started  from the hub, when all have come: port for JAX's own coordinator, what to call process 0, token of this start
agreed   from the hub, when all have sent the same facts
verdict  from the hub: number of the process that is to blame, code, what, where, fix; all shall end with that
over     from the hub: all are out

Strangers can do little: nobody is let in after the start, and before it only by a number that is still missing.
"""

import contextlib
import itertools
import json
import math
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, io_error

BEAT = 2.0
SILENCE = 30.0  # seconds after which a process that does not beat is taken for dead
GRACE = 10.0  # seconds in which all others may fail too, with errors of their own
START = 300.0  # seconds in which all processes must come
CLOSING = 8.0  # seconds in which they end after a verdict
AGAIN = "start the same command again to go on from the newest checkpoint"
ALIKE = "start all with the same config, data, versions and devices"
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


def first_difference(facts: Sequence[Mapping[str, Any]]) -> tuple[str, int] | None:
    """Returns the first name whose fact is another than process 0's, and in which process; None when all are equal.

    A name that is missing in one process alone differs too.
    """
    for name in dict.fromkeys(itertools.chain.from_iterable(facts)):
        for number, others in enumerate(facts):
            if (name in others, others.get(name)) != (name in facts[0], facts[0].get(name)):
                return name, number
    return None


@dataclass(eq=False)
class _Peer:
    connection: socket.socket
    rest: bytearray = field(default_factory=bytearray)
    heard: float = field(default_factory=time.monotonic)
    number: int = -1  # until it says hello
    name: str = ""
    step: int = 0
    paused: bool = True
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


class Hub(threading.Thread):
    """Listens on a port from its creation on; the thread gathers the processes and watches them until the end.

    Raises `UserError` (USAGE) when the port is taken.
    """

    def __init__(self, port: int, n_processes: int):
        super().__init__(name="watchdog hub", daemon=True)
        both = socket.has_dualstack_ipv6()
        try:
            self._listener = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=4096
            )
        except OSError as error:
            reason = io_error(error, "").fix
            what = f"process 0 cannot listen on port {port}"
            fix = f"choose another port for the coordinator ({reason})"
            raise UserError(ExitCode.USAGE, what, socket.gethostname(), fix) from error
        self._n_processes = n_processes
        self._members: dict[int, _Peer] = {}
        self._moved = 0.0  # when a step was last finished, or there was something else to do
        self._ended = self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.own, connection = socket.socketpair()
        """What process 0 itself speaks to the hub by; it says hello before the thread starts."""
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def run(self) -> None:
        self._gather()
        self._selector.unregister(self._listener)
        self._listener.close()
        for stranger in set(self._peers()) - set(self._members.values()):
            self._drop(stranger)
        if not self._ended and self._agree():
            with socket.create_server(("", 0)) as free:
                port = free.getsockname()[1]
            self._tell_all("started", port=port, hub=self._members[0].name, token=secrets.token_hex(16))
        beaten = self._moved = time.monotonic()
        for member in self._members.values():  # they said nothing while they waited for others
            member.heard = beaten
        while not self._ended:
            for peer, message in self._hear():
                self._note(peer, message)
            if time.monotonic() - beaten > BEAT:
                beaten = time.monotonic()
                self._tell_all("beat")
            if not self._ended:
                self._judge()
        for peer in self._peers():
            self._drop(peer)

    def _gather(self) -> None:
        begun, told = time.monotonic(), False
        while len(self._members) < self._n_processes and not self._ended:
            for peer, hello in self._hear():
                self._welcome(peer, hello)
            missing = [str(number) for number in range(self._n_processes) if number not in self._members]
            waited = time.monotonic() - begun
            if missing and waited > min(10.0, START / 2) and not told:
                told = True
                print(f"waiting for process {', '.join(missing)} of {self._n_processes}", flush=True)
            if missing and waited > START and not self._ended:
                what = f"process {', '.join(missing)} of {self._n_processes} has not come within {START:.0f} s"
                self._end(None, ExitCode.TRY_AGAIN, what, "see why it has not started, then start all again")

    def _welcome(self, peer: _Peer, hello: dict[str, Any]) -> None:
        number, n_processes = hello.get("number"), hello.get("n_processes")
        if peer.name or hello.get("kind") != "hello" or not isinstance(number, int):
            return
        peer.name = f"process {number} (host {hello.get('host')}, pid {hello.get('pid')})"
        if n_processes != self._n_processes:
            what = f"{peer.name} belongs to a run of {n_processes} processes, process 0 to one of {self._n_processes}"
            fix = "start all with the same number of processes"
        elif number in self._members:
            what = f"{self._members[number].name} and {peer.name} have the same number"
            fix = "give each process its own"
        else:
            peer.number, peer.facts = number, _facts(hello)
            self._members[number] = peer
            return
        self._members[-1] = peer  # it is to hear of it too
        self._end(None, ExitCode.USAGE, what, fix)

    def _hear(self) -> Iterator[tuple[_Peer, dict[str, Any]]]:
        """Waits a moment for messages; takes in new connections and lets go of closed ones."""
        for key, _ in self._selector.select(min(0.5, BEAT)):
            peer = key.data
            if peer is None:
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    connection.settimeout(5.0)
                    self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))
                continue
            if peer.gone:
                continue
            try:
                messages = receive(peer.connection, peer.rest)
            except EOFError:
                self._drop(peer)
                continue
            peer.heard = time.monotonic()
            for message in messages:
                yield peer, message

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if self._members.get(peer.number) is peer and self._listener.fileno() != -1:
            del self._members[peer.number]  # it has not begun: another may come in its place

    def _peers(self) -> list[_Peer]:
        return [key.data for key in list(self._selector.get_map().values()) if key.data is not None]

    def _tell_all(self, kind: str, **values: Any) -> None:
        for peer in self._peers():
            send(peer.connection, kind, **values)

    def _note(self, peer: _Peer, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "beat", "step": int(step), "paused": bool(paused), "limit": float(limit)}:
                if paused or step != peer.step:
                    self._moved = time.monotonic()
                peer.step, peer.paused, peer.limit = step, paused, limit
            case {"kind": "failed", "code": int(code), "sentence": str(sentence)}:
                peer.failed, peer.code, peer.sentence = time.monotonic(), code, sentence
            case {"kind": "facts", "patience": float(patience)}:
                peer.facts, peer.patience, peer.asked = _facts(message), patience, time.monotonic()
                if all(member.facts is not None for member in self._members.values()) and self._agree():
                    self._tell_all("agreed")
            case {"kind": "stop"} if not self._stopping:
                self._stopping = True
                self._tell_all("stop")
            case {"kind": "asked", "times": int(times)}:
                peer.asked_times = times
                asked = [member.asked_times for member in self._members.values()]
                if None not in asked:
                    self._tell_all("stops", at=max(asked) + 1)
            case {"kind": "out"}:
                peer.out = True

    def _agree(self) -> bool:
        """Ends the run when the facts of its processes differ; returns whether they agree, and awaits the next."""
        members = [self._members[number] for number in sorted(self._members)]
        difference = first_difference([member.facts for member in members])
        if difference:
            name, number = difference
            pair = members[0], members[number]
            where = ", ".join(f"{peer.name} has {peer.facts.get(name, 'nothing')}" for peer in pair)
            self._end(None, ExitCode.CONFIG, f"processes of the run differ in {name}", ALIKE, where)
        for member in members:
            member.facts = None
        return not difference

    def _judge(self) -> None:
        """Ends the run when a process is gone, has failed alone, or when none gets on; or when all are out."""
        now, members = time.monotonic(), list(self._members.values())
        if all(peer.out for peer in members):
            self._ended = True
            return self._tell_all("over")
        for peer in members:
            if peer.gone:
                return self._blame(peer, "has ended")
            if now - peer.heard > SILENCE:
                return self._blame(peer, f"has been silent for {SILENCE:.0f} s")
        busy = [peer for peer in members if peer.failed is None and not peer.out]
        waiting = [peer for peer in busy if peer.facts is not None]  # for all others; it does not fail by itself
        # A process that stops as agreed, with TRY_AGAIN, knows that the others do.
        failed = [peer for peer in members if peer.failed is not None and (peer.code != ExitCode.TRY_AGAIN or waiting)]
        first = min(failed, key=lambda peer: peer.failed, default=None)
        # One that is not heard of may be why the other failed: then it is waited for until it is taken for dead.
        late = first and (now - first.failed > GRACE or waiting == busy)
        if late and busy and all(now - peer.heard < GRACE / 2 for peer in members):
            return self._end(first, first.code, f"{first.name} of the run has failed", f"it says: {first.sentence}")
        absent = [peer for peer in busy if peer.facts is None]
        tired = next((peer for peer in waiting if now - peer.asked > peer.patience), None)
        if tired and absent:
            name, fact = next(iter(tired.facts.items()))
            what = f"{absent[0].name} of the run has not named {name} within {tired.patience:.0f} s"
            return self._end(None, ExitCode.CONFIG, what, ALIKE, f"{tired.name} has {fact}")
        limit = max(peer.limit for peer in members)
        if busy == members and now - self._moved > limit:
            step = min(peer.step for peer in members)
            behind = [peer for peer in members if peer.step == step]
            who = "" if behind == members else " and ".join(peer.name for peer in behind[:3]) + " behind: "
            what = f"{who}no step of the run finished for {limit:.0f} s, the last was {step}"
            return self._end(None, ExitCode.TRY_AGAIN, what, AGAIN)
        return None

    def _blame(self, peer: _Peer, how: str) -> None:
        if peer.failed is not None and peer.code != ExitCode.TRY_AGAIN:
            return self._end(peer, peer.code, f"{peer.name} of the run has failed", f"it says: {peer.sentence}")
        return self._end(peer, ExitCode.TRY_AGAIN, f"{peer.name} of the run {how}", AGAIN)

    def _end(self, peer: _Peer | None, code: int, what: str, fix: str, where: str | None = None) -> None:
        """Tells all, the process of the hub last: JAX's coordinator ends with it, and that aborts those still there."""
        self._ended = True
        number = -1 if peer is None else peer.number
        verdict = {"number": number, "code": int(code), "what": what, "where": where, "fix": fix}
        own = self._members.get(0)
        others = {member for member in self._members.values() if member is not own}
        for member in others:
            send(member.connection, "verdict", **verdict)
        patience = time.monotonic() + CLOSING
        while time.monotonic() < patience and not all(member.gone for member in others):
            for _ in self._hear():  # until they close
                pass
        if own:
            send(own.connection, "verdict", **verdict)


def _facts(message: dict[str, Any]) -> Mapping[str, Any]:
    facts = message.get("facts")
    return facts if isinstance(facts, dict) else {}
