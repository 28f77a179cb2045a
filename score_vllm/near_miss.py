"""The one helper that guesses what a mistyped name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_miss(name: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where something known is close to ``name``, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
