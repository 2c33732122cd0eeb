# `make run` sets everything up and trains on a bundled dataset; `make test` sets everything up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: run test lint check clean bench bench-steps bench-steps-all bench-prediction bench-around bench-quality

run: $(VENV)/.installed
	$(BIN)/python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml --holdout_ratio 0.2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint test

# Benchmarks: finished rows are skipped, so each target can be stopped and run again. On an idle machine, one at a time.
bench: bench-steps bench-prediction bench-around bench-quality

bench-steps: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step_throughput --size hopper --threads 2

bench-steps-all: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step_throughput

bench-prediction: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.prediction

bench-around: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.around_training

bench-quality: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.time_to_quality

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.installed-bench: requirements-bench.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mbrl==0.2.0
	touch $@
