# Every target creates and fills .venv if necessary. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# Arguments for the program that a target runs: make test ARGS="-x -k resume"
ARGS ?=
# The interpreter of .venv; if empty, the newest suitable one on PATH. It determines which TensorFlow is installed
# (docs/two_stacks.md).
PYTHON ?=
# For make only: the scripts in tpu_scripts read a variable of the same name.
unexport PYTHON
# TensorFlow's C++ code prints nothing; its errors reach Python as exceptions.
export TF_CPP_MIN_LOG_LEVEL ?= 3

VENV := .venv
RUN := $(VENV)/bin/python -m
PIP_INSTALL := $(RUN) pip install --quiet --disable-pip-version-check --no-input --use-pep517

.PHONY: help
help:  ## show this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.11]'
	sed -n 's/^\([a-z-]*\):[^#]*##  *\(.*\)/\1@\2/p' $(firstword $(MAKEFILE_LIST)) |
	  while IFS=@ read -r target text; do printf '  %-12s %s\n' "$$target" "$$text"; done

.PHONY: demo
demo: venv-run  ## run the whole method on small data, on a CPU
	@$(RUN) efficientnet_ns.demo $(ARGS)

.PHONY: test
test: venv-dev  ## run the quick tests
	@$(RUN) pytest --numprocesses=2 --dist=loadfile $(ARGS)

.PHONY: test-all
test-all: venv-dev  ## run all tests, including slow ones
	@$(RUN) pytest -m "" $(ARGS)

.PHONY: test-install
test-install:  ## install the package and each extra in the lowest and highest versions
	@$(shell_functions)
	find_python
	"$$python" tests/install_ranges.py $(ARGS)

.PHONY: lint
lint: venv-dev  ## check style, import order, format and types
	@$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

.PHONY: measure
measure: venv-run  ## print lines per room, lengths of functions, docstrings, comments
	@$(VENV)/bin/python tests/code_measures.py $(ARGS)

.PHONY: benchmark
benchmark:  ## compare speed with other libraries (20 minutes on an idle machine); writes runs/benchmark/tables.md
	@$(MAKE) --no-print-directory VENV=.venv-peers PYTHON="$(PYTHON)" compare

.PHONY: compare
compare: venv-peers
	@mkdir -p runs/benchmark
	whats=(input train predict select serving)
	for what in $${whats[@]}; do
	  echo "$$what"
	  $(RUN) efficientnet_ns.benchmark --what=$$what $(ARGS) | tee runs/benchmark/$$what.txt
	done
	for what in $${whats[@]}; do
	  printf '### %s\n\n```\n%s\n```\n\n' $$what "$$(< runs/benchmark/$$what.txt)"
	done > runs/benchmark/tables.md

.PHONY: docs
docs: venv-docs  ## build the pages as a site in site/; docs-serve previews it while you edit
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet
	echo "site/index.html"

.PHONY: docs-serve
docs-serve: venv-docs
	@$(RUN) mkdocs serve $(ARGS)

.PHONY: install
install: venv-run  ## install the package into .venv, for use from any folder
	@echo "Installing the package into $(VENV)"
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	echo "Installed. The programs: source $(VENV)/bin/activate && python -m efficientnet_ns"

.PHONY: clean
clean:  ## remove .venv, caches and build products; keep runs/
	@rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ----------------------------------------------------------------------------------------------
# The virtual environment. A finished installation has a stamp: an empty file in .venv that is
# named by the content of its requirements. An interrupted one leaves .venv/unfinished behind and is
# started over, because any of its packages may be incomplete.

.PHONY: venv-run venv-dev venv-docs venv-peers
venv-run: REQUIREMENTS := requirements.txt
venv-dev: REQUIREMENTS := requirements.txt requirements-dev.txt
venv-dev: venv-run
venv-docs: REQUIREMENTS := requirements-docs.txt
venv-docs: venv-run
venv-peers: REQUIREMENTS := requirements-peers.txt
venv-peers: venv-run

venv-run venv-dev venv-docs venv-peers:
	@$(shell_functions)
	lock
	if [[ -n "$(PYTHON)" ]] || ! usable; then find_python; fi
	if ! usable; then
	  echo "Creating $(VENV) with Python $$(version "$$python")"
	  rm -rf $(VENV)
	  mkdir $(VENV)
	  touch $(VENV)/unfinished
	  "$$python" -m venv $(VENV)
	fi
	stamp=$(VENV)/$@-$$(cat $(REQUIREMENTS) | cksum | tr ' ' -)
	if [[ -e $$stamp ]]; then exit; fi
	echo "Installing $(lastword $(REQUIREMENTS)) into $(VENV) (takes minutes the first time)"
	touch $(VENV)/unfinished
	rm -f $(VENV)/$@-*
	$(RUN) pip --version &> /dev/null || $(RUN) ensurepip > /dev/null
	$(PIP_INSTALL) --requirement $(lastword $(REQUIREMENTS))
	rm $(VENV)/unfinished
	touch $$stamp

define shell_functions
# Prints the version of an interpreter; empty if it does not run, as pyenv shims may not.
version() {
  "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true
}

# Prints the interpreter of that name. A pyenv shim runs only if its version is selected; the installed interpreter always does.
resolve() {
  local prefix
  if [[ -z "$$(version "$$1")" ]] && prefix=$$(pyenv prefix "$${1#python}" 2> /dev/null); then
    echo "$$prefix/bin/python"
  else
    echo "$$1"
  fi
}

suitable() {
  case "$$(version "$$1")" in 3.10 | 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac
}

usable() {
  [[ ! -e $(VENV)/unfinished ]] && suitable $(VENV)/bin/python &&
    [[ -z "$(PYTHON)" || $$(version $(VENV)/bin/python) == $$(version "$$(resolve "$(PYTHON)")") ]]
}

# Processes of make in one folder install one after the other.
lock() {
  exec 9< $(firstword $(MAKEFILE_LIST))
  if ! command -v flock > /dev/null || flock --nonblock 9; then return; fi
  echo "Waiting for another make to finish its installation here"
  flock 9 || true
}

find_python() {
  local candidate seen= without_venv=
  for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3.10 python3); do
    candidate=$$(resolve "$$candidate")
    if ! suitable "$$candidate"; then
      seen+="  $$candidate: $$(version "$$candidate" | grep . || echo "not found or does not run")"$$'\n'
      continue
    fi
    if "$$candidate" -c 'import ensurepip, venv' 2> /dev/null; then
      python=$$candidate
      return
    fi
    without_venv=$${without_venv:-$$(version "$$candidate")}
  done
  {
    if [[ -n $$without_venv ]]; then
      echo "Python $$without_venv was found, but it cannot create virtual environments. Install what is missing:"
      echo
      echo "  sudo apt-get install python$$without_venv-venv"
    else
      echo "Python 3.10, 3.11, 3.12 or 3.13 is required: TensorFlow 2.15 and 2.21 have no packages for other versions."
      echo "Found:"
      echo -n "$$seen"
      echo "Install one with any of these:"
      echo
      echo "  Debian 13:     sudo apt-get install python3.13 python3.13-venv"
      echo "  Ubuntu 24.04:  sudo apt-get install python3.12 python3.12-venv"
      echo "  Debian 12:     sudo apt-get install python3.11 python3.11-venv"
      echo "  Ubuntu 22.04:  sudo apt-get install python3.10 python3.10-venv"
      echo "  Other Ubuntu:  sudo add-apt-repository ppa:deadsnakes/ppa"
      echo "                 sudo apt-get install python3.13 python3.13-venv"
      echo "  uv:            uv python install 3.13"
      echo "                 make $(MAKECMDGOALS) PYTHON=\"\$$(uv python find 3.13)\""
      echo "  pyenv:         pyenv install 3.13"
      echo "                 make $(MAKECMDGOALS) PYTHON=\"\$$(pyenv prefix 3.13)/bin/python\""
    fi
    echo
  } >&2
  exit 1
}
endef
