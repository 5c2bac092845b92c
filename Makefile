# `make demo` and `make test` set everything up on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint mutants reference clean

demo: $(VENV)/ready
	$(RUN) run_all.py

test: $(VENV)/ready-dev lint
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Breaks the code on purpose, fault by fault, and wants the tests to fail each time.
mutants: $(VENV)/ready-dev
	HF_HUB_OFFLINE=1 $(RUN) tests/mutants.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

# The default run whose rows and report are part of the repository.
reference: $(VENV)/ready
	rm -rf results/reference reports/reference
	$(RUN) run_all.py run --out results/reference
	mv results/reference/report reports/reference

clean:
	rm -rf $(VENV) results/default
