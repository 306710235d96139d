# make run    a question to the bundled model, from nothing but Python 3.11+, make and git
# make test   the whole suite: ruff, then pytest
# Both make .venv with the versions of requirements.lock first, once. TORCH=cpu or TORCH=cuda chooses PyTorch's build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_USER=0 $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint requirements.lock
# Shows the name of each package, and nothing of what is already there; a pipe hides pip's exit status.
comma := ,
define install
	@{ $(INSTALL) $(1) || touch $(VENV)/.failed; } | grep --line-buffered -E "^(Collecting|Processing|Installing)" >&2 || true; \
	  ! rm $(VENV)/.failed 2>/dev/null
endef
# PyTorch's build: cpu or cuda. Without an NVIDIA driver the CPU build will do, which is a tenth of the download.
TORCH ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
VERSION := $(shell sed -n 's/^torch==//p' requirements.lock)
CPU_INDEX := https://download.pytorch.org/whl/cpu
QUESTION ?= How many times does the letter r appear in strawberry?

.PHONY: run test interop fuzz mutants gpu tiny pictures clean

run: $(VENV)/.run
	@$(BIN)/python generate.py --model models/tiny --thinking "$(QUESTION)"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Against llama.cpp itself: needs llama-cpp-python in the environment, which compiles for some minutes.
interop: $(VENV)/.test
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || $(INSTALL) llama-cpp-python==0.3.36
	$(BIN)/python -m pytest tests/interop

# The C++ step under sanitizers, for every instruction set: 200 random models each, some minutes.
fuzz: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python tests/ops/cpu/test_fuzz.py 200
	PYTHONPATH=.:tests $(BIN)/python tests/ops/cpu/test_instructions.py

# Small errors put into the code, one at a time: which of them would the tests not notice? SAMPLE of each file; hours.
SAMPLE ?= 40
mutants: $(VENV)/.test
	$(call install,--editable '.[mutation]')
	$(BIN)/python tests/mutation/mutate.py --sample $(SAMPLE)

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
	for stage in $(TINY); do \
	  $(BIN)/python evaluate.py run families --model $(OUT)/$$stage/latest --limit 1100 --threads 1 --batch-size 64 \
	    --resume --out $(OUT)/evaluation/$$stage || exit; \
	done
	$(BIN)/python evaluate.py report $(TINY:%=$(OUT)/evaluation/%) --groups off "new phrasings" hard "declined outside"
	$(BIN)/python convert.py --model $(OUT)/grpo/latest --to bf16 --out $(OUT)/bf16 --force
	$(BIN)/python evaluate.py run families --model $(OUT)/bf16 --limit 3300 --threads 1 --batch-size 64 \
	  --resume --out $(OUT)/evaluation/bf16

# The README's pictures, from the commands' own output.
pictures: $(VENV)/.run
	$(BIN)/python docs/pictures.py

# On Linux PyPI has the CUDA build, and PyTorch's own index the CPU build, as version +cpu. `===` takes PyPI's for certain.
$(VENV)/.torch: requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 run" >&2; exit 2; }
	@echo "Setting up $(VENV), once. Nothing outside of it changes, and an environment that is active is not used." >&2
	@$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" != Linux ]; then \
	  echo "PyTorch $(VERSION): about 100 MB to download" >&2; \
	  $(INSTALL) torch==$(VERSION) >&2; \
	elif [ "$(TORCH)" != cpu ]; then \
	  echo "PyTorch $(VERSION) for CUDA: 2.7 GB to download, 5.4 GB on disk. make TORCH=cpu takes 190 MB and no GPU." >&2; \
	  $(INSTALL) torch===$(VERSION) >&2; \
	elif $(PIP) index versions torch --extra-index-url $(CPU_INDEX) --retries 1 --timeout 15 2>/dev/null | grep -qF "$(VERSION)+cpu"; then \
	  echo "PyTorch $(VERSION), the build for the CPU: 190 MB to download, 0.9 GB on disk" >&2; \
	  $(INSTALL) --no-deps --extra-index-url $(CPU_INDEX) --retries 1 torch==$(VERSION)+cpu >&2; \
	else \
	  echo "PyTorch $(VERSION): there is no NVIDIA driver, but $(CPU_INDEX) can't be reached or" >&2; \
	  echo "has no build for this Python. So PyPI's build for CUDA: 2.7 GB to download, 5.4 GB on disk. To avoid that, end" >&2; \
	  echo "this with Ctrl-C, put the file torch-$(VERSION)+cpu-….whl of that index into a folder, PIP_FIND_LINKS=FOLDER make" >&2; \
	  $(INSTALL) torch===$(VERSION) >&2; \
	fi
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "What the commands need: 60 MB to download" >&2
	$(call install,--editable .)
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "What training and the tests need besides: 360 MB to download" >&2
	$(call install,--editable '.[train$(comma)test]')
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
