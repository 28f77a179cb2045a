"""Every metric and label that the dashboard and the alert rules name is on a running server's page."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("openai")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from .conftest import ROOT, Server  # noqa: E402
from .requests_of import ask, chat, data_url  # noqa: E402

DASHBOARDS = ROOT / "docs" / "dashboards"
# Of PromQL; a name that is neither one of these nor a metric fails the test.
LANGUAGE = {"sum", "max", "count", "and", "by", "rate", "increase", "histogram_quantile", "label_values"}
# Added by Prometheus.
SCRAPED = {"up": {"job"}}
LABELS = re.compile(r"\{([^}]*)\}|by \(([^)]*)\)")


def expressions() -> dict[str, str]:
    """By where they stand."""
    made = json.loads((DASHBOARDS / "score.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in made["panels"] for target in panel["targets"]
    }
    (variable,) = (one for one in made["templating"]["list"] if one["type"] == "query")
    assert variable["definition"] == variable["query"]["query"]
    found |= {"variable": variable["definition"].replace(", instance)", ")")}
    groups = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]
    return found | {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def names(expression: str) -> set[str]:
    plain = re.sub(r'"[^"]*"', "", LABELS.sub("", re.sub(r"\[[^\]]*\]", "", expression)))
    return set(re.findall(r"[a-zA-Z_][\w:]*", plain)) - LANGUAGE


def labels(expression: str) -> set[str]:
    found: set[str] = set()
    for matched, grouped in LABELS.findall(expression):
        found |= set(re.findall(r"(\w+)=", matched)) | set(re.findall(r"\w+", grouped))
    return found - {"instance"}


def test_the_parser_of_this_test() -> None:
    expression = 'histogram_quantile(0.5, sum by (le) (rate(a:b_bucket{x="y z",q=~"$q"}[5m]))) / max(other) > 0.5'
    assert names(expression) == {"a:b_bucket", "other"}
    assert labels(expression) == {"le", "x", "q"}


def test_every_name_is_on_the_page(server: Server, fresh_clip: Path) -> None:
    chat(server, ask(data_url(fresh_clip)))
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    known = {name: set(known) for name, known in SCRAPED.items()}
    for family in families:
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    wanted = expressions()
    assert len(wanted) > 20
    used: set[str] = set()
    for where, expression in wanted.items():
        assert names(expression), where
        for name in names(expression):
            assert name in known, f"{where}: {name} is not on the page"
        assert labels(expression) <= set().union(*(known[name] for name in names(expression))), where
        used |= names(expression)
    ours = {name for family in families if re.match("score_.*(?<!_created)$", name := family.name)}
    missing = {name for name in ours if not any(one.startswith(name) for one in used)}
    assert missing == set(), "a metric of ours that no panel shows"
