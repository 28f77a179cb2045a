"""Load test: vanilla vLLM and SCORE under the same arrivals, one server after the other. See README.md here.

    python benchmarks/load/drive.py             # 20 to 30 minutes on two quiet cores
    python benchmarks/load/drive.py --quick

For each configuration (vanilla, each ratio, and all ratios mixed) a server is started, checked against vanilla's
answers at ratio 1, warmed, and given the same requests at each concurrency: the same clips and questions in the same
order, no clip twice within a level, every cache off. Every answer is checked as it comes: its tokens, its prompt's
exact length, the server's report of retained tokens. Ends with 1 if any request failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from aggregate import aggregate, by_ratio, verdicts
from bench_model import add_arguments, resolve_model
from clips import ClipShape, add_clip_arguments, write_clips
from harness import default_output, machine_name, table, write_results
from monitoring import Monitor
from plan import Target, make_requests, question, run_locust
from report_blocks import save_picture
from report_blocks.load import picture
from serving import SERVED_NAME, Server, ServerOptions, running
from streaming import chat_body

CHECK_TOKENS = 8


@dataclass(frozen=True)
class Config:
    """One row of servers: a name, the kind of server, the ratios that its requests ask for in turn."""

    name: str
    kind: str
    ratios: tuple[float | None, ...]


def configurations(ratios: Sequence[float]) -> list[Config]:
    """Vanilla first, each ratio, and at last all of them mixed with ratio 1 (where there are several)."""
    made = [Config("vanilla", "vanilla", (None,))]
    made += [Config(f"SCORE {ratio:.0%}", "score", (ratio,)) for ratio in ratios]
    if len(ratios) > 1:
        made.append(Config("SCORE mixed", "score", (1.0, *ratios)))
    return made


def answers(server: Server, clips: Sequence[Path], ratio: float | None) -> list[tuple[list[int], int]]:
    """``(token ids, prompt tokens)`` of one short answer per clip."""
    found = []
    for i, clip in enumerate(clips):
        body = server.post(chat_body(SERVED_NAME, f"file://{clip}", question(i), CHECK_TOKENS, ratio, token_ids=True))
        found.append((list(body["choices"][0]["token_ids"]), int(body["usage"]["prompt_tokens"])))
    return found


def count_tokens(server: Server, clip: Path, vanilla_prompt: int) -> tuple[int, int]:
    """``(visual tokens before compression, text tokens)`` from a compressed server's report at ratio 1."""
    body = server.post(chat_body(SERVED_NAME, f"file://{clip}", question(0), 1, 1.0))
    original = int(body["score"]["videos"][0]["original_tokens"])
    return original, vanilla_prompt - original


def run_levels(
    server: Server, config: Config, target: Target, clips: Sequence[Path], args: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Every concurrency on one server; a row each."""
    rows = []
    first = 0
    for concurrency in tqdm(args.concurrency, desc=config.name, unit="level"):
        count = requests_of(concurrency, args)
        requests = make_requests(target, clips, config.ratios, count, first)
        first += count
        with Monitor(server) as monitor:
            place = folder / f"{config.name.replace(' ', '-').replace('%', '')}-{concurrency}"
            records, client = run_locust(target, requests, concurrency, place, args.max_tokens, args.media)
        row = aggregate(records, count)
        rows.append(
            {
                "config": config.name,
                "retention_ratios": [1.0 if ratio is None else ratio for ratio in config.ratios],
                "concurrency": concurrency,
                **row,
                "peak_rss_bytes": monitor.peak_rss,
                "peak_kv_cache_share": monitor.peak_kv,
                "client_cpu_share": client / row["seconds"],
                **({"by_ratio": by_ratio(records)} if len(config.ratios) > 1 else {}),
                "errors": [record["error"] for record in records if record["error"] is not None][:3],
            }
        )
        tqdm.write(f"  {config.name}, concurrency {concurrency}: {row['requests_per_second']:.2f} requests/s")
    return rows


def requests_of(concurrency: int, args: argparse.Namespace) -> int:
    """Requests of a level: enough for a tail, a multiple of the users so that they end together."""
    per_user = max(args.per_user, -(-args.minimum // concurrency))
    return concurrency * per_user


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table of all rows."""

    def show(values: dict[str, float] | None, *names: str) -> str:
        return "-" if values is None else " / ".join(f"{values[name]:.0f}" for name in names)

    header = ["", "users", "req/s", "TTFT p50/p95/p99 ms", "ITL p50/p95 ms", "failed", "RSS GiB", "KV peak"]
    cells = [
        [
            row["config"],
            str(row["concurrency"]),
            f"{row['requests_per_second']:.2f}",
            show(row["ttft_ms"], "p50", "p95", "p99"),
            show(row["itl_ms"], "p50", "p95"),
            str(row["failures"]),
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            f"{row['peak_kv_cache_share']:.0%}",
        ]
        for row in rows
    ]
    print(table(header, cells))


def parse_arguments() -> argparse.Namespace:
    """Command line, checked; ``ratios`` and ``concurrency`` become lists of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ratios", default="0.4,0.25,0.1", help="comma-separated, each in (0, 1)")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32", help="users, comma-separated")
    add_clip_arguments(parser, frames=16)
    parser.add_argument("--max-tokens", type=int, default=16, help="generated per request")
    parser.add_argument("--per-user", type=int, default=2, help="requests per user and level, at least")
    parser.add_argument("--minimum", type=int, default=8, help="requests per level, at least")
    parser.add_argument("--media", choices=["file", "data"], default="file", help="how clips travel")
    parser.add_argument("--kv-gib", type=int, default=2, help="KV cache on a CPU")
    parser.add_argument("--server-args", default="", help="further options for every server, in one quoted string")
    parser.add_argument("--output", type=Path, default=None, help="results file; the picture goes beside it as .png")
    parser.add_argument("--quick", action="store_true", help="small clips, users 1 and 2, one ratio: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.height, args.width, args.max_tokens = 8, 112, 112, 4
        args.ratios, args.concurrency, args.minimum = "0.1", "1,2", 2
    try:
        args.ratios = [float(text) for text in args.ratios.split(",")]
        args.concurrency = [int(text) for text in args.concurrency.split(",")]
        if not all(0 < ratio < 1 for ratio in args.ratios) or min(args.concurrency) < 1:
            raise ValueError
    except ValueError:
        parser.error("--ratios must be numbers in (0, 1), --concurrency integers >= 1, with commas between")
    for name in ("max_tokens", "per_user", "minimum", "kv_gib"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_arguments()
    shape = ClipShape(args.frames, args.height, args.width)
    model = resolve_model(args.model, args.policy)
    folder = Path(tempfile.mkdtemp(prefix="score-load-"))
    most = max(requests_of(concurrency, args) for concurrency in args.concurrency)
    clips = write_clips(folder / "media", shape, range(most + 2))
    checks, clips = clips[:2], clips[2:]
    length = shape.visual_tokens + 512 + args.max_tokens
    extra = shlex.split(args.server_args)
    options = ServerOptions(
        model, args.dtype, length, length, args.frames, folder / "media", kv_gib=args.kv_gib, extra=extra
    )
    print(
        f"{machine_name()}; {model.description}, {shape}, {args.max_tokens} tokens out, {args.dtype}; logs in {folder}"
    )

    rows: list[dict[str, Any]] = []
    plain: list[tuple[list[int], int]] = []
    counts: tuple[int, int] | None = None
    for config in configurations(args.ratios):
        with running(config.kind, options, folder) as server:
            if config.kind == "vanilla":
                plain = answers(server, checks, None)
                counts = (shape.visual_tokens, plain[0][1] - shape.visual_tokens)
            else:
                if answers(server, checks, 1.0) != plain:
                    sys.exit(f"correctness check failed: {config.name} at ratio 1 answers other than vanilla")
                if count_tokens(server, checks[0], plain[0][1]) != counts:
                    sys.exit(
                        "correctness check failed: the processor resized the clips; choose another --height/--width"
                    )
                for ratio in config.ratios:
                    answers(server, checks, ratio)  # warms what the ratio needs
            assert counts is not None
            target = Target(server.url, SERVED_NAME, *counts)
            rows += run_levels(server, config, target, clips, args, folder)

    print_rows(rows)
    lines = verdicts(rows, [c for c in args.concurrency if c >= 16] or [max(args.concurrency)])
    print("\n".join(lines))
    output = args.output or default_output("load", args.model, args.quick)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    facts = {"arguments": arguments, "model": model.description, "verdicts": lines}
    write_results(output, rows, benchmark="load", **facts)
    save_picture(output, picture)
    print(f"written: {os.path.relpath(output)} and {output.with_suffix('.png').name}")
    if any(row["failures"] for row in rows):
        sys.exit(f"{sum(row['failures'] for row in rows)} requests failed; logs in {folder}")


if __name__ == "__main__":
    main()
