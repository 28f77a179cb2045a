"""A selection method of your own, registered beside the built-in ones and run on one video.

Purpose: the shape of a method. Caveat: the score here, the norm of a token, is only an example. Hardware: any; a few
seconds with the demo model's vision tower on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from score_vllm import methods, select_tokens
from score_vllm.demo import ensure_demo
from score_vllm.video import decode_video
from score_vllm.vision.tower import VisionTower


@methods.register("norm")
def norm(x: torch.Tensor, num_retained: int, *, p: float = 2.0, **_: object) -> torch.Tensor:
    """Scores [T * N] of tokens [T, N, D]; the highest are kept. ``p`` becomes an option of the method."""
    return x.float().norm(p=p, dim=-1).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a video file")
    args = parser.parse_args()
    model, _ = ensure_demo()
    x, grid = VisionTower(model).encode(decode_video(args.video.read_bytes()).frames)
    for name, options in (("norm", {"p": 1.0}), ("vidcom2", {})):
        kept = select_tokens(x, 0.1, method=name, **options)
        cells = torch.bincount(kept.indices // grid.tokens_per_frame, minlength=grid.t).tolist()
        print(f"{name}: {kept.num_retained} of {grid.num_tokens} tokens, per cell {cells}")


if __name__ == "__main__":
    main()
