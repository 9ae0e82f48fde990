# Two commands on a fresh machine: `make debug` sees HIVE learn, `make test` proves that it works.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

UV = .venv-uv/bin/uv
CLUSTER = /tmp/hive-slurm

SUPPLY = .venv-supply/bin

.PHONY: install lock debug demo docs figures slurm-demo test test-newest test-oldest lint fuzz faults mutants sbom licences wheel clean

# exactly the versions of the lock, which were tested together
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is no Python 3.11 to 3.13: make PYTHON=... $(MAKECMDGOALS)"; exit 2; }
	@echo "installing into $(VENV): 7 GB, some minutes"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# after a change of pyproject.toml; UPGRADE=--upgrade takes the newest of everything
lock: $(UV)
	$(UV) pip compile pyproject.toml --extra dev --extra demo --universal --python-version 3.11 --no-emit-index-url \
		--custom-compile-command 'make lock' --quiet $(UPGRADE) --output-file requirements.lock

# the contract with every dependency, at both ends of what pyproject.toml admits
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	.venv-newest/bin/python -m pytest -m contract 

test-oldest: $(UV)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(UV) pip compile pyproject.toml --extra dev --resolution lowest-direct --python .venv-oldest --no-emit-index-url \
		--quiet --output-file .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --requirement .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	.venv-oldest/bin/python -m pytest -m contract

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --disable-pip-version-check uv

# three stages on the shipped images, on CPU or one GPU
debug: install
	$(RUN) launchers/pretrain.py --preset debug
	@echo "for the other commands: source $(VENV)/bin/activate"

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

# the pages of docs/ as a site: site/index.html. A broken link or a missing name ends it
docs: install
	$(VENV)/bin/mkdocs build --strict

# the documentation's, from the debug run
figures: debug
	$(RUN) launchers/visualize.py gradients runs/debug --count 2 --output docs/figures/gradients.svg
	$(RUN) launchers/visualize.py attention runs/debug --output docs/figures/attention.svg
	$(RUN) launchers/visualize.py report runs/debug --plots docs/figures

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --configfile pyproject.toml --recursive hive_scale launchers slurm

# files side by side, two more than there are cores: almost half of the time is spent waiting, for other processes and
# for Slurm, of which there is one
test: lint
	$(RUN) -m pytest --numprocesses $$(($$(nproc) + 2)) --maxprocesses 6 --dist loadfile --no-loadscope-reorder

# bytes of any kind for every reader of files, each for so many seconds (docs/fuzz.md); `make test` takes 5
FUZZ_SECONDS ?= 600
fuzz: install
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(RUN) -m pytest -rP tests/test_fuzz.py

# two hundred runs, each with a fault at a random instant: two hours on two free cores. Stopped and started again it goes on
faults: install
	$(RUN) tests/faults/sweep.py --trials 200 --markdown --results faults.jsonl

# one-line errors in the product's formulas, a sample of them: do the tests notice? Twenty minutes on two free cores
mutants: install
	$(RUN) tests/mutants.py

# what is installed, for who must know it (CycloneDX)
sbom: install $(SUPPLY)
	$(SUPPLY)/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible --output-file sbom.json

# and under which licences; after each change of the lock
licences: install $(SUPPLY)
	{ echo '# Licences of what `make install` installs'; echo; \
	echo 'As the packages state them, made by `make licences`. `cuda-toolkit` states none: it names packages of NVIDIA.'; \
	echo; $(SUPPLY)/pip-licenses --python $(VENV)/bin/python --from mixed --format markdown --no-version \
		--with-system --ignore-packages hive_scale; } > docs/licences.md

$(SUPPLY):
	$(PYTHON) -m venv .venv-supply
	$@/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-licenses==5.5.5

# of the last commit, the same bytes whoever builds it and when
DIST = dist
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheel: install
	rm -rf $(DIST)/source && mkdir -p $(DIST)/source
	umask 022 && git archive HEAD | tar -x --no-same-permissions -C $(DIST)/source && $(VENV)/bin/python -m pip wheel \
		--quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir $(DIST) $(DIST)/source
	rm -rf $(DIST)/source

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-uv .venv-supply runs build dist sbom.json *.egg-info
