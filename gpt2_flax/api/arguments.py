"""The arguments of public functions: their types and bounds, and the sentence for a wrong value."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationError

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.folders import HubModel, corpus_source, is_utf8, local_path, model_place, path_or_address
from gpt2_flax.input_files import MOST_POSITIONS, MOST_ROWS, MOST_STEPS

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise `UserError` (USAGE) for a value that does not suit the annotation of its argument.

    Annotations in quotation marks are not checked. Of the others, pydantic knows the meaning.
    """
    signature = inspect.signature(function)

    @functools.cache
    def adapter(name: str) -> TypeAdapter | None:
        annotation = signature.parameters[name].annotation
        return None if annotation is inspect.Parameter.empty or isinstance(annotation, str) else TypeAdapter(annotation)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if (checks := adapter(name)) is not None:
                try:
                    bound.arguments[name] = checks.validate_python(value)
                except ValidationError as error:
                    reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                    fix = f"{reason[0].lower()}{reason[1:]}, not {quote(value)}"
                    where = f"gpt2_flax.{function.__qualname__}"
                    raise UserError(ExitCode.USAGE, f"bad value of {name}", where, fix) from None
        return function(*bound.args, **bound.kwargs)

    return call


def _text_of(given: object) -> str:
    if not isinstance(given, str | os.PathLike):
        raise ValueError("give a string or a path")
    return os.fspath(given)


def sources_of(corpus: object) -> list[str]:
    """Return the sources of a corpus: of one string or path, or of a list of them."""
    several = corpus if isinstance(corpus, list | tuple) else [corpus]
    return [corpus_source(_text_of(one)) for one in several]


def _model_place(given: object) -> Path | HubModel:
    return model_place(_text_of(given), guess=isinstance(given, str))


def _utf8(text: str) -> str:
    if not is_utf8(text):
        raise ValueError("give text that UTF-8 can encode")
    return text


Text = Annotated[str, AfterValidator(_utf8)]
LocalPath = Annotated[str | os.PathLike[str], PlainValidator(lambda given: Path(local_path(_text_of(given))))]
ModelPlace = Annotated[str | os.PathLike[str], PlainValidator(_model_place)]
PathOrAddress = Annotated[str | os.PathLike[str], PlainValidator(lambda given: path_or_address(_text_of(given)))]
Source = Annotated[str | os.PathLike[str], PlainValidator(lambda given: corpus_source(_text_of(given)))]
Corpus = Annotated[str | os.PathLike[str] | list[str] | list[Path], PlainValidator(sources_of)]
Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Positive = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Length = Annotated[int, Field(ge=1, le=MOST_POSITIONS)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
