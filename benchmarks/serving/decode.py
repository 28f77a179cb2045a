"""Reading clips at the size that the model wants: ours against vLLM's loaders and decord, at 1, 4 and 16 at once.

Every loader works in a process of its own, which does nothing else, and reads each clip from bytes to frames of the
size that Qwen2.5-VL's processor chooses: ours scales in its decoding processes, the others' frames go through the
processor's own resize. Before anything is timed, the pictures are compared: clips carry their picture's number, and
two loaders' pictures of one number must agree. Memory is the peak of the process and all below it (proportional set
size), above what it was before the clips. Processor time tells more than wall time where others use the machine: a
pool as wide as the cores gets a smaller share of it than sixteen threads do.

    python -m benchmarks.serving.decode --repeats 3
    python -m benchmarks.serving.decode --quick

One file, as each loader's worker process is this script again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Sample, at_least, default_output, integers, rounds, script_parser, table, write_results
from benchmarks.report.serving import decode_rows
from tests.video_writing import even, number_of, numbered

# Width, height, seconds; 25 pictures a second, H.264 with B-frames and a key frame every 2 s.
CLIPS = {"240p 10 s": (426, 240, 10), "720p 10 s": (1280, 720, 10), "1080p 10 s": (1920, 1080, 10)}
QUICK = {"240p 10 s": (426, 240, 10)}
RATE = 25
MAX_FRAMES, FPS = 128, 2.0
LOADERS = ("ours", "opencv", "torchcodec", "decord")
# Mean difference of two decoders' RGB, of 255; they differ in rounding and in how they interpolate chroma.
CLOSE = 4.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--concurrency", type=integers, default=[1, 4, 16], help="clips at once")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--clips", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    parser.add_argument("--quick", action="store_true", help="one small clip, one round: does it work?")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    return parser


def write_clip(path: Path, width: int, height: int, seconds: int) -> None:
    """A moving texture with noise below the picture's number: compressible about as real footage is."""
    import av

    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        options = {"preset": "superfast", "crf": "23", "bf": "2"}
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 2 * RATE
        for i in range(seconds * RATE):
            picture = texture[i % 256 : i % 256 + height, (2 * i) % 256 : (2 * i) % 256 + width].copy()
            picture[: height // 8] = numbered(i, width, height)[: height // 8]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode(None))


def reader(name: str) -> tuple[Callable[[bytes], np.ndarray], Callable[[bytes], tuple[np.ndarray, str]]]:
    """``(timed, compared)``: frames at the model's size, and frames at full size with the version in words."""
    import torch
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    from score_vllm.video import DecodeLimits, Resize, sandbox

    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    rule = Resize.for_processor(processor)
    assert rule is not None
    factor = processor.patch_size * processor.merge_size

    def scaled(frames: Any) -> np.ndarray:
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)[None]
        out = processor.resize(video, processor.size, processor.resample, factor=factor, cap_pixels_per_frame=False)
        return out[0].permute(0, 2, 3, 1).numpy()

    limits = DecodeLimits(deadline=600)
    if name == "ours":
        import av

        def ours(data: bytes, resize: Any = None) -> np.ndarray:
            return sandbox.decode_video_isolated(
                data, fps=FPS, max_frames=MAX_FRAMES, resize=resize, limits=limits
            ).frames

        sandbox.configure(max_queued=1000)
        return lambda data: ours(data, rule), lambda data: (ours(data), f"PyAV {av.__version__}")
    if name == "decord":
        import decord

        def with_decord(data: bytes) -> np.ndarray:
            import io

            video = decord.VideoReader(io.BytesIO(data))
            wanted = np.arange(0, len(video), video.get_avg_fps() / FPS).astype(int)[:MAX_FRAMES]
            return video.get_batch(wanted).asnumpy()

        return lambda data: scaled(with_decord(data)), lambda data: (with_decord(data), f"decord {decord.__version__}")
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    loader = VIDEO_LOADER_REGISTRY.load("opencv")

    def vllms(data: bytes) -> np.ndarray:
        frames, _ = loader.load_bytes(data, num_frames=MAX_FRAMES, fps=FPS, backend=name)
        return np.asarray(frames)

    return lambda data: scaled(vllms(data)), lambda data: (vllms(data), f"vLLM's loader, backend {name}")


def proportional_bytes(pid: int) -> int:
    """Memory of a process and all below it; pages that several share count once."""
    total = 0
    for one in [pid, *_below(pid)]:
        with contextlib.suppress(OSError, StopIteration):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of all below it, those that have ended included."""
    total = 0
    for one in [pid, *_below(pid)]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def _below(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_below(child)]
    return found


def work(name: str) -> None:
    """A worker: orders as JSON lines in, results as JSON lines out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk
    try:
        timed, compared = reader(name)
    except Exception as error:
        print(
            json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}),
            file=answers,
            flush=True,
        )
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        data = Path(order["clip"]).read_bytes()
        if order["concurrency"] == 0:
            try:
                frames, words = compared(data)
                np.save(order["save"], frames)
                answer: dict[str, Any] = {"words": words}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        else:
            answer = measure(timed, data, order["concurrency"])
        print(json.dumps(answer), file=answers, flush=True)


def measure(read: Callable[[bytes], np.ndarray], data: bytes, concurrency: int) -> dict[str, Any]:
    """Seconds and peak memory of so many reads at once."""
    before = peak = proportional_bytes(os.getpid())
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, proportional_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, spent = time.perf_counter(), cpu_seconds(os.getpid())
    with ThreadPoolExecutor(concurrency) as pool:
        held = list(pool.map(lambda _: read(data), range(concurrency)))  # all held, as requests hold them
    seconds = time.perf_counter() - start
    peak = max(peak, proportional_bytes(os.getpid()))
    over.set()
    watcher.join()
    time.sleep(0.3)  # the last child's time is its parent's once it has been waited for
    spent = cpu_seconds(os.getpid()) - spent
    return {"seconds": seconds, "cpu_seconds": spent, "peak_bytes": peak - before, "shape": list(held[0].shape)}


class Worker:
    """The parent's handle on one."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.serving.decode", "--worker", name]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self.error = self._answer().get("error", "")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the worker ended"}

    def ask(self, clip: Path, concurrency: int, save: str = "") -> dict[str, Any]:
        assert self._process.stdin is not None
        print(
            json.dumps({"clip": str(clip), "concurrency": concurrency, "save": save}),
            file=self._process.stdin,
            flush=True,
        )
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ask(worker: Worker, clip: Path, concurrency: int, _: int) -> dict[str, Any]:
    """One round of one worker."""
    return worker.ask(clip, concurrency)


def compare(workers: dict[str, Worker], clip: Path, folder: Path) -> dict[str, str]:
    """Words for every loader whose pictures agree with ours; the others are named and closed.

    Raises:
        RuntimeError: ours are wrong, or a loader's pictures differ.
    """
    seen: dict[str, dict[int, np.ndarray]] = {}
    words = {}
    for name, worker in list(workers.items()):
        answer = worker.ask(clip, 0, str(folder / f"{name}.npy"))
        if "error" in answer:
            print(f"{name} does not load here: {answer['error']}", file=sys.stderr)
            workers.pop(name).close()
            continue
        frames = np.load(folder / f"{name}.npy")
        seen[name] = {number_of(frame): frame for frame in frames}
        words[name] = answer["words"]
    expected = [int(t * RATE + 1e-6) for t in even(len(seen["ours"]), FPS)]
    if sorted(seen["ours"]) != expected:
        raise RuntimeError(f"our pictures are {sorted(seen['ours'])}, not {expected}")
    for name, pictures in seen.items():
        common = sorted(set(pictures) & set(seen["ours"]))
        if not common:
            raise RuntimeError(f"{name} reads no picture that we read")
        worst = max(np.abs(pictures[n].astype(int) - seen["ours"][n]).mean() for n in common)
        if worst > CLOSE:
            raise RuntimeError(f"{name}'s pictures differ from ours by {worst:.1f} of 255 on average")
    return words


def main(argv: list[str] | None = None) -> None:
    """Compare, measure, write."""
    args = build_parser().parse_args(argv)
    if args.worker:
        work(args.worker)
        return
    import tempfile

    workers = {}
    for name in LOADERS:
        worker = Worker(name)
        if worker.error:
            print(f"{name} does not load here: {worker.error}", file=sys.stderr)
        else:
            workers[name] = worker
    output = args.output or default_output("decode", "loaders", args.quick)
    rows: list[dict[str, Any]] = []
    words: dict[str, str] = {}
    repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        for clip, (width, height, seconds) in (
            QUICK if args.quick else {name: CLIPS[name] for name in args.clips}
        ).items():
            path = Path(folder) / f"{width}.mp4"
            write_clip(path, width, height, seconds)
            words.update(compare(workers, path, Path(folder)))
            for concurrency in args.concurrency:
                calls = {n: partial(ask, w, path, concurrency) for n, w in workers.items()}
                for name, answers in rounds(calls, repeats, label=f"{clip} x {concurrency}").items():
                    times = Sample(tuple(answer["seconds"] * 1000 for answer in answers))
                    row = {"clip": clip, "concurrency": concurrency, "loader": name, "ms": times.to_json()}
                    row["clips_per_second"] = concurrency / times.median * 1000
                    row["cpu_seconds"] = statistics.median(answer["cpu_seconds"] for answer in answers)
                    row["peak_bytes"] = max(answer["peak_bytes"] for answer in answers)
                    rows.append({**row, "frames": answers[0]["shape"]})
            facts = {"loaders": words, "repeats": repeats, "load_average_at_end": os.getloadavg()[0]}
            write_results(output, rows, **facts)  # after every clip: the large ones take long
    for worker in workers.values():
        worker.close()
    print(table(*decode_rows({"rows": rows})))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
