# make demo: the whole thing on this machine's CPU.  make test: everything that is checked.  Both set up .venv first.
# A python3.11 that runs, which one that is only found need not.
PYTHON ?= $(or $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null),python3)
VENV := .venv/bin

# One plain command a line: make runs those without a shell between, so a signal to make reaches them.
.PHONY: demo test matrix environment
demo:
	@$(PYTHON) -m tools.environment
	@$(VENV)/python -m tools.demo

test:
	@$(PYTHON) -m tools.environment --dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

# Every published vLLM release; fetches what is not in .cache/vllm-sources, writes docs/versions.md.
matrix:
	@$(PYTHON) -m tools.environment --dev
	$(VENV)/python -m tools.matrix

environment:
	@$(PYTHON) -m tools.environment --dev
