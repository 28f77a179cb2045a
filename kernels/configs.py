"""Committed launch configurations, so that a server's first request compiles one kernel and searches nothing.

Chosen by compiling for each architecture (no spills, matrix instructions, shared memory within the chip's) and by
the traffic count in ``score.py``; ``benchmarks/kernels.py --tune`` times the neighbours on a real GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from score_vllm.kernels.inputs import SecondOperand

# Hidden units that the epilogue sums together, whatever the tile; the widths that kernels take are its multiples.
GROUP = 64

# A guess until it is measured on a GPU: a piece of BLOCK_M x GROUP takes a third of a 256 wide tile's time, so that
# up to two rounds of pieces end before one more wave of whole tiles would.
_MAX_TAIL_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Tile shape of the score kernel.

    Attributes:
        block_m: tokens per program.
        block_h: hidden units per program, a multiple of ``GROUP``.
        block_k: step along D.
        num_warps: warps per program; on sm_90 a multiple of 4 (a warpgroup issues the matrix instruction).
        num_stages: depth of the software pipeline.
        tma: load through the tensor memory accelerator (sm_90 and later, X whole and 16-byte aligned).
    """

    block_m: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


# (architecture, bytes per element) -> configurations by block_h, widest first; the widest that divides H is taken.
# "other" is for chips with 99 KB of shared memory per block (8.6, 8.9, 12.x).
SCORE_CONFIGS: dict[tuple[str, int], tuple[ScoreConfig, ...]] = {
    ("sm_80", 2): (
        ScoreConfig(128, 128, 32, 8, 4),
        ScoreConfig(128, 64, 32, 4, 4),
    ),
    ("sm_90", 2): (
        ScoreConfig(128, 256, 64, 8, 4, tma=True),
        ScoreConfig(128, 128, 64, 8, 4, tma=True),
        ScoreConfig(128, 64, 64, 4, 4, tma=True),
    ),
    # 256 wide needs two accumulators in tensor memory before Triton 3.9: 528 of 512 columns, compiled to a trap.
    ("sm_100", 2): (
        ScoreConfig(128, 128, 64, 8, 4, tma=True),
        ScoreConfig(128, 64, 64, 4, 4, tma=True),
    ),
    ("other", 2): (
        ScoreConfig(128, 128, 32, 8, 2),
        ScoreConfig(128, 64, 32, 4, 3),
    ),
    ("sm_80", 4): (ScoreConfig(64, 64, 16, 8, 3),),
    ("sm_90", 4): (ScoreConfig(64, 64, 16, 8, 3),),
    ("sm_100", 4): (ScoreConfig(64, 64, 16, 8, 3),),
    ("other", 4): (ScoreConfig(64, 64, 16, 8, 3),),
}


def architecture(capability: tuple[int, int]) -> str:
    """Row of the table for a CUDA compute capability ``(major, minor)``."""
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "other")


def score_config(arch: str, itemsize: int, width: int, second: SecondOperand = "previous") -> ScoreConfig:
    """Tile shape for one launch of the score kernel.

    Args:
        arch: from :func:`architecture`.
        itemsize: bytes per element of X: 2 or 4.
        width: H, a multiple of ``GROUP``.
        second: of the weights. Subtracting first holds two tiles of tokens and two of weights a step, so it takes
            steps of at most 32 columns.

    Returns:
        The table's widest configuration whose ``block_h`` divides H.

    Raises:
        ValueError: H is not a positive multiple of ``GROUP``.
    """
    if width < 1 or width % GROUP:
        raise ValueError(f"width must be a positive multiple of {GROUP}, got {width}")
    config = next(config for config in SCORE_CONFIGS[arch, itemsize] if width % config.block_h == 0)
    return replace(config, block_k=min(config.block_k, 32)) if second == "residual" else config


def main_tiles(num_rows: int, width: int, config: ScoreConfig, num_sms: int) -> int:
    """How many tiles of ``block_m`` tokens run whole; the rest run cut into pieces ``GROUP`` units wide.

    Whole tiles fill whole waves of the chip. What is left would hold it for one more tile's time, however little
    it is; where that remainder is small, cutting it spreads it over the idle multiprocessors.

    Args:
        num_rows: T * N.
        width: H.
        config: of the launch.
        num_sms: multiprocessors of the device.

    Returns:
        Between 0 and ``ceil(num_rows / block_m)``.
    """
    tiles = -(-num_rows // config.block_m)
    if config.block_h == GROUP:
        return tiles
    per_wave = max(1, num_sms // (width // config.block_h))
    left = tiles % per_wave
    rounds = -(-left * (width // GROUP) // num_sms)
    return tiles - left if rounds <= _MAX_TAIL_ROUNDS else tiles
