"""The answer to a client whose picture or video cannot be had: whose fault it was, and what may help."""

from __future__ import annotations

import errno
import logging
import socket
from http import HTTPStatus

import aiohttp
from aiohttp.http import HttpProcessingError
from PIL import UnidentifiedImageError
from vllm.connections import HTTPResponseSizeExceededError, MediaDownloadSizeExceededError
from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMValidationError

from score_vllm.video import DecoderBusyError, DecoderUnavailableError, VideoDeadlineError, VideoError, VideoWindowError

logger = logging.getLogger(__name__)

# Errors of the operating system that a request cannot have caused.
_SERVER_FAULTS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EDQUOT, errno.EIO}
)
_RETRY_AFTER = 5


class MediaError(GracefulHTTPError):
    """A medium that cannot be had.

    Attributes:
        parameter: the field of the request that named it.
        retry_after: seconds after which asking again may help, or None.
    """

    def __init__(self, message: str, status: HTTPStatus, parameter: str, retry_after: int | None = None) -> None:
        super().__init__(message, status)
        self.parameter = parameter
        self.retry_after = retry_after


def media_error(error: Exception, parameter: str, seconds: float) -> Exception:
    """What the client is told: 4xx for its own fault, 502 and 504 for the far server's, 503 for ours."""
    if isinstance(error, DecoderBusyError):
        return MediaError(str(error), HTTPStatus.SERVICE_UNAVAILABLE, parameter, max(1, round(error.retry_after)))
    if isinstance(error, VideoWindowError):
        return VLLMValidationError(f"video_{error}", parameter=f"video_{error.field}")
    if isinstance(error, VideoDeadlineError):
        text = f"{parameter}: fetching and decoding the video took longer than deadline = {seconds:g} s"
        return VLLMValidationError(text, parameter=parameter)
    if isinstance(error, VideoError):
        return VLLMValidationError(f"{parameter}: {error}", parameter=parameter)
    if isinstance(error, HTTPResponseSizeExceededError | MediaDownloadSizeExceededError):
        text = (
            f"{parameter}: the file is larger than {error.max_bytes} bytes, the most that this server downloads (the "
            "smaller of VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB and max_bytes of --media-io-kwargs)"
        )
        return VLLMValidationError(text, parameter=parameter)
    if isinstance(error, TimeoutError):
        text = f"{parameter}: the media server did not deliver the file within {seconds:g} s"
        return MediaError(text, HTTPStatus.GATEWAY_TIMEOUT, parameter)
    if isinstance(error, aiohttp.ClientResponseError) and isinstance(error.__cause__, HttpProcessingError):
        return MediaError(f"{parameter}: the media server does not speak HTTP", HTTPStatus.BAD_GATEWAY, parameter)
    if isinstance(error, aiohttp.ClientResponseError):
        ours = error.status < 500 and error.status not in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
        status = HTTPStatus.UNPROCESSABLE_ENTITY if ours else HTTPStatus.BAD_GATEWAY
        return MediaError(f"{parameter}: the media server answered {error.status} {error.message}", status, parameter)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(error, DecoderUnavailableError) or getattr(cause, "errno", None) in _SERVER_FAULTS:
        logger.error("a medium of a request failed on this server's side: %r", error)
        text = "this server cannot read media at the moment; its log says why"
        return MediaError(text, HTTPStatus.SERVICE_UNAVAILABLE, parameter, _RETRY_AFTER)
    if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
        return VLLMValidationError(f"{parameter}: the host of the URL does not exist", parameter=parameter)
    if isinstance(error, aiohttp.InvalidURL):
        return VLLMValidationError(f"{parameter}: the URL is not valid", parameter=parameter)
    if isinstance(error, aiohttp.ClientError | ConnectionError):
        reason = getattr(cause, "strerror", None) or str(error) or type(error).__name__
        return MediaError(
            f"{parameter}: the media server cannot be reached: {reason}", HTTPStatus.BAD_GATEWAY, parameter
        )
    if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError):
        return VLLMValidationError(f"{parameter}: the file cannot be read: {error.strerror}", parameter=parameter)
    if isinstance(error, ValueError) and not isinstance(error, VLLMError):
        return VLLMValidationError(f"{parameter}: {error}", parameter=parameter)
    return error
