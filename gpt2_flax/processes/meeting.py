"""How the hub in process 0 gathers the processes of a run.

It listens on two ports until all have come: PORT, its own, and PORT + 1, which JAX's coordinator takes afterwards. A
process shows that it reaches both. Strangers can do little: they are dropped and named, nobody is let in after the
start, and where there is a shared secret nobody without it.
"""

import errno
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.processes.answers import Answer, answer_of, unresolved
from gpt2_flax.processes.messages import (
    SECRET,
    Connections,
    Peer,
    proof,
    proves,
    quoted_beginning,
    send,
    shared_secret,
)
from gpt2_flax.processes.place import Place

START = 300.0  # seconds in which all processes must come
LINGER = 20.0  # seconds in which those who come after one has failed hear of it
HELLO = 15.0  # seconds that a stranger has to say who it is
_MOST_STRANGERS = 256  # connected at once
_LINES, _EVERY = 5, 60.0  # about strangers: so many in so many seconds


class Meeting:
    """Listens on both ports from its creation on. Raises `UserError` when one is taken, see `_listen`."""

    def __init__(self, place: Place):
        self._place, self._secret = place, shared_secret()
        self._listeners = [_listen(place.port, "its own"), _listen(place.port + 1, "that of JAX's coordinator")]
        self._id, self._log = secrets.token_hex(16), _StrangersLog()
        self._refused: dict[int, UserError] = {}  # by the number that they said
        self._failure: UserError | None = None
        self._told: set[int] = set()
        self.members: dict[int, Peer] = {}
        self.connections = Connections()
        for listener in self._listeners:
            self.connections.listen(listener)
        self.own, connection = socket.socketpair()
        """What process 0 itself speaks to the hub by; it says hello before the thread starts."""
        self.connections.add(connection)

    def gather(self) -> None:
        """Wait for all processes. Raises `UserError` that ends all: TRY_AGAIN, USAGE, or one member's error."""
        begun, told, misplaced = time.monotonic(), False, []
        try:
            while not self._failure and len(self.members) < self._place.n_processes:
                self._listen(min(0.5, START / 10))
                missing = [number for number in range(self._place.n_processes) if number not in self.members]
                waited = time.monotonic() - begun
                if missing and waited > min(10.0, START / 2) and not told:
                    told = True
                    print(f"waiting for process {_listed(missing)} of {self._place.n_processes}", flush=True)
                    if list(self.members) == [0]:
                        threading.Thread(target=lambda: misplaced.extend(self._misplaced()), daemon=True).start()
                if missing and waited > START:
                    raise self._incomplete(missing, misplaced)
            if self._failure:
                begun = time.monotonic()
                while set(range(self._place.n_processes)) - self._told and time.monotonic() - begun < LINGER:
                    self._listen(min(0.5, LINGER / 10))
                raise self._failure
        finally:
            for listener in self._listeners:
                self.connections.stop_listening(listener)
            for stranger in set(self.connections.peers()) - set(self.members.values()):
                self.connections.drop(stranger)
            self._log.close()

    def _listen(self, seconds: float) -> None:
        for peer, message in self.connections.hear(seconds):
            known = peer.number in self.members or not peer.address
            match message["kind"]:
                case "new":
                    self._greet(peer)
                case "gone" if not known and (peer.nonsense or peer.rest or peer.port == self._place.port):
                    self._drop(peer)
                case "hello" if not peer.name and peer.port != self._place.port + 1:
                    self._welcome(peer, message)
                case "failed" if known:
                    self._fail(peer, peer.number, message)
                case kind if kind != "gone" and not known and not peer.name:
                    peer.nonsense = f"'{kind}'"
                    self._drop(peer)
        # It has not begun: another may come in the place of one that is gone.
        self.members = {number: peer for number, peer in self.members.items() if not peer.gone}
        strangers = [peer for peer in self.connections.peers() if peer.address and peer.number not in self.members]
        for peer in strangers:
            if time.monotonic() - peer.heard > HELLO:
                self._drop(peer)
        for peer in strangers[:-_MOST_STRANGERS]:
            self._drop(peer)

    def _greet(self, peer: Peer) -> None:
        peer.nonce = secrets.token_hex(16)
        name = f"process 0 (host {socket.gethostname()}, pid {os.getpid()})"
        said = {"id": self._id, "nonce": peer.nonce, "secret": bool(self._secret), "attempt": self._place.attempt}
        send(peer.connection, "greeting", **said, name=name)

    def _drop(self, peer: Peer) -> None:
        if not peer.gone:
            self.connections.drop(peer)
        if not peer.name:
            said = peer.nonsense or (peer.rest and quoted_beginning(peer.rest)) or "nothing"
            self._log.say(f"a stranger at {peer.address}, no process of this run, was dropped; it said {said}")

    def _welcome(self, peer: Peer, hello: dict[str, Any]) -> None:
        number, n_processes, own = hello["number"], hello["n_processes"], self._place.n_processes
        peer.name = f"process {number} (host {printable(hello['host'])[:80]}, pid {hello['pid']})"
        shown = hello.pop("proof")
        if peer.address and not proves(shown, self._secret, peer.nonce, hello):
            has = f"another {SECRET} than process 0" if shown else f"no {SECRET}, process 0 has one"
            has = has if self._secret else f"a {SECRET}, process 0 has none"
            fix = f"give all processes the same {SECRET}"
            return self._refuse(peer, number, UserError(ExitCode.USAGE, f"{peer.name} has {has}", "", fix))
        attempts = hello["attempt"], self._place.attempt
        if attempts[0] != attempts[1] and all(attempts):
            what = f"{peer.name} belongs to attempt {printable(attempts[0])[:80]}, process 0 to attempt {attempts[1]}"
            fix = "end what an earlier start has left behind, then start all again"
            return self._refuse(peer, number, UserError(ExitCode.TRY_AGAIN, what, "", fix))
        send(peer.connection, "welcome", proof=proof(self._secret, hello["nonce"], peer.nonce))
        peer.facts = hello["facts"]
        if self._failure:
            self._tell(peer, number)
        elif hello["code"]:
            self._fail(peer, number, hello)
        elif n_processes != self._place.n_processes:
            what = f"{peer.name} belongs to a run of {n_processes} processes, process 0 to one of {own}"
            self._end(UserError(ExitCode.USAGE, what, "", "start all with the same number of processes"), peer, number)
        elif not 0 <= number < own or (peer.address and number == 0):
            what = f"{peer.name} came to process 0, which waits for 1 to {own - 1}"
            self._refuse(peer, number, UserError(ExitCode.USAGE, what, "", "give each process its own number"))
        elif number in self.members:
            what = f"{self.members[number].name} and {peer.name} have the same number"
            fix = "give each process its own; one may be left over from an earlier start: end it"
            self._end(UserError(ExitCode.USAGE, what, "", fix), peer, number)
        else:
            peer.number, self.members[number] = number, peer
        return None

    def _refuse(self, peer: Peer, number: int, error: UserError) -> None:
        """Lets a process go that may be anybody's; the run waits for the right one."""
        if 0 < number < self._place.n_processes:
            self._refused[number] = error
        self._log.say(f"refused, at {peer.address}: {error.what}")
        send(peer.connection, "verdict", **verdict(error))
        self.connections.drop(peer)

    def _fail(self, peer: Peer, number: int, message: dict[str, Any]) -> None:
        fix = f"it says: {message['sentence']}"
        self._end(UserError(ExitCode(message["code"]), f"{peer.name} of the run has failed", "", fix), peer, number)

    def _end(self, error: UserError, peer: Peer, number: int) -> None:
        """Tells all that have come, as it will tell those who come."""
        self._failure = error
        for known, member in [*self.members.items(), (number, peer)]:
            self._tell(member, known)

    def _tell(self, peer: Peer, number: int) -> None:
        self._told.add(number)
        if peer.address:  # process 0 hears of it last
            send(peer.connection, "verdict", **verdict(self._failure))

    def _incomplete(self, missing: list[int], misplaced: list[str]) -> UserError:
        """Returns what to end with when processes have not come. Starting again helps where they may come then."""
        what = f"process {_listed(missing)} of {self._place.n_processes} has not come within {START:.0f} s"
        refused = next((self._refused[number] for number in missing if number in self._refused), None)
        if refused:
            return UserError(refused.exit_code, f"{what}: {refused.what}", "", refused.fix)
        if misplaced and list(self.members) == [0]:
            fix = f"give the address at which all hosts reach {socket.gethostname()}, where process 0 runs"
            return UserError(unresolved(), f"{what}: {misplaced[0]}", "", fix)
        return UserError(ExitCode.TRY_AGAIN, what, "", "see why it has not started, then start all again")

    def _misplaced(self) -> list[str]:
        """Returns why the others cannot find process 0 at the address that was given, if so. A thread."""
        host = self._place.host
        try:
            # The port of JAX's coordinator, as a connection that only looks is no stranger there.
            with socket.create_connection((host, self._place.port + 1), timeout=10) as connection:
                at, answer = connection.getpeername()[0], answer_of(connection)
        except TimeoutError:
            return []  # a gateway may let in only what comes from outside
        except OSError as error:
            found = f"its address {host} does not lead there ({error.strerror or error})"
        else:
            if answer.greeting and answer.greeting["id"] == self._id:
                return []
            found = f"its address {host} leads to {at}, where {answer.who} answers"
        print(f"process 0 runs on {socket.gethostname()}, but {found}", flush=True)
        return [found]


class _StrangersLog:
    """Lines on stderr, few enough that a port scan does not flood it."""

    def __init__(self) -> None:
        self._said: list[float] = []
        self._known, self._unsaid = set(), 0

    def say(self, line: str) -> None:
        now = time.monotonic()
        self._said = [when for when in self._said if now - when < _EVERY]
        if line in self._known or len(self._said) >= _LINES:
            self._unsaid += 1
            return
        self._said.append(now)
        self._known.add(line)
        print(f"warning: {line}{self._more()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._unsaid:
            print(f"warning: strangers were dropped{self._more()}", file=sys.stderr, flush=True)

    def _more(self) -> str:
        more, self._unsaid = self._unsaid, 0
        return f" ({more} more since the last such line)" if more else ""


def verdict(error: UserError, number: int = -1) -> dict[str, Any]:
    """Returns the fields of the message that lets a process end with `error`; `number` is to blame."""
    return {"number": number, "code": int(error.exit_code), "what": error.what, "where": error.where, "fix": error.fix}


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


def _listen(port: int, name: str) -> socket.socket:
    """Returns a listener on all addresses.

    Raises `UserError`: TRY_AGAIN when an earlier start still has the port, USAGE when something else has it.
    """
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=4096
        )
    except OSError as error:
        what = f"process 0 cannot listen on port {port}, {name}: {os.strerror(error.errno or 0)}"
        fix = "choose another port for the coordinator, whose next one is free too"
        if error.errno != errno.EADDRINUSE:
            raise UserError(ExitCode.USAGE, what, socket.gethostname(), fix) from error
        try:
            with socket.create_connection(("localhost", port), timeout=5) as connection:
                answer = answer_of(connection)
        except OSError:
            answer = Answer("a connection of another program", is_passing=True)
        if answer.is_passing:
            fix = "end it if it is left over from an earlier start, and start again when it has ended"
        what = f"process 0 cannot listen on port {port}, {name}: {answer.who} has it"
        code = ExitCode.TRY_AGAIN if answer.is_passing else ExitCode.USAGE
        raise UserError(code, what, socket.gethostname(), fix) from error
