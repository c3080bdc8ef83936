# Two commands need nothing but Python and make: `make quickstart` and `make test`. Each makes .venv from PYTHON first.
PYTHON ?= python3
VENV := .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := $(VENV)/installed-$(VERSION)
PEERS := $(VENV)/peers-$(VERSION)
AOT := $(VENV)/aot-$(VERSION)
LAUNCHERS := $(VENV)/launchers
DECONSTRUCT := $(VENV)/bin/deconstruct

.PHONY: quickstart test proof slurm lint table peers notebooks clean

quickstart: $(INSTALLED)
	$(DECONSTRUCT) prepare --output=prepared/quickstart --vocab-size=1024 --row-length=256 --max-characters=4000000
	$(DECONSTRUCT) train --config=configs/quickstart.py --workdir=runs/quickstart
	$(DECONSTRUCT) evaluate --workdir=runs/quickstart --contexts=32,256
	$(DECONSTRUCT) report runs/quickstart

test: $(INSTALLED) lint
	$(VENV)/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder tests

# What is long and real: processes that are killed, clusters of processes, and other projects' programs beside ours.
proof: $(INSTALLED) $(PEERS) $(AOT)/installed $(LAUNCHERS)/installed-$(VERSION) slurm
	DECONSTRUCT_PROOF=1 DECONSTRUCT_AOT=$(abspath $(AOT))/bin/python $(VENV)/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder tests -m proof --durations=20

# Perplexity of every variant at a small size, on the .txt files in TEXT. About an hour on two cores.
TEXT ?= novels
VARIANTS := mlp non_approximate approximate static_emb_qk rnd_emb_qk fixed_seq_qk
RUNS := standard-uniform $(VARIANTS:=-uniform) $(VARIANTS:=-even)

table: $(INSTALLED)
	$(DECONSTRUCT) prepare --input=$(TEXT) --output=prepared/novels --vocab-size=512 --row-length=1024
	set -e; for run in $(RUNS); do \
	  $(DECONSTRUCT) train --config=configs/small.py:variant=$${run%-*},layout=$${run#*-} --workdir=runs/table/$$run; \
	  $(DECONSTRUCT) evaluate --workdir=runs/table/$$run --contexts=16,64,256; \
	done
	$(DECONSTRUCT) table runs/table

# Runs the notebooks and keeps their pictures. Some minutes each on two cores.
notebooks: $(INSTALLED)
	JAX_PLATFORMS=cpu $(VENV)/bin/python notebooks/render.py

# Speed beside Hugging Face transformers, in one run each.
peers: $(INSTALLED) $(PEERS)
	$(DECONSTRUCT) bench --peers
	$(DECONSTRUCT) bench generate --peers

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck launch/*.sh tests/launch/*.sh

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(PEERS): $(INSTALLED)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[peers,eval,dask,gcs,s3,emulators]'
	touch $@

# Compilers for devices that are not here, over the packages of .venv: with them, JAX looks for those devices first.
$(AOT)/installed: $(INSTALLED)
	$(PYTHON) -m venv --clear $(AOT)
	$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$($(AOT)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	$(AOT)/bin/pip install --quiet --disable-pip-version-check --editable '.[aot-tpu,aot-cuda]'
	touch $@

# What reads the launchers' files, apart from the rest: SkyPilot pins many packages.
$(LAUNCHERS)/installed-$(VERSION): $(INSTALLED)
	$(PYTHON) -m venv --clear $(LAUNCHERS)
	$(LAUNCHERS)/bin/pip install --quiet --disable-pip-version-check 'skypilot==0.14.*' 'kubeflow-trainer-api==2.3.*' pyyaml
	touch $@

slurm:
	tests/launch/slurm_here.sh install || echo 'make: tests of SLURM are skipped'

clean:
	rm -rf $(VENV) prepared/quickstart runs/quickstart
