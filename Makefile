# make setup   .venv with everything for use and development
# make demo    export, check, ground and draw the embedded model
# make test    lint, types, layers, tests, and the runtime alone in a clean environment
# make oldest  the runtime alone on Python 3.10, where there is one
# make docs     all pages as a site, in build/site; a broken link is an error
# make dist     wheels and sdists of both distributions in build/dist, tried in empty environments
# make notebook  every cell of the notebook in examples/
# make extras  every extra resolved by pip for x86-64 and aarch64, Python 3.10 and 3.12 (asks the package registry)
# make matrix every grid of tests whole: families, pruners, modes, formats, engines (more than half an hour)
# make gpu-contract  what onnxruntime-gpu's real CUDA provider does with every form of graph, without a GPU
# make gpu-day  what a GPU machine without a network needs, in build/gpu-day; run at once where a GPU is here
# make fuzz    change input at every border for MINUTES, and count what comes of it
# make faults  every call to the system fails once in turn
# make kills   exports, builds, evaluations and sweeps are killed at KILLS random moments
# make effect  accuracy of unpruned, gap, compact and permuted on the held-out split, which pages are held to
# make results the sweep of docs/results.md: every pruner, mode and ratio, PyTorch and ONNX (hours; goes on)
# make keeps   the sweep over the counts that papers quote: GAP against compact (about an hour; goes on)
# make why     the ablations of docs/why-positions.md, then all figures (about 40 minutes; goes on)
# make train   train the embedded model again (about an hour on two cores)

PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := build/demo
SAMPLES := refshapes/samples-256
SAMPLE := test-027.png
PHRASE := the triangle below the cross
PHRASES := 100
MINUTES := 10
SEED := 0
KILLS := 200
FUZZED := build/fuzz/bundle

.PHONY: setup demo test lint unit device oldest docs notebook dist extras matrix fuzz faults kills gpu-contract gpu-day effect results keeps why train clean
.DELETE_ON_ERROR:

# Tests start many programs; each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

setup: $(STAMP)

$(STAMP): pyproject.toml runtime/pyproject.toml
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; set PYTHON=/path/to/python3))
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ./runtime --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	@mkdir -p $(DEMO)
	$(BIN)/gap-export refshapes-256 --ratio 0,0.75 --out $(DEMO)/gap
	$(BIN)/gap-export refshapes-256 --ratio 0.75 --positions compact --out $(DEMO)/compact
	$(BIN)/gap-runtime check $(DEMO)/gap
	$(BIN)/gap-runtime ground $(DEMO)/gap $(SAMPLES)/$(SAMPLE) "$(PHRASE)" --ratio 0.75 --draw $(DEMO)/ground.png
	$(BIN)/python refshapes/demo.py $(DEMO)/gap $(DEMO)/compact --samples $(SAMPLES) --out $(DEMO)/demo.png

# Types are looked at by one core while the other tries the runtime alone; unit has both.
test: $(STAMP)
	$(MAKE) --jobs=2 --output-sync=target lint device
	$(MAKE) unit

lint: $(STAMP)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each: with more threads they would wait for each other.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

device: $(STAMP)
	bash tests/device.sh this

oldest: $(STAMP)
	bash tests/device.sh oldest

# mkdocs is for the pages alone, so it is no part of the setup.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ./runtime --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The exporter's environment is another torch: some minutes and gigabytes.
dist: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dist]"
	bash tests/dist.sh

extras: $(STAMP)
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/gpu/test_extras.py

matrix: $(STAMP)
	$(BIN)/python -m pytest -m matrix

notebook: $(STAMP)
	$(BIN)/python -m pytest -m matrix tests/parity/test_examples.py

# Fetches 255 MB once, into build/wheels.
gpu-contract: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu_contract tests/gpu

gpu-day: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_day build/gpu-day

fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	$(BIN)/gap-export refshapes --ratio 0,0.5 --out $(FUZZED)
	cd tests && PYTHONPATH=. OMP_NUM_THREADS=1 ../$(BIN)/python -W ignore -m fuzz \
		--bundle ../$(FUZZED) --minutes $(MINUTES) --seed $(SEED)
	cd tests && PYTHONPATH=. ../$(BIN)/python -W ignore -m fuzz.guided $(MINUTES)

faults: $(STAMP)
	$(BIN)/python -m pytest -m matrix -rP tests/export/test_faults.py

kills: $(STAMP)
	cd tests && PYTHONPATH=. OMP_NUM_THREADS=1 ../$(BIN)/python -W ignore -m kills \
		--home ../build/kills --kills $(KILLS) --seed $(SEED)

effect: $(STAMP)
	$(BIN)/python refshapes/effect.py --out build/effect.json
	cp build/effect.json docs/figures/effect.json

# One thread: single phrases gain nothing from more. Run again after a stop, it goes on.
results: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/gap-export sweep refshapes --data refshapes:test --limit $(PHRASES) \
		--ratio 0,0.25,0.5,0.75,0.9 --pruners all --positions gap compact permuted --pytorch \
		--set prune.phrase=embeddings --backend onnxruntime:cpu --out build/results --resume
	$(BIN)/python refshapes/results.py build/results --write docs/results.md

keeps: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/gap-export sweep refshapes-256 --data refshapes-256:test --limit 200 \
		--keeps 192 128 64 40 --pruners visionzip cls_attention vispruner divprune dart column_attention \
		nuwa prumerge_plus spatial random --seeds 0 1 2 \
		--positions gap compact --set prune.phrase=embeddings --backend onnxruntime:cpu --gallery 0 \
		--out build/keeps --resume
	$(BIN)/python refshapes/results.py build/keeps --counts --write docs/results.md

why: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python refshapes/ablations.py --out build/ablations --write docs/why-positions.md
	$(BIN)/python refshapes/figures.py --sweep build/keeps --ablations build/ablations --out docs

train: $(STAMP)
	$(BIN)/python refshapes/train.py

clean:
	rm -rf build .venv
