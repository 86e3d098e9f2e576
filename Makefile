# make demo    set up, then profile -> search -> train -> export -> chat sample on this machine
# make chat    set up, fetch SmolLM2-135M-Instruct, import, export as int4, open a chat
# make test    set up, then lint, types and every test
# make docs    set up, then build the documentation site in build/site; warnings are errors
# make bench   set up, then compare int4 with llama.cpp (compiles it, 10 minutes), onnxruntime-genai and transformers

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo chat test lint types docs bench clean

demo: $(VENV)/workstation
	$(BIN)/merino-edge demo --out $(OUT)

chat: $(VENV)/workstation
	test -d chat/checkpoint || $(BIN)/merino-edge import smollm2-135m-instruct --out chat/checkpoint
	test -d chat/bundle-int4 || $(BIN)/merino-edge export chat/checkpoint --out chat/bundle-int4 --precision int4
	$(BIN)/merino-edge generate chat/bundle-int4

# Two workers of one thread each: PyTorch's threads are many times slower on cores that others use.
# In the order of the files: by default those of few tests come last, and they are the longest.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy -p merino_edge

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/dev
	$(BIN)/python benchmarks/peers/compare.py --install llama.cpp onnxruntime-genai transformers

$(VENV)/workstation: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[workstation]'
	touch $@

$(VENV)/dev: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[dev]'
	-$(PIP) -e '.[rtx]' || echo "TensorRT for RTX has no package for this machine; its compile tests will be skipped"
	touch $@ $(VENV)/workstation

$(VENV)/docs: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/environment: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
