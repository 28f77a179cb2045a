"""vLLM's CPU platform says that it has no device that Ray counts; here it takes what Ray calls GPU. For tests alone."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """CPU engines, scheduled by Ray's counted "GPUs"."""

    ray_device_key = "GPU"


def register() -> str:
    """Entry point of ``vllm.platform_plugins``."""
    return "ray_cpu_platform.RayCpuPlatform"
