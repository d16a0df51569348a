"""Who answers at an address where process 0 of a run should be."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode
from gpt2_flax.processes.messages import Nonsense, quoted_beginning, receive

QUIET = 5.0  # seconds that one may say nothing: a hub greets at once, a web server waits to be asked
_SETTINGS = 4  # type of the HTTP/2 frame that a gRPC server, such as JAX's coordinator, begins with


class Answer(NamedTuple):
    who: str
    """What to call it."""
    is_passing: bool = False
    """Whether it may be gone when one starts again."""
    greeting: Mapping[str, Any] | None = None
    """Of the hub of a run."""
    is_silent: bool = False


def answer_of(connection: socket.socket) -> Answer:
    """Returns who is on the other side of a new connection: a hub, something that says so when asked, or nobody."""
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
            if len(said) > 3 and said[3] == _SETTINGS:
                return Answer("the coordinator of another JAX program", is_passing=True)
            kind = "a web server" if "HTTP/" in str(error) else "another program"
            return Answer(f"{kind} (it says {error})")
        except (EOFError, OSError):
            break
    return Answer("another program (it says nothing)", is_silent=True)


def unresolved() -> ExitCode:
    """Returns what to exit with when a name does not resolve: in Kubernetes it comes with its host, maybe late."""
    return ExitCode.TRY_AGAIN if "KUBERNETES_SERVICE_HOST" in os.environ else ExitCode.USAGE
