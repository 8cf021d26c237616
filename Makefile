# Everything runs in .venv, which the first target that needs it creates. Works from any directory (make -C).
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
BIN := $(ROOT).venv/bin
READY := $(ROOT).venv/ready
PYTEST := cd $(ROOT) && $(BIN)/python -m pytest

.PHONY: demo install node s3 check test fault soak gpu proto chart image lint bench clean

demo: $(READY)
	cd $(ROOT) && $(BIN)/python -m service.cli.demo

install: $(READY)

# OpenAI's client for Node, which a test uses; without it that test is skipped. Needs npm.
node: $(READY)
	npm install --no-audit --no-fund --silent --prefix $(ROOT).venv/node openai@6.49.0

# An S3 server for tests, with packages of its own: they ask for an older dateutil. Without it those tests are skipped.
s3: $(READY)
	$(BIN)/python -m venv $(ROOT).venv/s3 && $(ROOT).venv/s3/bin/pip install -q 'moto[server]==5.2.5'

# The quick loop: lint, types, the tests that start no processes, and one same-answer case per mechanism.
check: $(READY) lint
	$(PYTEST) -q -m "(not processes or mechanism) and not fault and not soak and not gpu"

# Everything but the three targets that follow. First what shares no cluster, two files at a time, then the live clusters,
# one by one: their tests measure time.
test: $(READY) lint
	$(PYTEST) --ignore tests/live -n 2 --dist loadfile
	$(PYTEST) tests/live

fault: $(READY)
	$(PYTEST) tests/live -m fault -s

# The tests, then FAULTS faults at jobs of a live cluster, planned by SEED. With FAULTS= the faults alone; they go on where
# they were interrupted. ON=postgres keeps the jobs in PostgreSQL.
FAULTS ?= 100
SEED ?= 0
ON ?= sqlite
soak: $(READY)
	$(if $(filter file,$(origin FAULTS)),$(PYTEST) -m soak -s &&) cd $(ROOT) && $(BIN)/python -m tests.benchmarks.job_faults \
	  --faults $(FAULTS) --seed $(SEED) --store $(ON)

# On a GPU; FAKE=1 tries it on the CPU. PART=checks|pipelines|kernels|steps|serve; without, all. ONLY= is a part of the name of
# a model of steps or of a pipeline. After SECONDS= a part begins no row. RESULTS= is a folder for the tables.
# With PYTHON= and no .venv, that Python as it is: it needs torch, no network, and what else it lacks in WHEELS=folder.
GIVEN := $(and $(filter-out file,$(origin PYTHON)),$(if $(wildcard $(ROOT).venv),,yes))
gpu: $(if $(GIVEN),,$(READY))
	cd $(ROOT) && $(if $(GIVEN),$(PYTHON),$(BIN)/python) -m tests.benchmarks.gpu $(PART) $(if $(FAKE),--fake) $(if $(ONLY),--only '$(ONLY)') \
	  $(if $(SECONDS),--seconds '$(SECONDS)') \
	  $(if $(RESULTS),--results '$(abspath $(RESULTS))') $(if $(WHEELS),--wheels '$(abspath $(WHEELS))')

# The generated code of the gRPC contract, after a change of the .proto file.
proto: $(READY)
	cd $(ROOT) && $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	  service/proto/mediagen/v1/generation_service.proto

# What the chart repeats of the project: its schema, Serve's defaults, rules, dashboards, the table of its values.
chart: $(READY)
	cd $(ROOT) && $(BIN)/python -m helm.generate

# The image of every node. IMAGE=REGISTRY/spray:TAG PYTHON_IMAGE=python:3.11-slim@sha256:DIGEST; VARIANT=cpu without CUDA,
# TORCH_INDEX= for a mirror of PyTorch's index; DOCKER=podman.
DOCKER ?= docker
VARIANT ?= cuda
image:
	@case '$(PYTHON_IMAGE)' in *@sha256:*) ;; *) echo 'PYTHON_IMAGE= must name a Python 3.11 image by its digest: NAME@sha256:...'; exit 2;; esac
	@case '$(IMAGE)' in *:latest|'') echo 'IMAGE= must be REGISTRY/NAME:TAG, and TAG not latest'; exit 2;; esac
	cd $(ROOT) && $(DOCKER) build --file deploy/docker/Dockerfile --build-arg PYTHON_IMAGE='$(PYTHON_IMAGE)' \
	  --build-arg VARIANT='$(VARIANT)' $(if $(TORCH_INDEX),--build-arg TORCH_INDEX='$(TORCH_INDEX)') --tag '$(IMAGE)' .

lint: $(READY)
	cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: $(READY)
	cd $(ROOT) && $(BIN)/python -m tests.benchmarks.overhead && $(BIN)/python -m tests.benchmarks.sp_vs_diffusers \
	  && $(BIN)/python -m tests.benchmarks.load_memory && $(BIN)/python -m tests.benchmarks.encoder_memory \
	  && $(BIN)/python -m tests.benchmarks.activation_memory && $(BIN)/python -m tests.benchmarks.layouts \
	  && $(BIN)/python -m tests.benchmarks.fleet_sim && $(BIN)/python -m tests.benchmarks.gateway_overhead \
	  && $(BIN)/python -m tests.benchmarks.autoscale && $(BIN)/python -m tests.benchmarks.replacements \
	  && $(BIN)/python -m tests.benchmarks.batched_guidance && $(BIN)/python -m tests.benchmarks.gateways \
	  && $(BIN)/python -m tests.benchmarks.api \
	  && $(BIN)/python -m tests.benchmarks.jobs \
	  && $(BIN)/python -m tests.benchmarks.fake_cuda && $(BIN)/python -m tests.benchmarks.previews

$(READY): $(ROOT)pyproject.toml $(ROOT)constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(ROOT).venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(ROOT)constraints.txt -e '$(ROOT)[dev]'
	touch $@

clean:
	rm -rf $(ROOT).venv $(ROOT).demo
