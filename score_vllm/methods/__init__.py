"""Selection methods behind one door. A method is a function registered under a name.

A method takes ``x`` [T, N, D] and ``num_retained`` (K) and returns either

* scores [T * N] float32 (higher is kept first): the door keeps the K best, ties to the lower index; or
* a :class:`~score_vllm.types.TokenSelection`, where the method does not rank single tokens.

Example, a method of your own::

    from score_vllm import methods, select_tokens

    @methods.register("norm")
    def norm(x, num_retained, **_):
        return x.float().norm(dim=-1).flatten()

    kept = select_tokens(x, 0.1, method="norm")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from score_vllm.types import TokenSelection

MethodFunction = Callable[..., torch.Tensor | TokenSelection]

# Arguments that the door passes to every method; anything else is a method's own option.
DOOR_ARGUMENTS = ("x", "num_retained", "policy", "saliency")


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method: its name, its function and the options that it takes."""

    name: str
    function: MethodFunction
    options: tuple[str, ...]

    @property
    def needs_policy(self) -> bool:
        """True where the method cannot run without trained weights."""
        return self.name == "score"


_METHODS: dict[str, Method] = {}


def register(name: str) -> Callable[[MethodFunction], MethodFunction]:
    """Decorator that makes a function available as ``method=name``.

    Args:
        name: lower-case identifier, not taken yet (registering the same function again is allowed).

    Raises:
        ValueError: the name is not an identifier or belongs to another function.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"method name must be a lower-case identifier, got {name!r}")

    def wrap(function: MethodFunction) -> MethodFunction:
        known = _METHODS.get(name)
        if known is not None and known.function is not function:
            raise ValueError(f"method {name!r} is registered already, by {known.function.__module__}")
        parameters = inspect.signature(function).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in DOOR_ARGUMENTS)
        _METHODS[name] = Method(name, function, options)
        return function

    return wrap


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _METHODS:
        raise ValueError(f"method must be one of {names()}, got {name!r}")
    return _METHODS[name]


def check_options(method: Method, options: dict[str, Any]) -> None:
    """Refuse options that the method does not take.

    Raises:
        ValueError: an unknown option; the message lists the known ones.
    """
    if unknown := sorted(set(options) - set(method.options)):
        raise ValueError(f"method {method.name!r} takes the options {list(method.options)}, got {unknown}")


from score_vllm.methods import baselines as _baselines  # noqa: E402,F401  (registers on import)
from score_vllm.methods import score as _score  # noqa: E402,F401
