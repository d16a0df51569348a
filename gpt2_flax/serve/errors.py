"""Errors as clients of OpenAI's API expect them: a status code and JSON."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gpt2_flax.errors import quote


class ApiError(Exception):
    """A request that cannot be answered; `param` names the wrong field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, object]:
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        named = {"type": kind.get(self.status, "invalid_request_error"), "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **named}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        # Requests and restarts take seconds; a client that retries too early only asks twice.
        retry = {"Retry-After": "2"} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), self.status, {**retry, **(headers or {})})


def no_such_model(name: str, ours: str) -> ApiError:
    return ApiError(404, f"model: there is no {quote(name)} here, only {quote(ours)}", "model", "model_not_found")


BUG = ApiError(500, "a bug in the server; what it printed has the details")


async def _answer_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Answer a request that the framework refuses: an unknown path, or a method that the path does not have."""
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message).response(error.headers)


async def _answer_disconnected(request: Request, error: Exception) -> Response:
    """Answer a client that has disconnected; 499 is the number that web servers log for this."""
    return Response(status_code=499)


async def _answer_bug(request: Request, error: Exception) -> Response:
    return BUG.response()


HANDLERS = {
    ApiError: _answer_api_error,
    ClientDisconnect: _answer_disconnected,
    HTTPException: _answer_http_error,
    Exception: _answer_bug,
}
