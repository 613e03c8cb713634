# make quickstart: installs into .venv and runs the main job on the embedded data.  make test: the test suite.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test reliability fuzz lint clean

quickstart: $(STAMP)
	$(VENV)/bin/dyndit quickstart

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Runs the tests that show a promise, and writes docs/reliability.md from the marks of those tests.
reliability: $(STAMP)
	$(VENV)/bin/python -m pytest -m reliability --junitxml=build/reliability.xml
	$(VENV)/bin/python tests/support/reliability.py

# Tries 100,000 invented files; `make test` tries 2,000.
fuzz: $(STAMP)
	DYNDIT_FUZZ=100000 $(VENV)/bin/python -m pytest tests/reliability/test_fuzz.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev,peers]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
