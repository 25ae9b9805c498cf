"""Why a request gets no tags."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pipeline.prepare.clip import Reason


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818  an answer, not a fault of the service
    """A request that gets no tags."""

    status: int
    reason: str
    message: str
    retry_after_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"error": {"reason": self.reason, "message": self.message}}


STATUS = {
    Reason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.TOO_LONG: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
    Reason.CRASHED: HTTPStatus.UNPROCESSABLE_ENTITY,
}
"""The status of a reason. Others are 422: the request is well formed, and its recording is not."""

OWN_WORDS = {
    Reason.CRASHED: "the decoder crashed on this recording",
    Reason.UNFORESEEN: "the decoder failed on this recording",
    Reason.MISSING_FILE: "the recording could not be opened",
    Reason.NETWORK: "the recording could not be read",
}
"""Messages of reasons whose own message may name files or processes of the server."""


def refusal_of(reason: Reason, message: str) -> Refusal:
    """The refusal of a recording that could not be read."""
    status = STATUS.get(reason, HTTPStatus.UNPROCESSABLE_ENTITY)
    return Refusal(status, str(reason), OWN_WORDS.get(reason, message))
