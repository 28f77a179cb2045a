"""Data URLs as browsers, command lines and clients write them."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

import pybase64

_MARK = re.compile(r";\s*base64\s*,", re.IGNORECASE)
# A media type with its parameters; those of a recorder may hold commas (codecs=vp8,opus).
_LONGEST_TYPE = 512


def split_data_url(url: str) -> tuple[str, str]:
    """``(media type without parameters, payload)`` of a base64 data URL.

    Raises:
        ValueError: not a base64 data URL.
    """
    mark = _MARK.search(url, 5, _LONGEST_TYPE)
    if mark is None:
        raise ValueError(f"a data URL must read data:TYPE;base64,DATA, got {url[:40]!r}")
    return url[5 : mark.start()].partition(";")[0].strip().lower(), url[mark.end() :]


def decode_base64(payload: str) -> bytes:
    """Bytes of base64 text; line breaks, missing padding, percent escapes and the URL-safe alphabet are accepted.

    Raises:
        ValueError: anything else that is not base64.
    """
    try:
        return pybase64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        pass
    try:
        plain = unquote_to_bytes(payload).translate(bytes.maketrans(b"-_", b"+/"), delete=b" \t\r\n").rstrip(b"=")
        return pybase64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data of a data URL is not valid base64: {error}") from error


def looks_like_video(data: bytes) -> bool:
    """Whether a file begins as the common video containers do; for hints in error messages."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in (b"avif", b"heic", b"heix", b"mif1", b"msf1")
    return data[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS") or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")
