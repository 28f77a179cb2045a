"""vLLM adapters: one file per model family. Importing this package imports nothing."""
