"""The registry of methods: names, modes, variants, options and side inputs are checked; a method of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from score_vllm import methods, select_tokens
from score_vllm.select import select_retained

X = torch.randn(9, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registry() -> Iterator[None]:
    """Methods registered by a test are gone after it."""
    before = dict(methods._METHODS)
    yield
    methods._METHODS.clear()
    methods._METHODS.update(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "evz"}, r"method must be one of \['cacovid', 'dycoke', 'evs', .*'vidcom2', .*\], got 'evz'"),
        ({"method": "evs", "mode": "paper"}, r"mode must be one of \['exact', 'reference'\], got 'paper'"),
        (
            {"method": "uniform", "mode": "reference"},
            r"'uniform' has no reference mode; .*\['cacovid', 'dycoke', 'evs'",
        ),
        ({"method": "vidcom2", "variant": "x"}, r"'vidcom2' must be one of \['paper', 'vllm'\], got 'x'"),
        ({"method": "evs", "variant": "paper"}, r"'evs' must be one of \[\], got 'paper'"),
        ({"method": "evs", "q": 0.5}, r"'evs' takes the options \[\] in exact mode, got \['q'\]"),
        ({"method": "dycoke", "k": 0.5}, r"'dycoke' takes the options \[\] in exact mode, got \['k'\]"),
        ({"method": "fastvid", "K": 3, "b": 1}, r"\['c', 'tau', 'ignore', 'd', 'p', 'beta'\].*got \['K', 'b'\]"),
        ({"method": "holitom", "mode": "reference", "c": 3}, r"\['tau', 'beta', 'K'\] in reference mode"),
        ({"method": "fastvid", "tau": 1.5}, r"'tau' of method 'fastvid' must be a number in \[-1, 1\], got 1.5"),
        ({"method": "fastvid", "d": -0.1}, r"'d' of method 'fastvid' must be a number in \[0, 1\], got -0.1"),
        ({"method": "fastvid", "c": 0}, r"'c' of method 'fastvid' must be an integer in \[1, "),
        ({"method": "holitom", "K": 0}, r"'K' of method 'holitom' must be an integer in \[1, "),
        ({"method": "holitom", "beta": float("nan")}, r"'beta' .* in \[0, 1\], got nan"),
        ({"method": "dycoke", "mode": "reference", "k": 1.1}, r"'k' of method 'dycoke' .* in \[0, 1\], got 1.1"),
        ({"method": "fastvid", "saliency": torch.rand(9, 7)}, r"saliency must be \[T=9, N=8\] float, got \(9, 7\)"),
        ({"method": "evs", "saliency": torch.rand(9, 8, 1)}, r"saliency must be \[T=9, N=8\] float, got \(9, 8, 1\)"),
        ({"method": "holitom", "saliency": torch.ones(9, 8, dtype=torch.int64)}, r"saliency must be .* torch.int64"),
        (
            {"method": "fastvid", "mode": "reference", "saliency": torch.rand(72)},
            r"saliency must be \[T=9, N=8\] float, got \(72,\)",
        ),
        ({"method": "fastvid", "frame_features": torch.rand(8, 4)}, r"frame_features must be \[T=9, E >= 1\] float"),
        ({"method": "fastvid", "frame_features": torch.rand(9)}, r"frame_features must be .*got \(9,\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_tokens(X, 0.5, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "fastvid", "c": 2.5},
        {"method": "fastvid", "p": True},
        {"method": "fastvid", "tau": "0.5"},
        {"method": "holitom", "K": 7.0},
        {"method": "dycoke", "mode": "reference", "k": "0.5"},
    ],
)
def test_options_of_the_wrong_kind_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        select_tokens(X, 0.5, **arguments)


@pytest.mark.parametrize("keep", [0, 73, -1])
def test_counts_out_of_range_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"num_retained must be in \[1, T\*N=72\], got {keep}"):
        select_retained(X, keep, "evs")


@pytest.mark.usefixtures("registry")
def test_the_example_of_the_docstring_works() -> None:
    example = re.search(r"Example, a method of your own::\n\n(.*?)\n\nKeyword-only", str(methods.__doc__), re.DOTALL)
    assert example is not None
    code = "\n".join(line.removeprefix("    ") for line in example.group(1).splitlines())
    assert len(code.splitlines()) <= 10
    scope: dict[str, Any] = {"x": X}
    exec(code, scope)
    longest = X.reshape(-1, 6).norm(dim=-1).topk(7).indices.sort().values
    assert torch.equal(scope["kept"].indices, longest)
    assert "norm" in methods.names()


@pytest.mark.usefixtures("registry")
def test_own_methods_get_their_options_and_only_the_arguments_they_name() -> None:
    seen: list[Any] = []

    @methods.register("mine", variants=("one", "two"))
    def mine(x: torch.Tensor, num_retained: int, *, variant: str, p: float = 2.0) -> torch.Tensor:
        seen.append((num_retained, variant, p))
        return x.float().norm(p=p, dim=-1).flatten()

    select_tokens(X, 0.5, method="mine", saliency=torch.rand(9, 8))
    select_tokens(X, 0.25, method="mine", variant="two", p=1.0)
    assert seen == [(36, "one", 2.0), (18, "two", 1.0)]
    with pytest.raises(ValueError, match=r"takes the options \['p'\] in exact mode, got \['q'\]"):
        select_tokens(X, 0.5, method="mine", q=1)
    with pytest.raises(ValueError, match="no reference mode"):
        select_tokens(X, 0.5, method="mine", mode="reference")


@pytest.mark.usefixtures("registry")
def test_names_are_identifiers_and_unique() -> None:
    with pytest.raises(ValueError, match="lower-case identifier, got 'My-Method'"):
        methods.register("My-Method")(lambda x, k: x)
    with pytest.raises(ValueError, match=r"'evs' is registered already, by score_vllm\.methods\.evs"):
        methods.register("evs")(lambda x, k: x)


@pytest.mark.usefixtures("registry")
def test_a_method_that_breaks_its_promise_is_refused() -> None:
    @methods.register("short")
    def short(x: torch.Tensor, num_retained: int, **_: Any) -> Any:
        return select_tokens(x, 1.0, method="uniform")

    with pytest.raises(ValueError, match="'short' kept 72 tokens, 36 were asked for"):
        select_tokens(X, 0.5, method="short")


def test_import_needs_no_server_packages() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(vllm=None, triton=None, PIL=None, av=None)\n"
        "import torch, score_vllm\n"
        "print(score_vllm.select_tokens(torch.randn(8, 4, 4), 0.5, method='holitom').num_retained)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "16", done.stderr
