# `make run` sets everything up and trains on a bundled dataset; `make test` sets everything up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: run test lint check fuzz study results collected clean
.PHONY: bench bench-steps bench-steps-all bench-prediction bench-env bench-planning bench-around bench-quality bench-recipes bench-headline

run: $(VENV)/.installed
	$(BIN)/python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml --holdout_ratio 0.2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint test

# Thousands of mutated files, other ones every day; the tests have a few hundred, always the same.
fuzz: $(VENV)/.installed-dev
	FUZZ_CASES=1000 FUZZ_SEED=$$(date +%j) $(BIN)/python -m pytest tests/fuzz

# Benchmarks: finished rows are skipped, so each target can be stopped and run again. On an idle machine, one at a time.
HOPPER ?= logs/hopper-200k.hdf5
bench: bench-steps bench-prediction bench-env bench-planning bench-around bench-quality bench-recipes bench-headline

bench-steps: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step_throughput --size hopper --threads 2
	$(BIN)/python -m benchmarks.step_throughput --size hopper --threads 2 --busy --batch 256 --hidden 4x200 4x256

bench-steps-all: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step_throughput

bench-prediction: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.prediction

bench-env: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.model_env

bench-planning: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.planning

bench-around: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.around_training

bench-quality: $(VENV)/.installed-bench $(HOPPER)
	$(BIN)/python -m benchmarks.time_to_quality --data hopper=$(HOPPER) --times
	$(BIN)/python -m benchmarks.time_to_quality --data hopper=$(HOPPER)

bench-recipes: $(VENV)/.installed-bench $(HOPPER)
	$(BIN)/python -m benchmarks.recipes_tried --data $(HOPPER)

bench-headline: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.headline

logs/hopper-200k.hdf5: | $(VENV)/.installed-dev
	$(BIN)/python collect_dataset.py --env Hopper-v5 --policy data/policies/hopper-medium.npz --steps 200000 --output $@

# The study of results/PROTOCOL.md, part by part, each with its own folder in results/; stopped at any moment, it goes on
# where it was. Every part runs as two processes of one thread each, which share its cells: some fifty cells an hour on two
# cores, so days for all of it. `make results` writes the numbers of what is there into README.md and packs the folders of
# cells into one file per part, so that they can be committed; `make study` goes on from there, too.
COMPARE = $(BIN)/python compare_models.py
ARMS := $(patsubst %,configs/study/%.yaml,dnn dnn_huber dnn_posthoc pnn pnn_beta pnn_decay faithful faithful_huber)
MEDIUM := $(patsubst %,data/collected/%-medium-b.hdf5,hopper halfcheetah walker2d)
FIRST = --first_seed 100 --split_seeds 100
LARGE := data/collected/hopper-large-b.hdf5
twice = $(COMPARE) $(1) --quiet & $(COMPARE) $(1); status=$$?; wait; exit $$status

study: $(VENV)/.installed-dev collected $(LARGE)
	$(call twice,--configs $(ARMS) --datasets $(COLLECTED:%=data/collected/%.hdf5) --seeds 6 $(FIRST) --simulator \
		--output results/confirmation)
	for epochs in 10 20 40 80; do \
		$(call twice,--configs $(ARMS) --datasets $(MEDIUM) --seeds 3 $(FIRST) --params fit_epochs=$$epochs \
			--learning_rates_of results/confirmation --output results/budget_$$epochs) || exit $$?; done
	$(call twice,--configs $(ARMS) --datasets $(MEDIUM) --seeds 1 $(FIRST) 101 102 \
		--learning_rates_of results/confirmation --output results/splits)
	$(call twice,--configs $(patsubst %,configs/study/%.yaml,dnn dnn_huber pnn pnn_beta) --seeds 3 $(FIRST) \
		--datasets $(LARGE):5000 $(LARGE):15000 $(LARGE):50000 $(LARGE):200000 --output results/sizes)
	$(call twice,--configs $(ARMS) --datasets $(MEDIUM) --seeds 3 $(FIRST) --params layer_norm=true --output results/layer_norm)

results: $(VENV)/.installed
	$(BIN)/python -m study.publish

# Datasets that do not come with the repository: what confirms the study, with other seeds and policies than the bundled
# ones, and what is large. The same packages make the same bytes, on any processor with AVX2.
COLLECTED := hopper-medium-b hopper-random-b hopper-medium-noisy-b hopper-replay-b hopper-hidden-b \
	walker2d-medium-b halfcheetah-medium-b
collected: $(COLLECTED:%=data/collected/%.hdf5)

MEDIUM_HOPPER := --env Hopper-v5 --policy data/policies/hopper/0105000.npz
data/collected/hopper-medium-b.hdf5: COLLECT = $(MEDIUM_HOPPER) --seed 2
data/collected/hopper-random-b.hdf5: COLLECT = --env Hopper-v5 --policy random --seed 2
data/collected/hopper-medium-noisy-b.hdf5: COLLECT = $(MEDIUM_HOPPER) --seed 3 --process_noise 0.2
data/collected/hopper-replay-b.hdf5: COLLECT = --env Hopper-v5 --seed 2 \
	--policy $(patsubst %,data/policies/hopper/0%000.npz,010 045 070 090 100 110)
data/collected/hopper-hidden-b.hdf5: COLLECT = $(MEDIUM_HOPPER) --seed 4 --hide_velocities
data/collected/walker2d-medium-b.hdf5: COLLECT = --env Walker2d-v5 --policy data/policies/walker2d/0155000.npz --seed 2
data/collected/halfcheetah-medium-b.hdf5: COLLECT = --env HalfCheetah-v5 --policy data/policies/halfcheetah/0075000.npz --seed 2

data/collected/hopper-large-b.hdf5: COLLECT = $(MEDIUM_HOPPER) --seed 5 --steps 340000

data/collected/%.hdf5: | $(VENV)/.installed-dev
	$(BIN)/python collect_dataset.py --steps 50000 $(COLLECT) --output $@

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

DEV := requirements-dev.txt requirements-envs.txt requirements-export.txt
$(VENV)/.installed-dev: $(DEV) $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(DEV:%=-r %)
	touch $@

$(VENV)/.installed-bench: requirements-bench.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mbrl==0.2.0
	touch $@
