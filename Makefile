# Two commands on a fresh machine: `make debug` sees HIVE learn, `make test` proves that it works.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

CLUSTER = /tmp/hive-slurm

.PHONY: install debug demo figures slurm-demo test lint faults clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

# three stages on the shipped pictures, on CPU or one GPU
debug: install
	$(RUN) launchers/pretrain.py --preset debug

# the same with a real pretrained LLM: half an hour
demo: install data/smollm2 data/emoji
	$(RUN) launchers/pretrain.py --preset demo

# debug as three jobs on a real Slurm of two virtual nodes, set up for the purpose: root on Debian. What it starts
# bears a mark, by which the guardian finds and ends it should make itself be stopped
slurm-demo: export SLURM_CONF = $(CLUSTER)/etc/slurm.conf
slurm-demo: export HIVE_SCALE_STARTED_BY := slurm-demo-$(shell echo $$PPID)
slurm-demo: install
	setsid $(RUN) -I -S tests/guardian.py $$PPID </dev/null >/dev/null 2>&1 &
	tests/cluster/cluster.sh start $(CLUSTER)
	-$(RUN) slurm/submit_pipeline.py --preset debug output=runs/slurm slurm.nodes=2 slurm.cpus_per_task=1 slurm.mem=2G
	-$(RUN) slurm/submit_pipeline.py status runs/slurm --follow
	tests/cluster/cluster.sh stop $(CLUSTER)

data/smollm2: | install
	$(RUN) launchers/prepare_data.py smollm2 --output $@

data/emoji: | install
	$(RUN) launchers/prepare_data.py emoji --styles all --output $@

# the README's, from the debug run
figures: debug
	$(RUN) launchers/visualize.py gradients runs/debug --count 2 --output .github/figures/gradients.svg
	$(RUN) launchers/visualize.py attention runs/debug --output .github/figures/attention.svg
	$(RUN) launchers/visualize.py report runs/debug --plots .github/figures

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# files side by side: much of the time is spent waiting, for processes to start and for Slurm, of which there is one
test: lint
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# a hundred runs, each with a fault at a random instant: about an hour on two free cores
faults: install
	$(RUN) tests/faults/sweep.py --trials 100 --markdown

clean:
	rm -rf $(VENV) runs build *.egg-info
