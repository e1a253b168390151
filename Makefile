# One command on a fresh machine with Python 3.11 or newer:
#   make             installs, writes the embedded task, runs every stage that exists, reports
#   make test        installs, runs all tests
#   make test-peers  installs transformers beside torch, runs the tests that compare with it
#   make bench       measures against peers
# LAUNCH="torchrun --nproc_per_node=8" runs the stages on several GPUs.

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
LAUNCH ?=
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))
TRANSFORMERS := transformers==5.23.0

.PHONY: all report test test-peers bench lint clean
.DELETE_ON_ERROR:

report: runs/sft/report.json
	@echo "gold reward of runs/sft, mean and 95% interval (5 at best; more in $<):"
	@$(PYTHON) -c "import json; report = json.load(open('$<')); [print(f'  {how:8} {task:8}', \
	  '{:6.2f}  [{:.2f}, {:.2f}]'.format(*parts['gold'])) \
	  for how in ('greedy', 'sampled') for task, parts in report[how].items()]"
	@echo "read samples: $(PYTHON) model.py runs/sft --prompt 'How do I fix a bike?'"

all: report

$(VENV)/installed: requirements.txt
	@$(PYTHON3) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON3=python3.12')"
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(PEERS)/installed: requirements.txt Makefile
	$(PYTHON3) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(TRANSFORMERS)
	touch $@

# --- the embedded task ---

data/toy/bpe.tiktoken: data/toy.py | $(VENV)/installed
	$(PYTHON) data/toy.py

# An interrupted stage goes on from its last checkpoint.
runs/sft/report.json: data/toy/bpe.tiktoken sft.py model.py
	$(RUN) sft.py --prompt_loss_weight 0.3 --gold data/toy.py --out_dir runs/sft $(call again,runs/sft)

# A run of the present source and data is resumed; an older one is begun anew.
again = $(shell cmp -s $(1)/script.py $(notdir $(1)).py && test ! -e $(1)/report.json \
  && test $(1)/script.py -nt model.py && test $(1)/script.py -nt data/toy/bpe.tiktoken \
  && echo --resume || echo --overwrite)

# --- tests ---

test: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest

test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest -m peers tests/test_peers.py

bench: $(PEERS)/installed
	$(PEERS)/bin/python tests/bench.py

clean:
	rm -rf runs data/toy
