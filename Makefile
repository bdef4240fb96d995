# Everything a contributor runs. Benchmarks need a CUDA device; the rest does not.
PYTHON ?= python
OUT ?= benchmarks/results

.PHONY: help test test-interpreter test-gpu lint format bench bench-linear bench-moe bench-model \
	bench-ceilings bench-report

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

test:  ## every test that this machine can run
	$(PYTHON) -m pytest
	$(MAKE) test-interpreter

test-interpreter:  ## kernels in Triton's interpreter, without a GPU
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/kernels/interpreter

test-gpu:  ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu

lint:  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:  ## ruff, in place
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: bench-linear bench-moe bench-model bench-report  ## all of the benchmarks

bench-ceilings:  ## what the card reads and multiplies at most
	$(PYTHON) -m benchmarks.ceilings

bench-linear:  ## F.linear over the shapes of real models, ours and the peers'
	$(PYTHON) -m benchmarks.bench_linear --seconds 3600 --out $(OUT)/linear.csv
	$(PYTHON) -m benchmarks.bench_linear --seconds 3600 --out $(OUT)/linear.csv \
		--impl w4tensor,humming --act int8g32,int8g128,int8token

bench-moe:  ## experts blocks
	$(PYTHON) -m benchmarks.bench_moe --seconds 3600 --out $(OUT)/moe.csv \
		--act bf16,int8g32,int8g128,int8token
	$(PYTHON) -m benchmarks.bench_moe --seconds 3600 --out $(OUT)/moe.csv --zipf 1.2 \
		--impl bf16,ours

bench-model:  ## whole transformers models
	$(PYTHON) -m benchmarks.bench_model --model llama-3-8b --profile --seconds 3600 \
		--out $(OUT)/model.csv
	$(PYTHON) -m benchmarks.bench_model --model qwen3-30b-a3b --batch 1,8,32 --profile \
		--seconds 3600 --limit 900 --out $(OUT)/model.csv

bench-report:  ## the pictures, and the bars with the figure reached beside each
	$(PYTHON) -m benchmarks.report --results $(OUT)
