"""The hub in process 0 hears all processes of a run; it decides when the run must end, and tells all of them why."""

import itertools
import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes import messages
from gpt2_flax.processes.meeting import Meeting
from gpt2_flax.processes.messages import Peer, send, verdict_of
from gpt2_flax.processes.phases import AGAIN, hang
from gpt2_flax.processes.place import Place

GRACE = 10.0  # seconds after the failure of a process in which all others may fail too, with their own errors
CLOSING = 8.0  # seconds in which the processes end after a verdict
ALIKE = "start all with the same config, data, versions and devices"


class _Verdict(NamedTuple):
    """Why the run must end, and which process is at fault, if it is one."""

    error: UserError
    peer: Peer | None = None
    stacks: bool = False
    """Whether each process adds its stacks to its crash log."""


def first_difference(facts: Sequence[Mapping[str, Any]]) -> tuple[str, int] | None:
    """Return the first name whose fact differs from process 0's, and the number of that process; None: no difference.

    A name that is missing in one process is a difference too.
    """
    for name in dict.fromkeys(itertools.chain.from_iterable(facts)):
        for number, others in enumerate(facts):
            if (name in others, others.get(name)) != (name in facts[0], facts[0].get(name)):
                return name, number
    return None


class Hub(threading.Thread):
    """Listens from its creation on; the thread gathers the processes and watches them until the end.

    Raises `UserError` like `Meeting`.
    """

    def __init__(self, place: Place):
        super().__init__(name="watchdog hub", daemon=True)
        self._meeting = Meeting(place)
        self._connections, self.own = self._meeting.connections, self._meeting.own
        self._members: dict[int, Peer] = {}
        self._fewest, self._moved = 0, 0.0  # the fewest marks of a process, and when they last changed
        self._ended = self._stopping = False

    def run(self) -> None:
        try:
            self._meeting.gather()
        except UserError as error:
            self._members = self._meeting.members
            self._end(_Verdict(error))
        self._members = self._meeting.members
        if not self._ended and self._agree():
            self._connections.tell_all("started", hub=self._members[0].name, token=secrets.token_hex(16))
        beaten = self._moved = time.monotonic()
        for member in self._members.values():  # they sent nothing while they waited for other processes
            member.heard = beaten
        while not self._ended:
            for peer, message in self._connections.hear(min(0.5, messages.BEAT)):
                self._note(peer, message)
            if time.monotonic() - beaten > messages.BEAT:
                beaten = time.monotonic()
                self._connections.tell_all("beat")
            if not self._ended:
                self._judge()
        for peer in self._connections.peers():
            self._connections.drop(peer)

    def _note(self, peer: Peer, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "beat", "phase": phase, "marks": marks, "waited": waited, "limit": limit}:
                peer.phase, peer.marks, peer.waited, peer.limit = phase, marks, waited, limit
            case {"kind": "failed", "code": code, "sentence": sentence}:
                peer.failed, peer.code, peer.sentence = time.monotonic(), code, sentence
            case {"kind": "facts", "facts": facts, "patience": patience}:
                peer.facts, peer.patience, peer.asked = facts, patience, time.monotonic()
                if all(member.facts is not None for member in self._members.values()) and self._agree():
                    self._connections.tell_all("agreed")
            case {"kind": "stop"} if not self._stopping:
                self._stopping = True
                self._connections.tell_all("stop")
            case {"kind": "asked", "times": times}:
                peer.asked_times = times
                asked = [member.asked_times for member in self._members.values() if member.asked_times is not None]
                if len(asked) == len(self._members):
                    self._connections.tell_all("stops", at=max(asked) + 1)
            case {"kind": "out"}:
                peer.out = True

    def _agree(self) -> bool:
        """Compare the facts of all processes, and end the run if they differ; return whether they agree."""
        members = [self._members[number] for number in sorted(self._members)]
        facts = [member.facts or {} for member in members]
        if difference := first_difference(facts):
            name, differing = difference
            where = ", ".join(f"{members[i].name} has {facts[i].get(name, 'nothing')}" for i in (0, differing))
            self._end(_Verdict(UserError(ExitCode.CONFIG, f"processes of the run differ in {name}", where, ALIKE)))
        for member in members:
            member.facts = None
        return not difference

    def _judge(self) -> None:
        """End the run if a process is gone, has failed alone or hangs, or if all processes are out."""
        now, members = time.monotonic(), list(self._members.values())
        busy = [peer for peer in members if peer.failed == math.inf and not peer.out]
        if all(peer.out for peer in members):
            self._ended = True
            self._connections.tell_all("over")
        elif verdict := (
            _lost(now, members) or _failed(now, members, busy) or _absent(now, busy) or self._stuck(now, members, busy)
        ):
            self._end(verdict)

    def _stuck(self, now: float, members: Sequence[Peer], busy: Sequence[Peer]) -> _Verdict | None:
        """Find a process that is behind the others and has made no progress within the limit of its own phase.

        Processes that are ahead wait for it in collectives, and it may rightly take long, as in a save.
        """
        fewest = min((peer.marks for peer in busy), default=0)
        if fewest != self._fewest:
            self._fewest, self._moved = fewest, now
        behind = [peer for peer in busy if peer.marks == fewest]
        for peer in behind:
            peer.waited = min(peer.waited, now - self._moved)  # earlier it waited for other processes
        if stuck := next((peer for peer in behind if peer.waited > peer.limit), None):
            who = "" if behind == members else " and ".join(peer.name for peer in behind[:3]) + " behind: "
            what = who + hang(stuck.phase, stuck.waited, stuck.limit)
            return _Verdict(UserError(ExitCode.TRY_AGAIN, what, "", AGAIN), stacks=True)
        return None

    def _end(self, verdict: _Verdict) -> None:
        """Send the verdict, to process 0 last: JAX's coordinator ends with process 0, which aborts the others."""
        self._ended = True
        number = -1 if verdict.peer is None else verdict.peer.number
        message = verdict_of(verdict.error, number) | {"stacks": verdict.stacks}
        own = self._members.get(0)
        others = [member for member in self._members.values() if member is not own]
        for member in others:
            send(member.connection, "verdict", **message)
        patience = time.monotonic() + CLOSING
        while time.monotonic() < patience and not all(member.gone for member in others):
            for _ in self._connections.hear(min(0.5, messages.BEAT)):  # until they close their connections
                pass
        if own:
            send(own.connection, "verdict", **message)


def _lost(now: float, members: Sequence[Peer]) -> _Verdict | None:
    """Find a process that has closed its connection or sends no heartbeats."""
    for peer in members:
        silent = now - peer.heard > messages.SILENCE
        if not peer.gone and not silent:
            continue
        if peer.failed < math.inf and peer.code != ExitCode.TRY_AGAIN:
            return _blame(peer)
        how = f"has been silent for {messages.SILENCE:.0f} s"
        if peer.gone:
            how = "has ended" if peer.nonsense is None else f"said what no process of a run says: {peer.nonsense}"
        error = UserError(ExitCode.TRY_AGAIN, f"{peer.name} of the run {how}", "", AGAIN)
        return _Verdict(error, peer, stacks=not peer.gone)
    return None


def _failed(now: float, members: Sequence[Peer], busy: Sequence[Peer]) -> _Verdict | None:
    """Find the first process that has failed, once the others had time to fail with their own errors."""
    waiting = [peer for peer in busy if peer.facts is not None]  # for facts of all processes; they cannot fail
    # A process that stops as agreed has failed with TRY_AGAIN, and knows that the others stop too.
    failed = [peer for peer in members if peer.failed < math.inf and (peer.code != ExitCode.TRY_AGAIN or waiting)]
    if not failed or not busy:
        return None
    first = min(failed, key=lambda peer: peer.failed)
    # A silent process may be the cause of the failure: first wait until it counts as dead.
    heard = all(now - peer.heard < GRACE / 2 for peer in members)
    return _blame(first) if heard and (now - first.failed > GRACE or waiting == busy) else None


def _blame(peer: Peer) -> _Verdict:
    what, fix = f"{peer.name} of the run has failed", f"it says: {peer.sentence}"
    return _Verdict(UserError(ExitCode(peer.code), what, "", fix), peer)


def _absent(now: float, busy: Sequence[Peer]) -> _Verdict | None:
    """Find a process that has sent no facts while another process has waited too long for them."""
    absent = [peer for peer in busy if peer.facts is None]
    for peer in busy:
        if absent and peer.facts is not None and now - peer.asked > peer.patience:
            name, fact = next(iter(peer.facts.items()))
            what = f"{absent[0].name} of the run has not named {name} within {peer.patience:.0f} s"
            return _Verdict(UserError(ExitCode.CONFIG, what, f"{peer.name} has {fact}", ALIKE))
    return None
