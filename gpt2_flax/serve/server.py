"""A server for one model: a page to try it, and OpenAI's completions."""

import errno
import ipaddress
import socket
import sys
import time
from types import FrameType

import uvicorn

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.generate import Generator
from gpt2_flax.interruption import handled_by
from gpt2_flax.serve.api import About, make_app
from gpt2_flax.serve.completion import Limits
from gpt2_flax.serve.queue import RequestQueue


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: CANT_CREATE, when the port is not available; USAGE, when the host is not known.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UserError(ExitCode.USAGE, "host not known", host, "give an address of this machine") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        what, fix = {
            errno.EADDRINUSE: ("port in use", "give another with --port"),
            errno.EACCES: ("no permission for this port", "give one from 1024 on with --port"),
            errno.EADDRNOTAVAIL: ("not an address of this machine", "use 127.0.0.1, or 0.0.0.0 for all"),
        }.get(error.errno or 0, ("no port to listen at", f"the system says: {error.strerror}"))
        raise UserError(ExitCode.CANT_CREATE, what, f"{host}:{port}", fix) from None


def serve(source: Source, name: str, listener: socket.socket, limits: Limits) -> None:
    """Answer requests until Ctrl-C, SIGTERM or another of `SIGNALS`; a second signal cuts off running requests."""
    about = About(name, source.model.parameters, source.model.n_positions, source.step, int(time.time()))
    server = make_server(Generator(source), about, listener, limits)
    host, port = listener.getsockname()[:2]
    if not _is_local(host):
        print("warning: whoever reaches this machine can use the model; there is no password", file=sys.stderr)
    url = f"http://{_in_url(host)}:{port}/"
    print(f"serving {name}, {about.parameters:,} parameters, at {url} (Ctrl-C ends it)", flush=True)
    with handled_by(server.handle_exit):
        server.run([listener])
    print("ended")


def make_server(generator: Generator, about: About, listener: socket.socket, limits: Limits) -> uvicorn.Server:
    """Return the server for `listener`; set its `should_exit` to True to end it."""
    host, queue = listener.getsockname()[0], RequestQueue(generator, limits)
    config = uvicorn.Config(
        make_app(queue, about, limits, _in_url(host) if _is_local(host) else None),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.closing_seconds) + 3,
    )
    return _Server(config, queue, limits.closing_seconds)


def _is_local(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    """Closes the queue on shutdown, and does not raise the signal again afterwards: a shutdown is no failure."""

    def __init__(self, config: uvicorn.Config, queue: RequestQueue, patience: float):
        super().__init__(config)
        self.queue, self._patience = queue, patience

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.close(self._patience)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._patience = 0.0
            self.queue.close(0.0)
        self.should_exit = True
