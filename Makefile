# make setup check test demo: all that CI does. Each sets up first, once.
# On CUDA: make setup EXTRA=cuda

PYTHON ?= python3
EXTRA ?= $(if $(wildcard .venv/ready-cuda),cuda,cpu)
BIN := .venv/bin
CPU_TORCH ?= torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := check
.NOTPARALLEL:
.PHONY: setup check test test-distributed demo readme dashboard clean

setup: .venv/ready-$(EXTRA)

.venv/ready-$(EXTRA): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python %d.%d is too old: expected 3.11 or newer; use make PYTHON=python3.11" \
	  % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(EXTRA),cpu)
	$(BIN)/pip install '$(CPU_TORCH)' || \
	  $(BIN)/pip install '$(CPU_TORCH)' --extra-index-url $(CPU_INDEX)
endif
	$(BIN)/pip install -e '.[$(EXTRA),train,bench,ray,dev]'
	$(BIN)/vllm-accel doctor --fix
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	@git ls-files -z '*.py' | xargs -0 awk \
	  'FNR == 401 { print FILENAME ": longer than 400 lines"; long = 1 } END { exit long }'

test: setup  # two at a time: most of an engine's start runs on one core
	$(BIN)/pytest tests -n 2 --dist loadfile

test-distributed: setup  # two ranks, replicas on Ray; half an hour, not part of `test`
	$(BIN)/pytest tests/distributed -m distributed

demo: setup
	$(BIN)/python examples/demo.py

readme:  # README's tables, from docs/results
	$(BIN)/python docs/results/readme_table.py

dashboard:  # Grafana's, from the counters there are
	$(BIN)/python docs/grafana/make_dashboard.py

clean:  # leaves .venv: it is slow to make again
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
