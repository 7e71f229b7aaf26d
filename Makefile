# make demo   set up .venv, convert the bundled model to four targets, verify them, compare them with the source
# make test   set up .venv, then lint, types and tests
# make clean  remove what these made
#
# Needs Python 3.11 or newer and nothing else.  PYTHON=/path/to/python3 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := demo/tiny-scout
DEMO_OUTPUT := demo-output
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	@$(BIN)/quantkit convert $(DEMO_MODEL) --to fp8-dynamic --to w4a16-rtn --to w4a16-gptq --to QK4_MOE-gptq \
		--samples 64 --sequence-length 256 --output $(DEMO_OUTPUT) --force
	@$(BIN)/quantkit verify $(DEMO_OUTPUT)/fp8-dynamic --source $(DEMO_MODEL)
	@$(BIN)/quantkit verify $(DEMO_OUTPUT)/w4a16-rtn --source $(DEMO_MODEL)
	@$(BIN)/quantkit verify $(DEMO_OUTPUT)/w4a16-gptq --source $(DEMO_MODEL)
	@$(BIN)/quantkit verify $(DEMO_OUTPUT)/QK4_MOE-gptq --source $(DEMO_MODEL)
	@$(BIN)/quantkit compare $(DEMO_OUTPUT)/fp8-dynamic $(DEMO_OUTPUT)/w4a16-rtn $(DEMO_OUTPUT)/w4a16-gptq \
		$(DEMO_OUTPUT)/QK4_MOE-gptq --reference $(DEMO_MODEL) --window 256 --output $(DEMO_OUTPUT)/report \
		--cache $(DEMO_OUTPUT)/cache --force

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("quantkit needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test,dev]'
	@touch $@ $(VENV)/.installed
