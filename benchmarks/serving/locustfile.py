"""Locust users who stream answers about videos, against any OpenAI-compatible server (extra ``bench``).

    locust -f benchmarks/serving/locustfile.py --host http://127.0.0.1:8000           # web UI, the demo's clips
    locust -f benchmarks/serving/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 1m \\
        --videos /data/clips --send file --retention-ratio 0.25

Each user sends the next request as soon as its last is answered. Locust's table has the whole answers and, as "TTFT",
the times to first token. An answer of another length than ``--max-tokens``, or cut short, is a failure.
``benchmarks.serving.load`` gives its requests, with the exact counts of their answers, as a file (``--requests``).
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # locust imports this file from its own folder, whose modules have common names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import gevent
from locust import HttpUser, events, task
from locust.env import Environment
from locust.exception import StopUser

from benchmarks.serving.client import Answer, Request, read_requests
from score_vllm.client import error_text, video_url

DEMO = Path(__file__).resolve().parents[2] / "score_vllm" / "assets" / "demo"


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Options of this file; each can also be set in the environment, as locust's own can."""
    add = parser.add_argument
    add("--videos", default=str(DEMO), help="a clip, a folder of .mp4 clips, or a URL (default: the demo's clips)")
    add("--send", choices=["base64", "file"], default="base64", help="bytes, or paths that the server opens")
    add("--question", default="What happens in this video?", help="about every clip")
    add("--max-tokens", type=int, default=64, help="generated per request, exactly")
    add("--retention-ratio", type=float, default=None, help="in (0, 1]; default: the server's own")
    add("--served-model", default=None, help="default: the first that the server lists")
    add("--api-key", default="", is_secret=True, env_var="LOCUST_API_KEY", help="sent as a bearer token")
    add("--requests", default="", help="a file of requests to be sent once each instead; then the run ends")
    add("--records", default="", help="a file that gets a line of JSON per answer")


def endless(options: Any) -> Iterator[Request]:
    """Every clip in turn, for ever."""
    place = options.videos
    if "://" in place:
        urls = [place]
    else:
        paths = sorted(Path(place).glob("*.mp4")) if Path(place).is_dir() else [Path(place)]
        urls = [video_url(path, options.send) for path in paths]
    if not urls:
        raise ValueError(f"--videos: no .mp4 file in {place}")
    for url in itertools.cycle(urls):
        yield Request(url, options.question, options.max_tokens, options.retention_ratio)


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Requests, and the processor time of this process so far."""
    options = environment.parsed_options
    made = read_requests(Path(options.requests)) if options.requests else endless(options)
    VideoUser.work, VideoUser.unanswered = enumerate(made), len(made) if options.requests else -1
    VideoUser.cpu_at_start = time.process_time()


class VideoUser(HttpUser):
    """One user in a closed loop."""

    work: Iterator[tuple[int, Request]]
    unanswered: int
    cpu_at_start: float

    def on_start(self) -> None:
        options = self.environment.parsed_options
        if options.api_key:
            self.client.headers["Authorization"] = f"Bearer {options.api_key}"
        self.model = options.served_model or self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def ask(self) -> None:
        """Send the next request; after the last answer the run ends."""
        number, request = next(VideoUser.work, (-1, None))
        if request is None:
            raise StopUser
        try:
            self.record(number, request, *self.send(request))
        finally:
            VideoUser.unanswered -= 1
            if VideoUser.unanswered == 0:
                gevent.spawn(self.environment.runner.quit)  # a user who calls it may be ended half-way through

    def send(self, request: Request) -> tuple[Answer, str | None]:
        """An answer, read as it comes, and what is wrong with it."""
        answer = Answer(time.monotonic())
        with self.client.post(
            "/v1/chat/completions", json=request.body(self.model), stream=True, catch_response=True, timeout=900
        ) as response:
            try:
                if response.status_code == 200:
                    for data in response.iter_content(None):
                        answer.feed(data, time.monotonic())
                else:
                    answer.error = str(response.error or f"status {response.status_code}: {error_text(response)}")
            except Exception as error:  # whatever broke, it is a failed request and not the end of the run
                answer.error = repr(error)
            answer.end = time.monotonic()
            response.request_meta["response_time"] = 1000 * (answer.end - answer.sent)
            if problem := answer.problem(request):
                response.failure(problem)
        if answer.arrivals:
            self.environment.events.request.fire(
                request_type="TTFT",
                name="first token",
                response_time=1000 * answer.ttft,
                response_length=0,
                exception=None,
                context={},
            )
        return answer, problem

    def record(self, number: int, request: Request, answer: Answer, problem: str | None) -> None:
        """A line for :func:`benchmarks.serving.aggregate.aggregate`; times in seconds."""
        if not self.environment.parsed_options.records:
            return
        line = {
            "number": number,
            "retention_ratio": request.ratio,
            "sent": answer.sent,
            "end": answer.end,
            "ttft": answer.ttft if answer.arrivals else None,
            "itl": answer.gaps(),
            "prompt_tokens": answer.usage.get("prompt_tokens"),
            "completion_tokens": answer.tokens,
            "error": problem,
            "client_cpu": time.process_time() - VideoUser.cpu_at_start,
        }
        with open(self.environment.parsed_options.records, "a") as file:
            file.write(json.dumps(line) + "\n")
