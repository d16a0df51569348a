"""The queue of requests: one runs at a time, and a limited number of others wait."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from gpt2_flax.inference.generate import Generator, prompt_ids, stream_text
from gpt2_flax.memory import out_of_memory
from gpt2_flax.serve.completion import Limits, StopStrings, Text, most_prompt_tokens
from gpt2_flax.serve.errors import ApiError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """More text of one of a request's texts; the last piece of a text has the finish reason and the token counts."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0


class RequestQueue:
    """Runs requests in the order in which they come; belongs to the event loop it is used in.

    The model computes in one other thread, one token at a time. A request whose client has disconnected ends before its
    next token.
    """

    def __init__(self, generator: Generator, limits: Limits):
        self._generator, self._limits = generator, limits
        self._thread = ThreadPoolExecutor(1, "generation")
        self._turn = asyncio.Lock()  # first come, first served
        self.n_requests = 0
        """Requests that run or wait."""
        self._deadline: float | None = None

    async def pieces(self, texts: Sequence[Text]) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a request's texts, one text after the other.

        A client that reads slowly delays no other request: its pieces are kept in memory, within the limits.

        Raises:
            ApiError: 413, 429 or 503 before the first piece; 503 later when the server shuts down.
        """
        self.check_open()
        if self.n_requests >= self._limits.max_concurrent:
            message = f"{self.n_requests} requests are running or waiting already, try again soon"
            raise ApiError(429, message, code="rate_limit_exceeded")
        self.n_requests += 1
        made: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        making = asyncio.create_task(self._make(texts, made.put_nowait))
        making.add_done_callback(self._leave)
        try:
            while (piece := await made.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            making.cancel()

    def check_open(self) -> None:
        """Raise `ApiError` (503) when the server is shutting down."""
        if self._deadline is not None:
            raise ApiError(503, "the server is shutting down")

    def close(self, patience: float) -> None:
        """Start no more requests; the running request has `patience` seconds to end."""
        self._deadline = time.monotonic() + patience

    def _leave(self, _: asyncio.Task[None]) -> None:
        self.n_requests -= 1

    async def _make(self, texts: Sequence[Text], put: Callable[[Piece | Exception | None], None]) -> None:
        try:
            async with self._turn:
                self.check_open()
                prompts = [await self._compute(self._prompt_ids, text) for text in texts]  # all, before the first text
                for text, prompt in zip(texts, prompts, strict=True):
                    await self._make_text(text, prompt, put)
            put(None)
        except Exception as error:
            failure = out_of_memory(error, "this request", "lower max_tokens or shorten the prompt")
            put(error if failure is None else ApiError(500, str(failure), code="out_of_memory"))

    async def _make_text(self, text: Text, prompt: list[int], put: Callable[[Piece], None]) -> None:
        ids = await self._compute(self._generator.new_ids, prompt, text.max_tokens, text.sampling, text.seed)
        counted, stop = _CountedIds(ids), StopStrings(text.stops)
        pieces = stream_text(self._generator.tokenizer, prompt, counted)
        try:
            while not stop.found and (piece := await self._compute(lambda: next(pieces, None))) is not None:
                if certain := stop.feed(piece):
                    put(Piece(text.index, certain))
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self.check_open()
        finally:
            counted.ended = True  # ends a step in the other thread, too, which may compute many tokens without a text
        full = counted.n >= min(text.max_tokens, self._generator.decoder.cfg.n_positions - len(prompt))
        reason = "length" if full and not stop.found else "stop"
        put(Piece(text.index, stop.held, reason, len(prompt), counted.n))

    def _prompt_ids(self, text: Text) -> list[int]:
        (prompt,) = prompt_ids(self._generator.tokenizer, [text.prompt])
        positions = self._generator.decoder.cfg.n_positions
        if len(prompt) >= positions:
            most = most_prompt_tokens(positions)
            message = f"prompt: it has {len(prompt) - 1} tokens, and the model takes {most} and one new one"
            raise ApiError(413, message, "prompt", "context_length_exceeded")
        return prompt

    async def _compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class _CountedIds(Iterator[int]):
    """Ids, counted as they pass; the iterator ends when `ended` is set."""

    def __init__(self, ids: Iterator[int]):
        self.n, self.ended = 0, False
        self._ids = ids

    def __next__(self) -> int:
        if self.ended:
            raise StopIteration
        token = next(self._ids)
        self.n += 1
        return token
