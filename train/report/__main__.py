"""``python -m score_vllm.train.report RUN``: write the report of a finished run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from score_vllm.train.__main__ import make_accelerator, make_engine, model_path, temporal_merge
from score_vllm.train.checkpoint import newest_checkpoint
from score_vllm.train.config import TrainSettings
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.report.write import write_report
from score_vllm.train.schema import ConfigurationError, MissingError, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 done, 2 no such run."""
    parser = argparse.ArgumentParser(prog="python -m score_vllm.train.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of python -m score_vllm.train")
    parser.add_argument("--clips", type=int, help="to measure on (default: as in the run's settings)")
    options = parser.parse_args(arguments)
    try:
        found = newest_checkpoint(options.run / "checkpoints")
        if found is None:
            raise MissingError(f"{str(options.run)!r} is not the output of a training: it has no checkpoints")
        table = {**found[2].settings, "output": str(options.run)}
        if options.clips is not None:
            table["report"] = {**table.get("report", {}), "clips": options.clips}
        settings: TrainSettings = build(TrainSettings, table)
        merge = temporal_merge(FrozenVLM.config_of(model_path(settings)))
        engine = make_engine(settings, make_accelerator(settings))
        print("\n".join(write_report(settings, settings.named(found[2].stage), engine, merge)))
        return 0
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
