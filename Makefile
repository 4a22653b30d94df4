# SPDX-License-Identifier: GPL-2.0-or-later
# `make help` lists the targets.

PYTHON ?= python3
CC ?= cc
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
TIME ?= 60
MOVES ?= 200

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/installed
# Each variant that is not installed has a tree of its own, so that one build never spoils another. Two compilers at once:
# there is nothing else to do meanwhile.
VARIANT = $(PY) setup.py -q build --parallel 2 --build-base build/$(1) --build-lib build/$(1)/lib

SOURCES := $(shell find src -name '*.py' -o -name '*.py[ix]' -o -name '*.px[di]')

# setup.py and the compiler see the same compiler.
export CC PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv build demo bench probes test test-vm vm-tools fuzz fuzz-keep outcomes faults syscalls endurance endurance-vm leaks soak soak-vm lint debug asan annotate check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## the virtual environment, .venv, with all tools

$(STAMP): pyproject.toml | prerequisites-build
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check 'Cython>=3.3,<3.4' 'setuptools>=77'
	GODWIT_BARE=1 $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[lab,test,dev]'
	@touch $@

# The byte code as well, as an installation has it: where Python may not write it, by an environment or for want of
# permission, each start would compile everything anew, which takes longer than all the rest of it.
build: venv ## the Cython modules and the byte code, in place
	$(PY) setup.py -q build_ext --inplace --parallel $$(nproc)
	$(PY) -m compileall -q src/godwit

demo: build prerequisites-lab ## a guest with open connections migrates there and back
	$(BIN)/godwit demo

# What is in the repository is from a whole run, on a machine that does nothing else: three quarters of an hour. For a
# look there is BENCH_ARGS="tcp --rounds 1", which leaves the page as it is. QEMU is fetched unless there are groups, and
# it is none of them. Status 3 is that something could not be measured, which the page says.
BENCH_OUT = $(if $(strip $(BENCH_ARGS)),build/bench,docs)
BENCH_NEEDS = $(if $(filter qemu,$(BENCH_ARGS)),vm-tools,$(if $(filter tcp udp move rest,$(BENCH_ARGS)),,vm-tools))

bench: build prerequisites-lab $(BENCH_NEEDS) ## godwit beside passt, into docs/performance.md; with BENCH_ARGS into build/bench
	mkdir -p $(BENCH_OUT)
	$(BIN)/godwit bench $(BENCH_ARGS) --json $(BENCH_OUT)/performance.json --svg $(BENCH_OUT)/performance.svg || [ $$? -eq 3 ]
	$(if $(strip $(BENCH_ARGS)),,$(PY) tools/docs.py)

probes: build prerequisites-lab ## what else the data plane's system calls could be, measured; five minutes
	$(PY) tools/probes/run.py

test: build prerequisites-lab prerequisites-test ## the test suite without virtual machines
	$(PY) -m pytest $(PYTEST_ARGS)

test-vm: build prerequisites-lab vm-tools ## the tests with QEMU guests, passt and libvirt
	$(PY) -m pytest --override-ini=addopts= --import-mode=importlib --strict-markers -ra tests/vm $(PYTEST_ARGS)

vm-tools: build prerequisites-vm ## QEMU, a guest image, passt and libvirt for test-vm
	$(PY) -m godwit.lab.setup_vm

# TARGET=NAME... for some of them.
fuzz: build/libfuzzer/built $(VENV)/fuzz prerequisites-lab ## all that reads what others send, fuzzed for TIME seconds in all
	$(PY) -m tests.fuzz.campaign --time $(TIME) $(TARGET)

build/libfuzzer/built: $(SOURCES) setup.py | venv prerequisites-fuzz
	CC=clang GODWIT_FUZZ=1 $(call VARIANT,libfuzzer)
	@touch $@

# Not as an extra of godwit's, which would be built once more.
$(VENV)/fuzz: pyproject.toml | venv
	$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"])' \
		| xargs $(PY) -m pip install -q --disable-pip-version-check
	@touch $@

fuzz-keep: build/libfuzzer/built $(VENV)/fuzz ## of what make fuzz has found, keep the least that reaches all of it
	$(PY) -m tests.fuzz.keep

outcomes: build prerequisites-lab ## what becomes of connections in every migration there is, into docs/outcomes.md
	$(PY) tools/outcomes.py

faults: build prerequisites-lab ## a fault in every place of a migration, into docs/faults.md
	$(PY) tools/faults.py

syscalls: build prerequisites-lab prerequisites-test prerequisites-trace ## what the daemon asks of the kernel, compared with its list
	$(PY) tools/syscalls.py --override-ini=addopts= --import-mode=importlib -q $(or $(strip $(PYTEST_ARGS)),tests/lab tests/cli)

endurance: build prerequisites-lab ## one guest moves MOVES times under load: nothing may be lost, nothing may grow
	$(PY) -m godwit.lab.endurance --moves $(MOVES)

endurance-vm: build prerequisites-lab vm-tools ## the same with a QEMU guest
	$(PY) -m godwit.lab.endurance --moves $(MOVES) --qemu

leaks: build prerequisites-lab ## whether the daemon keeps memory: each kind of event alone, again and again
	$(PY) -m godwit.lab.leaks

# Without SEED by chance; the first line says which.
soak: build prerequisites-lab ## for TIME seconds everything happens to a guest under load that may: make soak TIME=7200
	$(PY) -m godwit.lab.soak --seconds $(TIME) $(if $(SEED),--seed $(SEED))

soak-vm: build prerequisites-lab vm-tools ## the same with a QEMU guest
	$(PY) -m godwit.lab.soak --seconds $(TIME) $(if $(SEED),--seed $(SEED)) --qemu

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

debug: venv ## an unoptimised build with debug information, in build/debug/lib
	GODWIT_DEBUG=1 $(call VARIANT,debug)
	@echo "Use it with PYTHONPATH=build/debug/lib"

# Python itself is not built with the sanitizers, so their libraries are loaded first. It frees little at
# its end, which is no leak; and its own allocator would hide overruns inside its arenas.
# Not what is Python alone; of the laboratory, neither what is about itself, nor what takes long and has the data plane do
# what others do, too.
ASAN_LEAVES := tests/cli tests/examples tests/migration tests/vhost_user tests/test_docs.py tests/test_layers.py \
	$(patsubst %,tests/net/test_%.py,arp config dhcp dhcpv6 forward handover native ndp netevents netlink oracle resolv \
	responder state) \
	$(patsubst %,tests/daemon/test_%.py,control hostwatch lifecycle log main network_options options probe record texts) \
	$(patsubst %,tests/lab/test_%.py,outcomes fault_matrix endurance leaks soak addresses guard failures going_on \
	clients services hosts options front_ends scenario upgrade windows agent debian image netns placement qmp stream traffic \
	guest ideal udp weather bench bench_report move_bench rest_bench tcp_bench) \
	tests/fuzz/test_streams.py

asan: venv prerequisites-lab prerequisites-test ## the test suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	GODWIT_SANITIZE=1 $(call VARIANT,sanitize)
	$(PY) -m compileall -q build/sanitize/lib
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	PYTHONPATH=$(CURDIR)/build/sanitize/lib GODWIT_SANITIZE=1 \
	$(PY) -m pytest -o timeout=600 $(ASAN_LEAVES:%=--ignore=%) $(PYTEST_ARGS)

annotate: venv ## Cython's annotated sources, below build/annotate
	@for source in $$(cd src && find . -name '*.pyx'); do \
		mkdir -p "build/annotate/$$(dirname "$$source")" && \
		$(BIN)/cython -a -3 -X cdivision=True -I src \
			-o "build/annotate/$${source%.pyx}.c" "src/$$source" || exit 1; \
	done
	@echo "See build/annotate/godwit/dataplane/*.html"

check: ## what CI runs: lint, fuzz, asan, test-vm and test
	.ci/run

clean: ## remove what was built, but not .venv
	rm -rf build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src -name '*.so' -delete
	find src tests -name __pycache__ -prune -exec rm -rf {} +

prerequisites-%:
	@tools/prerequisites $*
