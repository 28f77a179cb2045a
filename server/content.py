"""The content parts of a message that carry a video: the forms clients write, brought to the one that vLLM reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vllm.exceptions import VLLMValidationError

VIDEO_TYPES = ("video_url", "video", "input_video")
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
FORM = '{"type": "video_url", "video_url": {"url": "https://... or data:video/mp4;base64,... or file://..."}}'
# What other programs call our fields, inside a content part or at the top level of a request.
ALIASES = {
    "fps": "video_fps",
    "sample_fps": "video_fps",
    "max_frames": "video_max_frames",
    "num_frames": "video_max_frames",
    "nframes": "video_max_frames",
    "start": "video_start",
    "start_time": "video_start",
    "end": "video_end",
    "end_time": "video_end",
    "stop": "video_end",
    "ratio": "retention_ratio",
    "method": "retention_method",
}
# Of chat completions alone; the others also decide what /tokenize counts.
EXPLAIN_FIELD = "score_explain"
OWN_FIELDS = (
    "retention_ratio",
    "retention_method",
    "video_start",
    "video_end",
    "video_fps",
    "video_max_frames",
    EXPLAIN_FIELD,
)


@dataclass(frozen=True, slots=True)
class VideoPart:
    """One video of a request: whether its pictures have yet to be fetched, or are embeddings already."""

    has_url: bool
    is_embedding: bool = False


def standard_messages(messages: Any) -> Any:
    """The same messages with each video part as ``video_url`` with a ``url``; what is no video stays untouched.

    Raises:
        VLLMValidationError: a part that must be a video and cannot be read as one; says the right form.
    """
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [_standard(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def video_parts(messages: Any) -> list[VideoPart]:
    """The videos of :func:`standard_messages`, in the order of vLLM's parser."""
    found = []
    for part in _dict_parts(messages):
        if part.get("type") == "video_embeds" or (part.get("type") is None and "video_embeds" in part):
            found.append(VideoPart(False, is_embedding=True))
        elif part.get("type") == "video_url":
            found.append(VideoPart(part["video_url"] is not None))
    return found


def has_video(value: Any) -> bool:
    """Whether a content part anywhere in the messages of another API is a video, in any form."""
    if isinstance(value, list):
        return any(has_video(item) for item in value)
    if not isinstance(value, dict):
        return isinstance(value, str) and value[:11].lower() == "data:video/"
    media_type = value.get("media_type")
    return (
        value.get("type") in VIDEO_TYPES
        or "video_url" in value
        or (isinstance(media_type, str) and media_type.startswith("video/"))
        or any(has_video(item) for item in value.values())
    )


def _dict_parts(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part


def _standard(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in VIDEO_TYPES or (kind is None and any(name in part for name in VIDEO_TYPES)):
        return _standard_video(part)
    if "image_url" in part:
        _refuse_video_as_image(part)
    return part


def _standard_video(part: dict[str, Any]) -> dict[str, Any]:
    name = next((name for name in VIDEO_TYPES if name in part), None)
    value = part.get(name) if name else part.get("url")
    for holder in (part, value if isinstance(value, dict) else {}):
        for key in holder:
            if (field := ALIASES.get(key, key)) in OWN_FIELDS:
                raise VLLMValidationError(
                    f"{key!r} inside a content part is not read: write {field!r} at the top level of the request, "
                    "as one value or a list with one per video",
                    parameter=key,
                )
    if isinstance(value, list):
        raise VLLMValidationError(
            f"{name} must be one URL, got a list of {len(value)}; frames are sent as one data URL: "
            "data:video/jpeg;base64,JPEG1,JPEG2,...",
            parameter=name,
        )
    if isinstance(value, dict):
        data, container = value.get("data"), value.get("format", "mp4")
        value = value.get("url", f"data:video/{container};base64,{data}" if isinstance(data, str) else value)
    if not (isinstance(value, str) and value) and (value or part.get("uuid") is None):
        raise VLLMValidationError(f"a video is sent as {FORM}, got a part with {sorted(part)}", parameter="video_url")
    kept = {key: item for key, item in part.items() if key not in (*VIDEO_TYPES, "url")}
    return {**kept, "type": "video_url", "video_url": {"url": value} if value else None}


def _refuse_video_as_image(part: dict[str, Any]) -> None:
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        return
    path = PurePosixPath("" if url[:5].lower() == "data:" else url.partition("?")[0].partition("#")[0])
    if url[:11].lower() == "data:video/" or path.suffix.lower() in VIDEO_SUFFIXES:
        raise VLLMValidationError(f"image_url holds a video; a video is sent as {FORM}", parameter="image_url")
