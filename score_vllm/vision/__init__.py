"""The frozen vision tower outside vLLM, and the attention that some methods rank by."""
