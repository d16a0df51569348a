"""A completion request: the fields of OpenAI's /v1/completions, two more fields, and limits."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import pydantic_core
from pydantic import ConfigDict, Field

from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.serve.errors import ApiError, no_such_model


@dataclass(frozen=True)
class Limits:
    max_tokens: int = 512
    """Most new tokens of a text."""
    max_concurrent: int = 4
    """Most requests that run or wait."""
    body_bytes: int = 2**18
    """Longest body of a request."""
    body_seconds: float = 10.0
    """Most seconds for a client to send the body."""
    texts: int = 16
    """Most texts of a request: prompts times n."""
    stops: int = 16
    """Most stop strings of a request; OpenAI's clients send up to 4, clients of other servers more."""
    stop_characters: int = 100
    """Longest stop string."""
    closing_seconds: float = 5.0
    """Most seconds that a running request may continue when the server shuts down."""


class StreamOptions(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False


class Completion(pydantic.BaseModel):
    """The fields and defaults of OpenAI's API; unsupported fields are accepted only at their neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    prompt: str | Annotated[list[str], Field(min_length=1)]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | list[str] = []
    seed: int | None = Field(None, ge=0, lt=2**32)
    echo: bool = False
    user: str | None = None
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=1.0, le=10.0)
    best_of: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, repetition_penalty=self.repetition_penalty)


@dataclass(frozen=True)
class Text:
    """One text to generate: a request has n texts for each of its prompts."""

    index: int
    prompt: str
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...]


def parse_completion(body: bytes, model: str, limits: Limits) -> Completion:
    """Return the request in `body`; raise `ApiError` 400 that names the wrong field, or 404 for another model."""
    try:
        fields = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        asked = Completion.model_validate({name: value for name, value in fields.items() if value is not None})
    except pydantic.ValidationError as errors:
        raise _explained(errors) from None
    if asked.model not in (None, model):
        raise no_such_model(asked.model, model)
    if asked.max_tokens > limits.max_tokens:
        message = f"max_tokens: {asked.max_tokens} is more than this server allows, {limits.max_tokens}"
        raise ApiError(400, message, "max_tokens")
    if asked.n * len(asked.prompts) > limits.texts:
        param = "n" if asked.n > 1 else "prompt"
        message = f"{param}: prompts times n is {asked.n * len(asked.prompts)}, this server allows {limits.texts}"
        raise ApiError(400, message, param)
    if len(asked.stops) > limits.stops:
        raise ApiError(400, f"stop: {len(asked.stops)} strings, this server allows {limits.stops}", "stop")
    if not all(0 < len(stop) <= limits.stop_characters for stop in asked.stops):
        raise ApiError(400, f"stop: each string must have 1 to {limits.stop_characters} characters", "stop")
    return asked


def most_prompt_tokens(n_positions: int) -> int:
    """Return the most tokens of a prompt: the begin of the document and one new token need a position each."""
    return n_positions - 2


def texts_of(asked: Completion) -> list[Text]:
    """Return the texts to generate, the n samples of a prompt one after another, each with its own seed."""
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
    return [
        Text(index, prompt, asked.max_tokens, asked.sampling, (seed + index) % 2**32, asked.stops)
        for index, prompt in enumerate(prompts)
    ]


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string; holds back a possible start of a stop string."""

    def __init__(self, stops: tuple[str, ...]):
        self.found = False
        self._stops, self.held = stops, ""
        """The text that is held back; it belongs to the text when no more pieces come."""

    def feed(self, piece: str) -> str:
        """Return the text that is now certain; once a stop string is `found`, the text has ended."""
        text = self.held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _explained(errors: pydantic.ValidationError) -> ApiError:
    """Return the first error as a sentence that begins with the field's name."""
    first = errors.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return ApiError(400, f"{name}: there is no such field", name)
    if name in ("prompt", "stop") and first["type"] not in ("missing", "string_unicode"):
        return ApiError(400, f"{name}: a string or a list of strings, please", name)
    if name in ("best_of", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "suffix"):
        return ApiError(400, f"{name}: this server does not support it", name)
    return ApiError(400, f"{name}: {first['msg']}", name)
