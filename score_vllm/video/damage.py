"""What FFmpeg says about damage that it conceals: it returns such pictures as if they were whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import av
import av.logging

from score_vllm.video.container import DECODERS

_LINE = re.compile(r"^\[([^@\]]+) @ [^]]*\] (.*)$", re.MULTILINE)
# Said by demuxers.
_CUT = re.compile(r"ended prematurely|partial file|Packet corrupt|truncated", re.IGNORECASE)
# Said of sound files too, where reading begins at an open group of pictures.
_HARMLESS = re.compile(
    r"reference picture missing|Missing reference picture|number of reference frames|mmco: unref short failure"
    r"|co located POCs unavailable|Could not find ref with POC|First slice in a frame missing|not on whitelist"
)
# Per picture there may be thousands of lines; these are enough to know.
_MOST = 1 << 20


class Complaints:
    """FFmpeg's messages as ``(component, text)`` pairs, while the block of :func:`listen` runs."""

    def __init__(self, messages: Callable[[], list[tuple[str, str]]]) -> None:
        self._messages = messages
        self._from = 0

    def decoding_begins(self) -> None:
        """What the decoder said before was about probing."""
        self._from = len(self._messages())

    def of_decoder(self) -> int:
        """How often the decoder complained."""
        said = self._messages()[self._from :]
        return sum(name in DECODERS and not _HARMLESS.search(text) for name, text in said)

    def is_cut(self) -> bool:
        """Whether the file ends early or has damaged packets."""
        return any(name not in DECODERS and _CUT.search(text) for name, text in self._messages())


@contextlib.contextmanager
def listen(threads: int) -> Iterator[Complaints]:
    """Collect FFmpeg's messages while the block runs.

    Args:
        threads: of the decoder. With one, PyAV collects the messages. With more it would wait for the interpreter's
            lock in threads that are waited for: FFmpeg then writes to standard error itself, which is read back.
    """
    if threads == 1:
        level = av.logging.get_level()
        av.logging.set_level(av.logging.ERROR)
        try:
            with av.logging.Capture(local=True) as logs:
                yield Complaints(lambda: [(name, text) for _, name, text in logs])
        finally:
            av.logging.set_level(level)
        return
    file = os.memfd_create("complaints")
    kept = os.dup(2)
    av.logging.set_libav_level(av.logging.ERROR)
    av.logging.restore_default_callback()
    os.dup2(file, 2)
    try:
        yield Complaints(lambda: _LINE.findall(os.pread(file, _MOST, 0).decode(errors="replace")))
    finally:
        os.dup2(kept, 2)
        os.close(file)
        os.close(kept)
