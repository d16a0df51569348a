"""A process of a run connects to the hub in process 0 and shows that it belongs to the run."""

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
from gpt2_flax.processes import meeting, messages
from gpt2_flax.processes.messages import (
    SECRET,
    Answer,
    answer_of,
    error_of,
    proof,
    proves,
    receive,
    send,
    shared_secret,
    unresolved,
)
from gpt2_flax.processes.peers import Hub
from gpt2_flax.processes.place import Place

_REACH = 10.0  # seconds in which a port answers unless a firewall is in the way


class Joined(NamedTuple):
    connection: socket.socket
    hub: str
    """The name of process 0 in errors."""
    token: str
    """A random text that only the processes of this start know."""


def join(place: Place, facts: Mapping[str, str]) -> Joined:
    """Wait until all processes have come; process 0 starts the hub.

    Args:
        place: the place of this process in the run.
        facts: texts by name that must be equal in all processes, such as versions.

    Raises:
        UserError: TRY_AGAIN when a process does not come or belongs to another start; USAGE when numbers or secrets do
            not match, or a port is taken or cannot be reached; CONFIG when `facts` differ; or another process's error.
    """
    if place.number == 0:
        hub = Hub(place)
        return _meet(place, hub.own, None, facts, start=hub.start)
    shared_secret()  # check it before waiting for process 0
    connection, greeting = _connect(place, meeting.START)
    if failure := _second_port(place, greeting):
        send(connection, **_hello(place, greeting, {}, failure.exit_code, str(failure)))
        raise failure
    return _meet(place, connection, greeting, facts)


def say_goodbye(place: Place, code: int, sentence: str) -> None:
    """Report the failure of this process before it has joined, so that the other processes do not wait for it."""
    print("reporting this failure to the other processes", flush=True)
    with contextlib.suppress(UserError):  # the verdict that answers the report
        if place.number == 0:
            hub = Hub(place)
            _meet(place, hub.own, None, {}, code, sentence, hub.start)
        else:
            _meet(place, *_connect(place, meeting.LINGER), {}, code, sentence)


def _connect(place: Place, patience: float) -> tuple[socket.socket, Mapping[str, Any]]:
    """Wait at most `patience` seconds for the hub; return a connection to it and its greeting."""
    begun, told, where = time.monotonic(), False, f"{place.host}:{place.port}"
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5.0)
        except socket.gaierror as error:
            code = ExitCode.TRY_AGAIN if error.errno == socket.EAI_AGAIN else unresolved()
            what = f"the host name of process 0 does not resolve ({error.strerror})"
            failure = UserError(code, what, where, "check the name, and the name service of this host")
        except OSError as error:  # nothing listens yet: process 0 may start later
            what = f"process 0 cannot be reached within {patience:.0f} s ({error.strerror or error})"
            fix = f"check that it runs, its address{_loopback_hint(place.host)}, and that the hosts let each other in"
            failure = UserError(ExitCode.TRY_AGAIN, what, where, fix)
        else:
            answer = answer_of(connection)
            greeting = answer.greeting
            if greeting and (greeting["attempt"] == place.attempt or not (greeting["attempt"] and place.attempt)):
                return connection, greeting
            with connection:
                failure = _not_ours(place, answer)
                if greeting:  # the other hub then names this process in its log
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
    """Return the error when another program answers at the address of the hub."""
    where, code = f"{place.host}:{place.port}", ExitCode.USAGE
    what, fix = f"{answer.who} has the port of process 0", "choose another port for the coordinator, or its right host"
    if answer.is_passing or answer.is_silent:
        code, fix = ExitCode.TRY_AGAIN, f"{fix}; one of an earlier start ends by itself"
    if answer.greeting:
        what = f"{answer.greeting['name']} belongs to attempt {answer.greeting['attempt']}, this process to attempt "
        what, fix = what + place.attempt, "end what an earlier start has left behind, then start all again"
    return UserError(code, what, where, fix)


def _second_port(place: Place, greeting: Mapping[str, Any]) -> UserError | None:
    """Return an error if the hub does not answer on the port that JAX's coordinator will use."""
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
    rest = {"nonce": secrets.token_hex(16), "attempt": place.attempt, "code": int(code), "sentence": sentence[:2000]}
    hello = {"kind": "hello", **me, "facts": dict(facts), **rest}
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
    """Say hello to the hub, call `start`, and wait until all processes have come."""
    where, hello = f"{place.host}:{place.port}", _hello(place, greeting, facts, code, sentence)
    connection.settimeout(min(0.5, messages.BEAT))
    send(connection, **hello)
    start()
    rest, patience = bytearray(), time.monotonic() + meeting.START + messages.SILENCE
    trusted = greeting is None or not shared_secret()
    ended = {"code": int(ExitCode.TRY_AGAIN), "sentence": "it was asked to end before all processes had come"}
    with cleaned_up(lambda: send(connection, "failed", **ended)):
        while time.monotonic() < patience:
            try:
                arrived = receive(connection, rest)
            except EOFError:
                break
            for message in arrived:
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


def _loopback_hint(host: str) -> str:
    """Return a hint if `host` is a name by which each host means itself."""
    with contextlib.suppress(OSError, ValueError):
        if ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            return f" ({host} is the own host of each process)"
    return ""
