# One command on a fresh machine with Python 3.11 or newer:
#   make             installs, writes the embedded task, runs every stage that exists, reports
#   make test        installs, runs all tests
#   make test-peers  installs transformers and TRL beside torch, runs the tests that compare
#   make bench       measures against peers
#   make reward-scaling, make reward-margins   experiments with reward models, three seeds each
# QUICK=1 makes the experiments with one seed.
# LAUNCH="torchrun --nproc_per_node=8" runs the stages on several GPUs; INIT=gpt2/ DATA=mine/ on a
# model and data of your own, into runs/mine (see below, and SFT_FLAGS, REWARD_FLAGS, SAMPLING).

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
LAUNCH ?=
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))
PEER_PACKAGES := transformers==5.23.0 trl==1.12.0

DATA ?= data/toy
INIT ?=
RUNS ?= $(if $(filter data/toy,$(DATA)),runs,runs/$(notdir $(patsubst %/,%,$(DATA))))

SEEDS := $(if $(QUICK),0,0 1 2)
comma := ,
space := $() $()
list = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: all report check test test-peers bench lint clean reward-scaling reward-margins
.DELETE_ON_ERROR:

report: $(RUNS)/evaluation/report.json
	@rm $(<D)/.printed 2>/dev/null || $(PYTHON) evaluate.py table --report $<
	@echo "the whole report, with responses side by side: $(RUNS)/report.md"
	@echo "read more samples: $(PYTHON) model.py $(RUNS)/sft --prompt 'How do I fix a bike?'"

# What the report must show: differences of scores, paired by prompt, with their interval above 0.
check: $(RUNS)/evaluation/report.json
	$(PYTHON) evaluate.py check --report $< --judge $(if $(GOLD),gold,$(RUNS)/reward) --better \
	  "$(RUNS)/sft@best_of=4:$(RUNS)/reward > $(RUNS)/sft"

all: report

$(VENV)/installed: requirements.txt
	@$(PYTHON3) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON3=python3.12')"
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(PEERS)/installed: requirements.txt Makefile
	$(PYTHON3) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER_PACKAGES)
	touch $@

# --- the pipeline ---

data/toy/bpe.tiktoken: data/toy.py | $(VENV)/installed
	$(PYTHON) data/toy.py

# Your own data: a folder with files of the names that data/toy has, rankings or comparisons as
# rankings.jsonl; INIT is where SFT starts. Without gold the feedback is what the folder has.
ifeq ($(DATA),data/toy)
  GOLD := --gold data/toy.py
  SFT_FLAGS ?= --prompt_loss_weight 0.3
  READY := data/toy/bpe.tiktoken
  FEEDBACK := $(RUNS)/feedback/rankings.jsonl
  HELD_OUT := $(RUNS)/feedback_validation/rankings.jsonl
else
  GOLD :=
  READY := $(VENV)/installed
  FEEDBACK := $(DATA)/rankings.jsonl
  HELD_OUT := $(DATA)/rankings_validation.jsonl
endif

# An interrupted stage goes on from where it was: see `again`.
SFT = $(RUN) sft.py $(GOLD) $(SFT_FLAGS) $(SAMPLING) --data $(DATA)/demonstrations.jsonl \
  --validation $(DATA)/demonstrations_validation.jsonl --prompts $(DATA)/prompts_validation.jsonl
ANNOTATE = $(RUN) annotate.py $(GOLD) $(SAMPLING)
REWARD = $(RUN) reward.py $(GOLD) $(REWARD_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_train.jsonl

$(RUNS)/sft/report.json: $(READY) sft.py model.py
	$(SFT) --init "$(INIT)" --out_dir $(@D) $(call again,$(@D),sft)

# $(1) where, $(2) the prompts' split
define judged
$(RUNS)/$(1)/rankings.jsonl: $(RUNS)/sft/report.json annotate.py
	$(ANNOTATE) --policy $(RUNS)/sft --prompts $(DATA)/prompts_$(2).jsonl --out_dir $$(@D) \
	  $$(call again,$$(@D),annotate)
endef
$(eval $(call judged,feedback,train))
$(eval $(call judged,feedback_validation,validation))

$(RUNS)/reward/report.json: $(FEEDBACK) $(HELD_OUT) $(RUNS)/sft/report.json reward.py
	$(REWARD) --init $(RUNS)/sft --data $(FEEDBACK) --validation $(HELD_OUT) --out_dir $(@D) \
	  $(call again,$(@D),reward)

# Every policy on the test prompts, and best-of-n. A stage that lands adds its policy here.
POLICIES := $(RUNS)/sft $(RUNS)/sft@temperature=0 $(RUNS)/sft@best_of=4:$(RUNS)/reward

$(RUNS)/evaluation/report.json: $(RUNS)/reward/report.json evaluate.py
	$(RUN) evaluate.py --policies $(call list,$(POLICIES)) $(GOLD) --judges $(RUNS)/reward \
	  --prompts $(DATA)/prompts_test.jsonl --best_of_n 16 --proxy $(RUNS)/reward $(SAMPLING) \
	  --out_dir $(@D) --report $(RUNS)/report.md --overwrite
	touch $(@D)/.printed

# A run of the present source and data is resumed; an older one is begun anew.
again = $(shell cmp -s $(1)/script.py $(2).py && test ! -e $(1)/report.json \
  && test $(1)/script.py -nt model.py && test $(1)/script.py -nt data/toy/bpe.tiktoken \
  && echo --resume || echo --overwrite)

# --- experiments with reward models: everything again in each seed ---

SIZES := small medium large
LINES := 1500 4000 12000
SIZE_small := --n_layer 2 --n_embd 64
SIZE_medium := --n_layer 3 --n_embd 128
SIZE_large := --n_layer 4 --n_embd 192
E := runs/experiments

# $(1) size, $(2) seed: the trunk, which is the policy too when medium.
define trunk
$(E)/sft-$(1)-$(2)/report.json: data/toy/bpe.tiktoken sft.py model.py
	$(SFT) $(SIZE_$(1)) --seed $(2) --num_prompts 200 --eval_every 0 --out_dir $$(@D) $$(call again,$$(@D),sft)
endef

# $(1) seed: feedback on the medium policy, for all sizes; what is held out are the test prompts.
define feedback
$(E)/feedback-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$(ANNOTATE) --policy $(E)/sft-medium-$(1) --seed $(1) \
	  --out_dir $$(@D) $$(call again,$$(@D),annotate)
$(E)/feedback-test-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$(ANNOTATE) --policy $(E)/sft-medium-$(1) --prompts data/toy/prompts_test.jsonl --seed $(1) \
	  --out_dir $$(@D) $$(call again,$$(@D),annotate)
endef

# $(1) seed, $(2) how many lines of its feedback
define part
$(E)/rankings-$(1)-$(2).jsonl: $(E)/feedback-$(1)/report.json
	head -n $(2) $$(<D)/rankings.jsonl > $$@
endef

# $(1) size, $(2) seed, $(3) lines of feedback, $(4) margin, $(5) the run's name
define reward_run
$(E)/$(5)/report.json: $(E)/sft-$(1)-$(2)/report.json $(E)/rankings-$(2)-$(3).jsonl \
  $(E)/feedback-test-$(2)/report.json reward.py
	$(REWARD) --init $(E)/sft-$(1)-$(2) --normalise_with $(E)/sft-medium-$(2) --margin $(4) \
	  --data $(E)/rankings-$(2)-$(3).jsonl --validation $(E)/feedback-test-$(2)/rankings.jsonl \
	  --seed $(2) --eval_every 0 --out_dir $$(@D) $$(call again,$$(@D),reward)
endef

scaled = $(foreach s,$(SIZES),$(foreach n,$(LINES),$(SEEDS:%=reward-$(s)-$(n)-%)))
with_margins = $(SEEDS:%=reward-medium-12000-%) $(foreach m,small large,$(SEEDS:%=margin-$(m)-%))
$(foreach seed,$(SEEDS),$(eval $(call feedback,$(seed))) \
  $(foreach n,$(LINES),$(eval $(call part,$(seed),$(n)))) \
  $(foreach s,$(SIZES),$(eval $(call trunk,$(s),$(seed))) \
    $(foreach n,$(LINES),$(eval $(call reward_run,$(s),$(seed),$(n),none,reward-$(s)-$(n)-$(seed))))) \
  $(foreach m,small large,$(eval $(call reward_run,medium,$(seed),12000,$(m),margin-$(m)-$(seed)))))

# Figure 6 of Stiennon et al. (2020) in small, and table 28 of Llama 2.
reward-scaling: $(patsubst %,$(E)/%/report.json,$(scaled))
	$(PYTHON) evaluate.py scaling --runs $(call list,$(addprefix $(E)/,$(scaled))) \
	  --out runs/figures/reward_scaling

reward-margins: $(patsubst %,$(E)/%/report.json,$(with_margins))
	$(PYTHON) evaluate.py margins --runs $(call list,$(addprefix $(E)/,$(with_margins))) \
	  --out runs/figures/reward_margins

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
