"""``--selector``: where the trained weights of the learned methods besides score come from."""

from __future__ import annotations

from pathlib import Path

from score_vllm import methods
from score_vllm.catalog import UsageError
from score_vllm.demo import cache_directory
from score_vllm.methods import hub


def local_directory(method: str, source: str) -> str:
    """A directory that holds a method's weights; a hub id is fetched into the cache, its tensors alone.

    Raises:
        UsageError: the source is neither a directory nor a hub id that can be fetched.
    """
    weights = methods.get(method).weights
    assert weights is not None
    if not hub.is_hub_id(source):
        return str(Path(source).expanduser().resolve())
    target = cache_directory() / "selectors" / method / source.replace("/", "--")
    try:
        return str(hub.fetch(source, target, weights.wanted))
    except (OSError, ValueError) as error:
        if (target / "model.safetensors").is_file():
            return str(target)  # offline: what was fetched before
        raise UsageError(f"--selector: {error}") from error


def resolve_selectors(
    given: list[str], chosen: tuple[str, ...], hidden_size: int, architecture: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Directories and digests of the weights of every learned method that the server runs.

    Args:
        given: values of ``--selector``: ``SOURCE``, or ``METHOD=SOURCE`` where several learned methods run.
        chosen: every method that the server runs.
        hidden_size: D of the model.
        architecture: vLLM's name of the model.

    Returns:
        ``(directories, digests)`` by method.

    Raises:
        UsageError: weights are missing, superfluous, broken, or made for another model.
    """
    needed = [name for name in chosen if name in methods.learned_names()]
    sources: dict[str, str] = {}
    for value in given:
        name, _, source = value.partition("=")
        if not name.isidentifier() or "=" not in value:  # paths may hold a = too
            if len(needed) != 1:
                raise UsageError(
                    f"--selector {value!r} must be METHOD=SOURCE: the learned methods of this server are {needed}"
                )
            name, source = needed[0], value
        if name not in needed:
            raise UsageError(f"--selector names method {name!r}; the learned methods of this server are {needed}")
        if name in sources:
            raise UsageError(f"--selector is given twice for method {name!r}")
        if not source:
            raise UsageError(f"--selector {value!r} must name a directory or a hub id")
        sources[name] = source
    directories, digests = {}, {}
    for name in needed:
        if name not in sources:
            raise UsageError(f"method {name} needs its trained weights: --selector {name}=DIR or a hub id")
        directories[name] = local_directory(name, sources[name])
        try:
            digests[name] = methods.load_weights(name, directories[name], hidden_size, architecture).digest()
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(f"--selector: {error}") from error
    return directories, digests
