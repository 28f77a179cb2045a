"""From time stamps to stages: where one request's time to first token went. Arithmetic only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# In the order in which a request passes them.
STAGES = ("download", "decode", "preprocess", "hand-over", "ViT", "compress", "LLM prefill", "first token")


@dataclass(frozen=True)
class Span:
    """A stopwatch's one run, in seconds of the machine's monotonic clock."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end - self.start


class SpanReader:
    """Reads what a server's processes wrote since the last look.

    Args:
        folder: the one that the server's stopwatches write into, a file per process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new(self) -> list[Span]:
        """Spans since the last call, by start."""
        spans = []
        for path in sorted(self._folder.glob("spans-*.jsonl")):
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            for line in whole[self._read.get(path, 0) :].splitlines():
                spans.append(Span(**json.loads(line)))
            self._read[path] = len(whole)
        return sorted(spans, key=lambda span: span.start)


def split(spans: Sequence[Span], sent: float, first_token: float, compressed: bool) -> dict[str, float]:
    """Seconds per stage of one request that was alone on its server and generated one token.

    ``ViT`` is encoding without selection. ``LLM prefill`` is the sum of the language model's steps. ``first token`` is
    what follows the last of them: logits, sampling, detokenisation, the way to the client. ``hand-over`` is the rest:
    parsing the request, handing pixels from the API process to the engine, scheduling. The stages sum up to
    ``first_token - sent`` exactly.

    Args:
        spans: of this request: download, decode, preprocess, encode, compress, llm.
        sent: when the client sent the request.
        first_token: when its first token arrived at the client.
        compressed: the server compresses, so a ``compress`` span must be there.

    Raises:
        ValueError: a stage is missing, twice there, outside the request, or overlaps another.
    """
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        if not sent <= span.start <= span.end <= first_token:
            raise ValueError(f"{span} lies outside of the request [{sent}, {first_token}]")
        by_name.setdefault(span.name, []).append(span)
    once = ["download", "decode", "preprocess", "encode", *(["compress"] if compressed else [])]
    for name in once:
        if len(by_name.get(name, ())) != 1:
            raise ValueError(f"stage {name!r} must have one span, got {by_name.get(name, [])}")
    if "llm" not in by_name:
        raise ValueError("stage 'llm' has no span")
    if unknown := sorted(set(by_name) - set(once) - {"llm"}):
        raise ValueError(f"unexpected stages {unknown}")
    encode = by_name["encode"][0]
    selection = by_name["compress"][0] if compressed else None
    if selection is not None and not encode.start <= selection.start <= selection.end <= encode.end:
        raise ValueError(f"selection {selection} is not inside of {encode}")
    serial = sorted((span for span in spans if span.name != "compress"), key=lambda span: span.start)
    for earlier, later in itertools.pairwise(serial):
        if later.start < earlier.end:
            raise ValueError(f"{later} begins before {earlier} ends")
    last = max(span.end for span in by_name["llm"])
    seconds = {name: by_name[name][0].seconds for name in ("download", "decode", "preprocess")}
    seconds["compress"] = 0.0 if selection is None else selection.seconds
    seconds["ViT"] = encode.seconds - seconds["compress"]
    seconds["LLM prefill"] = sum(span.seconds for span in by_name["llm"])
    seconds["first token"] = first_token - last
    seconds["hand-over"] = first_token - sent - sum(seconds.values())
    return {name: seconds[name] for name in STAGES}
