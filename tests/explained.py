"""What ``score_explain`` must say of a selection, worked out bit by bit."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from score_vllm import VideoGrid


def explained(indices: Iterable[int], grid: VideoGrid) -> dict[str, Any]:
    """Of kept flat indices ``t * N + n``."""
    kept = {int(index) for index in indices}
    bits = "".join("1" if index in kept else "0" for index in range(grid.num_tokens))
    octets = [int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8)]
    per_cell = [bits[start : start + grid.h * grid.w].count("1") for start in range(0, len(bits), grid.h * grid.w)]
    return {"kept_per_cell": per_cell, "kept_mask": base64.b64encode(bytes(octets)).decode()}


def kept_indices(video: dict[str, Any]) -> list[int]:
    """The flat indices that an entry of ``score.videos`` says were kept."""
    bits = "".join(f"{octet:08b}" for octet in base64.b64decode(video["kept_mask"]))
    return [index for index, bit in enumerate(bits) if bit == "1"]
