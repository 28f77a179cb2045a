"""The renderer's hook: our fields go into the processor after vLLM's check of client options, and reports come back."""

from collections.abc import Iterable
from typing import Any

from score_vllm.models.processing import METHOD_KEY, OPTIONS_KEY, RATIO_KEY, REPORT_KEY
from score_vllm.server import context, metrics, request_log


def hook_renderer(renderer: Any) -> None:
    """Wrap the two methods through which every route renders."""

    def inject(extras: dict[str, Any] | None) -> dict[str, Any] | None:
        request = context.current.get()
        if request is None:
            return extras
        asked = {RATIO_KEY: request.ratio, METHOD_KEY: request.method, OPTIONS_KEY: request.options or None}
        asked = {key: value for key, value in asked.items() if value is not None}
        if not asked:
            return extras
        extras = dict(extras or {})
        extras["mm_processor_kwargs"] = {**(extras.get("mm_processor_kwargs") or {}), **asked}
        return extras

    def collect(engine_inputs: Iterable[Any]) -> None:
        reports = [report for engine_input in engine_inputs for report in engine_input.get(REPORT_KEY, ())]
        request = context.current.get()
        if request is not None:
            request.reports.extend(reports)
        if (record := request_log.current.get()) is not None:
            record.reports.extend(reports)
        if context.counts.get():
            metrics.count_videos(reports)

    render_chat, render_cmpl = renderer.render_chat_async, renderer.render_cmpl_async

    async def render_chat_async(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        conversations, prompts = await render_chat(*args, prompt_extras=inject(prompt_extras), **kwargs)
        collect(prompts)
        return conversations, prompts

    async def render_cmpl_async(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        prompts = await render_cmpl(*args, prompt_extras=inject(prompt_extras), **kwargs)
        collect(prompts)
        return prompts

    renderer.render_chat_async, renderer.render_cmpl_async = render_chat_async, render_cmpl_async
