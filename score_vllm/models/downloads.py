"""Downloads within one deadline, and a bound on the bytes that all requests together hold before decoding is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType

import aiohttp
from vllm import envs
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError
from yarl import URL

from score_vllm.video import DecoderBusyError

# Encoded bytes, fetched or sent, over all requests of this process.
FETCHED_BYTES = 2 << 30
_CHUNK = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 10


class Budget:
    """Bytes that may be held at once. One medium alone may exceed it: other limits are for that.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._lock = threading.Lock()

    def lease(self) -> Lease:
        """Room for one medium."""
        return Lease(self)

    def move(self, size: int, own: int) -> None:
        """Take ``size`` bytes more for who holds ``own``, or give back where it is negative.

        Raises:
            DecoderBusyError: others hold too much.
        """
        with self._lock:
            if size > 0 and self.held > own and self.held + size > self.most:
                raise DecoderBusyError(
                    "other requests take all the memory for media that this server has; try again later"
                )
            self.held += size


class Lease:
    """The bytes of one medium; all are given back when the block ends."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._own = 0

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more; raises DecoderBusyError as :meth:`Budget.move`."""
        self._budget.move(size, self._own)
        self._own += size

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.move(-self._own, self._own)
        self._own = 0


# Of the medium that the running task fetches.
current_lease: ContextVar[Lease | None] = ContextVar("score_lease", default=None)
# Raises ValueError for an address that this server may not fetch; of the medium that the running task fetches.
check_address: ContextVar[Callable[[str], None] | None] = ContextVar("score_check_address", default=None)


class Downloads(HTTPConnection):
    """vLLM's client; each download within its seconds, counted while it runs."""

    async def async_get_bytes(  # type: ignore[override]
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
    ) -> bytes:
        """The body of a response; lost connections and 5xx are tried again, as often as vLLM does.

        Raises:
            TimeoutError: ``timeout`` seconds are over.
            ValueError: it redirects to an address that may not be fetched.
            MediaDownloadSizeExceededError: more than ``max_bytes`` or vLLM's own limit.
            DecoderBusyError: other requests hold too much.
            aiohttp.ClientError: no whole response.
        """
        own = envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB << 20
        most = min(size for size in (max_bytes, own, 1 << 62) if size is not None and size > 0)
        tries = max(envs.VLLM_MEDIA_FETCH_MAX_RETRIES, 1)
        lease = current_lease.get() or Budget(most).lease()
        # The only clock: aiohttp would take our cancellation for a timeout of its own.
        async with asyncio.timeout(timeout):
            for attempt in range(1, tries + 1):
                try:
                    return await self._read(url, allow_redirects, most, lease)
                except (aiohttp.ClientConnectionError, aiohttp.ClientResponseError) as error:
                    if attempt == tries or (isinstance(error, aiohttp.ClientResponseError) and error.status < 500):
                        raise
                await asyncio.sleep(4 ** (attempt - 1))
        raise AssertionError("unreachable")

    async def _read(self, url: str, allow_redirects: bool, most: int, lease: Lease) -> bytes:
        data = bytearray()
        try:
            async with await self._open(url, allow_redirects) as response:
                response.raise_for_status()
                size = response.content_length or 0
                while size <= most:
                    chunk = await response.content.read(_CHUNK)
                    if not chunk:
                        return bytes(data)
                    lease.take(len(chunk))
                    data += chunk
                    size = max(size, len(data))
                raise MediaDownloadSizeExceededError(most, size)
        except BaseException:
            lease.take(-len(data))
            raise

    async def _open(self, url: str, allow_redirects: bool) -> aiohttp.ClientResponse:
        """The response at the end of all redirects, each of which is checked as the first address was."""
        check = check_address.get()
        for _ in range(_MAX_REDIRECTS + 1):
            response = await (await self.get_async_response(url, allow_redirects=False))
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response
            message = f"{response.reason}, and this server follows no redirects"
            async with response:
                if not allow_redirects:
                    raise aiohttp.ClientResponseError(
                        response.request_info, (), status=response.status, message=message
                    )
                url = str(response.url.join(URL(response.headers["Location"])))
            if check is not None:
                check(url)
        message = f"and redirects more than {_MAX_REDIRECTS} times"
        raise aiohttp.TooManyRedirects(response.request_info, (), status=response.status, message=message)
