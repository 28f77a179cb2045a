"""Locust users that stream chat completions about videos, following a plan that the driver wrote.

Run by ``drive.py``; by hand::

    locust -f benchmarks/load/locustfile.py --headless -u 8 -r 1000 --host http://127.0.0.1:8000 \\
        --plan plan.json --records records.jsonl

Custom metrics follow locust's convention: beside the POST row, ``events.request`` fires rows of the types TTFT, ITL
and E2E. The POST row of a streamed request is the time to its headers, which is no latency of interest, so it is named
"(headers)". Locust rounds what it aggregates; percentiles that count come from the records file, which has every
request with every inter-token gap.

Nothing heavy is imported here: locust patches sockets for gevent, and one process is one core.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, constant, events, task
from locust.exception import StopUser

sys.path.append(str(Path(__file__).resolve().parents[1]))
from streaming import Answer, chat_body


class Plan:
    """Requests in the order in which they are sent, whoever sends them; and the file for what became of them."""

    def __init__(self, plan: Path, records: Path) -> None:
        content = json.loads(plan.read_text())
        self.common: dict[str, Any] = content["common"]
        self.requests: list[dict[str, Any]] = content["requests"]
        self._records = records.open("w")
        self._next = 0
        self._done = 0

    def take(self) -> dict[str, Any] | None:
        """The next request; None after the last. Greenlets switch at I/O only, so no lock is needed."""
        if self._next == len(self.requests):
            return None
        self._next += 1
        return self.requests[self._next - 1]

    def finish(self, record: dict[str, Any]) -> bool:
        """Write one record; True for the last of the plan."""
        self._records.write(json.dumps(record) + "\n")
        self._records.flush()
        self._done += 1
        return self._done == len(self.requests)


@events.init_command_line_parser.add_listener
def _add_arguments(parser: Any) -> None:
    parser.add_argument("--plan", type=Path, required=True, help="JSON file with the requests")
    parser.add_argument("--records", type=Path, required=True, help="JSON lines file to write, one line per request")


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    environment.score_plan = Plan(options.plan, options.records)


class VideoUser(HttpUser):
    """Sends the next request of the plan as soon as its last one is answered (a closed loop)."""

    wait_time = constant(0)

    @task
    def ask(self) -> None:
        """One request, or the end."""
        plan: Plan = self.environment.score_plan
        request = plan.take()
        if request is None:
            raise StopUser
        record = self._stream(request, plan.common)
        if plan.finish(record):
            # From a greenlet of its own: quitting waits for the users, and this is one of them.
            gevent.spawn(self.environment.runner.quit)

    def _stream(self, request: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
        ratio, tokens = request["retention_ratio"], common["max_tokens"]
        headers = {"Authorization": f"Bearer {common['api_key']}"} if common.get("api_key") else {}
        name = "vanilla" if ratio is None else f"ratio {ratio:g}"
        answer = Answer(time.monotonic())
        wrong: str | None = None
        limits = (10, common["timeout"])
        try:
            url = video_url(request["clip"], common["media"])
            body = chat_body(common["model"], url, request["text"], tokens, ratio)
            answer.sent = time.monotonic()
            with self.client.post(
                "/v1/chat/completions",
                json=body,
                headers=headers,
                stream=True,
                timeout=limits,
                name=f"{name} (headers)",
                catch_response=True,
            ) as response:
                if response.status_code != 200:
                    # Status 0: no response came at all, and there is nothing to read.
                    text = response.text[:300] if response.status_code else str(response.error)
                    wrong = f"status {response.status_code}: {text}"
                else:
                    # None: what the network brings, when it brings it; a byte at a time would cost the client a core.
                    for data in response.iter_content(chunk_size=None):
                        answer.feed(data, time.monotonic())
                    wrong = answer.problem(tokens, request["prompt_tokens"], request["retained_tokens"])
                if wrong is not None:
                    response.failure(wrong)
        except Exception as error:  # a broken connection or a lost clip is a failed request, not the end of the user
            wrong = wrong or repr(error)
        end = time.monotonic()
        gaps = answer.inter_token()
        self._fire("E2E", name, (end - answer.sent) * 1000, answer.tokens, wrong)
        if wrong is None:
            self._fire("TTFT", name, answer.ttft * 1000, 0, None)
            for gap in gaps:
                self._fire("ITL", name, gap * 1000, 0, None)
        return {
            "id": request["id"],
            "retention_ratio": ratio,
            "sent": answer.sent,
            "end": end,
            "ttft": answer.ttft if answer.arrivals else None,
            "itl": gaps,
            "prompt_tokens": answer.usage.get("prompt_tokens"),
            "completion_tokens": answer.tokens,
            "error": wrong,
        }

    def _fire(self, kind: str, name: str, milliseconds: float, length: int, wrong: str | None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=milliseconds,
            response_length=length,
            exception=None if wrong is None else RuntimeError(wrong),
            context=self.context(),
        )


def video_url(clip: str, media: str) -> str:
    """How a clip travels: ``file`` names its path to the server, ``data`` sends its bytes along."""
    if media == "file":
        return f"file://{clip}"
    return "data:video/mp4;base64," + base64.b64encode(Path(clip).read_bytes()).decode()
