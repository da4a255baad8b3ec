# Run `make` to see the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A test often waits: four processes keep two cores busy.
TEST_PROCESSES ?= 4

.DEFAULT_GOAL := help
.PHONY: help serve worker service service-remove test test-slow lint format bench chaos cluster-chaos pages pins clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo '  options go in as: make serve ARGS="--model tiny --port 4031"'

# The extra packages that the options in ARGS need.
EXTRAS = $(foreach extra,cluster:--broker lan:--bonjour otel:--traces,$(if $(findstring $(word 2,$(subst :, ,$(extra))),$(ARGS)),$(VENV)/.$(word 1,$(subst :, ,$(extra)))))

serve: $(VENV)/.serves $(EXTRAS) ## install what is missing, then serve on http://127.0.0.1:4030
	@exec $(BIN)/python server.py $(ARGS)

worker: $(VENV)/.cluster ## draw for a server on another machine: make worker ARGS="--broker redis://..."
	@exec $(BIN)/python remote_worker.py $(ARGS)

service: $(VENV)/.serves $(EXTRAS) ## start the server now and at each login: make service ARGS="--model ..."
	@$(BIN)/python deploy/service.py install $(ARGS)

service-remove: $(VENV)/.serves ## stop that and remove it; tasks and images stay
	@$(BIN)/python deploy/service.py remove

# Threads of NumPy's linear algebra wait by computing, which takes the cores from the other tests.
PYTEST = OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.tests ## run the tests; some of them: make test ARGS="tests/test_worker.py"
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.tests ## and those that take long: soaks, whole programs, every family of models
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.tests ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: $(VENV)/.tests ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.tests ## run the benchmarks, some minutes each; a smoke run: make bench ARGS=--quick
	@for script in submit idle_to_start task_gap generator_speed throughput cpu_cost lock_hold memory weights_copy fair_share forecast_error forecast_after_three forecast_machines forecast_live cluster_scale built_in_model; do \
		echo; echo "== $$script"; $(BIN)/python benchmarks/$$script.py $(ARGS) || exit 1; \
	done

chaos: $(VENV)/.tests ## what a real server survives, some minutes; a smoke run: make chaos ARGS=--quick
	$(BIN)/python tests/chaos/run_chaos.py $(ARGS)

cluster-chaos: $(VENV)/.tests ## the same of a cluster, with a real Redis; a smoke run: ARGS=--quick
	$(BIN)/python tests/chaos/run_cluster_chaos.py $(ARGS)

pages: $(VENV)/.serves ## write the generated pages: docs/models.md, options.md, fields.md
	$(BIN)/python docs/make_models_page.py
	$(BIN)/python docs/make_reference_pages.py

pins: $(VENV)/.serves ## resolve requirements*.in into requirements*.txt
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --upgrade --no-annotate \
		--custom-compile-command "make pins" \
		--override requirements-overrides.in requirements.in -o requirements.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --upgrade --no-annotate \
		--custom-compile-command "make pins" requirements-dev.in -o requirements-dev.txt
	for extra in cluster lan otel; do \
		$(BIN)/uv pip compile -q --universal --python-version 3.11 --upgrade --no-annotate \
			--custom-compile-command "make pins" --override requirements-overrides.in \
			requirements-$$extra.in -o requirements-$$extra.txt || exit 1; \
	done

clean: ## remove the virtual environment
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --no-deps: the pins are complete, and leave out torch, which mflux requires on Linux.
$(VENV)/.serves: requirements.txt | $(BIN)/python
	@echo 'installing about 700 MB into $(VENV)...'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.txt
	@touch $@

$(VENV)/.cluster $(VENV)/.lan $(VENV)/.otel: $(VENV)/.%: requirements-%.txt $(VENV)/.serves
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VENV)/.tests: requirements-dev.txt $(VENV)/.cluster $(VENV)/.lan $(VENV)/.otel
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-dev.txt
	@touch $@
