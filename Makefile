# make setup | demo | test | test-all | lint | coverage. A fresh machine needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV ?= .venv
# The build of torch for this machine; without CUDA any CPU build does.
TORCH ?= torch==2.13.0
# The versions tested together; with another torch, or to try newer ones: make setup CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
DEMO_DIR ?= runs/demo
DEMO_STEPS ?= 200
BIN := $(VENV)/bin
BASED := $(BIN)/based

.PHONY: setup demo test test-all test-gpu coverage lint format clean

setup: $(VENV)/.installed

# DS_BUILD_OPS=0: DeepSpeed's own kernels are not compiled; those in use are built on first use on a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,trackers,prep]'
	touch $@

# The main job on real text: corpus -> tokenizer and shards -> pretraining on 4 ranks (TP 2 x PP 2) -> Hugging Face -> text.
demo: setup
	rm -rf $(DEMO_DIR)
	$(BIN)/python -m based_megatron.data_prep.stdlib_corpus $(DEMO_DIR)/stdlib.jsonl
	$(BASED) prep $(DEMO_DIR)/stdlib.jsonl --output $(DEMO_DIR)/data --vocab-size 4096 --validation-fraction 0.03
	$(BASED) launch local --nproc 4 -- train --config tiny --run-dir $(DEMO_DIR)/run --data.path $(DEMO_DIR)/data \
	  --train.steps $(DEMO_STEPS) --parallel.tensor 2 --parallel.pipeline 2
	$(BASED) export $(DEMO_DIR)/run --output $(DEMO_DIR)/hf
	$(BASED) generate $(DEMO_DIR)/hf --prompt "import os" --max-new-tokens 64
	@echo
	@echo "TensorBoard logs:  $(DEMO_DIR)/run/tensorboard   (look: $(BIN)/tensorboard --logdir $(DEMO_DIR)/run/tensorboard)"
	@echo "Checkpoint:        $$(ls -d $(DEMO_DIR)/run/checkpoints/step-* | tail -n 1)"
	@echo "Hugging Face:      $(DEMO_DIR)/hf"

# On PROCESSES cores: a file's tests run in one of them, so that they share what it sets up.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

test: setup
	$(PYTEST) -m "not slow"

# Also what must take long: curves of 200 steps, and ranks that torchrun starts.
test-all: setup
	$(PYTEST)

# The kernels compiled, and the same layouts over NCCL, one GPU a rank; those that need more GPUs than there are say so.
test-gpu: setup
	BASED_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/kernels tests/baselines tests/inference tests/model tests/parallel tests/train/test_step.py \
	  tests/checkpoint/test_checkpoint_store.py

# Lines and branches that no test reaches, the processes of jobs included: a table, and pages in htmlcov/.
coverage: setup
	$(PYTEST) --cov --cov-report=term --cov-report=html

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build htmlcov .coverage* *.egg-info
