"""Captions for every video below a folder, by engines under Ray that compress; run it again and it goes on.

Purpose: captions in bulk, where no server should run. Every partition of files becomes one file of JSON lines in the
output folder, written at once when it is done, and is not done again: another node may die, this script may be ended.
Files that cannot be read are counted and named, and cost nobody else an answer. Caveat: the demo model, which is the
default, knows only its own world. Hardware: a GPU per actor and tensor-parallel rank, or CPUs; a Ray cluster whose
nodes have this package and see the folders under the same paths. --actors 0 runs one engine here, without Ray.

    python examples/caption_folder.py /data/clips -o /data/captions --model Qwen2.5-VL-7B --policy DIR --actors 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from score_vllm.catalog import UsageError
from score_vllm.client import Reply
from score_vllm.models.offline import EngineOptions, OfflineEngine
from score_vllm.train.annotate.log import write_lines

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp"}


class Captioner:
    """One engine; turns a partition's paths into its file."""

    def __init__(self, options: EngineOptions, prompt: str) -> None:
        self.engine, self.prompt = OfflineEngine(options), prompt

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        done: dict[str, list[int]] = {"videos": [], "failed": []}
        for output, paths in zip(batch["output"], batch["paths"], strict=True):
            answers = self.engine.ask([(Path(path), self.prompt) for path in paths])
            good = [isinstance(answer, Reply) for answer in answers]
            rows = [
                {"video": str(path), "caption": answer.text, "finish_reason": answer.finish_reason}
                if isinstance(answer, Reply)
                else {"video": str(path), "error": str(answer)}
                for path, answer in zip(paths, answers, strict=True)
            ]
            write_lines(Path(str(output)), rows)
            done["videos"].append(len(rows))
            done["failed"].append(len(rows) - sum(good))
        return done


def partitions(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Files of a partition each, named by what is asked about what: other settings or files give other names."""
    videos = sorted(path.absolute() for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    made = []
    for number, start in enumerate(range(0, len(videos), args.partition)):
        paths = [str(path) for path in videos[start : start + args.partition]]
        digest = hashlib.sha256(json.dumps([settings, paths]).encode()).hexdigest()[:12]
        made.append({"output": str(args.output.absolute() / f"part-{number:06d}-{digest}.jsonl"), "paths": paths})
    return made


def captioned(todo: list[dict[str, Any]], options: EngineOptions, args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Videos and failures of each partition, as it is done."""
    if args.actors == 0:
        captioner = Captioner(options, args.prompt)
        for part in todo:
            done = captioner({name: [value] for name, value in part.items()})
            yield {name: value for name, (value,) in done.items()}
        captioner.engine.close()
        return
    import ray

    ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ranks = options.engine_args.get("tensor_parallel_size", 1)
    yield from (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map_batches(
            Captioner,
            fn_constructor_kwargs={"options": options, "prompt": args.prompt},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=1,
            num_gpus=ranks if ray.cluster_resources().get("GPU") else 0,
        )
        .iter_rows()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="searched with its subfolders")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="of the captions")
    parser.add_argument("--model", default="demo", help="as for score-serve (default: %(default)s)")
    parser.add_argument("--policy", metavar="DIR", help="retention policy; as for score-serve")
    parser.add_argument(
        "--retention", type=float, default=0.1, metavar="RATIO", help="in (0, 1] (default: %(default)s)"
    )
    parser.add_argument("--prompt", default="Describe the video.", help="asked about every video")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a caption (default: %(default)s)")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="more, for vLLM's engine")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="engines (default: %(default)s)")
    parser.add_argument("--partition", type=int, default=64, metavar="N", help="videos a file (default: %(default)s)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"folder {str(args.folder)!r} is no folder")
    settings = {"model": args.model, "policy": args.policy, "retention_ratio": args.retention}
    settings |= {"max_tokens": args.max_tokens, "engine_args": args.engine_args}
    try:
        options = EngineOptions(**settings)
        options.resolve()
    except (UsageError, OSError, ValueError) as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    parts = partitions(args, {**settings, "prompt": args.prompt})
    todo = [part for part in parts if not Path(part["output"]).exists()]
    print(f"{sum(len(part['paths']) for part in parts)} videos, {len(todo)} of {len(parts)} partitions to do")
    failed = 0
    with tqdm(total=sum(len(part["paths"]) for part in todo), unit="video") as bar:  # with rate and time left
        for done in captioned(todo, options, args) if todo else ():
            failed += done["failed"]
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(done["videos"])
    rows = [json.loads(line) for part in parts for line in Path(part["output"]).read_text().splitlines()]
    broken = [row for row in rows if "error" in row]
    print(f"{len(rows) - len(broken)} captioned, {len(broken)} failed")
    for row in broken:
        print(f"failed: {row['video']}: {row['error']}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
