# Everything runs from a virtual environment in .venv, which each target fills
# with what it needs. Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8001

PY      := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run demo test test-dependents test-replication test-matrix campaign mutants lint check bench screenshots dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: $(VENV)/.base  ## serve an instance to try on http://127.0.0.1:8001 (PORT=… for another)
	@$(PY) scripts/run.py --port $(PORT)

demo: $(VENV)/.base  ## play the whole story against a real server, and check each step
	@$(PY) scripts/demo.py

test: $(VENV)/.test  ## run the test suite (ARGS=… is passed to pytest)
	$(PY) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-dependents: $(VENV)/.test  ## test beside the plugins that depend on this one, and after 0.x
	$(PY) scripts/dependents.py

test-replication: $(VENV)/.test  ## test beside a real Litestream (Linux, macOS)
	$(PY) -m pytest -m replication $(ARGS)

test-matrix: $(VENV)/.test  ## the suite on each Python, the oldest and newest Datasette and PyNaCl
	$(PY) scripts/matrix.py $(ARGS)

campaign: $(VENV)/.test  ## try for half an hour what the suite tries for seconds (Linux, cc)
	$(PY) scripts/campaign.py $(ARGS)

mutants: $(VENV)/.mutants  ## change the code in small ways, and report what no test notices
	$(PY) scripts/mutants.py $(ARGS)

check: lint  ## the same as lint

lint: $(VENV)/.lint  ## ruff (lint and format), mypy --strict, zizmor (workflows) and pip-audit
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict
	$(VENV)/bin/zizmor --offline --quiet --persona pedantic .github
	$(PY) scripts/audit.py

bench: $(VENV)/.test  ## measure everything beside something else, and print the table
	@$(PY) scripts/benchmarks/bench.py $(ARGS)

screenshots: $(VENV)/.test  ## take the screenshots under .github (needs a Chromium)
	$(PY) scripts/screenshots.py

dist: $(VENV)/.dist  ## build and check the wheel and sdist, and test the installed wheel
	$(PY) scripts/dist.py $(ARGS)

clean:  ## remove what these targets made, except .run
	rm -rf $(VENV) .venv-dependents .bench build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One empty file per set of dependencies marks it as installed.

$(PY):
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# pip 25.1 is the first to read dependency groups. uv makes environments without a pip.
$(VENV)/.pip: | $(PY)
	@$(PY) -m ensurepip >/dev/null
	$(INSTALL) --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.base: pyproject.toml | $(VENV)/.pip
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.mutants $(VENV)/.lint $(VENV)/.dist: $(VENV)/.%: pyproject.toml | $(VENV)/.pip
	$(INSTALL) --editable '.[fernet]' --group $*
	@touch $@
