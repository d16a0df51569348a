"""The routes: the page, /v1/completions and /v1/models as OpenAI's API has them, and /healthz."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeVar
from uuid import uuid4

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt2_flax.serve.completion import Completion, Limits, most_prompt_tokens, parse_completion, texts_of
from gpt2_flax.serve.errors import BUG, HANDLERS, ApiError, no_such_model
from gpt2_flax.serve.queue import Piece, RequestQueue

Result = TypeVar("Result")

# The page loads only its own three files, and no other page may frame it.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
STREAM_HEADERS = {**HEADERS, "X-Accel-Buffering": "no"}  # tells a proxy in front to forward each piece at once
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@dataclass(frozen=True)
class About:
    """The facts about the model that clients can read."""

    name: str
    parameters: int
    n_positions: int
    step: int | None
    created: int
    """Seconds since 1970."""


class Api:
    """The endpoints of one model."""

    def __init__(self, queue: RequestQueue, about: About, limits: Limits):
        self._queue, self._about, self._limits = queue, about, limits

    async def completions(self, request: Request) -> Response:
        body = await _body(request, self._limits)
        asked = parse_completion(body, self._about.name, self._limits)
        pieces = self._queue.pieces(texts_of(asked))
        if not asked.stream:
            return await _while_connected(request, self._whole(asked, pieces))
        # Errors before the first piece, such as a full queue or a prompt that is too long, set the response's status.
        first = await _while_connected(request, anext(pieces))
        return StreamingResponse(
            self._events(asked, first, pieces), media_type="text/event-stream", headers=STREAM_HEADERS
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._about.name:
            raise no_such_model(name, self._about.name)
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        self._queue.check_open()
        return JSONResponse({"status": "ok"})

    def _card(self) -> dict[str, object]:
        about, limits = self._about, self._limits
        ours = {"parameters": about.parameters, "n_positions": about.n_positions, "step": about.step}
        # The limits that error messages name; a text also ends at the last position.
        ours |= {"max_tokens": limits.max_tokens, "max_prompt_tokens": most_prompt_tokens(about.n_positions)}
        ours |= {"max_texts": limits.texts, "max_stop_strings": limits.stops}
        return {"id": about.name, "object": "model", "created": about.created, "owned_by": "gpt2_flax", **ours}

    async def _whole(self, asked: Completion, pieces: AsyncIterator[Piece]) -> Response:
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        texts, ends = [prompt if asked.echo else "" for prompt in prompts], []
        async for piece in pieces:
            texts[piece.index] += piece.text
            ends += [piece] if piece.finish_reason else []
        choices = [_choice(end.index, texts[end.index], end.finish_reason) for end in ends]
        return JSONResponse({**self._head(), "choices": choices, "usage": _usage(asked, ends)})

    async def _events(self, asked: Completion, first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncIterator[bytes]:
        head, ends, begun, piece = self._head(), [], set(), first
        try:
            while piece is not None:
                echo = asked.prompts[piece.index // asked.n] if asked.echo and piece.index not in begun else ""
                begun.add(piece.index)
                ends += [piece] if piece.finish_reason else []
                yield _event({**head, "choices": [_choice(piece.index, echo + piece.text, piece.finish_reason)]})
                piece = await anext(rest, None)
            if asked.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": _usage(asked, ends)})
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status has been sent, so clients look for an error event
            yield _event((error if isinstance(error, ApiError) else BUG).body())
            if not isinstance(error, ApiError):
                raise
        finally:
            await rest.aclose()

    def _head(self) -> dict[str, object]:
        made = {"object": "text_completion", "created": int(time.time()), "model": self._about.name}
        return {"id": f"cmpl-{uuid4().hex}", **made}


def make_app(queue: RequestQueue, about: About, limits: Limits, local: str | None) -> ASGIApp:
    """Return the ASGI app; with `local`, the only address it listens at, it answers only to names of this machine."""
    api = Api(queue, about, limits)
    routes = [Route(path, _page(*file)) for path, file in PAGE.items()]
    routes += [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name}", api.model),
        Route("/healthz", api.health),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    return _OnlyLocalNames(app, local) if local else app


class _OnlyLocalNames:
    """Refuses requests for other host names, because a website could resolve its own name to this machine.

    starlette's TrustedHostMiddleware would answer with 400 and plain text, which clients of OpenAI's API cannot read.
    """

    def __init__(self, app: ASGIApp, address: str):
        self._app, self._names = app, ("localhost", "127.0.0.1", "[::1]", address)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name.lower() in self._names:
            return await self._app(scope, receive, send)
        message = "this server answers only to localhost; start it with --host 0.0.0.0 to allow other names"
        return await ApiError(403, message).response()(scope, receive, send)


def _page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("gpt2_flax.serve").joinpath(name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return page


async def _body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request; raise `ApiError` 408, 413 or 415."""
    # Browsers let any website post other types here, without asking this server first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    body = b""
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise ApiError(413, f"the body is longer than {limits.body_bytes:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:.0f} s") from None
    return body


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`; if the client disconnects first, cancel `work` and raise `ClientDisconnect`."""
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _event(content: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _usage(asked: Completion, ends: Sequence[Piece]) -> dict[str, int]:
    """Count tokens by the last piece of each text; a prompt counts once, however many texts continue it."""
    prompt = sum(piece.prompt_tokens for piece in ends if piece.index % asked.n == 0)
    new = sum(piece.new_tokens for piece in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
