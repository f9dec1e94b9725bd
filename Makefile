PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help notebooks test test-oldest test-slow lab lint bench

help:
	@echo "make notebooks   run every notebook, write pages to build/site/index.html"
	@echo "make test        run all tests but the slow ones, ten to fifteen minutes"
	@echo "make test-oldest run the tests of transformers models with its version 5.0.0"
	@echo "make test-slow   run the slow ones too: long searches, every notebook in JupyterLab"
	@echo "make lab         open JupyterLab"
	@echo "make lint        check style and formatting"
	@echo "make bench       time moba_fast against dense attention, to build/bench.csv"

notebooks: $(INSTALLED)
	$(BIN)/python -m moba_lab.notebooks

# Two at a time; threads that spin while they wait would slow the other one down.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

OLDEST := build/transformers-oldest

# What lies on PYTHONPATH goes before what is installed.
test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) tests/test_hf.py tests/test_hf_errors.py \
		tests/test_hf_generate.py tests/test_hf_train.py tests/test_hf_oldest.py \
		tests/test_convert.py tests/test_export.py tests/test_evaluate.py

$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) \
		--requirement constraints-oldest.txt
	touch $@

test-slow: $(INSTALLED)
	$(PYTEST)

lab: $(INSTALLED)
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror moba_fast/cpp/*.cpp moba_fast/cpp/*.h

bench: $(INSTALLED)
	$(BIN)/python -m moba_fast.bench

# The stamp is older than what it installed from when an install is stale.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1);" \
			"name another one: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) cannot make virtual environments;" \
			"install its venv package (Debian: python3-venv)"; exit 1; }
	@echo "installing into .venv, which takes a minute or more"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[notebooks,dev]'
	touch $@
