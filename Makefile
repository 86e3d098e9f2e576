# make demo    set up, then profile -> search -> train -> export -> chat sample on this machine
# make chat    set up, then merino-edge run smollm2-135m-instruct: it fetches, imports, exports as int4 and opens a chat
# make test    set up, then lint, types and every test
# make docs    set up, then build the documentation site in build/site; warnings are errors
# make release set up, then build sdist and wheel in dist/, check them, and run the wheel in a new environment
# make test-board PYTHON=python3.10    set up .venv-board, then the tests that a board's packages run (no PyTorch)
# make bench   set up, then compare int4 with llama.cpp (compiles it, 10 minutes), onnxruntime-genai and transformers

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo chat test test-board lint types editor-types hooks docs release bench clean

demo: $(VENV)/workstation
	$(BIN)/merino-edge demo --out $(OUT)

chat: $(VENV)/workstation
	$(BIN)/merino-edge run smollm2-135m-instruct

# Two workers of one thread each: PyTorch's threads are many times slower on cores that others use.
# In the order of the files: by default those of few tests come last, and they are the longest.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 25

# In an environment of its own: Python 3.10 is JetPack 6's, 3.12 is JetPack 7's.
test-board: $(VENV)-board/dev
	OMP_NUM_THREADS=1 $(VENV)-board/bin/pytest tests/core tests/latency tests/runtime tests/jetson tests/cli

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy -p merino_edge

# Whether an editor's type checker finds every import.
editor-types: $(VENV)/checks $(VENV)/dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# The checks of .pre-commit-config.yaml, before each commit.
hooks: $(VENV)/checks $(VENV)/dev
	$(BIN)/pre-commit install

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

release: $(VENV)-release/tools
	$(VENV)-release/bin/python tools/release.py --out dist

bench: $(VENV)/dev
	$(BIN)/python benchmarks/peers/compare.py --install llama.cpp onnxruntime-genai transformers

$(VENV)/workstation: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[workstation]'
	touch $@

$(VENV)/dev: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[dev]'
	-$(PIP) -e '.[rtx]' || echo "TensorRT for RTX has no package for this machine; its compile tests will be skipped"
	-$(BIN)/python tools/install_pycuda.py || echo "PyCUDA cannot be compiled here; the tests through it will be skipped"
	touch $@ $(VENV)/workstation

$(VENV)/docs: $(VENV)/environment pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/checks: $(VENV)/environment pyproject.toml
	$(PIP) --group $(@F)
	touch $@

# In an environment of its own: its tools and the pinned packages of the project exclude each other.
$(VENV)-release/tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check --group release
	touch $@

$(VENV)-board/dev: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-board
	$(VENV)-board/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-board/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[serve,jetson,export,plot]' --group board
	touch $@

$(VENV)/environment: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-board $(VENV)-release build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
