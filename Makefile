# One command on a fresh machine with Python 3.11 or newer:
#   make                 installs, writes the embedded task, runs every stage, reports
#   make check           what that report must show
#   make all             AI feedback and reward collapse too, by experiments/
#   make figures         every experiment, over three seeds: hours. figure-frontier is one of them;
#                        QUICK=1: one seed, a tenth of all work
#   make test            installs, runs all tests
#   make test-mutations  plants bugs in the sources, each of which the tests must catch
#   make test-faults     plants every fault in every script, many times (QUICK=1: few)
#   make test-peers      installs transformers and TRL beside torch, runs the tests that compare
#   make bench           measures against peers (BENCH=--full: GPT-2's shape too)
# A model and data of your own, into runs/own/mine, and flags for each stage, or for all (SAMPLING):
#   make DATA=mine INIT=gpt2/ LAUNCH="torchrun --nproc_per_node=8" SAMPLING="--max_new_tokens 128" \
#       SFT_FLAGS="--lr 1e-5" REWARD_FLAGS= PPO_FLAGS= DPO_FLAGS=

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))

DATA ?= data/toy
override DATA := $(patsubst %/,%,$(DATA))
RUNS ?= $(if $(filter data/toy,$(DATA)),runs,runs/own/$(notdir $(DATA)))
EXPERIMENTS := $(filter-out common,$(basename $(notdir $(wildcard experiments/*.py))))

.PHONY: report check all figures test test-half test-rest test-mutations test-faults test-peers \
  bench lint clean
.DELETE_ON_ERROR:

report: $(RUNS)/evaluation/report.json
	@rm $(<D)/printed 2>/dev/null || $(PYTHON) evaluate.py table --report $<
	@echo "the whole report, with responses side by side: $(RUNS)/report.md"
	@echo "read more samples: $(PYTHON) model.py $(RUNS)/sft --prompt 'How do I fix a bike?'"

# --- installation ---

$(VENV)/installed: requirements.txt
	@$(PYTHON3) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON3=python3.12')"
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(PEERS)/installed: requirements.txt
	$(PYTHON3) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  transformers==5.23.0 trl==1.12.0
	touch $@

# --- the pipeline ---

data/toy/bpe.tiktoken: data/toy.py | $(VENV)/installed
	$(PYTHON) data/toy.py

# The embedded task has gold, and simulated people. Your own data is a folder with files of the names
# that data/toy has, and its feedback what that holds: rankings (or comparisons) under these names.
ifeq ($(DATA),data/toy)
  GOLD := --gold data/toy.py
  SFT_FLAGS ?= --prompt_loss_weight 0.3
  READY := data/toy/bpe.tiktoken
  FEEDBACK := $(RUNS)/feedback/rankings.jsonl
  HELD_OUT := $(RUNS)/feedback_validation/rankings.jsonl
else
  READY := $(wildcard $(DATA)/*.jsonl $(DATA)/*.jsonl.gz)
  FEEDBACK := $(DATA)/rankings.jsonl
  HELD_OUT := $(DATA)/rankings_validation.jsonl
endif

# $(call go,SCRIPT FLAGS): a run in the target's folder. One that was interrupted goes on, if it is of
# the present code, and of these settings and data (else status 2: refused); any other begins anew.
SHARED := model.py run.py feedback.py
present = "$$(cat $(1) $(SHARED) | cksum)" = "$$(cd $(@D) && cat script.py $(SHARED) | cksum)"
go = @$(info $(RUN) $(1) --out_dir $(@D)) run() { $(RUN) $(1) --out_dir $(@D) $$1; }; \
  if { test ! -e $(@D)/report.json && test $(call present,$(firstword $(1))); } 2>/dev/null; \
  then run --resume || { test $$? = 2 && run --overwrite; }; else run --overwrite; fi

$(RUNS)/sft/report.json: $(READY) sft.py $(SHARED) | $(VENV)/installed
	$(call go,sft.py $(GOLD) $(SFT_FLAGS) $(SAMPLING) --data $(DATA)/demonstrations.jsonl \
	  --validation $(DATA)/demonstrations_validation.jsonl --prompts $(DATA)/prompts_validation.jsonl \
	  --init "$(INIT)")

$(RUNS)/feedback/rankings.jsonl: $(RUNS)/sft/report.json annotate.py
	$(call go,annotate.py $(GOLD) $(SAMPLING) --policy $(RUNS)/sft --prompts $(DATA)/prompts_train.jsonl)

$(RUNS)/feedback_validation/rankings.jsonl: $(RUNS)/sft/report.json annotate.py
	$(call go,annotate.py $(GOLD) $(SAMPLING) --policy $(RUNS)/sft --prompts $(DATA)/prompts_validation.jsonl)

$(RUNS)/reward/report.json: $(FEEDBACK) $(HELD_OUT) $(RUNS)/sft/report.json reward.py
	$(call go,reward.py $(GOLD) $(REWARD_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_train.jsonl \
	  --init $(RUNS)/sft --data $(FEEDBACK) --validation $(HELD_OUT))

$(RUNS)/ppo/report.json: $(RUNS)/reward/report.json ppo.py
	$(call go,ppo.py $(GOLD) $(PPO_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_train.jsonl \
	  --validation $(DATA)/prompts_validation.jsonl --init $(RUNS)/sft --reward $(RUNS)/reward)

$(RUNS)/dpo/report.json: $(FEEDBACK) $(HELD_OUT) $(RUNS)/sft/report.json dpo.py
	$(call go,dpo.py $(GOLD) $(DPO_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_validation.jsonl \
	  --init $(RUNS)/sft --data $(FEEDBACK) --validation $(HELD_OUT) --cache $(RUNS)/cache)

# Every policy on the test prompts, and best-of-n.
GREEDY := @temperature=0
BEST := $(RUNS)/sft@best_of=4:$(RUNS)/reward
POLICIES := $(RUNS)/sft,$(RUNS)/sft$(GREEDY),$(BEST),$(RUNS)/ppo,$(RUNS)/ppo$(GREEDY),$(RUNS)/dpo,$(RUNS)/dpo$(GREEDY)
$(RUNS)/evaluation/report.json: $(RUNS)/ppo/report.json $(RUNS)/dpo/report.json evaluate.py
	$(call go,evaluate.py $(GOLD) $(SAMPLING) --prompts $(DATA)/prompts_test.jsonl --policies $(POLICIES) \
	  --judges $(RUNS)/reward --best_of_n 16 --proxy $(RUNS)/reward --report $(RUNS)/report.md)
	@touch $(@D)/printed

# Differences of scores, paired by prompt, whose intervals must be above 0.
BETTER := $(BEST) > $(RUNS)/sft,$(RUNS)/ppo > $(RUNS)/sft,$(RUNS)/ppo$(GREEDY) > $(RUNS)/sft$(GREEDY)
BETTER := $(BETTER),$(RUNS)/dpo > $(RUNS)/sft,$(RUNS)/dpo$(GREEDY) > $(RUNS)/sft$(GREEDY)
check: report
	$(PYTHON) evaluate.py check --report $(RUNS)/evaluation/report.json \
	  --judge $(if $(GOLD),gold,$(RUNS)/reward) --better "$(BETTER)"

# --- experiments ---

all: report
	$(PYTHON) experiments/rlaif.py --seeds 0
	$(PYTHON) experiments/collapse.py --seeds 0

figures: $(EXPERIMENTS:%=figure-%)

figure-%: | $(VENV)/installed
	$(PYTHON) experiments/$*.py $(if $(QUICK),--quick)

# --- tests ---

test: lint
	@echo "the tests, in two halves side by side: some four minutes on two cores, then what they say"
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-half test-rest

# About as long as the others together.
HALF := $(patsubst %,tests/test_%.py,annotate collapse data evaluate faults sft)
test-half:; @$(PYTHON) -m pytest $(wildcard $(HALF))
test-rest:; @$(PYTHON) -m pytest $(addprefix --ignore=,$(HALF))

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test-mutations: $(VENV)/installed
	$(PYTHON) tests/mutations.py

test-faults: $(VENV)/installed
	QUICK=$(QUICK) $(PYTHON) -m pytest -m faults tests

test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest -m peers tests/test_peers.py

bench: $(PEERS)/installed
	$(PEERS)/bin/python tests/bench.py $(BENCH)

clean:
	rm -rf runs data/toy
