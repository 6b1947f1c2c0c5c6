# Everything happens in .venv, which is made once; PYTHON names the interpreter that it is made with.
PYTHON ?= python3
DEMO ?= epochs=16 imgsz=192 batch=8 nbs=8 optimizer=AdamW lr0=0.003 warmup_epochs=0.5 cls=1.0 mosaic=0

BIN := .venv/bin
# What an installation depends on; the compiled parts are built by it.
BUILD := pyproject.toml constraints.txt setup.py $(wildcard src/paceline/native/*.[ch])
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help venv demo test test-all lint format clean bench-peers bench-peers-ap
.DELETE_ON_ERROR:

help:
	@echo "make demo       train, evaluate and draw a detector on the embedded data set"
	@echo "make test       the tests (make test-all: the long ones too)"
	@echo "make lint       ruff, mypy, import-linter (make format: let ruff write)"
	@echo "make bench-NAME run bench/NAME"
	@echo "make venv       only make .venv, for instance to put a build of torch of your own into it"
	@echo "make clean      remove .venv and what tools leave behind; runs/ stays"

demo: .venv/.core
	$(BIN)/paceline train data=shapes model=yolo11n $(DEMO)

test: .venv/.test
	$(BIN)/python -m pytest

# Two files at a time, in the order of their names: it mixes tests that wait with tests that compute.
test-all: .venv/.test
	$(BIN)/python -m pytest -m "" -n 2 --dist loadfile --no-loadscope-reorder --durations=40

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Beside the reference trainer, in an environment of its own.
bench-peers: .venv/.test
	$(BIN)/python bench/vs_peers/run.py

bench-peers-ap: .venv/.test
	$(BIN)/python bench/vs_peers/ap.py

bench-%: .venv/.test
	@test -f bench/$*/run.py || { echo "There is no bench/$*/run.py; take one of: $(notdir $(patsubst %/run.py,%,$(wildcard bench/*/run.py)))"; exit 2; }
	$(BIN)/python bench/$*/run.py

venv: .venv/.made

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info src/paceline/native/*.so

.venv/.made:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit('Paceline needs Python 3.11 to 3.13, and this is %d.%d: name another one by make PYTHON=...' % v)"
	$(PYTHON) -m venv .venv
	touch $@

# A larger installation contains the smaller ones, so their stamps are set too.
.venv/.core: .venv/.made $(BUILD)
	@echo "Installing Paceline into .venv; PyTorch is large, so this takes a while the first time."
	$(INSTALL) -e .
	touch $@

.venv/.test: .venv/.made $(BUILD)
	@echo "Installing Paceline and its tests into .venv; PyTorch is large, so this takes a while the first time."
	$(INSTALL) -e '.[test]'
	touch .venv/.core $@

.venv/.dev: .venv/.made $(BUILD)
	@echo "Installing Paceline and the tools of its developers into .venv."
	$(INSTALL) -e '.[dev]'
	touch .venv/.core .venv/.test $@
