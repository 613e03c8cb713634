# make quickstart: installs into .venv and runs the main job on the embedded data.  make test: the test suite.
# make docs: the documentation, in site/.  make audit: known holes in what is installed.  make release: dist/, checked.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test reliability fuzz torture coverage mutation lint docs audit release clean

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

# Makes every case that `make test` makes a tenth or a fifth of: crashes at every change of a comparison, damage to slow files.
torture: $(STAMP)
	DYNDIT_TORTURE=full $(VENV)/bin/python -m pytest tests/reliability/test_kills.py tests/reliability/test_damaged_files.py

# The lines that the suite runs, in child processes too: a table of every module.
coverage: $(STAMP)
	rm -rf build/coverage && mkdir -p build/coverage
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

# Changes 40 operators or constants a group of modules, and writes docs/mutation.md: which changes no test noticed.
mutation: $(STAMP)
	$(VENV)/bin/python tests/support/mutate.py --num 40 --seed 0
	$(VENV)/bin/python tests/support/mutate.py --page docs/mutation.md

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/types/dyndit
	ln -sfn ../../../analysis build/types/dyndit/analysis
	ln -sfn ../../../recipes build/types/dyndit/recipes
	ln -sfn ../../../dyndit/__init__.py build/types/dyndit/__init__.py
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev,peers,docs]"
	touch $(STAMP)

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

audit: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[release]"
	$(VENV)/bin/pip-audit --skip-editable

# The wheel has to work alone: it is installed in an empty environment, and the command line answers there.
release: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[release]"
	rm -rf dist build
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv dist/check && dist/check/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	cd dist && check/bin/dyndit --version && check/bin/python -c "import dyndit; dyndit.load('digits')"
	$(VENV)/bin/cyclonedx-py environment dist/check --output-reproducible --output-file dist/dyndit.cdx.json
	rm -rf dist/check

clean:
	rm -rf $(VENV) build dist site *.egg-info
