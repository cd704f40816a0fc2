# Two commands do everything: `make up` runs the main job, `make test` proves it. Versions: cluster/requirements/.
PYTHON  ?= python3
EXTRA   ?= cpu
STORAGE ?= .memorag
PORT    ?= 8000
BIN     := .venv/bin
LISTS   := cluster/requirements
READY   := .venv/installed-$(EXTRA)
PACKAGES := cluster memory_worker retrieval_worker generator_worker serving
EXAMPLE := examples/chronicle.txt
QUESTION ?= What haven did the finder of the green sword reach?
MINUTES ?= 20
SEED    ?= 0
WORKERS ?= 3
SOAK    := .memorag-soak

.PHONY: install lock hooks up down test test-long test-all ready-to-test browser lint soak bench docs

install: $(READY)

$(READY): pyproject.toml $(LISTS)/$(EXTRA).lock $(LISTS)/dev.lock $(LISTS)/install.sh
	@PYTHON="$(PYTHON)" sh $(LISTS)/install.sh $(EXTRA)
	@touch $@

# After a change of a version in cpu.txt, gpu.txt or dev.txt: the digests of the files that they name.
lock: install
	@for list in cpu gpu dev; do $(BIN)/uv pip compile --quiet --no-deps --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate $(LISTS)/$$list.txt -o $(LISTS)/$$list.lock || exit 1; done

hooks: install
	@$(BIN)/pre-commit install

up: install
	@$(BIN)/memorag up --profile embedded --storage $(STORAGE) --port $(PORT)
	@$(BIN)/memorag memories show chronicle --storage $(STORAGE) >/dev/null 2>&1 \
	  || $(BIN)/memorag memorize $(EXAMPLE) --id chronicle --title "A Town Chronicle" --storage $(STORAGE)
	@$(BIN)/memorag ask chronicle "$(QUESTION)" --storage $(STORAGE)
	@echo; echo "The server goes on running; 'make down' ends it."

down:
	@if [ -x $(BIN)/memorag ]; then $(BIN)/memorag down --storage $(STORAGE); else echo "nothing is installed, so nothing runs"; fi

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy

# Three workers, whatever the machine has: one for the tests on a server, one for those on Ray, one for the others.
RUN_TESTS = $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(PYTEST)

test: ready-to-test
	@$(RUN_TESTS) -m "not long"

test-long: install
	@$(RUN_TESTS) -m long

test-all: ready-to-test
	@$(RUN_TESTS)

ready-to-test:
	@$(MAKE) --no-print-directory -j2 lint browser

browser:
	@sh tests/support/install_browser.sh

soak: install
	@trap '$(BIN)/memorag down --storage $(SOAK)' EXIT; trap 'exit 1' INT TERM; \
	  $(BIN)/memorag up --profile embedded --storage $(SOAK) --port 0 && \
	  $(BIN)/python -m tests.support.chaos --storage $(SOAK) --minutes $(MINUTES) --seed $(SEED) --json $(SOAK)/soak.json

bench: install
	@$(BIN)/python -m benchmarks

docs: install
	@$(BIN)/python docs/generate.py
