"""What a decoder says about damage that it conceals: FFmpeg returns such pictures as if they were whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import av
import av.logging

from score_vllm.video.container import DECODERS

_LINE = re.compile(r"^\[(?:" + "|".join(re.escape(name) for name in DECODERS) + r") @ [^]]*\] (.*)$", re.MULTILINE)
# Said of sound files too, where reading begins at an open group of pictures.
_HARMLESS = re.compile(
    r"reference picture missing|Missing reference picture|number of reference frames|mmco: unref short failure"
    r"|co located POCs unavailable|Could not find ref with POC|First slice in a frame missing"
)
# Per picture there may be thousands of lines; these are enough to know.
_MOST = 1 << 20


class Complaints:
    """Collects the decoder's messages; ``count`` is set when the block ends."""

    def __init__(self) -> None:
        self.count = 0


@contextlib.contextmanager
def listen(threads: int) -> Iterator[Complaints]:
    """Count the decoder's complaints while the block runs.

    Args:
        threads: of the decoder. With one, PyAV collects the messages. With more it would wait for the interpreter's
            lock in threads that are waited for: FFmpeg then writes to standard error itself, which is read back.
    """
    found = Complaints()
    if threads == 1:
        level = av.logging.get_level()
        av.logging.set_level(av.logging.ERROR)
        try:
            with av.logging.Capture(local=True) as logs:
                yield found
        finally:
            av.logging.set_level(level)
        found.count = sum(name in DECODERS and not _HARMLESS.search(text) for _, name, text in logs)
        return
    file = os.memfd_create("complaints")
    kept = os.dup(2)
    av.logging.set_libav_level(av.logging.ERROR)
    av.logging.restore_default_callback()
    os.dup2(file, 2)
    try:
        yield found
    finally:
        os.dup2(kept, 2)
        text = os.pread(file, _MOST, 0).decode(errors="replace")
        os.close(file)
        os.close(kept)
    found.count = sum(not _HARMLESS.search(line) for line in _LINE.findall(text))
