# Every habit of this repository is a line here. `make` alone lists them.
PYTHON ?= python3
NB ?= $(sort $(wildcard nbs/*.ipynb))
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test quick lint export notebooks ablation improved solvers guidance latent models mutants bench bench-gpu book student clean

help: ## list what make can do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

install: .venv/installed ## create .venv with the pinned versions; nothing happens where it is up to date

.venv/installed: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install ## train on real digits and write samples: a minute or two on two CPU cores
	$(BIN)/python -m ddpm_lit demo $(ARGS)

# Where other work shares the cores, threads that wait actively slow each other down many times over.
test quick notebooks: export OMP_WAIT_POLICY = PASSIVE

# No test needs the Hub: without a network, huggingface_hub would try for half a minute before it says so.
test quick notebooks: export HF_HUB_OFFLINE = 1

# Files of tests, and chapters, side by side: one on each core takes less time than one after the other on all of them.
test quick: export OMP_NUM_THREADS = 1
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile

test: lint ## lint, the tests in tests/, then every notebook run again and compared with what it shows
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --nbval nbs/

# The chapters and tests of the mathematics and of the rules: what a change breaks most often shows here first.
QUICK_CHAPTERS := $(addprefix nbs/,$(addsuffix .ipynb,00_checks 01_gaussian 02_forward 03_posterior 04_reverse 06_objective))
QUICK_TESTS := $(addprefix tests/test_,$(addsuffix .py,forward ddpm rooms notebooks properties layers unet images))

quick: lint ## a verdict within a minute: lint, the quick tests, the chapters of the mathematics; it names what it took
	@echo "make quick takes $(QUICK_TESTS) (not those marked slow) and $(QUICK_CHAPTERS)"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not processes" --nbval $(QUICK_TESTS) $(QUICK_CHAPTERS)

lint: install ## check the style of the notebooks and of the code
	$(BIN)/ruff check

export: install ## write ddpm_lit/ from the cells of nbs/ that are marked `#| export`
	$(BIN)/nbdev_export

notebooks: export ## run the chapters again and store what they show; NB=nbs/02_forward.ipynb for one
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NB)
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --coalesce-streams --inplace $(NB)  # after it has run, not before
	$(BIN)/nbstripout --keep-output --keep-count --extra-keys "metadata.language_info cell.metadata.lines_to_next_cell" $(NB)
	$(BIN)/nbdev_export  # once more: an export names its cells, and normalising numbers them

ablation: install ## train what is missing in nbs/21_ablation.jsonl, the table of chapter 21: most of an hour for all
	$(call as_program,21_ablation)

improved: install ## the same for nbs/30_improved.jsonl, the table of chapter 30: half an hour
	$(call as_program,30_improved)

solvers: install ## the same for nbs/31_solvers.jsonl, the table of chapter 31: a quarter of an hour
	$(call as_program,31_solvers)

guidance: install ## train what nbs/32_guidance.jsonl, the table of chapter 32, is made of: ten minutes
	$(call as_program,32_guidance)

latent: install ## the same for nbs/33b_latent.jsonl, the table of chapter 33b: five minutes
	$(call as_program,33b_latent)

# A chapter, run as a program that fills its table and stops; interrupted, it resumes.
define as_program
	mkdir -p build
	$(BIN)/jupytext --quiet --to py:percent --output build/$(1).py nbs/$(1).ipynb
	cd nbs && TABLE=1 MPLBACKEND=agg ../$(BIN)/python ../build/$(1).py
endef

MODELS := digits digits-labels digits-improved digits-captions digits-inpaint mnist5k-autoencoder emoji-autoencoder

models: $(patsubst %,models/%/recipe.json,$(or $(ARGS),$(MODELS))) ## train the models that ship with the package, where models/ lacks one: ARGS=digits for one

models/digits-captions/recipe.json: | install
	$(call as_program,34_text)

models/digits-inpaint/recipe.json: | install
	$(call as_program,35_glide)

models/%-autoencoder/recipe.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python tools/autoencoders.py $*-autoencoder

models/%/recipe.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python tools/models.py $*

mutants: install ## change one symbol of an exported cell at a time, and list the changes that nobody notices: ten minutes
	$(BIN)/python tools/mutants.py $(ARGS)

# The peers come without what they require: torchvision, which one of them names, does not import beside a CPU torch.
build/peers: .venv/installed
	$(BIN)/python -m pip install --no-deps $$(sed -n 's/^bench_requirements = //p' settings.ini)
	mkdir -p build
	touch $@

bench: build/peers ## time this package beside its peers on the CPU: 8 minutes on two quiet cores; ARGS=book for a part
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-gpu: build/peers ## the same on a GPU, CIFAR-10 at the paper's size: 10 minutes; ARGS=training for a part
	$(BIN)/python benchmarks/gpu.py $(ARGS)

book: install ## build the web book into build/book from the chapters as they are stored: half a minute
	$(BIN)/python tools/book.py $(ARGS)

student: install ## write the chapters with their exercises open into student/
	$(BIN)/python tools/student.py $(ARGS)

clean: ## remove builds and caches; .venv and what was trained stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/.ipynb_checkpoints
	find ddpm_lit tests -name __pycache__ -prune -exec rm -rf {} +
