"""Benchmarks of this repository; README.md says which script answers which question."""
