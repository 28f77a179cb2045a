"""``python -m score_vllm.train.world``: see :mod:`score_vllm.train.world.vlm`."""

from score_vllm.train.world.vlm import main

main()
