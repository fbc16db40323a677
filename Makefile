# Two commands do everything from a fresh clone with python3 and make alone:
#   make demo    train, export, build and label images of many sizes, on the CPU
#   make test    lint and the whole test suite (make test-fast: a part of every package, in two minutes)
#   make test CONSTRAINTS=/dev/null    with the newest of everything, in a fresh clone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-fast lint types links docs findings wheels silicon silicon-simulated bench engine-matrix zoo-matrix clean

# Three stamps: the demo does not wait for what only the tests need.
$(VENV)/.all: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.all
	$(INSTALL) -e '.[dev]'
	touch $@

# pycuda compiles for a minute or two, the first time. Where it cannot, its tests skip, and say why.
$(VENV)/.gpu-sim: $(VENV)/.dev tests/gpu_sim/build.py tests/gpu_sim/driver.cpp tests/gpu_sim/host_kernels.h
	$(BIN)/python tests/gpu_sim/build.py && touch $@ || echo "the tests on the simulated GPU will be skipped"

demo: $(VENV)/.all
	$(BIN)/python -m benchmarks.demo --out $(DEMO)

# Two files of tests at a time; each worker takes up to 1.5 GB. PyTorch's threads of one would wait for the other's; where
# a test has several, those that wait leave the cores alone.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: lint $(VENV)/.gpu-sim
	$(PYTEST)

test-fast: $(VENV)/.gpu-sim
	$(PYTEST) --fast

lint: $(VENV)/.dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyproject.toml has mypy's settings.
types: $(VENV)/.dev links
	$(BIN)/mypy

# mypy and the site's reader of docstrings do not follow setuptools' package-dir, so they are shown the floors by links.
links:
	mkdir -p build/types/fcn_deploy
	for name in fcn_deploy/__init__.py fcn_deploy/py.typed runtime calibration fcn export; do \
		ln -sfn "$(CURDIR)/$$name" build/types/fcn_deploy/; done

# The site in build/site/, which needs nothing from elsewhere; its warnings, and those of docstrings, are errors. The first
# step writes docs/reference/commands.md from the commands.
docs: $(VENV)/.docs links
	$(BIN)/python docs/commands.py
	$(BIN)/zensical build --clean --strict > build/docs.log 2>&1 && ! grep "griffe: " build/docs.log || \
		{ cat build/docs.log; exit 1; }
	@echo "build/site/index.html"

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) -e '.[docs]'
	touch $@

# What other projects do wrong, each shown by a script of its own that fetches the versions it was seen with; one that
# fails no longer shows what it says. Not part of the tests: they need the network, and minutes.
findings:
	failed=; for script in findings/*.sh; do \
		echo "== $$script"; bash $$script || failed="$$failed $$script"; done; \
		test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Who provides each shared library that the wheels of the GPU extras need. Fetches some gigabytes, kept in build/wheels.
wheels: $(VENV)/.dev
	$(BIN)/python -m benchmarks.wheels --folder build/wheels

# All that only a GPU can tell, in silicon.json and silicon.html: for any machine with one, some ten minutes, without a network.
silicon: $(VENV)/.dev
	$(BIN)/python -m benchmarks.silicon

# The same on the simulated GPU, small, with engines of both libraries in every precision: some ten minutes.
silicon-simulated: $(VENV)/.gpu-sim
	PYTHONPATH=tests $(BIN)/python -m gpu_sim.silicon

$(VENV)/.bench: $(VENV)/.all
	$(INSTALL) -e '.[bench]'
	touch $@

# Not part of the tests: timings are for people to read, on a machine that does nothing else. The demo's network, or
# make bench NETWORK=cam DATA=../shared/camvid for cam.safetensors and cam.onnx. PEERS="--rounds 5" and the like.
NETWORK := $(DEMO)/digits
DATA := digits
WORK = build/bench/$(notdir $(NETWORK))
bench: $(VENV)/.bench
	test -f $(NETWORK).onnx || $(MAKE) demo
	rm -f $(WORK)/*.engine
	$(BIN)/python -m benchmarks.peers $(NETWORK).safetensors $(NETWORK).onnx --data $(DATA) --work $(WORK) \
		--plot $(WORK)/peers.png --json $(WORK)/peers.json $(PEERS)
	$(BIN)/python -m benchmarks.overhead $(WORK)/float32.engine

# Every network in every precision, built for GPUs; no GPU is needed. MATRIX="--only vgg16 --full" and the like.
engine-matrix: $(VENV)/.dev
	$(BIN)/python -m benchmarks.engine_matrix $(MATRIX)

# Networks of the libraries that people use, in an environment of their own in build/zoo. ZOO="--only smp-unet" and the like.
zoo-matrix: $(VENV)/.all
	$(BIN)/python -m benchmarks.zoo_matrix $(ZOO)

clean:
	rm -rf $(VENV) $(DEMO) build .cache *.egg-info
