# The two commands, and those beside them. All make `.venv` first and reuse it until a pin changes.
#   make run      generate from the example checkpoint on a local Ray cluster
#   make test     ruff, mypy --strict, import contracts, pytest
#   make test-all the same with the tests marked slow: every fault on Ray, every form of every kernel, all examples
#   make clients  the clients that people use, from an environment of their own (`.venv-clients`), against `manta serve`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # the tests start many processes, each of which would compile everything anew

.PHONY: run test test-all checked lint compiled clients install clean

run: $(STAMP)
	$(BIN)/manta generate --groups 2 --tensor-parallel-size 2 --input examples/prompts.jsonl --stream

# Three processes: two wait for Ray clusters most of the time while the third computes (tests/conftest.py).
test: checked
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

test-all: checked
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder -m ''

checked: $(STAMP)
	$(MAKE) --no-print-directory --jobs 2 lint compiled

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# While mypy has one core: what the tests import, theirs with the asserts that pytest writes into them. Each of pytest's processes
# would do it anew. What cannot be imported is said by the tests themselves.
compiled: $(STAMP)
	$(BIN)/python -m pytest --collect-only --quiet >/dev/null || true

clients: $(STAMP) $(CLIENTS_STAMP)
	MANTA=$(abspath $(BIN)/manta) $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients

install: $(STAMP)

# Not compiled: of 23,000 files a third is ever imported, and compiled when it is. The pip that comes with an older Python takes
# half a minute more to find the versions.
$(STAMP): pyproject.toml constraints.txt setup.py deploy/proto/manta.proto
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

$(CLIENTS_STAMP): tests/clients/requirements.txt tests/clients/constraints.txt
	test -d $(CLIENTS) || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --no-compile --constraint tests/clients/constraints.txt --requirement tests/clients/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
