"""``score-viz``: what each method keeps of a video, drawn over its frames."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from score_vllm import RetentionPolicy, methods, select_tokens
from score_vllm.budget import check_retention_ratio
from score_vllm.catalog import DEMO, TRAIN_COMMAND, UsageError, resolve_model
from score_vllm.client import RequestFailed
from score_vllm.methods.tango_clusters import cell_seconds
from score_vllm.types import TokenSelection
from score_vllm.video import DecoderUnavailableError, VideoError, VideoWindowError
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, MAX_FPS, THINNINGS
from score_vllm.video.sandbox import decode_video_isolated
from score_vllm.viz.draw import LEAST_CELL_WIDTH, MOST_CELL_WIDTH, Shown, draw
from score_vllm.viz.paint import THEMES

if TYPE_CHECKING:
    from score_vllm.vision.tower import VisionTower


def build_parser() -> argparse.ArgumentParser:
    """Command line of ``score-viz``."""
    parser = argparse.ArgumentParser(
        prog="score-viz",
        description="Draw what token-selection methods keep: kept patches as they are, dropped ones faded, and a strip "
        "of kept tokens per frame below; several methods side by side.",
    )
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument(
        "--server", metavar="URL", help="show what this running score-serve keeps, instead of selecting here"
    )
    parser.add_argument("--api-key", metavar="KEY", help="of the server (default: $OPENAI_API_KEY)")
    parser.add_argument(
        "--model", help="'demo' (the default), a short name, a directory or a hub id; with --server one of its models"
    )
    parser.add_argument(
        "--retention", type=float, metavar="RATIO", help="in (0, 1] (default: 0.1; with --server what it says)"
    )
    parser.add_argument(
        "--method",
        metavar="NAMES",
        help=f"with commas between: {methods.names()} (default: score; with --server what it says)",
    )
    parser.add_argument("--selector", metavar="DIR", help="trained weights of a learned method other than score")
    parser.add_argument("--policy", default=None, metavar="DIR", help="retention policy for the method score")
    parser.add_argument("--fps", type=float, help=f"frames per second read (default: {DEFAULT_FPS:g}, or the server's)")
    parser.add_argument(
        "--max-frames", type=int, help=f"most frames read (default: {DEFAULT_MAX_FRAMES}, or the server's)"
    )
    parser.add_argument("--start", type=float, default=None, metavar="SECONDS", help="read from here on")
    parser.add_argument("--end", type=float, default=None, metavar="SECONDS", help="read up to here")
    parser.add_argument("--thinning", choices=THINNINGS, help="of what is above --max-frames (default: even)")
    parser.add_argument("--theme", choices=sorted(THEMES), default="dark", help="colours (default: dark)")
    parser.add_argument("--cell-width", type=int, default=224, metavar="PIXELS", help="of a PNG's cells (default: 224)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="out.png or out.mp4")
    return parser


def run(args: argparse.Namespace) -> Path:
    """Everything after parsing; returns the path written.

    Raises:
        UsageError: a wrong option; the message is one sentence.
        VideoError: the video cannot be decoded.
    """
    names = None if args.method is None else [name.strip() for name in args.method.split(",")]
    if unknown := [name for name in names or () if name not in methods.names()]:
        raise UsageError(f"--method must be names out of {methods.names()}, got {unknown}")
    try:
        ratio = None if args.retention is None else check_retention_ratio(args.retention, "--retention")
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if args.output.suffix not in (".png", ".mp4"):
        raise UsageError(f"--output must end in .png or .mp4, got {str(args.output)!r}")
    fps, max_frames = args.fps, args.max_frames
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UsageError(f"--fps must be a number in (0, {MAX_FPS}], got {fps:g}")
    if max_frames is not None and max_frames < 1:
        raise UsageError(f"--max-frames must be an integer >= 1, got {max_frames}")
    if not LEAST_CELL_WIDTH <= args.cell_width <= MOST_CELL_WIDTH:
        raise UsageError(
            f"--cell-width must be an integer in [{LEAST_CELL_WIDTH}, {MOST_CELL_WIDTH}], got {args.cell_width}"
        )
    _check_output(args.output)
    local = {"--policy": args.policy, "--selector": args.selector, "--thinning": args.thinning}
    if args.server is not None:
        if given := [name for name, value in local.items() if value is not None]:
            raise UsageError(f"{given[0]} is the server's own business with --server; leave it out")
        if not args.server.startswith(("http://", "https://")):
            raise UsageError(f"--server must begin with http:// or https://, got {args.server!r}")
    try:
        data = args.video.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the video {str(args.video)!r}: {error.strerror}") from error

    if args.server is None:
        shown = _select_here(args, data, names or ["score"], 0.1 if ratio is None else ratio)
    else:
        from score_vllm.viz.served import select_there

        window = {"video_start": args.start, "video_end": args.end, "video_fps": fps, "video_max_frames": max_frames}
        key = os.environ.get("OPENAI_API_KEY") if args.api_key is None else args.api_key
        shown = select_there(args.server, key, args.model, data, args.video.suffix, names, ratio, window)
    frames, times, grid, selections = shown
    # Two frames share a temporal cell, and the last one may stand alone: one picture per cell at least.
    theme = THEMES[args.theme]
    return draw(args.output, frames, grid, selections, times=times, cell_width=args.cell_width, theme=theme)


def _select_here(args: argparse.Namespace, data: bytes, names: list[str], ratio: float) -> Shown:
    video = decode_video_isolated(
        data,
        fps=args.fps or DEFAULT_FPS,
        max_frames=args.max_frames or DEFAULT_MAX_FRAMES,
        start=args.start,
        end=args.end,
        thinning=args.thinning or "even",
    )
    for warning in video.warnings:
        print(f"score-viz: warning: {warning}", file=sys.stderr)

    from score_vllm.vision.tower import VisionTower

    model = resolve_model(args.model or DEMO)
    policy = None
    if "score" in names:
        source = args.policy or model.demo_policy
        if source is None:
            raise UsageError(f"method score needs --policy DIR; train one with: {TRAIN_COMMAND}")
        try:
            policy = RetentionPolicy.from_pretrained(source)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(f"--policy: {error}") from error
    try:
        tower = VisionTower(model.path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {' '.join(str(error).split())}") from error
    if policy is not None:
        try:
            policy.check_model(str(source), tower.hidden_size, tower.config.architectures[0])
        except ValueError as error:
            raise UsageError(f"--policy: {error}") from error
    weights = {name: _selector(name, args.selector, tower) for name in names}
    kinds = {kind for name in names if (kind := methods.get(name).saliency) is not None}
    x, grid, saliency = tower.encode_with_saliency(video.frames, sorted(kinds))
    seconds = torch.from_numpy(cell_seconds(video.times, grid.t))
    selections: dict[str, TokenSelection] = {}
    for name in names:
        selections[name] = select_tokens(
            x,
            ratio,
            name,
            policy if name == "score" else None,
            saliency.get(methods.get(name).saliency or ""),
            variant=methods.variant_for(methods.get(name), tower.config.architectures[0]),
            weights=weights[name],
            grid=grid,
            seconds=seconds,
        )
    return Shown(video.frames, video.times, grid, selections)


def _check_output(path: Path) -> None:
    """Before any work: whether the picture can be written.

    Raises:
        UsageError: it cannot.
    """
    if path.is_dir():
        raise UsageError(f"--output {str(path)!r} is a folder; name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--output {str(path)!r}: the folder {str(folder)!r} does not exist")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error


def _selector(method: str, source: str | None, tower: VisionTower) -> methods.Learned | None:
    """The trained weights of a learned method other than score."""
    spec = methods.get(method).weights
    if spec is None or method == "score":
        return None
    if source is None:
        raise UsageError(f"method {method} needs --selector DIR with its trained weights; see score-selector")
    try:
        return methods.load_weights(method, source, tower.hidden_size, tower.config.architectures[0])
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--selector: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """Console entry point."""
    args = build_parser().parse_args(argv)
    try:
        print(f"score-viz: written: {run(args)}")
    except VideoWindowError as error:  # its text begins with the option's name
        sys.exit(f"score-viz: error: --{error}")
    except (UsageError, VideoError, DecoderUnavailableError, RequestFailed) as error:
        sys.exit(f"score-viz: error: {error}")
