"""What goes wrong for a client: a status code and the JSON that clients of OpenAI's API expect."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gpt2_flax.errors import quote


class ApiError(Exception):
    """A request that is not answered with text; `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, object]:
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        named = {"type": kind.get(self.status, "invalid_request_error"), "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **named}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        # A request takes seconds, so does a restart; a client that waits a little less only asks twice.
        retry = {"Retry-After": "2"} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), self.status, {**retry, **(headers or {})})


def no_such_model(name: str, ours: str) -> ApiError:
    return ApiError(404, f"model: there is no {quote(name)} here, only {quote(ours)}", "model", "model_not_found")


BUG = ApiError(500, "a bug in the server; what it printed has the details")


async def _answer_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Answers what the framework refuses: an unknown path, a method that a path does not have."""
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message).response(error.headers)


async def _answer_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the number is the one that web servers write into their logs."""
    return Response(status_code=499)


async def _answer_bug(request: Request, error: Exception) -> Response:
    return BUG.response()


HANDLERS = {
    ApiError: _answer_api_error,
    ClientDisconnect: _answer_gone,
    HTTPException: _answer_http_error,
    Exception: _answer_bug,
}
