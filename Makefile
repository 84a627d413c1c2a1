# `make demo` and `make test` need Python 3.11 or later and make; everything else is set up by the first run.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Of `make test-newest`: the newest Python that is tested, with the newest versions that pyproject.toml allows.
NEWEST ?= $(shell command -v python3.13 || command -v python3.12)
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --progress-bar off

DEMO := runs/demo
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
ANSWERS := $(DEMO)/answers.jsonl
RUN := $(DEMO)/run
DRAFT := $(DEMO)/export
TABLE := $(DEMO)/bench/report.md

# Compiled programs are kept: the second run of a step does not compile again. Tests compile for themselves.
demo: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/$(VENV)/jax-cache
demo: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.DELETE_ON_ERROR:
.PHONY: demo demo-clean test test-all test-newest profile lint format clean

demo: $(TABLE)
	@echo "The table above is in $(TABLE). 'make demo-clean' forgets the answers, the draft and it."

$(MODEL): | $(VENV)/.demo
	$(PY) -m infer.demo_model $(@D)

$(ANSWERS): configs/demo_prompts_train.jsonl | $(MODEL)
	$(PY) -m infer.generate --target $(MODEL) --prompts $< --out $@ \
	    --batch-size 32 --max-new-tokens 96

$(RUN)/.trained: $(ANSWERS) configs/smollm2_demo.yaml
	rm -rf $(RUN)
	$(PY) -m train.main --config configs/smollm2_demo.yaml
	@touch $@

$(DRAFT)/sorted_draft.json: $(RUN)/.trained
	rm -rf $(DRAFT)
	$(PY) -m infer.export --run $(RUN) --out $(DRAFT)
	@touch $@

$(TABLE): $(DRAFT)/sorted_draft.json configs/demo_prompts_eval.jsonl
	$(PY) -m infer.bench --target $(MODEL) --draft $(DRAFT) \
	    --questions configs/demo_prompts_eval.jsonl --max-questions 8 --max-new-tokens 64 --num-draft-tokens 3 \
	    --methods ar,sd@6,sd@9,sd@12,s2d --out $(@D)

# Compilers for GPUs and TPUs lie beside the other packages: found among them, JAX would look for the chips at every start.
COMPILERS := $(VENV)/compilers
PYTEST := PYTHONPATH=$(COMPILERS) JAX_PLATFORMS=cpu $(PY) -m pytest --numprocesses 2 --dist loadgroup

test: $(VENV)/.test $(COMPILERS)/.installed
	$(PYTEST)

# What needs an hour: each test that is marked `exhaustive` says why. Then decoding again, compiled as users have it.
test-all: $(VENV)/.test $(COMPILERS)/.installed
	$(PYTEST) --all --kills 20
	$(PYTEST) --optimize tests/decode

test-newest:
	@test -n '$(NEWEST)' || { echo 'error: no python3.13 or python3.12; give one: make test-newest NEWEST=...'; exit 2; }
	$(MAKE) test VENV=$(VENV)-newest PYTHON=$(NEWEST) UPGRADE='--upgrade --upgrade-strategy eager'

# Where the tests' time goes: docs/lab/suite.md.
profile: $(VENV)/.test
	$(PY) docs/checks/suite_profile.py runs/suite_profile

lint: $(VENV)/.test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

$(PY): | python
	$(PYTHON) -m venv $(VENV)

# Says so if Python is too old, or if PYTHON was given and $(VENV) was made with another one.
.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is too old; give Python 3.11 or later: make PYTHON=..."; exit 2; }
ifneq ($(filter-out file default undefined,$(origin PYTHON)),)
	@test ! -e $(PY) || test "$$($(PY) -V)" = "$$($(PYTHON) -V)" || \
	    { echo "error: $(VENV) has $$($(PY) -V), not $(PYTHON); run make clean, or add VENV=.venv-other"; exit 2; }
endif

$(VENV)/.demo: pyproject.toml | $(PY)
	@echo 'Installing (about two minutes, once)'
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(PY)
	@echo 'Installing with test tools (a few minutes, once)'
	$(INSTALL) $(UPGRADE) -e '.[demo,test]'
	@touch $@

# The versions that the installed JAX asks for. Where there are none for this machine, tests that need them are skipped.
$(COMPILERS)/.installed: $(VENV)/.test
	@echo 'Installing compilers for GPUs and TPUs (a minute, once)'
	@mkdir -p $(@D)
	$(INSTALL) --no-deps --upgrade --target $(@D) $$($(PY) docs/checks/compilers_wanted.py) || \
	    echo 'none for this machine: tests that compile for GPUs and TPUs are skipped'
	@touch $@

demo-clean:
	rm -rf $(DEMO)

clean: demo-clean
	rm -rf $(VENV) $(VENV)-newest
