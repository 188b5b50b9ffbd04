# Everything runs in .venv, which is made on first use, and tests of clients in .venv-ecosystem. `make`
# alone lists the targets.

# The interpreter that makes .venv; afterwards .venv/bin/python is used.
PYTHON ?= python3
# Passed to the tool behind a target: make test ARGS='-k adam -x'
ARGS ?=
TARGETS ?= cuda:80 cuda:90 cuda:100 hip:gfx942
SAMPLES_TARGETS ?= cuda:120 hip:gfx950
# Where the results of make gpu go, and the C library is built.
OUT ?= bench/out/gpu
BUILD ?= build

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Trainers and libraries around an optimizer, which .venv goes without.
CLIENTS := .venv-ecosystem
CLIENTS_STAMP := $(CLIENTS)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-ecosystem gpu bench bench-per-sample experiments regression codegen codegen-samples \
  native table lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON (to make .venv with), ARGS (for demo, test, gpu, bench, ...), TARGETS (for codegen, native)"

env: $(STAMP) ## Create or update .venv with the versions in constraints.txt

# The stamp is written last, so an install that fails or is interrupted is tried again. The mark of an
# unfinished first install makes that retry start from an empty environment, since pip takes a package
# whose files were half written for an installed one. An environment made otherwise is updated in place.
# torch comes by itself and first: its pin decides the build, and nothing later may replace it.
define environment # folder, constraints, extra, packages to be installed without what they ask for
	@if [ -e $(1)/.unfinished ]; then rm -rf $(1); fi
	@if [ ! -e $(1)/bin/python ]; then \
	  mkdir -p $(1) && touch $(1)/.unfinished && $(PYTHON) -m venv $(1); fi
	$(call pip,$(1),$(2)) torch setuptools
	$(call pip,$(1),$(2)) --no-build-isolation -e '.[$(3)]'
	$(if $(4),$(call pip,$(1),$(2)) --no-deps $(4))
	@rm -f $(1)/.unfinished
	@touch $(1)/.installed
endef
pip = $(1)/bin/python -m pip --disable-pip-version-check install -c $(2)

$(STAMP): pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt,dev)

# BackPACK asks for torchvision, imports it for an example alone, and a build of it that does not go with torch's
# breaks whatever does, such as transformers. torchtitan asks for loggers and datasets, and imports two small packages
# for its optimizers.
$(CLIENTS_STAMP): pyproject.toml constraints.txt constraints-ecosystem.txt
	$(call environment,$(CLIENTS),constraints-ecosystem.txt,ecosystem,backpack-for-pytorch torchtitan)

demo: $(STAMP) ## Train a small GPT with torch.optim.AdamW and with fusedopt.AdamW
	$(BIN)/python -m fusedopt demo $(ARGS)

# The script and not `python -m pytest`, which would put the checkout itself on the import path.
# loadgroup keeps tests that share an expensive fixture on one worker.
test: $(STAMP) ## Run the whole test suite in parallel
	$(BIN)/pytest -n auto --dist loadgroup $(ARGS)

# Nothing is downloaded but packages: models are tiny ones, from their configurations.
test-ecosystem: $(CLIENTS_STAMP) ## Test under Hugging Face, Lightning, Opacus and BackPACK themselves
	$(CLIENTS)/bin/pytest -n auto --dist loadgroup tests/ecosystem $(ARGS)

# Without .venv: the Python of a machine with a GPU has a PyTorch for it, and Triton.
gpu: ## On a machine with a GPU, in seven minutes: verify, benchmarks, tuning, tests, sanitizer; results in OUT
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m bench.gpu --out "$(OUT)" $(ARGS)

bench: $(STAMP) ## Run the microbenchmarks
	$(BIN)/pytest bench $(ARGS)

# Needs a GPU. Without one: make bench-per-sample ARGS=--quick
bench-per-sample: $(STAMP) ## Time per-sample squares against the plain gradient on a GPU
	$(BIN)/python -m bench.per_sample $(ARGS)

# All of them take about an hour: make experiments ARGS='digits --reduced'
experiments: $(STAMP) ## Run the experiments on batch sizes and states; JSON and PNG in experiments/results
	$(BIN)/python -m experiments $(ARGS)

regression: $(STAMP) ## Hold the host's share of a step to its committed baseline
	$(BIN)/python -m bench.regression host $(ARGS)

codegen: $(STAMP) ## Compile every kernel variant for TARGETS, without a GPU; check budgets and baseline
	$(BIN)/python -m fusedopt codegen $(TARGETS:%=--target %) --baseline bench/baselines/codegen.json $(ARGS)

# Their registers are scarce, and what runs out of them depends on the target: the next ones of both makers.
codegen-samples: $(STAMP) ## Compile the per-sample kernels for SAMPLES_TARGETS, too; check budgets
	$(BIN)/python -m fusedopt codegen $(SAMPLES_TARGETS:%=--target %) \
	  $(foreach name,linear_ convolution_ partial_sums embedding reduce_,--only $(name)) --only "finish " $(ARGS)

# Of the targets, NVIDIA's: the library has code for no other.
space := $(subst ,, )
native: $(STAMP) ## Build the C library for TARGETS in BUILD, without a GPU, and test it
	cmake -S . -B "$(BUILD)" -DFUSEDOPT_TARGETS="$(subst $(space),;,$(strip $(filter cuda:%,$(TARGETS))))"
	cmake --build "$(BUILD)"
	ctest --test-dir "$(BUILD)" --output-on-failure --label-exclude codegen

table: $(STAMP) ## Write the tables of docs/: algorithms, benchmarks, launches, and scale with its picture, costs of a step
	$(BIN)/python -m tools.algorithm_table --write
	$(BIN)/python -m tools.benchmark_table --write
	$(BIN)/python -m tools.scale --write
	TRITON_INTERPRET=1 $(BIN)/python -m tools.launches --write
	$(BIN)/python -m tools.step_costs --write

# The conventions that only a pattern can check are pre-commit hooks; those need the git checkout.
lint: $(STAMP) ## Check style, format, types and conventions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -e .git ]; then PRE_COMMIT_HOME=$(VENV)/.pre-commit $(BIN)/pre-commit run --all-files; fi

format: $(STAMP) ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove environments, build output and caches
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
