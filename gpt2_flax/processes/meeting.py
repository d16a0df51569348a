"""The hub in process 0 gathers the processes of a run.

It listens on two ports until all processes have come: PORT, its own, and PORT + 1, which JAX's coordinator uses
afterwards. Each process shows that it reaches both ports. Strangers are dropped and named in the log. After the start
nobody is admitted. With a shared secret, no process without it is admitted.
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
from gpt2_flax.processes.messages import (
    SECRET,
    Answer,
    Connections,
    Peer,
    answer_of,
    proof,
    proves,
    quoted_beginning,
    send,
    shared_secret,
    unresolved,
    verdict_of,
)
from gpt2_flax.processes.place import Place

START = 300.0  # seconds in which all processes must come
LINGER = 20.0  # seconds in which late processes still hear of the failure of another process
HELLO = 15.0  # seconds that a stranger has to say hello
MOST_STRANGERS = 256  # connected at once
_LINES, _EVERY = 5, 60.0  # at most this many lines about strangers in this many seconds


class Meeting:
    """Listens on both ports from its creation on; raises `UserError` if a port is taken, see `_listener`."""

    def __init__(self, place: Place):
        self._place, self._secret = place, shared_secret()
        names = {place.port: "its own", place.port + 1: "that of JAX's coordinator"}
        self._listeners = [_listener(port, name) for port, name in names.items()]
        self._id, self._log = secrets.token_hex(16), _StrangersLog()
        self._refused: dict[int, UserError] = {}  # by the number in the refused process's hello
        self._failure: UserError | None = None
        self._told: set[int] = set()  # numbers of the processes that know of the failure
        self.members: dict[int, Peer] = {}
        self.connections = Connections()
        for listener in self._listeners:
            self.connections.listen(listener)
        self.own, connection = socket.socketpair()
        """The connection of process 0 to the hub; process 0 says hello before the thread starts."""
        self.connections.add(connection)

    def gather(self) -> None:
        """Wait for all processes.

        Raises:
            UserError: the error that ends all processes. TRY_AGAIN when a process does not come, USAGE when numbers or
                secrets do not match, or the error of a process that failed.
        """
        begun, told, misplaced = time.monotonic(), False, []
        try:
            while not self._failure and len(self.members) < self._place.n_processes:
                self._hear(min(0.5, START / 10))
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
                    self._hear(min(0.5, LINGER / 10))
                raise self._failure
        finally:
            for listener in self._listeners:
                self.connections.stop_listening(listener)
            for stranger in set(self.connections.peers()) - set(self.members.values()):
                self.connections.drop(stranger)
            self._log.close()

    def _hear(self, seconds: float) -> None:
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
        # The run has not started, so another process may come in place of one that is gone.
        self.members = {number: peer for number, peer in self.members.items() if not peer.gone}
        strangers = [peer for peer in self.connections.peers() if peer.address and peer.number not in self.members]
        for peer in strangers:
            if time.monotonic() - peer.heard > HELLO:
                self._drop(peer)
        for peer in strangers[:-MOST_STRANGERS]:
            self._drop(peer)

    def _greet(self, peer: Peer) -> None:
        peer.nonce = secrets.token_hex(16)
        name = f"process 0 (host {socket.gethostname()}, pid {os.getpid()})"
        values = {"id": self._id, "nonce": peer.nonce, "secret": bool(self._secret), "attempt": self._place.attempt}
        send(peer.connection, "greeting", **values, name=name)

    def _drop(self, peer: Peer) -> None:
        if not peer.gone:
            self.connections.drop(peer)
        if not peer.name:
            said = peer.nonsense or (peer.rest and quoted_beginning(peer.rest)) or "nothing"
            self._log.add(f"a stranger at {peer.address}, no process of this run, was dropped; it said {said}")

    def _welcome(self, peer: Peer, hello: dict[str, Any]) -> None:
        """Admit a process that said hello, refuse it, or end the run because of it."""
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
            self._tell(peer, number, self._failure)
        elif hello["code"]:
            self._fail(peer, number, hello)
        elif n_processes != own:
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
        """Send a process away that may not belong to this run; the run waits for the right process."""
        if 0 < number < self._place.n_processes:
            self._refused[number] = error
        self._log.add(f"refused, at {peer.address}: {error.what}")
        send(peer.connection, "verdict", **verdict_of(error))
        self.connections.drop(peer)

    def _fail(self, peer: Peer, number: int, message: dict[str, Any]) -> None:
        fix = f"it says: {message['sentence']}"
        self._end(UserError(ExitCode(message["code"]), f"{peer.name} of the run has failed", "", fix), peer, number)

    def _end(self, error: UserError, peer: Peer, number: int) -> None:
        """End all processes that have come; processes that come later get the same verdict."""
        self._failure = error
        for known, member in [*self.members.items(), (number, peer)]:
            self._tell(member, known, error)

    def _tell(self, peer: Peer, number: int, error: UserError) -> None:
        self._told.add(number)
        if peer.address:  # process 0 gets the verdict last, see `Hub`
            send(peer.connection, "verdict", **verdict_of(error))

    def _incomplete(self, missing: list[int], misplaced: list[str]) -> UserError:
        """Return the error when processes have not come: TRY_AGAIN if they may come after another start."""
        what = f"process {_listed(missing)} of {self._place.n_processes} has not come within {START:.0f} s"
        refused = next((self._refused[number] for number in missing if number in self._refused), None)
        if refused:
            return UserError(refused.exit_code, f"{what}: {refused.what}", "", refused.fix)
        if misplaced and list(self.members) == [0]:
            fix = f"give the address at which all hosts reach {socket.gethostname()}, where process 0 runs"
            return UserError(unresolved(), f"{what}: {misplaced[0]}", "", fix)
        return UserError(ExitCode.TRY_AGAIN, what, "", "see why it has not started, then start all again")

    def _misplaced(self) -> list[str]:
        """Return why other processes cannot find process 0 at its address, or nothing. Runs in a thread."""
        host = self._place.host
        try:
            # On the second port a connection that only looks is not logged as a stranger.
            with socket.create_connection((host, self._place.port + 1), timeout=10) as connection:
                at, answer = connection.getpeername()[0], answer_of(connection)
        except TimeoutError:
            return []  # a gateway may admit connections from outside only
        except OSError as error:
            found = f"its address {host} does not lead there ({error.strerror or error})"
        else:
            if answer.greeting and answer.greeting["id"] == self._id:
                return []
            found = f"its address {host} leads to {at}, where {answer.who} answers"
        print(f"process 0 runs on {socket.gethostname()}, but {found}", flush=True)
        return [found]


class _StrangersLog:
    """Prints warnings on stderr, few enough that a port scan does not flood it."""

    def __init__(self) -> None:
        self._times: list[float] = []  # when the latest lines were printed
        self._lines: set[str] = set()
        self._left_out = 0

    def add(self, line: str) -> None:
        now = time.monotonic()
        self._times = [when for when in self._times if now - when < _EVERY]
        if line in self._lines or len(self._times) >= _LINES:
            self._left_out += 1
            return
        self._times.append(now)
        self._lines.add(line)
        print(f"warning: {line}{self._more()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._left_out:
            print(f"warning: strangers were dropped{self._more()}", file=sys.stderr, flush=True)

    def _more(self) -> str:
        more, self._left_out = self._left_out, 0
        return f" ({more} more since the last such line)" if more else ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


def _listener(port: int, name: str) -> socket.socket:
    """Return a listening socket for all addresses of this host.

    Raises:
        UserError: TRY_AGAIN when a process of an earlier start has the port, USAGE when another program has it.
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
