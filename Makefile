# The everyday commands. Every target first makes .venv (once); PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
# A PYTHONPATH from outside would hide packages from pip and the tests; without .pyc files each of a test's processes compiles all anew.
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE

run: .venv/.installed
	.venv/bin/gptloom run experiments/shakespeare.yaml

test: .venv/.dev
	.venv/bin/ruff check && .venv/bin/ruff format --check
	@$(MAKE) --no-print-directory -j2 types tests

# One core for a minute without what an earlier call has left: in the time that the tests leave.
types: .venv/.dev
	nice .venv/bin/mypy

tests: .venv/.dev
	.venv/bin/pytest -n 2 --dist worksteal -m "not integration" && .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder -m integration

# The long forms: hundreds of kills, stops, cancels and outages; at most 90 minutes on 2 cores.
test-long: .venv/.dev
	.venv/bin/pytest -s -m long

test-stack:
	@echo "test-stack: the tests that need containers come with the stack of docker-compose.yml; there are none yet" >&2; exit 2

up: .venv/.installed
	.venv/bin/gptloom up

down: .venv/.installed
	.venv/bin/gptloom down

lint: .venv/.dev
	.venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/mypy

bench: .venv/.installed
	.venv/bin/python benchmarks/main_job.py
	.venv/bin/python benchmarks/data.py
	.venv/bin/python benchmarks/batches.py

# A bill of materials of every pin (CycloneDX), then known vulnerabilities; one that could not be looked up counts as not passed.
audit: .venv/.installed
	.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[audit]'
	mkdir -p build && .venv/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/bom.json constraints.txt
	.venv/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("gptloom needs Python 3.11 to 3.13, found " + v + "; choose another one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	-.venv/bin/python -m gptloom.flows.servers.databases
	@touch $@

# What tests and linters need beside it.
.venv/.dev: .venv/.installed
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: run test types tests test-long test-stack up down lint bench audit clean
