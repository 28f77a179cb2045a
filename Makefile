# Everything runs from .venv, which `make setup` builds once; nothing needs activation.
PYTHON ?= python3
RETENTION ?= 0.1
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= demo
# Test processes side by side; more than two need some 6 GB of memory each.
WORKERS ?= 2

.PHONY: setup serve picture tables check fast test test-ray test-long lint docs docs-serve wheel

setup:
	@$(PYTHON) scripts/setup_env.py

serve: setup
	@.venv/bin/score-serve --model $(MODEL) --retention $(RETENTION) --host $(HOST) --port $(PORT)

test: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/python -m pytest -n $(WORKERS) --no-loadscope-reorder --max-worker-restart=0

# Engines under Ray, on this machine alone; some eight minutes on two cores. Ray comes beside vLLM without moving anything.
test-ray: setup
	@.venv/bin/python -c "import ray, pandas" 2>/dev/null || \
	  .venv/bin/python -m pip install -q --no-deps "ray==2.60.*" "pandas>=2.2" "python-dateutil>=2.8" "six>=1.16" "msgpack>=1.0"
	@.venv/bin/python -m pytest -m ray tests/ray

# Under two minutes on two quiet cores: what an author runs after every change. Types are checked beside the tests.
check: setup
	@$(MAKE) --no-print-directory -j2 lint fast

fast:
	@.venv/bin/python -m pytest -q -n $(WORKERS) -m "not slow and not long" tests/unit tests/kernels

# The long reproductions, which `make test` leaves out: the demo's training, load.
test-long: setup
	@.venv/bin/python -m pytest -m long

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The site, into site/; a broken link or anchor is an error. Needs no network.
docs: setup
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

# The README's picture, from the demo's clip and policy, for light and dark pages.
picture: setup
	@for theme in light dark; do .venv/bin/score-viz score_vllm/assets/demo/clip.mp4 --model demo --retention 0.1 \
	  --cell-width 120 --theme $$theme -o docs/assets/kept-$$theme.png || exit 1; done

# What the pages show of code and results, written anew: tables of models, accuracy, speed.
tables: setup
	@.venv/bin/python scripts/models_table.py
	@.venv/bin/python scripts/compatibility.py
	@.venv/bin/python -m benchmarks.report

docs-serve: docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve

# sdist and wheel, into dist/.
wheel: setup
	@.venv/bin/python -m build --no-isolation --outdir dist .
