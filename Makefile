# make repro   the whole pipeline, from nothing to data/report/index.html; PROFILE=NAME takes profiles/NAME.yaml for
#              params.yaml first, `git checkout params.yaml` is the way back
# make profile PROFILE=NAME lays the profile over params.yaml and runs nothing
# make doctor  PROFILE=NAME tries encoders, disk and the model that is asked, before anything runs
# make test    what CI runs: lint, types, tests
# VENV=DIR reuses an environment; it is rebuilt when pyproject.toml or constraints.txt change.
VENV ?= .venv
PYTHON ?= python3
RUN ?=
NAME ?=
export REMOTE ?=
export PARTS ?=
export ENCODER ?=
PROFILE ?=
SHELL := /bin/bash

STAMP := $(VENV)/.fieldmark-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Threads that spin while they wait take the cores from each other.
export OMP_WAIT_POLICY ?= passive
# Where there is no git (an unpacked archive) DVC must be told.
NO_SCM := $(if $(wildcard .git),,.dvc/config.local)

.PHONY: setup profile doctor repro retry study compare pull share test test-all bench clean

setup: $(STAMP) $(NO_SCM)

$(STAMP):
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 6 GB; minutes)"
	@$(VENV)/bin/python -m pip install --quiet --upgrade --disable-pip-version-check -c constraints.txt pip
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[dev]'
	@rm -rf $(VENV)/.fieldmark-* build fieldmark.egg-info && touch $@

.dvc/config.local: $(STAMP)
	@dvc config --quiet --local core.no_scm true

profile: setup
	@$(if $(PROFILE),python -m tools.profiles "$(PROFILE)")

# What the pipeline needs, tried before anything runs: packages, pictures, encoders, disk, and one question to the model.
doctor: profile
	@python -m tools.doctor

repro: profile
	@python -m tools.preflight
	@python -m training.train --check
	@python -m tools.repro
	@cat data/report/summary.txt

# Ask again what was refused, invalid or failed; answers that are there cost nothing.
retry: profile
	dvc repro --single-item --force generate_concepts describe_images ask
	@$(MAKE) --no-print-directory repro

# The runs of studies/NAME.yaml that are not there yet; then its tables.
study: setup
	@test -n "$(NAME)" || { echo "error: make study NAME=NAME, a file of studies/ without .yaml" >&2; exit 1; }
	@python -m evaluation.study --name "$(NAME)"

compare: setup
	@test -n "$(NAME)" || { echo "error: make compare NAME=NAME, a file of studies/ without .yaml" >&2; exit 1; }
	@python -m evaluation.compare --name "$(NAME)"

# What `dvc repro --single-item train@RUN` reads, and nothing else: no images, no key, no GPU needed. PARTS="moments
# graphs", ENCODER=NAME or both bring these parts of the cache in its place (python -m tools.inputs --help lists them);
# with RUN beside them, wherever they were set, nothing is pulled.
pull: setup
ifneq ($(strip $(PARTS)$(ENCODER)),)
	@test -z "$(RUN)" || { echo "error: make pull takes RUN, or PARTS and ENCODER, which the environment or the command" \
		"line sets; unset one of these" >&2; exit 1; }
	@paths=$$(python -m tools.inputs $(if $(strip $(PARTS)),--parts $(PARTS)) \
		$(if $(strip $(ENCODER)),--encoder $(ENCODER))) && dvc pull $$paths
else
	@test -n "$(RUN)" || { echo "error: make pull RUN=NAME, a name under train.runs in params.yaml" >&2; exit 1; }
	@dvc pull --quiet data/inputs && paths=$$(python -m tools.inputs train@$(RUN)) && dvc pull $$paths
endif

# Push every output to the remote, or those of PARTS and ENCODER. REMOTE=FOLDER, s3://BUCKET/PATH or ssh://HOST/PATH sets it first, named `share`.
share: setup
	@python -m tools.share

# Types are checked beside the tests, since mypy keeps one core busy for a minute; what it says comes last.
define check
	ruff check .
	@said=$$(mktemp); mypy >$$said 2>&1 & types=$$!; trap 'kill $$types; rm -f $$said; exit 130' INT TERM; \
	pytest -n 2 --dist loadfile --no-loadscope-reorder $(1); tests=$$?; \
	wait $$types; types=$$?; echo mypy; cat $$said; rm -f $$said; exit $$((tests | types))
endef

test: setup
	$(call check)

test-all: setup
	$(call check,-m "slow or not slow")

bench: setup
	@for bench in bench/[a-z]*.py; do python -m bench.$$(basename $$bench .py) || exit 1; done

# Outputs that can be made again for nothing, and arrays. Answers, their journal (.cache) and DVC's cache stay, and so
# do encoders that were tuned on texts of another day (data/adapted).
clean:
	rm -rf data/index data/thumbs data/embed data/bank data/labels data/graphs data/inputs data/runs
	rm -rf data/again data/first_looks data/report data/reef
	rm -f data/links/*.parquet
	rm -rf data/asked/*/texts.parquet data/asked/*/vectors
	rm -f data/concepts/concepts.parquet data/descriptions/descriptions.parquet data/descriptions/cells.parquet
	rm -rf "$${FIELDMARK_CACHE:-.cache}/arrays" "$${FIELDMARK_CACHE:-.cache}/pictures"
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
