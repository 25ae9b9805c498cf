# Set-up happens by itself: every target that needs the environment makes it first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# uv installs in one or two minutes what takes pip five. A uv of one's own is used with its cache.
UV := $(shell command -v uv)

.PHONY: setup demo demo-compare test test-machines test-slow lint format docs bench bench-quick lock clean

setup: $(READY)

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements-dev.txt, about 7 GB, into $(VENV): one to six minutes"
	$(if $(UV),,$(BIN)/pip install --quiet --require-hashes -r requirements-uv.txt)
	@# pip follows settings that uv does not read, for example those that name a company's own index.
	@# Without compiled bytecode, and where Python may not write it, each process would compile all that it imports.
	$(or $(UV),$(BIN)/uv --no-cache) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.txt \
		|| $(BIN)/pip install --quiet --require-hashes -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)  ## synthesised sounds → yt-dlp → shards → training → scores
	$(BIN)/python -m jobs.demo

demo-compare: $(READY)  ## the same data; three models on one page
	$(BIN)/python -m jobs.demo --compare

test: $(READY)  ## in three processes, also on two cores: much of it waits for processes to start
	@# The tests start hundreds of processes. Each would compile this project's files where Python may not keep them.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-machines: $(READY)  ## a preparation and a training on two machines; needs root, for network namespaces
	$(BIN)/python -m pytest -m slow tests/jobs/test_machines.py -k both_jobs

test-slow: $(READY)  ## what make test leaves out: runs that are killed, on S3, compiled
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation as a site in site/, which needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench-quick: $(READY)  ## one page of ratios to floors and peers, in ten minutes
	$(BIN)/python -m benchmarks.quick

bench: $(READY)  ## slow: the figures of benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.fbank
	$(BIN)/python -m benchmarks.metrics
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.train_step --fed
	$(BIN)/python -m benchmarks.feed --ray
	$(BIN)/python -m benchmarks.feed_memory
	$(BIN)/python -m benchmarks.esc10
	$(BIN)/python -m benchmarks.compare_esc10
	$(BIN)/python -m benchmarks.first_model
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.decode_campaign
	$(BIN)/python -m benchmarks.order
	$(BIN)/python -m benchmarks.fetch_campaign
	$(BIN)/python -m benchmarks.driver_memory
	$(BIN)/python -m benchmarks.list_fuzz
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.lease_races
	$(BIN)/python -m benchmarks.interrupts
	$(BIN)/python -m benchmarks.bit_flips
	$(BIN)/python -m benchmarks.train_faults
	$(BIN)/python -m benchmarks.embedding_search
	$(BIN)/python -m benchmarks.near_duplicates
	$(BIN)/python -m benchmarks.tag_events
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.scale_model

lock:  ## write the requirements files anew from pyproject.toml; needs uv
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -o requirements-dev.txt
	uv pip compile pyproject.toml -c requirements-dev.txt --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -o requirements.txt
	echo uv | uv pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements-uv.txt

clean:
	rm -rf $(VENV) demo-out site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
