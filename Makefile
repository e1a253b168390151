# One command on a fresh machine with Python 3.11 or newer:
#   make             installs, writes the embedded task, runs every stage that exists, reports
#   make test        installs, runs all tests
#   make test-peers  installs transformers and TRL beside torch, runs the tests that compare
#   make bench       measures against peers
#   make reward-scaling, make reward-margins   experiments with reward models, three seeds each
# QUICK=1 makes the experiments with one seed.
# LAUNCH="torchrun --nproc_per_node=8" runs the stages on several GPUs.

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
LAUNCH ?=
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))
PEER_PACKAGES := transformers==5.23.0 trl==1.12.0

SEEDS := $(if $(QUICK),0,0 1 2)
comma := ,
space := $() $()
list = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: all report test test-peers bench lint clean reward-scaling reward-margins
.DELETE_ON_ERROR:

report: runs/sft/report.json runs/reward/report.json
	@echo "gold reward of runs/sft, mean and 95% interval (5 at best; more in $<):"
	@$(PYTHON) -c "import json; report = json.load(open('$<')); [print(f'  {how:8} {task:8}', \
	  '{:6.2f}  [{:.2f}, {:.2f}]'.format(*parts['gold'])) \
	  for how in ('greedy', 'sampled') for task, parts in report[how].items()]"
	@echo "agreement of runs/reward with gold, held out, and 95% interval (chance: 0.5):"
	@$(PYTHON) -c "import json; gold = json.load(open('runs/reward/report.json'))['gold']; \
	  [print(f'  {task:8}', '{:6.3f}  [{:.3f}, {:.3f}]'.format(*row['model'])) \
	  for task, row in gold.items()]"
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
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER_PACKAGES)
	touch $@

# --- the embedded task ---

data/toy/bpe.tiktoken: data/toy.py | $(VENV)/installed
	$(PYTHON) data/toy.py

# An interrupted stage goes on from where it was: see `again`.
SFT = $(RUN) sft.py --prompt_loss_weight 0.3 --gold data/toy.py
ANNOTATE = $(RUN) annotate.py --gold data/toy.py
REWARD = $(RUN) reward.py --gold data/toy.py

runs/sft/report.json: data/toy/bpe.tiktoken sft.py model.py
	$(SFT) --out_dir runs/sft $(call again,runs/sft,sft)

runs/feedback/report.json: runs/sft/report.json annotate.py
	$(ANNOTATE) --out_dir runs/feedback $(call again,runs/feedback,annotate)

runs/feedback_validation/report.json: runs/sft/report.json annotate.py
	$(ANNOTATE) --prompts data/toy/prompts_validation.jsonl --out_dir runs/feedback_validation \
	  $(call again,runs/feedback_validation,annotate)

runs/reward/report.json: runs/feedback/report.json runs/feedback_validation/report.json reward.py
	$(REWARD) --out_dir runs/reward $(call again,runs/reward,reward)

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
