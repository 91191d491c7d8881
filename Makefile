# Every target sets up what it needs in .venv, once, and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
RECIPE := pyproject.toml .ci/constraints.txt

.PHONY: demo test test-slow lint types check wheel bench bench-quick bench-gpu nano plm-nano clean

demo: $(VENV)/.demo ## classify, embed, search and show bundled pictures, offline
	$(BIN)/perception demo

test: $(VENV)/.test ## the tests: CPU, offline
	$(BIN)/python -m pytest

test-slow: $(VENV)/.slow ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

check: lint types test wheel ## what CI runs

wheel: $(VENV)/.test ## build the wheel, install it in a clean environment, use it there
	$(BIN)/python .ci/check_wheel.py

bench: $(VENV)/.test ## every benchmark, an hour or more; results go to benchmarks/results/ and into the README
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/quantize_lm.py
	$(BIN)/python benchmarks/training_packing.py
	$(BIN)/python benchmarks/finetuning.py

bench-quick: $(VENV)/.test ## a first look at the seven quickest, in two minutes; nothing is kept
	$(BIN)/python benchmarks/run.py --quick

bench-gpu: $(VENV)/.test ## towers, attention and decoding on a GPU; skips without one
	$(BIN)/python benchmarks/gpu_encoder.py
	$(BIN)/python benchmarks/gpu_attention.py
	$(BIN)/python benchmarks/gpu_decode.py

# Both trainings need npm (Debian: npm), for drawings, and Debian's apt-get with dpkg-deb, which fetch words (wordnet-base)
# and photographs to test with (tuxpaint-stamps-default); PLM-nano letters besides (fonts-dejavu, fonts-liberation).
# A training that is stopped ends with an error here, and the same target goes on where it was.
nano: $(VENV)/.nano ## train PE-Core-nano again from registry packages, and measure it (two and a quarter hours on one shared core)
	$(BIN)/python -m perception_encoder.training.drawings --out runs/data
	$(BIN)/python -m perception_encoder.training.nano --data runs/data --out runs/nano
	$(BIN)/python benchmarks/nano_core.py --data runs/data --model runs/nano/PE-Core-nano

plm-nano: $(VENV)/.plm-nano ## train PLM-nano again from registry packages, and measure it (hours on two cores; goes on where it was)
	$(BIN)/python -m perception_encoder.training.drawings --out runs/data
	$(BIN)/python -m perception_lm.training.nano --data runs/data --out runs/plm_nano
	$(BIN)/python benchmarks/plm_nano.py --data runs/data --model runs/plm_nano/PLM-nano --look

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(RECIPE) | $(BIN)/python
	$(INSTALL) -e '.[video,lm]'
	touch $@

$(VENV)/.test: $(RECIPE) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.slow: $(RECIPE) | $(BIN)/python
	$(INSTALL) -e '.[dev,ray]'
	touch $@ $(VENV)/.demo $(VENV)/.test

$(VENV)/.nano: $(RECIPE) | $(BIN)/python
	$(INSTALL) -e '.[video,lm,train]'
	touch $@ $(VENV)/.demo

$(VENV)/.plm-nano: $(RECIPE) | $(BIN)/python
	$(INSTALL) -e '.[video,lm,train]' easy-vqa
	touch $@ $(VENV)/.demo $(VENV)/.nano

clean:
	rm -rf $(VENV) dist build demo .pytest_cache .ruff_cache .mypy_cache
