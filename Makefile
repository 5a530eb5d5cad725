# make run    from a fresh machine to an answered prompt and a server on 127.0.0.1:8080
# make test   set up and pass the fast tests (`make test-slow`: the long ones)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run demo demo-agents setup test test-slow lint docs train bench clean

run: setup
	@$(BIN)/python tools/run_demo.py

demo: setup
	@$(BIN)/python tools/run_demo.py --once --port 18080

# Ten agent workflows with the four demo models.
demo-agents: setup
	@$(BIN)/flexserve demo agents

setup: $(STAMP)

# llama.cpp first and with progress; then everything else, and our own C part with it.
$(STAMP): pyproject.toml setup.py tools/build_llama.py src/flexserve/flexmem/ggml_arena.c
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); hint: apt-get install python3 python3-venv"; exit 1; }
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV) || \
	  { echo "hint: apt-get install python3-venv"; exit 1; }; $(BIN)/pip install -q --upgrade pip; }
	@$(BIN)/python tools/build_llama.py
	@echo "installing FlexServe and its libraries"
	@$(BIN)/pip install -q --find-links .cache/wheels -e '.[dev]'
	@touch $@

test: setup lint
	@$(BIN)/pytest -m "not slow"

# Without QEMU, the cross compiler or Debian's arm64 kernel the firmware's tests say that they are skipped, and why.
test-slow: setup
	-@$(MAKE) --no-print-directory tz-tools && $(MAKE) --no-print-directory tz-linux
	@$(BIN)/pytest -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/flexserve bench cold-start

# A demo model, from its generated text to its evaluation: `make train TASK=router`. The assistant takes half an hour.
TASK ?= assistant
train: setup
	@$(BIN)/pip install -q --find-links .cache/wheels -e '.[train]'
	@$(BIN)/python -m training.train $(TASK)

clean:
	rm -rf $(VENV) run build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The trustzone world's firmware, and the attacks on it. As root on Debian this installs what is missing.
.PHONY: firmware tz tz-tools tz-linux
tz-tools:
	@if command -v qemu-system-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null && test -e "$$(aarch64-linux-gnu-gcc -print-file-name=libc.a)"; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross; \
	else echo "error: qemu-system-aarch64 or aarch64-linux-gnu-gcc is missing; hint: apt-get install qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross"; exit 1; fi

firmware: tz-tools
	@$(MAKE) --no-print-directory -C firmware OUT=$(CURDIR)/build/firmware/release

# Debian's arm64 kernel and busybox, into .cache/debian-arm64.
tz-linux: setup firmware
	@$(BIN)/flexserve tz boot --fetch

tz: tz-linux
	@$(BIN)/flexserve tz attack
