"""lmms-eval's model ``score_vllm``."""
