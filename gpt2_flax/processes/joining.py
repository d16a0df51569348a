"""How a process of a run comes to the hub in process 0, and shows that it belongs to the run."""

import contextlib
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.interruption import cleaned_up
from gpt2_flax.processes import meeting, peers
from gpt2_flax.processes.answers import Answer, answer_of, unresolved
from gpt2_flax.processes.messages import SECRET, proof, proves, receive, send, shared_secret
from gpt2_flax.processes.peers import Hub
from gpt2_flax.processes.place import Place

_REACH = 10.0  # seconds in which a port answers, or a firewall is in the way


class Joined(NamedTuple):
    connection: socket.socket
    hub: str
    """What to call process 0."""
    token: str
    """Which all processes of this start know, and no other start has."""


def join(place: Place, facts: Mapping[str, str]) -> Joined:
    """Waits until all processes have come; process 0 brings the peers.

    Raises `UserError`: TRY_AGAIN when a process does not come or belongs to another start, USAGE when numbers or
    secrets do not fit or a port is taken or not reached, CONFIG when `facts` differ; or what another has failed with.
    """
    if place.number == 0:
        own = Hub(place)
        return _meet(place, own.own, None, facts, start=own.start)
    shared_secret()  # a bad one does not wait for process 0
    connection, greeting = _arrive(place, meeting.START)
    if failure := _second_port(place, greeting):
        send(connection, **_hello(place, greeting, {}, failure.exit_code, str(failure)))
        raise failure
    return _meet(place, connection, greeting, facts)


def say_goodbye(place: Place, code: int, sentence: str) -> None:
    """Lets the others know what this process has failed with before it came, so that they do not wait for it."""
    print("letting the other processes know that this one ends", flush=True)
    with contextlib.suppress(UserError):  # which answers it
        if place.number == 0:
            own = Hub(place)
            _meet(place, own.own, None, {}, code, sentence, own.start)
        else:
            _meet(place, *_arrive(place, meeting.LINGER), {}, code, sentence)


def _arrive(place: Place, patience: float) -> tuple[socket.socket, Mapping[str, Any]]:
    """Returns a connection to the peers, for which it waits, and the hub's greeting."""
    begun, told, where = time.monotonic(), False, f"{place.host}:{place.port}"
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5.0)
        except socket.gaierror as error:
            code = ExitCode.TRY_AGAIN if error.errno == socket.EAI_AGAIN else unresolved()
            what = f"the host name of process 0 does not resolve ({error.strerror})"
            failure = UserError(code, what, where, "check the name, and the name service of this host")
        except OSError as error:  # nobody listens yet: process 0 may be started later
            what = f"process 0 cannot be reached within {patience:.0f} s ({error.strerror or error})"
            fix = f"check that it runs, its address{_own(place.host)}, and that the hosts let each other in"
            failure = UserError(ExitCode.TRY_AGAIN, what, where, fix)
        else:
            answer = answer_of(connection)
            greeting = answer.greeting
            if greeting and (greeting["attempt"] == place.attempt or not (greeting["attempt"] and place.attempt)):
                return connection, greeting
            with connection:
                failure = _not_ours(place, answer)
                if greeting:  # so that it names this process
                    send(connection, **_hello(place, greeting, {}))
                elif not (answer.is_passing or answer.is_silent):
                    raise failure
        if time.monotonic() - begun > patience:
            raise failure
        if time.monotonic() - begun > min(10.0, patience / 2) and not told:
            told = True
            print(f"waiting for process 0: {failure.what}: {where}", flush=True)
        time.sleep(min(1.0, patience / 10))


def _not_ours(place: Place, answer: Answer) -> UserError:
    """Returns what to say of one that answers in place of the hub of this start."""
    where, code = f"{place.host}:{place.port}", ExitCode.USAGE
    what, fix = f"{answer.who} has the port of process 0", "choose another port for the coordinator, or its right host"
    if answer.is_passing or answer.is_silent:
        code, fix = ExitCode.TRY_AGAIN, f"{fix}; one of an earlier start ends by itself"
    if answer.greeting:
        what = f"{answer.greeting['name']} belongs to attempt {answer.greeting['attempt']}, this process to attempt "
        what, fix = what + place.attempt, "end what an earlier start has left behind, then start all again"
    return UserError(code, what, where, fix)


def _second_port(place: Place, greeting: Mapping[str, Any]) -> UserError | None:
    """Returns what to say when the hub does not answer on the port that JAX's coordinator takes later."""
    port = place.port + 1
    try:
        with socket.create_connection((place.host, port), timeout=_REACH) as connection:
            answer = answer_of(connection)
    except OSError as error:
        found = error.strerror or str(error)
    else:
        if answer.greeting and answer.greeting["id"] == greeting["id"]:
            return None
        found = f"{answer.who} answers"
    what = f"port {port} of process 0 cannot be reached, port {place.port} can ({found})"
    fix = f"let the hosts reach both ports, {place.port} and {port}: JAX's coordinator takes the second"
    return UserError(ExitCode.USAGE, what, f"{place.host}:{port}", fix)


def _hello(
    place: Place, greeting: Mapping[str, Any] | None, facts: Mapping[str, str], code: int = 0, sentence: str = ""
) -> dict[str, Any]:
    me = {"number": place.number, "n_processes": place.n_processes, "host": socket.gethostname(), "pid": os.getpid()}
    said = {"nonce": secrets.token_hex(16), "attempt": place.attempt, "code": int(code), "sentence": sentence[:2000]}
    hello = {"kind": "hello", **me, "facts": dict(facts), **said}
    return hello if greeting is None else hello | {"proof": proof(shared_secret(), greeting["nonce"], hello)}


def _meet(
    place: Place,
    connection: socket.socket,
    greeting: Mapping[str, Any] | None,
    facts: Mapping[str, str],
    code: int = 0,
    sentence: str = "",
    start: Callable[[], None] = lambda: None,
) -> Joined:
    """Says hello, calls `start`, and waits until all have come."""
    where, hello = f"{place.host}:{place.port}", _hello(place, greeting, facts, code, sentence)
    connection.settimeout(min(0.5, peers.BEAT))
    send(connection, **hello)
    start()
    rest, patience = bytearray(), time.monotonic() + meeting.START + peers.SILENCE
    trusted = greeting is None or not shared_secret()
    ended = {"code": int(ExitCode.TRY_AGAIN), "sentence": "it was asked to end before all processes had come"}
    with cleaned_up(lambda: send(connection, "failed", **ended)):
        while time.monotonic() < patience:
            try:
                messages = receive(connection, rest)
            except EOFError:
                break
            for message in messages:
                match message["kind"]:
                    case "welcome" if greeting is not None:
                        trusted = proves(message["proof"], shared_secret(), hello["nonce"], greeting["nonce"])
                        if not trusted:
                            what, fix = f"process 0 has another {SECRET}", f"give all processes the same {SECRET}"
                            raise UserError(ExitCode.USAGE, what, where, fix)
                    case "started" if trusted:
                        return Joined(connection, message["hub"], message["token"])
                    case "verdict":
                        raise error_of(message, where)
    raise UserError(ExitCode.TRY_AGAIN, "process 0 has ended before all had come", where, "start all again")


def error_of(verdict: Mapping[str, Any], where: str) -> UserError:
    """Returns what the hub lets all processes end with; `where` stands in for a place that it does not name."""
    return UserError(ExitCode(verdict["code"]), verdict["what"], verdict["where"] or where, verdict["fix"])


def _own(host: str) -> str:
    """Returns a hint where a name is another host's on each host."""
    with contextlib.suppress(OSError, ValueError):
        if ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            return f" ({host} is the own host of each process)"
    return ""
