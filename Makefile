# Two commands need nothing but Python and make: `make quickstart` and `make test`. Each makes .venv from PYTHON first.
PYTHON ?= python3
VENV := .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := $(VENV)/installed-$(VERSION)
DECONSTRUCT := $(VENV)/bin/deconstruct

.PHONY: quickstart test lint table peers clean

quickstart: $(INSTALLED)
	$(DECONSTRUCT) prepare --output=prepared/quickstart --vocab-size=1024 --row-length=256 --max-characters=4000000
	$(DECONSTRUCT) train --config=configs/quickstart.py --workdir=runs/quickstart
	$(DECONSTRUCT) evaluate --workdir=runs/quickstart --contexts=32,256
	$(VENV)/bin/python -m deconstruct.evaluate.report --workdir=runs/quickstart

test: $(INSTALLED) lint
	$(VENV)/bin/python -m pytest -n 2 tests

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) prepared/quickstart runs/quickstart
