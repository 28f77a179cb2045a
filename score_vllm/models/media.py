"""How pictures and videos of a request are fetched: vLLM's connector under one deadline, with statuses that say whose
fault it was.

score-serve chooses it with ``VLLM_MEDIA_CONNECTOR=score``; without that nothing of vLLM's changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from PIL import UnidentifiedImageError
from urllib3.util import parse_url
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
    VideoMediaIO,
)
from vllm.multimodal.video import get_video_loader_backend_for_processor

from score_vllm.config import MEDIA_CONNECTOR
from score_vllm.models.downloads import FETCHED_BYTES, Budget, Downloads, Lease, check_address, current_lease
from score_vllm.models.jpeg_sequence import load_jpeg_sequence
from score_vllm.models.media_error import media_error
from score_vllm.models.media_url import decode_base64, looks_like_video, split_data_url
from score_vllm.models.video_loaders import ScoreVideoLoader
from score_vllm.models.video_options import VideoOptions, decode_seconds, pending_options
from score_vllm.video import DecodeLimits, DecoderBusyError, VideoError

_downloads = Downloads()
_budget = Budget(FETCHED_BYTES)


class _Leasing:
    """A reader whose bytes are counted where it runs in a thread: there the task's own variable is not known."""

    lease: Lease | None = None

    def count(self, size: int) -> None:
        if self.lease is not None:
            self.lease.take(size)


class _ImageIO(_Leasing, ImageMediaIO):
    def load_bytes(self, data: bytes) -> Any:
        try:
            return super().load_bytes(data)
        except ValueError as error:
            if not isinstance(error.__cause__, UnidentifiedImageError):
                raise
            hint = "; it is a video, which goes into a content part of type video_url" if looks_like_video(data) else ""
            raise ValueError(f"the file is not an image in a known format{hint}") from error


class _VideoIO(_Leasing, VideoMediaIO):
    """One video: what the request says about it, and what is left of its seconds."""

    kwargs: dict[str, Any]

    def __init__(self, image_io: ImageMediaIO, options: VideoOptions, seconds: float, **kwargs: Any) -> None:
        super().__init__(image_io, **kwargs)
        self._options = options
        self._end = time.monotonic() + seconds
        self._ours = isinstance(self.video_loader, ScoreVideoLoader)
        # Decoding runs in a thread, where the request's variables are not known.
        self._decode_seconds = decode_seconds.get()

    def get_max_bytes(self) -> int | None:
        return self.kwargs.get("max_bytes")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        if self._decode_seconds is not None:
            self._decode_seconds.append(time.monotonic() - begun)

    def load_bytes(self, data: bytes) -> Any:
        with self._timed():
            return self._load_bytes(data)

    def _load_bytes(self, data: bytes) -> Any:
        if not self._ours:
            return super().load_bytes(data)
        rest = self._end - time.monotonic()
        if rest <= 0:
            raise DecoderBusyError("this server is busy: the video waited for its turn until its time was over")
        self.kwargs = {**self.kwargs, "deadline": rest, "options": self._options}
        return super().load_bytes(data)

    def load_base64(self, media_type: str, data: str) -> Any:
        if media_type != "video/jpeg":
            return self.load_bytes(decode_base64(data))
        if not self._ours:
            return super().load_base64(media_type, data)
        with self._timed():
            video = load_jpeg_sequence(data, num_frames=self.num_frames, options=self._options, **self.kwargs)
        return MediaWithBytes(video, data.encode())

    def load_file(self, filepath: Path) -> Any:
        most = self.get_max_bytes()
        if most is not None and (size := filepath.stat().st_size) > most:
            raise VideoError(f"the video has {size} bytes, more than max_bytes = {most}")
        return super().load_file(filepath)


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class ScoreMediaConnector(MediaConnector):
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"connection": _downloads, **kwargs})
        self.budget = _budget
        self.seconds = float(self.media_io_kwargs.get("video", {}).get("deadline", DecodeLimits().deadline))

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: Any = None) -> Any:
        """vLLM's, within the deadline; raises what :func:`media_error` makes of anything that goes wrong."""
        try:
            with self.budget.lease() as lease:
                current_lease.set(lease)
                check_address.set(lambda target: self._assert_url_in_allowed_media_domains(parse_url(target)))
                if isinstance(media_io, _Leasing):
                    media_io.lease = lease
                return await super().load_from_url_async(url, media_io, fetch_timeout=self.seconds)  # type: ignore[arg-type]
        except Exception as error:
            # vLLM wraps what the far server said, under the name of another field.
            wrapped = isinstance(error, VLLMUnprocessableEntityError) and isinstance(error.__cause__, Exception)
            cause = error.__cause__ if wrapped else error
            parameter = "video_url" if isinstance(media_io, VideoMediaIO) else "image_url"
            raise media_error(cause, parameter, self.seconds) from error  # type: ignore[arg-type]

    def fetch_video(self, video_url: str, *, image_mode: Any = "RGB", video_processor: str | None = None) -> Any:
        """vLLM's, with the request's options."""
        return self.load_from_url(video_url, self._video_io(image_mode, video_processor))

    async def fetch_video_async(
        self, video_url: str, *, image_mode: Any = "RGB", video_processor: str | None = None
    ) -> Any:
        """vLLM's, with the request's options."""
        return await self.load_from_url_async(video_url, self._video_io(image_mode, video_processor))

    async def fetch_image_async(self, image_url: str, *, image_mode: Any = "RGB") -> Any:
        """vLLM's, with a hint where a video was sent."""
        return await self.load_from_url_async(image_url, self._image_io(image_mode))

    def _image_io(self, image_mode: Any) -> ImageMediaIO:
        return _ImageIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))

    def _video_io(self, image_mode: Any, video_processor: str | None) -> VideoMediaIO:
        kwargs = dict(self.media_io_kwargs.get("video", {}))
        if (backend := get_video_loader_backend_for_processor(video_processor)) is not None:
            kwargs.setdefault("video_backend", backend)
        # Fetches begin in the order of the videos in the request: each takes the next one's options.
        pending = pending_options.get()
        options = VideoOptions() if pending is None else next(pending, VideoOptions())
        return _VideoIO(self._image_io(image_mode), options, self.seconds, **kwargs)

    def _load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        media_type, payload = split_data_url(url)
        if isinstance(media_io, _Leasing):
            media_io.count(len(payload))
        if isinstance(media_io, _VideoIO):
            return media_io.load_base64(media_type, payload)
        return media_io.load_bytes(decode_base64(payload))

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        root = self.allowed_local_media_path
        if root is None:
            raise ValueError(
                "file:// is switched off here; an operator allows a folder with --allowed-local-media-path"
            )
        path = Path(url2pathname((url_spec.netloc or "") + (url_spec.path or ""))).resolve()
        if root not in path.parents:
            raise ValueError("a file:// URL must lie in the folder of --allowed-local-media-path")
        if path.exists() and not path.is_file():
            raise ValueError("the file:// URL does not name a regular file")
        if isinstance(media_io, _Leasing):
            media_io.count(path.stat().st_size)
        return media_io.load_file(path)
