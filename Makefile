# Everything a person types: `make help` lists it. The first target of a day builds the environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

# uv does not read pip's settings; where pip has a mirror or a certificate, uv gets the same.
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint ui browser lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST) | awk '{printf "  %s %-8s", $$1, $$2; $$1 = $$2 = ""; print $$0}'

demo: .venv/ready  ## train a ResNet on real digits: 2 minutes on two server cores
	$(BIN)/python -m pipeline.train +model=resnet

test: .venv/ready  ## the tests: under 10 minutes on two server cores
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/ready  ## and those of every variant, which take several times as long
	$(BIN)/python -m pytest $(PARALLEL) -m ""

lint: .venv/ready  ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/ready  ## the MLflow dashboard on http://127.0.0.1:5000/?workflowType=machine_learning
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

# A test that finds no browser is skipped and says so: without one, nothing fails.
browser:  ## Chromium, in which a test opens the report
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium > /dev/null; \
	then command -v chromium; else echo "no browser: install chromium or google-chrome, or go without that test"; fi

lock: .venv/ready  ## resolve pyproject.toml anew into requirements.lock, versions and hashes only
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

clean:  ## remove the environment and caches; data sets and runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

# pip needs three minutes for what uv does in one; it steps in where uv cannot reach the packages. Without bytecode,
# which some machines never write, every command would begin by compiling torch for ten seconds.
.venv/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@
