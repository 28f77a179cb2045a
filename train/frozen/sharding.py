"""The frozen language model spread over processes with FSDP, for models that do not fit beside their activations.

Every layer's weights are gathered when it runs, so all processes must run layers together, although they hold
different videos with different numbers of micro-batches. Before each forward pass the processes say whether they have
one to run; those that have none run an empty one along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from score_vllm.train.schema import ConfigurationError


def shard_layers(language_model: Any, device: torch.device) -> None:
    """Shard all layers but the last, whose parts are called one by one, over all processes.

    Args:
        language_model: the text model, still on the CPU or on ``device``.
        device: of this process.

    Raises:
        ConfigurationError: no process group is initialised.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ConfigurationError(
            "model.shard = 'fsdp' needs several processes: start with torchrun or accelerate launch"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in language_model.layers[:-1]:
        fully_shard(layer, mesh=mesh)


class Lockstep:
    """Keeps the forward passes of all processes in pairs.

    Args:
        device: of the exchanged flag.
        empty_pass: runs a forward pass whose result nobody needs.
    """

    def __init__(self, device: torch.device, empty_pass: Callable[[], None]) -> None:
        self._device, self._empty_pass = device, empty_pass

    def before_pass(self) -> None:
        """Call before each forward pass."""
        self._somebody_runs(True)

    def finish(self) -> None:
        """Run empty passes until no process has a real one left."""
        while self._somebody_runs(False):
            self._empty_pass()

    def _somebody_runs(self, mine: bool) -> bool:
        flag = torch.tensor([float(mine)], device=self._device)
        dist.all_reduce(flag)
        return bool(flag.item() > 0)
