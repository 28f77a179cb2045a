"""Fetching media: data URLs as they are written, media servers that misbehave, statuses that say whose fault it was."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import os
import resource
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")
from vllm.connections import HTTPResponseSizeExceededError
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, VideoMediaIO

from score_vllm.config import MEDIA_CONNECTOR
from score_vllm.models import downloads, media, media_error, video_loaders
from score_vllm.models.media_url import decode_base64, looks_like_video, split_data_url
from score_vllm.models.video_options import VideoOptions, pending_options
from score_vllm.video import DecoderBusyError, DecoderUnavailableError, VideoError, decode_video
from tests.conftest import moving_square, write_clip


def connector(allowed: str = "", domains: tuple[str, ...] = (), **video: Any) -> MediaConnector:
    """As vLLM makes it for a request of score-serve."""
    video = {"video_backend": video_loaders.PYAV_LOADER, "num_frames": 128, "fps": 2.0, **video}
    kwargs = {"media_io_kwargs": {"video": video}, "allowed_local_media_path": allowed}
    kwargs["allowed_media_domains"] = list(domains)
    loaded = MEDIA_CONNECTOR_REGISTRY.load(MEDIA_CONNECTOR, **kwargs)
    assert type(loaded) is media.ScoreMediaConnector
    return loaded


def fetch(url: str, *options: VideoOptions, **kwargs: Any) -> Any:
    """Frames and metadata of one video, by the path of a server."""

    async def inner() -> Any:
        pending_options.set(iter(options))
        loader = connector(**kwargs)
        loader.connection = downloads.Downloads()  # the shared one belongs to the loop of a server
        try:
            return (await loader.fetch_video_async(url)).media
        finally:
            await (await loader.connection.get_async_client()).close()

    return asyncio.run(inner())


def refused(url: str, *options: VideoOptions, **kwargs: Any) -> tuple[int, str]:
    """Status and message of what the server would answer."""
    with pytest.raises((VLLMValidationError, media_error.MediaError)) as caught:
        fetch(url, *options, **kwargs)
    error = caught.value
    assert "\n" not in str(error)
    return (error.http_status if isinstance(error, media_error.MediaError) else 400), str(error)


# Data URLs


def test_nothing_of_vllm_is_replaced() -> None:
    """Another model in the process reads media as vLLM does."""
    for owner in (VideoMediaIO, MediaConnector):
        for name, value in vars(owner).items():
            assert not getattr(value, "__module__", "").startswith("score_vllm"), name


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        ("data:video/mp4;base64,", "video/mp4"),
        ("data:video/webm;codecs=vp8,opus;base64,", "video/webm"),
        ('data:video/webm;codecs="vp9,opus";base64,', "video/webm"),
        ("data:VIDEO/MP4;BASE64,", "video/mp4"),
        ("data:video/mp4; base64,", "video/mp4"),
        ("data:;base64,", ""),
    ],
)
def test_heads_that_browsers_write(head: str, media_type: str) -> None:
    assert split_data_url(head + "AA,;base64,BB") == (media_type, "AA,;base64,BB")


@pytest.mark.parametrize("url", ["data:video/mp4,plain", "data:video/mp4;base64", "data:", "data:video/mp4;base64;x"])
def test_heads_that_are_no_base64(url: str) -> None:
    with pytest.raises(ValueError, match="data:TYPE;base64,DATA"):
        split_data_url(url)


def test_base64_as_it_is_written() -> None:
    data = bytes(range(256)) * 3 + b"\xff\xfe"
    plain = base64.b64encode(data).decode()
    assert plain.endswith("=")
    written = [
        plain,
        plain + "\n",
        base64.encodebytes(data).decode(),
        "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76)),
        plain.rstrip("="),
        " " + plain,
        urllib.parse.quote(plain, safe=""),
        base64.urlsafe_b64encode(data).decode(),
    ]
    for text in written:
        assert decode_base64(text) == data
    for text in ("@@@@", "A", "AAAA*", "AA=A", "é"):
        with pytest.raises(ValueError, match="not valid base64"):
            decode_base64(text)


def test_what_looks_like_a_video(clips: dict[str, Path]) -> None:
    for name in ("plain", "odd", "one_pixel_wide"):
        assert looks_like_video(clips[name].read_bytes()), name
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"\0\0\0 ftypavif", b"GIF89a"):
        assert not looks_like_video(data)


def test_a_data_url_with_codecs_is_a_video(clips: dict[str, Path]) -> None:
    data = base64.encodebytes(clips["plain"].read_bytes()).decode().rstrip("=\n")
    frames, _ = fetch("data:video/mp4;codecs=mp4v.20.9,mp4a.40.2;base64," + data)
    assert (frames == decode_video(clips["plain"].read_bytes()).frames).all()


# Options of the request


def test_each_fetch_takes_the_next_options(clips: dict[str, Path]) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clips["plain"].read_bytes()).decode()
    asked = [VideoOptions(max_frames=count) for count in (2, 8, 4, 6)]

    async def inner() -> list[int]:
        pending_options.set(iter(asked))
        loaders = [connector() for _ in range(2)]  # one per message
        fetches = [loaders[i // 2].fetch_video_async(url) for i in range(4)]
        return [len((await video).media[0]) for video in [asyncio.ensure_future(f) for f in fetches]]

    assert asyncio.run(inner()) == [2, 8, 4, 6]


def test_several_videos_are_decoded_at_once(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in the decoder before either is out."""
    both = threading.Barrier(2, timeout=60)
    inner = video_loaders.decode_video_isolated

    def met(*args: Any, **kwargs: Any) -> Any:
        both.wait()
        return inner(*args, **kwargs)

    monkeypatch.setattr(video_loaders, "decode_video_isolated", met)
    url = "data:video/mp4;base64," + base64.b64encode(clips["plain"].read_bytes()).decode()

    async def fetch_two() -> list[Any]:
        loader = connector()
        return await asyncio.gather(*(loader.fetch_video_async(url) for _ in range(2)))

    assert [len(video.media[0]) for video in asyncio.run(fetch_two())] == [12, 12]


def test_a_window_is_what_is_read(clips: dict[str, Path]) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clips["plain"].read_bytes()).decode()
    frames, metadata = fetch(url, VideoOptions(start=2, end=4, fps=4))
    expected = decode_video(clips["plain"].read_bytes(), start=2, end=4, fps=4)
    assert (frames == expected.frames).all()
    assert metadata.read == expected.report()
    assert metadata.read["window"] == [2, 4]
    status, said = refused(url, VideoOptions(start=60))
    assert status == 400
    assert said.startswith("video_start")


# JPEG sequences


def jpeg(width: int = 64, height: int = 48, value: int = 0) -> str:
    picture = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(picture, "JPEG", quality=95)
    return base64.b64encode(picture.getvalue()).decode()


def sequence(*pictures: str) -> str:
    return "data:video/jpeg;base64," + ",".join(pictures)


def test_long_jpeg_sequences_are_sampled_over_their_whole_length() -> None:
    frames, metadata = fetch(sequence(*(jpeg(value=i) for i in range(160))))
    shown = frames[:, 0, 0, 0].astype(int)
    assert len(frames) == 128
    assert (shown[0], shown[-1]) == (0, 159)
    assert set(np.diff(shown)) <= {1, 2}
    assert (metadata.read["frames"], metadata.read["source_frames"]) == (128, 160)
    frames, metadata = fetch(sequence(*(jpeg(value=i) for i in range(5))))
    assert [int(v) for v in frames[:, 0, 0, 0]] == [0, 1, 2, 3, 4], "none of a short one is dropped"


def test_the_rate_of_a_jpeg_sequence() -> None:
    url = sequence(*(jpeg(value=i) for i in range(40)))
    _, metadata = fetch(url)
    assert metadata.read["duration"] == 20, "the operator's rate"
    frames, metadata = fetch(url, VideoOptions(fps=10, start=1, end=2))
    assert metadata.read["duration"] == 4
    assert [int(v) for v in frames[:, 0, 0, 0]] == list(range(10, 20))
    frames, _ = fetch(url, VideoOptions(max_frames=4))
    assert len(frames) == 4


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-4])
def test_jpeg_sequences_that_would_last_too_long(rate: float) -> None:
    text = refused(sequence(*[jpeg()] * 8), VideoOptions(fps=rate))[1]
    assert f"8 frames at video_fps = {rate:g}" in text
    assert "max_duration = 21600 s" in text


def test_jpeg_sequences_meet_the_limits() -> None:
    limits = {"num_frames": 8, "max_pixels": 64 * 64, "max_output_bytes": 3 * 64 * 64 * 3}
    assert fetch(sequence(*[jpeg(64, 64)] * 3), **limits)[0].shape == (3, 64, 64, 3)
    for url, said in {
        sequence(jpeg(65, 64)): "max_pixels = 4096",
        sequence(*[jpeg(64, 64)] * 4): "max_output_bytes",
        sequence(base64.b64encode(b"not a picture").decode()): "frame 0 of the video/jpeg sequence is not a JPEG",
        sequence(jpeg(), "@"): "frame 1 of the video/jpeg sequence",
        sequence(
            jpeg(), jpeg(), jpeg(48, 64)
        ): "frame 2 of the video/jpeg sequence has 48x64 pixels, but frame 0 has 64x48",
    }.items():
        assert said in refused(url, **limits)[1]


def test_pictures_with_a_head_each() -> None:
    frames, _ = fetch(sequence(jpeg(value=9), "data:image/jpeg;base64", jpeg(value=200)))
    assert len(frames) == 2


# Files


def test_files(clips: dict[str, Path], tmp_path: Path) -> None:
    plain = clips["plain"]
    assert "switched off" in refused(f"file://{plain}")[1]
    allowed = str(plain.parent)
    assert len(fetch(f"file://{plain}", allowed=allowed)[0])
    assert "--allowed-local-media-path" in refused(f"file://{tmp_path}/x.mp4", allowed=allowed)[1]
    os.mkfifo(tmp_path / "fifo.mp4")
    for name, said in {"fifo.mp4": "regular file", ".": "--allowed-local", "none.mp4": "No such file"}.items():
        status, text = refused(f"file://{tmp_path}/{name}", allowed=str(tmp_path))
        assert status == 400
        assert said in text
        assert str(tmp_path) not in text
    assert "max_bytes = 100" in refused(f"file://{plain}", allowed=allowed, max_bytes=100)[1]


# Media servers


@pytest.fixture
def media_server() -> Iterator[Callable[[bytes, bytes | None], str]]:
    """Starts servers on the loopback that answer every request with ``head`` and then ``drip`` for ever."""
    stopped = threading.Event()
    sockets: list[socket.socket] = []

    def serve(listener: socket.socket, head: bytes, drip: bytes | None) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client, head, drip), daemon=True).start()

    def answer(client: socket.socket, head: bytes, drip: bytes | None) -> None:
        try:
            with client:
                client.recv(65536)
                client.sendall(head)
                while drip is not None and not stopped.wait(0.02):
                    client.sendall(drip)
        except OSError:
            pass

    def begin(head: bytes, drip: bytes | None = None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        threading.Thread(target=serve, args=(listener, head, drip), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4"

    yield begin
    stopped.set()
    for listener in sockets:
        listener.close()


ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "drip"), [(b"", b""), (b"HTTP/1.1 200 OK\r\nX-A: ", b"b"), (ENDLESS, b"x"), (ENDLESS, b"")]
)
def test_a_server_that_hangs_or_drips_ends_with_the_deadline(media_server: Any, head: bytes, drip: bytes) -> None:
    status, said = refused(media_server(head, drip), deadline=0.5)
    assert status == HTTPStatus.GATEWAY_TIMEOUT
    assert "within 0.5 s" in said


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 422, "answered 404 Not Found"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 422, "answered 403 Forbidden"),
        (b"HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\n\r\n", 502, "answered 429"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", 502, "answered 500 Oh"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", 502, "cannot be reached"),
        (b"", 502, "cannot be reached"),
        (b"nonsense\r\n\r\n", 502, "does not speak HTTP"),
        (ENDLESS + b"x" * 5000, 400, "larger than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd", 400, "not a video in an accepted container"),
    ],
)
def test_what_the_media_server_did(
    media_server: Any, monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int, said: str
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    got, text = refused(media_server(answer), max_bytes=1000)
    assert said in text
    assert got == status


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, said = refused(f"http://127.0.0.1:{port}/clip.mp4")
    assert (status, "cannot be reached: Connect" in said) == (502, True)


def test_bytes_of_all_requests_together_are_bounded(media_server: Any, clips: dict[str, Path]) -> None:
    """A download that hangs holds what has come; the next ones find no room, and all of it is given back."""
    budget = downloads.Budget(300_000)
    size = clips["plain"].stat().st_size
    data_url = "data:video/mp4;base64," + base64.b64encode(b"x" * 200_000).decode()
    hanging = media_server(ENDLESS + b"x" * 250_000, b"")
    arrived: list[int] = []

    async def inner() -> list[Any]:
        client = downloads.Downloads()
        loaders = []
        for seconds in (3.0, 30.0, 30.0, 30.0):
            loaders.append(connector(str(clips["plain"].parent), deadline=seconds))
            loaders[-1].budget, loaders[-1].connection = budget, client
        try:
            first = asyncio.ensure_future(loaders[0].fetch_video_async(hanging))
            while budget.held < 250_000 and not first.done():
                await asyncio.sleep(0.01)
            arrived.append(budget.held)
            urls = [data_url, hanging, f"file://{clips['plain']}"]
            rest = [loader.fetch_video_async(url) for loader, url in zip(loaders[1:], urls, strict=True)]
            return await asyncio.gather(first, *rest, return_exceptions=True)
        finally:
            await (await client.get_async_client()).close()

    hung, data, other, file = asyncio.run(inner())
    assert arrived == [250_000]
    assert hung.http_status == 504
    for refused_one in (data, other):
        assert (refused_one.http_status, refused_one.retry_after) == (503, 5)
        assert "memory for media" in str(refused_one)
    assert size < 50_000
    assert len(file.media[0]) == 12
    assert budget.held == 0


def test_redirects_are_held_to_what_may_be_fetched(media_server: Any, clips: dict[str, Path]) -> None:
    """An allowed host must not lead to one that is not, such as the server's own network."""
    data = clips["plain"].read_bytes()
    last = media_server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    other = last.replace("127.0.0.1", "localhost")

    def redirect(target: str) -> str:
        head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
        return media_server(head.encode())

    first = redirect(other)
    assert len(fetch(first)[0]) == 12
    assert len(fetch(first, domains=("127.0.0.1", "localhost"))[0]) == 12
    status, said = refused(first, domains=("127.0.0.1",))
    assert (status, "allowed domains" in said, "localhost" in said) == (400, True, True)
    assert refused(redirect("file:///etc/hostname"))[0] == 400
    # Relative, and to itself for ever.
    status, said = refused(redirect("/again"))
    assert (status, "more than 10 times" in said) == (422, True)


def test_redirects_can_be_switched_off(media_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    url = media_server(b"HTTP/1.1 302 Found\r\nLocation: /clip.mp4\r\nContent-Length: 0\r\n\r\n")
    status, said = refused(url)
    assert (status, "302 Found, and this server follows no redirects" in said) == (422, True)


def test_lost_connections_are_tried_again(clips: dict[str, Path]) -> None:
    """The first answer is cut off before its head."""
    data = clips["plain"].read_bytes()
    answers = [b"", b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n"]
    answers.append(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    def serve(listener: socket.socket) -> None:
        for answer in answers:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        frames, _ = fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4")
    assert len(frames) == 12


def test_no_file_handle_left_is_this_servers_fault(clips: dict[str, Path]) -> None:
    """Of a data URL and of a download; afterwards all is well."""
    url = "data:video/mp4;base64," + base64.b64encode(clips["plain"].read_bytes()).decode()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def inner() -> list[Any]:
        loader = connector()
        loader.connection = downloads.Downloads()
        await loader.fetch_video_async(url)  # what is opened once is open
        first_free = os.open(os.devnull, os.O_RDONLY)
        os.close(first_free)
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        try:
            fetches = [loader.fetch_video_async(u) for u in (url, "http://127.0.0.1:9/clip.mp4")]
            return await asyncio.gather(*fetches, return_exceptions=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for handle in held:
                os.close(handle)
            await (await loader.connection.get_async_client()).close()

    for error in asyncio.run(inner()):
        assert isinstance(error, media_error.MediaError), error
        assert (error.http_status, error.retry_after) == (503, 5)
    assert len(fetch(url)[0]) == 12


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.mp4", "nonsense", "http://", "http://[::1", "/a/b.mp4"])
def test_what_is_no_url(url: str) -> None:
    assert refused(url)[0] == 400


def test_whose_fault_it_was() -> None:
    def told(error: Exception) -> tuple[int, int | None]:
        answer = media_error.media_error(error, "video_url", 30)
        if isinstance(answer, media_error.MediaError):
            return answer.http_status, answer.retry_after
        assert isinstance(answer, VLLMValidationError)
        return 400, None

    for number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM, errno.EAGAIN):
        assert told(OSError(number, os.strerror(number))) == (503, 5)
    key: Any = aiohttp.client_reqrep.ConnectionKey("h", 80, False, False, None, None, None)
    assert told(aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "Too many open files")))[0] == 503
    assert told(aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "refused")))[0] == 502
    assert told(aiohttp.ClientConnectorError(key, socket.gaierror(socket.EAI_NONAME, "unknown")))[0] == 400
    assert told(aiohttp.ClientConnectorError(key, socket.gaierror(socket.EAI_AGAIN, "later")))[0] == 502
    assert told(aiohttp.InvalidURL("x"))[0] == 400
    assert told(HTTPResponseSizeExceededError(10, 20))[0] == 400
    assert told(PermissionError(errno.EACCES, "denied"))[0] == 400
    assert told(VideoError("damaged"))[0] == 400
    assert told(DecoderUnavailableError("no process")) == (503, 5)
    busy = DecoderBusyError("busy")
    assert told(busy) == (503, max(1, round(busy.retry_after)))
    assert media_error.media_error(RuntimeError("a bug"), "video_url", 30).args == ("a bug",), "stays a 500"


def test_a_video_that_waited_its_time_away_is_the_servers_load(clips: dict[str, Path]) -> None:
    """Not "decoding took longer than", which would blame the file."""
    video_io = connector(deadline=1e-9)._video_io("RGB", None)
    with pytest.raises(DecoderBusyError, match="waited"):
        video_io.load_bytes(clips["plain"].read_bytes())


def test_server_faults_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    media_error.media_error(OSError(errno.EMFILE, "Too many open files"), "video_url", 30)
    assert "Too many open files" in caplog.text


def test_a_video_sent_as_an_image(clips: dict[str, Path]) -> None:
    data = base64.b64encode(clips["plain"].read_bytes()).decode()
    for payload, said in {data: "it is a video", "AAAA": "not an image in a known format"}.items():
        with pytest.raises(VLLMValidationError, match=said):
            asyncio.run(connector().fetch_image_async("data:image/png;base64," + payload))
    picture = jpeg() + "\n"
    image = asyncio.run(connector().fetch_image_async("data:image/jpeg;base64," + picture)).media
    assert image.size == (64, 48)


def test_other_loaders_keep_vllms_ways(clips: dict[str, Path]) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clips["plain"].read_bytes()).decode()
    frames, _ = fetch(url, video_backend="opencv", num_frames=4)
    assert len(frames) == 4
    frames, _ = fetch(sequence(jpeg(), jpeg()), video_backend="opencv")
    assert len(frames) == 2


def test_frames_leave_the_decoder_at_the_size_of_the_model(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "large.mp4", moving_square(8, 480, 640))
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    rule = {"factor": 28, "min_pixels": 28 * 28, "max_pixels": 280 * 280}
    frames, _ = fetch(url, resize=rule)
    assert frames.shape[1:3] == (224, 308)
    frames, _ = fetch(sequence(*[jpeg(640, 480)] * 4), resize=rule)
    assert frames.shape[1:3] == (224, 308)
