# `make help` lists the targets. The first target that needs the environment builds it in .venv.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

# uv does not read pip's settings, so it is given pip's certificate and index.
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo workflow test test-all test-faults test-soak test-engines lint gpu-check ui browser servers lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST) | awk '{printf "  %s %-12s", $$1, $$2; $$1 = $$2 = ""; print $$0}'

demo: .venv/ready  ## train a ResNet on real digits, in 3 minutes on two cores
	$(BIN)/python -m pipeline.train +model=resnet

test: .venv/ready  ## run the tests, in 10 minutes on two cores
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/ready  ## also run the slow tests, of every variant of every network
	$(BIN)/python -m pytest $(PARALLEL) -m "not faults and not soak and not engines"

# Three at a time even on two cores: these tests wait more than they compute.
test-faults: .venv/ready  ## kill, signal, damage and starve trainings, in 6 minutes on two cores
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "faults and not soak" --durations=12

test-soak: .venv/ready .workflow/ready  ## the same for an hour, and what is rare
	$(BIN)/python -m pytest -m soak

test-engines: .venv/ready .workflow/ready  ## run studies on Snakemake, jobs on a Slurm played here, web servers, the commands of the documentation, in 12 minutes on two cores
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "engines and not soak" -rs --durations=12

lint: .venv/ready  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

DEVICE ?= cuda
gpu-check: .venv/ready  ## prove what is claimed on a GPU, in 10 minutes; DEVICE=cpu runs what has a meaning there
	$(BIN)/python -m benchmarks.gpu --device $(DEVICE)

ui: .venv/ready  ## open the MLflow dashboard on http://127.0.0.1:5000/?workflowType=machine_learning
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

# The test that needs a browser is skipped, with a reason, where there is none.
browser:  ## install Chromium, for the test that opens the report
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium > /dev/null; \
	then command -v chromium; else echo "no browser: install chromium or google-chrome to run that test"; fi

# Tests that play a Slurm of two nodes and a web server are skipped, with a reason, where these are not installed.
SERVERS := slurm-wlm munge nginx-light
servers:  ## install Slurm and nginx, for the tests of batch jobs and object stores
	@command -v sbatch && command -v nginx && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $(SERVERS) > /dev/null; \
	then command -v sbatch nginx; else echo "install $(SERVERS) to run those tests"; fi

install: .venv/ready  ## build the environment in .venv

workflow: .workflow/ready  ## build the environment of Snakemake, which runs studies

lock: .venv/ready  ## resolve pyproject.toml into requirements.lock, versions and hashes only
	$(BIN)/uv pip compile pyproject.toml --extra optimizers --group dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pipeline/engines/requirements.txt --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file pipeline/engines/requirements.lock

clean:  ## remove the environment and caches, but no data set or run
	rm -rf .venv .workflow .mypy_cache .ruff_cache .pytest_cache .hypothesis

# uv installs in one minute, pip in three; pip is the fallback where uv cannot reach the packages. Without precompiled
# bytecode, which some machines never write, every command would spend ten seconds compiling torch.
.venv/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

# Snakemake's versions of libraries differ from MLflow's.
.workflow/ready: pipeline/engines/requirements.lock .venv/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .workflow
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python .workflow/bin/python $<
	touch $@
