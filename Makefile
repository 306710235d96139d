# make run    a question to the bundled model, from nothing but Python 3.11+, make and git
# make test   the whole suite: ruff, then pytest
# Both make .venv with the versions of requirements.lock first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint requirements.lock
TORCH := $(shell grep '^torch==' requirements.lock)
# Without an NVIDIA driver PyTorch's CPU build will do, which is a tenth of the download.
CPU_INDEX := $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
QUESTION ?= How many times does the letter r appear in strawberry?

.PHONY: run test interop gpu tiny clean

run: $(VENV)/.run
	@$(BIN)/python generate.py --model models/tiny --thinking "$(QUESTION)"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Against llama.cpp itself: needs llama-cpp-python in the environment, which compiles for some minutes.
interop: $(VENV)/.test
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || $(PIP) llama-cpp-python==0.3.36
	$(BIN)/python -m pytest tests/interop

# On a machine with an NVIDIA GPU: the kernels against PyTorch, then what they and the model reach.
gpu: $(VENV)/.test
	$(BIN)/python -m pytest tests/ops/test_kernels.py
	$(BIN)/python tests/ops/gpu/measure_kernels.py
	$(BIN)/python bench.py --rows '*/cuda' --deep --batch --out runs/bench-gpu

# The bundled model again, from its seed (SEED=1 is another): four stages on two processes, each resumable; then a row of
# the table for each stage.
TINY := pretrain sft dpo grpo
SEED ?= 0
OUT := runs/tiny-$(SEED)

tiny: $(VENV)/.run
	previous=; for stage in $(TINY); do \
	  $(BIN)/torchrun --standalone --nproc-per-node 2 train.py configs/tiny-$$stage.yaml --resume --set \
	    train.parallel=ddp train.seed=$(SEED) data.seed=$(SEED) train.out=$(OUT)/$$stage \
	    $${previous:+model.init=$$previous/latest} || exit; \
	  previous=$(OUT)/$$stage; \
	done
	$(BIN)/python evaluate.py --model $(TINY:%=$(OUT)/%/latest) --count 1100 --threads 1
	$(BIN)/python convert.py --model $(OUT)/grpo/latest --to bf16 --out $(OUT)/bf16 --force
	$(BIN)/python evaluate.py --model $(OUT)/bf16 --count 3300 --threads 1

$(VENV)/.torch: requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 run" >&2; exit 2; }
	@echo "Installing into $(VENV) (once)" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(CPU_INDEX) $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[train,test]'
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
