"""Errors as the OpenAI API answers them: a status and {"error": {message, type, param, code}}."""

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
TYPES |= {503: "server_error"}


class ApiError(Exception):
    """Ends a request with this status. `param` names the field that is wrong, `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, why: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {why}", param)
