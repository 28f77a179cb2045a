"""``report.html`` of a run: measure its policy on a few clips, and put everything on one page."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from score_vllm.files import write_atomically
from score_vllm.policy import RetentionPolicy
from score_vllm.train.config import StageSettings, TrainSettings
from score_vllm.train.frozen.model import Engine
from score_vllm.train.report.clips import open_report_source, read_clips
from score_vllm.train.report.history import read_history
from score_vllm.train.report.measure import Findings, measure
from score_vllm.train.report.page import page, summary
from score_vllm.train.tracking import LOG_NAME

logger = logging.getLogger(__name__)

NAME = "report.html"


def write_report(settings: TrainSettings, stage: StageSettings, engine: Engine | None, merge: int) -> list[str]:
    """Write the page of a run into its output folder.

    Args:
        settings: of the run.
        stage: the last one that was run.
        engine: the frozen model; None: nothing is measured, the page shows the curves alone.
        merge: frames per temporal cell of the model.

    Returns:
        Lines for the terminal.

    Raises:
        OSError: it cannot be written.
    """
    started = time.perf_counter()
    output = Path(settings.output)
    findings, problem, facts = None, "", {}
    if engine is not None:
        try:
            policy = RetentionPolicy.from_pretrained(output / "policy")
            facts = {"policy digest": policy.digest(), **_flat(policy.config.provenance)}
            findings = _measure(settings, stage, engine, policy, merge)
            problem = "" if findings.clips or not settings.report.clips else "No clip could be read to measure on."
        except Exception as error:  # the curves are worth a page of their own
            logger.exception("the report measures nothing")
            problem = f"Nothing could be measured: {type(error).__name__}: {error}"
    text = page(str(output), read_history(output / LOG_NAME), findings, problem, settings.to_dict(), facts)
    write_atomically(output / NAME, lambda part: part.write_text(text, encoding="utf-8"))
    lines = summary(findings) if findings and findings.clips else []
    return [*lines, f"report   {output / NAME} (made in {time.perf_counter() - started:.0f} s)"]


def _measure(
    settings: TrainSettings, stage: StageSettings, engine: Engine, policy: RetentionPolicy, merge: int
) -> Findings:
    wanted = settings.report
    if not wanted.clips:
        return Findings(seen=False)
    source = open_report_source(settings, stage, merge)
    clips = read_clips(source.samples, stage, engine, wanted.clips, wanted.questions)
    shown = tqdm(clips, desc="report", unit="clip", total=wanted.clips, disable=not settings.tracking.progress)
    return measure(shown, engine, policy, pictures=wanted.pictures, seen=source.seen)


def _flat(provenance: dict[str, Any]) -> dict[str, Any]:
    """One level of tables as ``name.key``."""
    return {
        f"{name}.{key}" if key else name: one
        for name, value in provenance.items()
        for key, one in (value.items() if isinstance(value, dict) else [("", value)])
    }
