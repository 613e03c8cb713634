# make quickstart: installs into .venv and runs the main job on the embedded data.  make test: the test suite.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint clean

quickstart: $(STAMP)
	$(VENV)/bin/dyndit quickstart

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev,peers]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
