"""Process 0's half of the watchdog: hears all processes of a run, and tells them when the run must end and why.

The module `messages` describes the messages; `meeting` describes how the processes come together.
"""

import itertools
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes.meeting import Meeting, verdict
from gpt2_flax.processes.messages import Peer, send
from gpt2_flax.processes.phases import hang
from gpt2_flax.processes.place import Place

BEAT = 2.0
SILENCE = 30.0  # seconds after which a process that does not beat is taken for dead
GRACE = 10.0  # seconds in which all others may fail too, with errors of their own
CLOSING = 8.0  # seconds in which they end after a verdict
AGAIN = "start the same command again to go on from the newest checkpoint"
ALIKE = "start all with the same config, data, versions and devices"


def first_difference(facts: Sequence[Mapping[str, Any]]) -> tuple[str, int] | None:
    """Returns the first name whose fact is another than process 0's, and in which process; None when all are equal.

    A name that is missing in one process alone differs too.
    """
    for name in dict.fromkeys(itertools.chain.from_iterable(facts)):
        for number, others in enumerate(facts):
            if (name in others, others.get(name)) != (name in facts[0], facts[0].get(name)):
                return name, number
    return None


class Hub(threading.Thread):
    """Listens from its creation on; the thread gathers the processes and watches them until the end.

    Raises `UserError` as `Meeting`.
    """

    def __init__(self, place: Place):
        super().__init__(name="watchdog hub", daemon=True)
        self._meeting = Meeting(place)
        self._connections, self.own = self._meeting.connections, self._meeting.own
        self._members: dict[int, Peer] = {}
        self._fewest, self._moved = 0, 0.0  # marks of those behind, and since when
        self._ended = self._stopping = False

    def run(self) -> None:
        try:
            self._meeting.gather()
        except UserError as error:
            self._members = self._meeting.members
            self._end(None, error.exit_code, error.what, error.fix, error.where)
        self._members = self._meeting.members
        if not self._ended and self._agree():
            self._connections.tell_all("started", hub=self._members[0].name, token=secrets.token_hex(16))
        beaten = self._moved = time.monotonic()
        for member in self._members.values():  # they said nothing while they waited for others
            member.heard = beaten
        while not self._ended:
            for peer, message in self._connections.hear(min(0.5, BEAT)):
                self._note(peer, message)
            if time.monotonic() - beaten > BEAT:
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
            case {"kind": "facts", "patience": patience}:
                peer.facts, peer.patience, peer.asked = message["facts"], patience, time.monotonic()
                if all(member.facts is not None for member in self._members.values()) and self._agree():
                    self._connections.tell_all("agreed")
            case {"kind": "stop"} if not self._stopping:
                self._stopping = True
                self._connections.tell_all("stop")
            case {"kind": "asked", "times": times}:
                peer.asked_times = times
                asked = [member.asked_times for member in self._members.values()]
                if None not in asked:
                    self._connections.tell_all("stops", at=max(asked) + 1)
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
        """Ends the run when a process is gone, has failed alone, or hangs; or when all are out."""
        now, members = time.monotonic(), list(self._members.values())
        if all(peer.out for peer in members):
            self._ended = True
            return self._connections.tell_all("over")
        for peer in members:
            if peer.gone:
                how = "has ended" if peer.nonsense is None else f"said what no process of a run says: {peer.nonsense}"
                return self._blame(peer, how)
            if now - peer.heard > SILENCE:
                return self._blame(peer, f"has been silent for {SILENCE:.0f} s", stacks=True)
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
        # Others wait for those behind, which may take their time; so each is judged by the limit of its own phase.
        fewest = min((peer.marks for peer in busy), default=0)
        if fewest != self._fewest:
            self._fewest, self._moved = fewest, now
        behind = [peer for peer in busy if peer.marks == fewest]
        for peer in behind:
            peer.waited = min(peer.waited, now - self._moved)  # not while it waited for others itself
        if stuck := next((peer for peer in behind if peer.waited > peer.limit), None):
            who = "" if behind == members else " and ".join(peer.name for peer in behind[:3]) + " behind: "
            what = who + hang(stuck.phase, stuck.waited, stuck.limit)
            return self._end(None, ExitCode.TRY_AGAIN, what, AGAIN, stacks=True)
        return None

    def _blame(self, peer: Peer, how: str, stacks: bool = False) -> None:
        if peer.failed is not None and peer.code != ExitCode.TRY_AGAIN:
            return self._end(peer, peer.code, f"{peer.name} of the run has failed", f"it says: {peer.sentence}")
        return self._end(peer, ExitCode.TRY_AGAIN, f"{peer.name} of the run {how}", AGAIN, stacks=stacks)

    def _end(self, peer: Peer | None, code: int, what: str, fix: str, where: str = "", stacks: bool = False) -> None:
        """Tells all, the process of the hub last: JAX's coordinator ends with it, and that aborts those still there."""
        self._ended = True
        number = -1 if peer is None else peer.number
        message = verdict(UserError(ExitCode(code), what, where, fix), number) | {"stacks": stacks}
        own = self._members.get(0)
        others = {member for member in self._members.values() if member is not own}
        for member in others:
            send(member.connection, "verdict", **message)
        patience = time.monotonic() + CLOSING
        while time.monotonic() < patience and not all(member.gone for member in others):
            for _ in self._connections.hear(min(0.5, BEAT)):  # until they close
                pass
        if own:
            send(own.connection, "verdict", **message)
