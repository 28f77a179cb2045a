"""Selection methods behind one API. A method is a function registered under a name.

A method takes ``x`` [T, N, D] and ``num_retained`` (K) and returns either

* scores [T * N] float32 (higher is kept first): the K best are kept, ties to the lower index; or
* a :class:`~score_vllm.types.TokenSelection`, where the method does not rank single tokens.

Example, a method of your own::

    from score_vllm import methods, select_tokens

    @methods.register("norm")
    def norm(x, num_retained, **_):
        return x.float().norm(dim=-1).flatten()

    kept = select_tokens(x, 0.1, method="norm")

Keyword-only parameters of the function become the method's options: ``def norm(x, num_retained, *, p=2.0)``
makes ``select_tokens(x, 0.1, method="norm", p=1.0)`` work and refuses any other option. A parameter named
as in :data:`SIGNALS` receives the argument of that name of :func:`~score_vllm.select.select_tokens`.

A published method has two modes. ``exact`` (default, and the only one that is served) keeps exactly K tokens in
ascending order, without randomness, with decisions in fp32, for every video and ratio. ``reference`` gives
index for index and row for row what its own code gives, its miscounts and refusals included.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from score_vllm.types import TokenSelection
from score_vllm.vision.saliency import SALIENCY_KINDS

MethodFunction = Callable[..., torch.Tensor | TokenSelection]
ReferenceFunction = Callable[..., TokenSelection]

MODES = ("exact", "reference")

# Arguments of select_tokens that a method may take; any other keyword-only parameter is its own option.
SIGNALS = (
    "policy",
    "weights",
    "saliency",
    "frame_features",
    "grid",
    "seconds",
    "text_before",
    "text_after",
    "variant",
)


def _own_options(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in SIGNALS)


@runtime_checkable
class Learned(Protocol):
    """Trained weights of a method."""

    @property
    def hidden_size(self) -> int:
        """D of the tokens that they read."""

    def digest(self) -> str:
        """Of their content; part of the cache key of what they select."""

    def to(self, device: Any) -> Any:
        """The same on a device."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a method's trained weights come from.

    Attributes:
        load: reads them from a directory; FileNotFoundError, ValueError.
        wanted: not None for the names of a checkpoint's tensors that belong to them.
        architectures: models that they exist for; empty: any of their width.
    """

    load: Callable[[str], Learned]
    wanted: Callable[[str], str | None]
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method.

    Attributes:
        name: what ``method=`` takes.
        function: ``exact`` mode: ``(x, num_retained, **keywords)``.
        options: the options that ``function`` takes.
        reference: ``reference`` mode: ``(x, retention_ratio, **keywords)``, or None where there is none.
        variants: known values of ``variant=``, the default first; empty where there is only one.
        saliency: kind of attention that the published method ranks by, out of :data:`SALIENCY_KINDS`; without
            ``saliency=`` it ranks by the L2 norm, which is not the published method. None: it ranks by none.
        weights: its trained weights, without which it cannot run; None for training-free methods.
    """

    name: str
    function: MethodFunction
    options: tuple[str, ...]
    reference: ReferenceFunction | None = None
    variants: tuple[str, ...] = ()
    saliency: str | None = None
    weights: Weights | None = None

    def options_in(self, mode: str) -> tuple[str, ...]:
        """Names of the options that the method takes in that mode."""
        return _own_options(self.reference) if mode == "reference" and self.reference else self.options


_METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    reference: ReferenceFunction | None = None,
    variants: Sequence[str] = (),
    saliency: str | None = None,
    weights: Weights | None = None,
) -> Callable[[MethodFunction], MethodFunction]:
    """Decorator that makes a function available as ``method=name``; see the module's example.

    Args:
        name: lower-case identifier, not taken yet (registering the same function again is allowed).
        reference: the method's ``reference`` mode, if it has one.
        variants: known values of ``variant=``, the default first.
        saliency, weights: see :class:`Method`.

    Raises:
        ValueError: the name is not an identifier or belongs to another function, or the saliency is of no known kind.
    """
    if saliency not in (None, *SALIENCY_KINDS):
        raise ValueError(f"saliency of method {name!r} must be None or one of {SALIENCY_KINDS}, got {saliency!r}")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"method name must be a lower-case identifier, got {name!r}")

    def wrap(function: MethodFunction) -> MethodFunction:
        known = _METHODS.get(name)
        if known is not None and known.function is not function:
            raise ValueError(f"method {name!r} is registered already, by {known.function.__module__}")
        _METHODS[name] = Method(name, function, _own_options(function), reference, tuple(variants), saliency, weights)
        return function

    return wrap


def names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def learned_names() -> list[str]:
    """Names of the methods whose trained weights come as ``weights=``, sorted; those of ``score`` are its policy."""
    return [name for name in names() if _METHODS[name].weights is not None and name != "score"]


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _METHODS:
        raise ValueError(f"method must be one of {names()}, got {name!r}")
    return _METHODS[name]


def check_mode(method: Method, mode: str) -> None:
    """Refuse a mode that is unknown or that the method does not have.

    Raises:
        ValueError: the message lists the known modes, or the methods that have this one.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    if mode == "reference" and method.reference is None:
        having = [name for name in names() if _METHODS[name].reference]
        raise ValueError(f"method {method.name!r} has no reference mode; the methods that have one are {having}")


def check_options(method: Method, options: dict[str, Any], mode: str = "exact") -> None:
    """Refuse options that the method does not take in that mode.

    Raises:
        ValueError: an unknown option; the message lists the known ones.
    """
    known = method.options_in(mode)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"method {method.name!r} takes the options {list(known)} in {mode} mode, got {unknown}")


def check_variant(method: Method, variant: str | None) -> str | None:
    """The variant to run: the one named, or the method's default.

    Returns:
        A name out of ``method.variants``, or None where the method has no variants.

    Raises:
        ValueError: an unknown variant; the message lists the known ones.
    """
    if variant is None:
        return method.variants[0] if method.variants else None
    if variant not in method.variants:
        raise ValueError(f"variant of method {method.name!r} must be one of {list(method.variants)}, got {variant!r}")
    return variant


def variant_for(method: Method, architecture: str) -> str | None:
    """The variant that was published for a model, out of ``method.variants``; None: the method's default."""
    return "llava" if architecture.startswith("Llava") and "llava" in method.variants else None


def load_weights(method: str, directory: str, hidden_size: int, architecture: str) -> Learned:
    """Load a learned method's weights and check that they were made for the model's tokens.

    Raises:
        ValueError: their width or architecture differs from the model's; both are in the message.
        FileNotFoundError: the directory has no weights.
    """
    spec = get(method).weights
    assert spec is not None
    if spec.architectures and architecture not in spec.architectures:
        raise ValueError(
            f"method {method!r} exists for {', '.join(spec.architectures)}, but the model is {architecture}"
        )
    learned = spec.load(directory)
    if learned.hidden_size != hidden_size:
        raise ValueError(
            f"selector {directory} was made for hidden size {learned.hidden_size}, "
            f"but the model has hidden size {hidden_size}"
        )
    return learned


def call(
    function: Callable[..., Any], x: torch.Tensor, amount: float, signals: dict[str, Any], own: dict[str, Any]
) -> Any:
    """Call a method's function with the signals that its signature has room for.

    Args:
        function: of either mode.
        x: [T, N, D].
        amount: K in ``exact`` mode, the ratio in ``reference`` mode.
        signals: by name, see :data:`SIGNALS`.
        own: the method's options, checked already.

    Returns:
        What the function returns.
    """
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        signals = {name: value for name, value in signals.items() if name in parameters}
    return function(x, amount, **signals, **own)


# Registered on import, each under its own name.
for _name in (
    "baselines",
    "cacovid",
    "dycoke",
    "evs",
    "fastvid",
    "flashvid",
    "holitom",
    "score",
    "tango",
    "vcast",
    "vidcom2",
    "visionselector",
):
    importlib.import_module(f"score_vllm.methods.{_name}")
