"""The installed vLLM is the one that was recorded; any other is refused in one sentence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from score_vllm import catalog, plugin
from score_vllm.server import options

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vllm_contract.py"


@pytest.fixture(scope="module")
def contract() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_contract", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_contract"] = module
    spec.loader.exec_module(module)
    return module


def vllm_parent() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(spec.submodule_search_locations[0]).parent


def test_the_installed_vllm_is_as_recorded(contract: Any) -> None:
    version, recorded = plugin.installed_version(), contract.load()
    assert version in recorded, f"vLLM {version} is not recorded; see the head of {SCRIPT.name}"
    found = contract.describe_all(vllm_parent())
    known = recorded[version].keys() & found.keys()
    moved = contract.differences({s: recorded[version][s] for s in known}, {s: found[s] for s in known})
    assert not moved, "moved in vLLM:\n" + "\n".join(moved)
    assert len(known) > 0.8 * len(found), "much of what we use is not recorded; record again"
    assert not [symbol for symbol in found.keys() - known if found[symbol] == contract.MISSING]


def test_what_is_recorded_covers_what_is_tested(contract: Any) -> None:
    recorded = contract.load()
    assert {"0.32.0", "0.33.0"} <= set(recorded)
    assert set(plugin.TESTED_VERSIONS) <= {version.rpartition(".")[0] for version in recorded}
    # Both places of what moved are tried; everything else is in both versions.
    moved = {s for s in recorded["0.32.0"] if contract.MISSING in (recorded["0.32.0"][s], recorded["0.33.0"][s])}
    names = {"make_arg_parser", "validate_parsed_serve_args", "cli_env_setup"}
    assert {symbol.rpartition(":")[2] for symbol in moved} == names
    assert len(moved) == 2 * len(names)


def test_a_moved_signature_is_named(contract: Any, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    module = tmp_path / "vllm" / "m.py"
    symbols = ("vllm.m:f", "vllm.m:C.g", "vllm.m:gone")
    module.write_text("def f(a: int, *, b=2): ...\nclass C(B):\n    async def g(self):\n        return 1\ngone = 1\n")
    old = {symbol: contract.Source(tmp_path).describe(symbol) for symbol in symbols}
    module.write_text("def f(a, b=2): ...\nclass C(B):\n    async def g(self):\n        return 2\n")
    new = {symbol: contract.Source(tmp_path).describe(symbol) for symbol in symbols}
    lines = contract.differences(old, new)
    assert [line.split(": ")[0] for line in lines] == sorted(symbols)
    assert "(a, *, b=2)" in next(line for line in lines if line.startswith("vllm.m:f"))
    assert next(line for line in lines if "gone" in line) == "vllm.m:gone: value -> missing"


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.320.0", "1.0.0", "0.1.dev5+gabc"])
def test_an_untested_version_is_refused_in_one_sentence(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: version)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv(plugin.ALLOW_VARIABLE, raising=False)
    with pytest.raises(plugin.UntestedVersionError) as caught:
        plugin.register()
    message = str(caught.value)
    assert f"vLLM {version} has not been tested" in message
    assert "0.32" in message
    assert f"{plugin.ALLOW_VARIABLE}=1" in message
    assert not plugin.is_registered()
    with pytest.raises(catalog.UsageError, match="has not been tested"):
        options.check_plugins()
    monkeypatch.setenv(plugin.ALLOW_VARIABLE, "1")
    plugin.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_a_tested_version_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: version)
    plugin.check_version()
