# Everything runs from .venv, which `make setup` builds once; nothing needs activation.
PYTHON ?= python3
RETENTION ?= 0.1
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= demo

.PHONY: setup serve test lint

setup:
	@$(PYTHON) scripts/setup_env.py

serve: setup
	@.venv/bin/score-serve --model $(MODEL) --retention $(RETENTION) --host $(HOST) --port $(PORT)

test: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/python -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
