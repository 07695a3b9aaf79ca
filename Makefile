# make run      set up, run every notebook and the quick benchmark on this machine
# make test     set up, then lint, tests and notebooks; with a GPU and nvcc the GPU's tests too
# make lab      open the notebooks in JupyterLab
# make figures  redraw figures/ and its tables, and the README's table, from figures/data/
PYTHON ?= python3
BIN := .venv/bin
# With an NVIDIA GPU but no CUDA toolkit, take nvcc from PyPI.
comma := ,
EXTRAS := dev$(if $(shell command -v nvidia-smi 2>&1),$(if $(shell command -v nvcc 2>&1),,$(comma)cuda))
# Tests run two at a time; with a GPU one at a time, as some fill its memory and notebooks time kernels on it.
TWO_AT_A_TIME := $(if $(shell command -v nvidia-smi 2>&1),,-n 2 --dist loadfile)

.PHONY: run test lab figures setup
.DEFAULT_GOAL := run

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@for folder in . .venv; do test ! -e $$folder || test -w $$folder || \
		{ echo "make: expected a folder that can be written, got $(CURDIR); copy the checkout to a folder of your own"; exit 1; }; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is too old: expected Python 3.10 or newer; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || \
		{ echo "make: $(PYTHON) has no Python.h, which torch.compile needs; on Debian: apt install python3-dev"; exit 1; }
	@echo "setting up .venv (a few minutes and 5 GB the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

run: setup
	@$(BIN)/python notebooks/run.py

# NOTE: by default OpenMP's threads spin while they wait: on two cores that can take longer than the work.
test: export OMP_WAIT_POLICY := passive
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) --nbval --nbval-current-env --nbval-cell-timeout=600 notebooks

# JupyterLab refuses to run as root unless told to.
lab: setup
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=notebooks notebooks/00_start_here.ipynb

figures: setup
	$(BIN)/python -m fused_kernels figures
