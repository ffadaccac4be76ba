# The whole of what there is to remember: make demo | test | check | fix | bench | test-gpu | bench-gpu
PYTHON ?= python3
VENV   ?= .venv
# An index of CPU-only torch wheels, where the default index has none (PyTorch's site names it). Empty: use what pip is set up with.
TORCH_INDEX ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test check fix bench test-gpu bench-gpu test-slow clean

setup: $(READY)

$(READY): pyproject.toml setup_environment.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh setup_environment.sh
	touch $@
