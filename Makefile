# All there is to remember: make demo | demo-speed | test | check | fix | docs | attack | bench | test-gpu | bench-gpu. Each sets up .venv by itself.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python to set up with; any 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
# The address of an index of CPU-only torch wheels, for a machine without a GPU where pip finds none.
TORCH_INDEX ?=
VENV ?= .venv

# Compiled modules are kept whatever the shell says: the tests start many processes, and each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

RUN := $(VENV)/bin/python
READY := $(VENV)/ready
SET_UP := tools/set_up.py
# 4.57 is the last transformers before 5; its tests get an environment of their own.
VENV_4 := .venv-transformers-4
# 3.6 is the oldest Triton that the kernels are written for; likewise.
VENV_TRITON := .venv-oldest-triton

.PHONY: help setup demo demo-speed test test-slow test-gpu test-transformers-4 test-oldest-triton test-interpreter matrix check fix docs \
	notebooks release attack bench bench-gpu

help:
	@echo "make demo       prune all-MiniLM-L6-v2 with and without data, check the masks, and make a report to look at"
	@echo "make demo-speed prune SmolLM2-135M to 4:8-T and let it write, dense and packed, on this CPU"
	@echo "make test       the tests; test-interpreter, test-slow, test-gpu, test-transformers-4 and test-oldest-triton are the others"
	@echo "make check      format, lint, types, import contract, doctests, documentation, packaging"
	@echo "make fix        format and repair what can be repaired, and write the generated pages again"
	@echo "make docs       the documentation site, out/site/index.html; warnings and broken links are errors"
	@echo "make release    sdist and wheel in out/release: twine check, and the wheel installed in an empty environment"
	@echo "make notebooks  run the notebooks of the site again, and store their outputs"
	@echo "make matrix     the fast tests in one environment per Python that is installed: 3.11 to 3.14"
	@echo "make attack     crafted files, kills, full disks, rivals, bad values, failing steps, extreme tiles; ARGS='--seconds 60 --only files'"
	@echo "make bench      the solver benchmark; bench-gpu is the GPU's"

setup: $(READY)

$(READY): pyproject.toml $(SET_UP)
	$(PYTHON) $(SET_UP) $(VENV) --torch-index "$(TORCH_INDEX)"
	@touch $@

demo: $(READY)
	$(RUN) tools/fetch_assets.py all-MiniLM-L6-v2 lee50
	HF_HUB_OFFLINE=1 $(RUN) examples/demo.py .cache/assets/all-MiniLM-L6-v2 .cache/assets/lee50 out/demo

demo-speed: $(READY)
	$(RUN) tools/fetch_assets.py smollm2-135m
	HF_HUB_OFFLINE=1 $(RUN) examples/decode.py .cache/assets/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf

# Tests of the repository itself (pages, examples, packaging) are a part of `make check`.
test: $(READY)
	$(RUN) -m pytest -n auto --ignore tests/repo

# The Triton kernels on the CPU: Triton chooses between GPU and interpreter when it is imported, so they have a process of their own.
test-interpreter: $(READY)
	TRITON_INTERPRET=1 PYTHONPATH=tests $(RUN) -m pytest -n 0 tests/kernels/interpreted

test-slow: $(READY)
	$(RUN) -m pytest -m "slow and not gpu"

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu -rs

test-transformers-4: $(VENV_4)/ready
	$(VENV_4)/bin/python -m pytest -m "transformers and not gpu"

$(VENV_4)/ready: pyproject.toml $(SET_UP)
	$(PYTHON) $(SET_UP) $(VENV_4) --torch-index "$(TORCH_INDEX)" --with "transformers==4.57.*"
	@touch $@

test-oldest-triton: $(VENV_TRITON)/ready
	$(VENV_TRITON)/bin/python -m pytest -m "not gpu" tests/kernels/exact/test_kernels_cuda.py tests/kernels/mvue tests/kernels/sparse24

$(VENV_TRITON)/ready: pyproject.toml $(SET_UP)
	$(PYTHON) $(SET_UP) $(VENV_TRITON) --torch-index "$(TORCH_INDEX)" --with "triton==3.6.*"
	@touch $@

# One environment per supported Python that this machine has, each with a torch of its own; VERSIONS and TORCHES choose others, as in
# make matrix VERSIONS=3.12 TORCHES="2.11.* 2.13.*". A version that is not installed is named and left out.
VERSIONS ?= 3.11 3.12 3.13 3.14
TORCHES ?= any
matrix:
	@failed=; for version in $(VERSIONS); do for torch in $(TORCHES); do \
		name=.venv-$$version-$$(echo $$torch | tr -d '*.'); \
		if ! python$$version -c "" 2>/dev/null; then echo "python$$version: not installed, not tested"; continue; fi; \
		with=; if [ "$$torch" != any ]; then with="--with torch==$$torch"; fi; \
		python$$version $(SET_UP) $$name --torch-index "$(TORCH_INDEX)" $$with && $$name/bin/python -m pytest -n auto || failed="$$failed $$version/$$torch"; \
	done; done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

check: $(READY)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	$(RUN) -m pytest --doctest-modules src
	$(RUN) tools/cli_reference.py --check
	$(RUN) tools/api_pages.py --check
	$(RUN) tools/draw_mask.py --check
	$(RUN) benchmarks/tables.py --check
	$(RUN) -m pytest -n auto -m "not slow and not gpu" tests/repo

fix: $(READY)
	$(RUN) -m ruff format
	$(RUN) -m ruff check --fix
	$(RUN) tools/cli_reference.py
	$(RUN) tools/api_pages.py
	$(RUN) tools/draw_mask.py
	$(RUN) benchmarks/tables.py

docs: $(READY)
	$(RUN) -m sphinx --fail-on-warning --keep-going -q -b html -d out/doctrees docs out/site
	$(RUN) tools/check_links.py

# The sdist and the wheel, checked and installed in an empty environment; nothing is published.
release: $(READY)
	$(RUN) tools/check_release.py --torch-index "$(TORCH_INDEX)"

notebooks: $(READY)
	$(RUN) tools/notebooks.py

# Slow and seeded; exit code 1 if it finds anything. ARGS: --seconds, --seed, --only KIND, --cases, --json.
ARGS ?=
attack: $(READY)
	PYTHONPATH=tests $(RUN) -m attack $(ARGS)

bench: $(READY)
	$(RUN) benchmarks/solvers.py

# One program after the other, what users ask for first. One that fails does not keep the others from running; without a GPU
# (exit code 2) the first says so and ends the run.
bench-gpu: $(READY)
	@failed=0; for program in linear.py solvers.py block.py windows.py "linear.py --grid"; do \
		echo "benchmarks/gpu/$$program"; $(RUN) benchmarks/gpu/$$program; code=$$?; \
		if [ $$code = 2 ]; then exit 2; fi; if [ $$code != 0 ]; then failed=1; fi; \
	done; exit $$failed
