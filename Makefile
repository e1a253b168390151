# One command on a fresh machine with Python 3.11 or newer:
#   make                 installs, writes the embedded task, runs every stage that exists, reports
#   make test            installs, runs all tests
#   make test-mutations  plants bugs in the sources, each of which the tests must catch
#   make test-faults     plants every fault in every script, many times (QUICK=1: few)
#   make test-peers      installs transformers and TRL beside torch, runs the tests that compare
#   make bench           measures against peers (BENCH=--full: GPT-2's shape too)
#   make all             the pipeline, AI feedback (judge, Constitutional AI, RLAIF), reward collapse;
#                        in 19 minutes on two cores as OMP_NUM_THREADS=1 make -j2 all
#   make reward-scaling, reward-margins, best-of-n, online-dpo, rlaif, collapse, collapse-ppo
#                        experiments, three seeds each
#   make figures         the sources' figures in small, into runs/figures; figure-NAME for one of them
# QUICK=1 makes the experiments with one seed.
# LAUNCH="torchrun --nproc_per_node=8" runs the stages on several GPUs; INIT=gpt2/ DATA=mine/ on a
# model and data of your own, into runs/own/mine (see below, and SFT_FLAGS, REWARD_FLAGS, PPO_FLAGS, DPO_FLAGS,
# SAMPLING).

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PEERS := .venv-peers
LAUNCH ?=
# torchrun comes from the same environment as python.
RUN := $(if $(LAUNCH),$(VENV)/bin/$(LAUNCH),$(PYTHON))
PEER_PACKAGES := transformers==5.23.0 trl==1.12.0

DATA ?= data/toy
override DATA := $(patsubst %/,%,$(DATA))
INIT ?=
RUNS ?= $(if $(filter data/toy,$(DATA)),runs,runs/own/$(notdir $(DATA)))

SEEDS := $(if $(QUICK),0,0 1 2)
comma := ,
space := $() $()
hash := \#
list = $(subst $(space),$(comma),$(strip $(1)))

.PHONY: all report check test test-half test-rest test-mutations test-faults test-peers bench lint clean reward-scaling reward-margins best-of-n online-dpo rlaif ai-report \
  collapse collapse-report collapse-ppo figures $(addprefix figure-,overoptimisation frontier temperatures ablations \
  bleu ensembles tax diversity noise)
.DELETE_ON_ERROR:

report: $(RUNS)/evaluation/report.json
	@rm $(<D)/.printed 2>/dev/null || $(PYTHON) evaluate.py table --report $<
	@echo "the whole report, with responses side by side: $(RUNS)/report.md"
	@echo "read more samples: $(PYTHON) model.py $(RUNS)/sft --prompt 'How do I fix a bike?'"

# What the report must show: differences of scores, paired by prompt, with their interval above 0.
check: report
	$(PYTHON) evaluate.py check --report $(RUNS)/evaluation/report.json --judge $(if $(GOLD),gold,$(RUNS)/reward) --better \
	  "$(RUNS)/sft@best_of=4:$(RUNS)/reward > $(RUNS)/sft,$(RUNS)/ppo > $(RUNS)/sft,$(RUNS)/ppo@temperature=0 > $(RUNS)/sft@temperature=0,$(RUNS)/dpo > $(RUNS)/sft,$(RUNS)/dpo@temperature=0 > $(RUNS)/sft@temperature=0"

all: report ai-report collapse-report

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
  READY := $(wildcard $(DATA)/*.jsonl $(DATA)/*.jsonl.gz)
  FEEDBACK := $(DATA)/rankings.jsonl
  HELD_OUT := $(DATA)/rankings_validation.jsonl
endif

# $(1) command, $(2) its source, $(3) its folder. An unfinished run of the present source goes on, if
# its settings and data are these (else it is refused with exit status 2); any other begins anew.
go = @$(info $(1) --out_dir $(3))if cmp -s $(3)/script.py $(2) && test ! -e $(3)/report.json && ! test model.py -nt $(3)/script.py; \
  then $(1) --out_dir $(3) --resume || { test $$? = 2 && $(1) --out_dir $(3) --overwrite; }; \
  else $(1) --out_dir $(3) --overwrite; fi
SFT = $(RUN) sft.py $(GOLD) $(SFT_FLAGS) $(SAMPLING) --data $(DATA)/demonstrations.jsonl \
  --validation $(DATA)/demonstrations_validation.jsonl --prompts $(DATA)/prompts_validation.jsonl
ANNOTATE = $(RUN) annotate.py $(GOLD) $(SAMPLING)
PPO = $(RUN) ppo.py $(GOLD) $(PPO_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_train.jsonl \
  --validation $(DATA)/prompts_validation.jsonl
DPO = $(RUN) dpo.py $(GOLD) $(DPO_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_validation.jsonl
REWARD = $(RUN) reward.py $(GOLD) $(REWARD_FLAGS) $(SAMPLING) --prompts $(DATA)/prompts_train.jsonl

$(RUNS)/sft/report.json: $(READY) sft.py model.py | $(VENV)/installed
	$(call go,$(SFT) --init "$(INIT)",sft.py,$(@D))

# $(1) where, $(2) the prompts' split
define judged
$(RUNS)/$(1)/rankings.jsonl: $(RUNS)/sft/report.json annotate.py
	$$(call go,$(ANNOTATE) --policy $(RUNS)/sft --prompts $(DATA)/prompts_$(2).jsonl,annotate.py,$$(@D))
endef
$(eval $(call judged,feedback,train))
$(eval $(call judged,feedback_validation,validation))

$(RUNS)/reward/report.json: $(FEEDBACK) $(HELD_OUT) $(RUNS)/sft/report.json reward.py
	$(call go,$(REWARD) --init $(RUNS)/sft --data $(FEEDBACK) --validation $(HELD_OUT),reward.py,$(@D))

$(RUNS)/ppo/report.json: $(RUNS)/reward/report.json ppo.py
	$(call go,$(PPO) --init $(RUNS)/sft --reward $(RUNS)/reward,ppo.py,$(@D))

$(RUNS)/dpo/report.json: $(FEEDBACK) $(HELD_OUT) $(RUNS)/sft/report.json dpo.py
	$(call go,$(DPO) --init $(RUNS)/sft --data $(FEEDBACK) --validation $(HELD_OUT) \
	  --cache $(RUNS)/cache,dpo.py,$(@D))

# Every policy on the test prompts, and best-of-n. A stage that lands adds its policy here.
POLICIES := $(RUNS)/sft $(RUNS)/sft@temperature=0 $(RUNS)/sft@best_of=4:$(RUNS)/reward \
  $(RUNS)/ppo $(RUNS)/ppo@temperature=0 $(RUNS)/dpo $(RUNS)/dpo@temperature=0

$(RUNS)/evaluation/report.json: $(RUNS)/ppo/report.json $(RUNS)/dpo/report.json evaluate.py model.py
	$(RUN) evaluate.py --policies $(call list,$(POLICIES)) $(GOLD) --judges $(RUNS)/reward \
	  --prompts $(DATA)/prompts_test.jsonl --best_of_n 16 --proxy $(RUNS)/reward $(SAMPLING) \
	  --out_dir $(@D) --report $(RUNS)/report.md --overwrite
	touch $(@D)/.printed

# --- AI feedback: what people did above, by a judge ---

# The judge, the rater and the critic play a language model that one would take off the shelf; they
# learn from data of their own.
JUDGES := data/toy/judge.jsonl
TAUGHT = $(RUN) sft.py --n_positions 384 --prompt_loss_weight 0.3 --batch_size 6 --lr 3e-3 --eval_every 0 \
  --num_prompts 100 --max_new_tokens 128

$(JUDGES): data/toy.py data/prompts/toy.txt data/constitution.json | $(VENV)/installed
	$(PYTHON) data/toy.py --judge

# $(1) folder of runs, $(2) suffix of a run's name, $(3) seed, $(4) judge, rater or critic
define taught
$(1)/$(4)$(2)/report.json: $(JUDGES) sft.py model.py
	$$(call go,$$(TAUGHT) --data data/toy/$(4).jsonl --validation data/toy/$(4)_validation.jsonl \
	  --prompts data/toy/$(4)_validation.jsonl --seed $(3),sft.py,$$(@D))
endef

# $(1) folder of runs, $(2) suffix of a run's name, $(3) seed, $(4) SFT policy, $(5) its samples,
# $(6) test prompts with responses in an order by gold
define ai_feedback
$(foreach who,judge rater critic,$(eval $(call taught,$(1),$(2),$(3),$(who))))
$(1)/agreement$(2)/report.json: $(1)/judge$(2)/report.json $(6)/report.json rlaif.py
	$$(call go,$$(PYTHON) rlaif.py agree --judges $(1)/judge$(2) --data $(6)/rankings.jsonl \
	  --gold data/toy.py --seed $(3),rlaif.py,$$(@D))
$(1)/labels$(2)/report.json: $(1)/judge$(2)/report.json $(5)/report.json rlaif.py
	$$(call go,$$(PYTHON) rlaif.py label --judge $(1)/judge$(2) --samples $(5)/samples.jsonl \
	  --seed $(3),rlaif.py,$$(@D))
$(1)/reward-ai$(2)/report.json: $(1)/labels$(2)/report.json $(4)/report.json reward.py
	$$(call go,$$(REWARD) --init $(4) --data $(1)/labels$(2)/comparisons.jsonl --seed $(3) \
	  --validation $(6)/rankings.jsonl,reward.py,$$(@D))
$(1)/ppo-ai$(2)/report.json: $(1)/reward-ai$(2)/report.json ppo.py
	$$(call go,$$(PPO) --init $(4) --reward $(1)/reward-ai$(2) --seed $(3),ppo.py,$$(@D))
$(1)/dpo-ai$(2)/report.json: $(1)/labels$(2)/report.json $(4)/report.json dpo.py
	$$(call go,$$(DPO) --init $(4) --data $(1)/labels$(2)/comparisons.jsonl --seed $(3) \
	  --validation $(6)/rankings.jsonl --cache $(1)/cache,dpo.py,$$(@D))
$(1)/direct$(2)/report.json: $(1)/rater$(2)/report.json $(4)/report.json rlaif.py
	$$(call go,$$(RUN) rlaif.py direct $$(GOLD) --init $(4) --judge $(1)/rater$(2) --seed $(3),rlaif.py,$$(@D))
$(1)/revisions$(2)/report.json: $(1)/critic$(2)/report.json $(4)/report.json rlaif.py
	$$(call go,$$(PYTHON) rlaif.py revise --policy $(4) --judge $(1)/critic$(2) --revisions 4 \
	  --prompts data/toy/prompts_red_team.jsonl --mix data/toy/demonstrations_helpful.jsonl \
	  --gold data/toy.py --seed $(3),rlaif.py,$$(@D))
$(1)/cai$(2)/report.json: $(1)/revisions$(2)/report.json $(4)/report.json sft.py
	$$(call go,$$(RUN) sft.py --init $(4) --data $(1)/revisions$(2)/demonstrations.jsonl \
	  --validation data/toy/demonstrations_validation.jsonl $$(GOLD) --seed $(3) \
	  --prompts data/toy/prompts_validation.jsonl --lr 5e-4 --eval_every 0,sft.py,$$(@D))
$(1)/ai-evaluation$(2)/report.json: $(foreach p,cai ppo-ai dpo-ai direct,$(1)/$(p)$(2)/report.json) \
  $(1)/agreement$(2)/report.json evaluate.py
	$$(RUN) evaluate.py --policies $$(call list,$(4) $(foreach p,cai ppo-ai dpo-ai direct,\
	  $(1)/$(p)$(2) $(1)/$(p)$(2)@temperature=0)) --gold data/toy.py --seed $(3) \
	  --prompts data/toy/prompts_test.jsonl --out_dir $$(@D) --overwrite
endef
ifeq ($(DATA),data/toy)
$(eval $(call ai_feedback,$(RUNS),,0,$(RUNS)/sft,$(RUNS)/feedback,$(RUNS)/feedback_validation))
$(RUNS)/feedback/report.json: $(RUNS)/feedback/rankings.jsonl
$(RUNS)/feedback_validation/report.json: $(RUNS)/feedback_validation/rankings.jsonl
ai-report: $(RUNS)/ai-evaluation/report.json
	$(PYTHON) evaluate.py table --report $<
else
ai-report:
endif

# --- reward collapse: one utility for all prompts, and one for each kind ---

COLLAPSE = $(RUN) collapse.py --prompts data/toy/prompts_train.jsonl

ifeq ($(DATA),data/toy)
$(RUNS)/collapse/report.json: $(RUNS)/sft/report.json collapse.py
	$(call go,$(COLLAPSE) --init $(RUNS)/sft --closed_utility inverse_power,collapse.py,$(@D))
$(RUNS)/prompt_aware/report.json: $(RUNS)/sft/report.json collapse.py
	$(call go,$(COLLAPSE) --init $(RUNS)/sft,collapse.py,$(@D))
collapse-report: $(RUNS)/collapse/report.json $(RUNS)/prompt_aware/report.json
	$(PYTHON) collapse.py plot $(^D) --out $(RUNS)/figures/collapse
else
collapse-report:
endif

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
	$$(call go,$(SFT) $(SIZE_$(1)) --seed $(2) --num_prompts 200 --eval_every 0,sft.py,$$(@D))
endef

# $(1) seed: feedback on the medium policy, for all sizes; what is held out are the test prompts.
define feedback
$(E)/feedback-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$$(call go,$(ANNOTATE) --policy $(E)/sft-medium-$(1) --seed $(1),annotate.py,$$(@D))
$(E)/feedback-test-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$$(call go,$(ANNOTATE) --policy $(E)/sft-medium-$(1) --seed $(1) \
	  --prompts data/toy/prompts_test.jsonl,annotate.py,$$(@D))
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
	$$(call go,$(REWARD) --init $(E)/sft-$(1)-$(2) --normalise_with $(E)/sft-medium-$(2) \
	  --margin $(4) --data $(E)/rankings-$(2)-$(3).jsonl --seed $(2) --eval_every 0 \
	  --validation $(E)/feedback-test-$(2)/rankings.jsonl,reward.py,$$(@D))
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

# Best-of-n for n up to 16, in every seed.
define best_of_n
$(E)/best-of-n-$(1)/report.json: $(E)/reward-medium-12000-$(1)/report.json evaluate.py
	$(RUN) evaluate.py --policies $(E)/sft-medium-$(1) --gold data/toy.py --best_of_n 16 \
	  --proxy $(E)/reward-medium-12000-$(1) --seed $(1) --out_dir $$(@D) --overwrite
endef
$(foreach seed,$(SEEDS),$(eval $(call best_of_n,$(seed))))

best-of-n: $(SEEDS:%=$(E)/best-of-n-%/report.json)

# DPO online beside offline at an equal number of judged pairs: two responses to each of 5,120
# prompts, one annotator whose noise (gold points) makes agreement 0.75.
NOISE := 1.91
JUDGED := --validation "" --prompts data/toy/prompts_test.jsonl --eval_every 0 --cache ""
define online
$(E)/pairs-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$$(call go,$(ANNOTATE) --policy $(E)/sft-medium-$(1) --seed $(1) --num_responses 2 \
	  --num_prompts 5120 --annotators 1 --noise_spread 0 --bias 0 --overlap 0,annotate.py,$$(@D))
$(E)/offline-$(1)/report.json: $(E)/pairs-$(1)/report.json dpo.py
	$$(call go,$(RUN) dpo.py $(GOLD) $(JUDGED) --init $(E)/sft-medium-$(1) --seed $(1) \
	  --data $(E)/pairs-$(1)/rankings.jsonl,dpo.py,$$(@D))
$(E)/online-$(1)/report.json: $(E)/sft-medium-$(1)/report.json dpo.py
	$$(call go,$(RUN) dpo.py $(GOLD) $(JUDGED) --init $(E)/sft-medium-$(1) --seed $(1) \
	  --online data/toy.py --judge_noise $(NOISE),dpo.py,$$(@D))
endef
$(foreach seed,$(SEEDS),$(eval $(call online,$(seed))))

online-dpo: $(SEEDS:%=$(E)/offline-%/report.json) $(SEEDS:%=$(E)/online-%/report.json)

# Judges instead of people, in every seed; beside the same stages by simulated people.
define people
$(E)/ppo-$(1)/report.json: $(E)/reward-medium-12000-$(1)/report.json ppo.py
	$$(call go,$(PPO) --init $(E)/sft-medium-$(1) --reward $(E)/reward-medium-12000-$(1) \
	  --seed $(1),ppo.py,$$(@D))
$(E)/dpo-$(1)/report.json: $(E)/feedback-$(1)/report.json dpo.py
	$$(call go,$(DPO) --init $(E)/sft-medium-$(1) --data $(E)/rankings-$(1)-12000.jsonl --seed $(1) \
	  --validation $(E)/feedback-test-$(1)/rankings.jsonl --cache $(E)/cache,dpo.py,$$(@D))
endef
$(foreach seed,$(SEEDS),$(eval $(call people,$(seed))) $(eval \
  $(call ai_feedback,$(E),-$(seed),$(seed),$(E)/sft-medium-$(seed),$(E)/feedback-$(seed),$(E)/feedback-test-$(seed))))

# What `label --hard` would write, without asking again.
define hard_labels
$(E)/hard-$(1).jsonl: $(E)/labels-$(1)/report.json
	sed 's/"label": [0-9.e-]*/"label": 1.0/' $$(<D)/comparisons.jsonl > $$@
$(E)/reward-hard-$(1)/report.json: $(E)/hard-$(1).jsonl reward.py
	$$(call go,$$(REWARD) --init $(E)/sft-medium-$(1) --data $$< --seed $(1) \
	  --validation $(E)/feedback-test-$(1)/rankings.jsonl,reward.py,$$(@D))
endef
$(foreach seed,$(SEEDS),$(eval $(call hard_labels,$(seed))))

rlaif: $(foreach run,ai-evaluation reward-hard ppo dpo,$(SEEDS:%=$(E)/$(run)-%/report.json))

# Reward collapse under four utilities, with labels smoothed or noisy, and by kind; in every seed.
UTILITIES := inverse_power log linear log_sigmoid:0.25
plain = $(subst :,_,$(1))
# $(1) the run's name, $(2) seed, $(3) flags
define collapse_run
$(E)/$(1)-$(2)/report.json: $(E)/sft-medium-$(2)/report.json collapse.py
	$$(call go,$$(COLLAPSE) --init $(E)/sft-medium-$(2) --seed $(2) $(3),collapse.py,$$(@D))
endef
$(foreach seed,$(SEEDS),$(foreach u,$(UTILITIES),$(eval $(call collapse_run,collapse-$(call \
  plain,$(u)),$(seed),--open_utility $(u) --closed_utility $(u)))) \
  $(eval $(call collapse_run,prompt_aware,$(seed),)) $(eval $(call collapse_run,smoothed,$(seed),\
  --closed_utility inverse_power --label_smoothing 0.1)) $(eval $(call collapse_run,noisy,$(seed),\
  --closed_utility inverse_power --label_noise 0.25)))
collapsed := $(foreach u,$(UTILITIES),collapse-$(call plain,$(u))) smoothed noisy prompt_aware

collapse: $(foreach run,$(collapsed),$(SEEDS:%=$(E)/$(run)-%/report.json))
	$(PYTHON) collapse.py optimum --out runs/figures/optimal_rewards
	$(PYTHON) collapse.py plot $(^D) --out runs/figures/collapse_seeds
	$(PYTHON) collapse.py plot $(foreach run,$(wordlist 1,3,$(collapsed)) prompt_aware,$(E)/$(run)-0) \
	  --out runs/figures/collapse_utilities

# Does it matter to a policy? Eight responses each to prompts of all tasks, ranked by simulated
# annotators; both reward models, two passes; ppo.py.
define collapse_ppo
$(E)/eight-$(1)/report.json: $(E)/sft-medium-$(1)/report.json annotate.py
	$$(call go,$(ANNOTATE) --policy $(E)/sft-medium-$(1) --seed $(1) --num_responses 8 \
	  --num_prompts 3000,annotate.py,$$(@D))
$(foreach kind,one by_kind,$(E)/collapse-$(kind)-$(1)/report.json): $(E)/eight-$(1)/report.json collapse.py
	$$(call go,$$(COLLAPSE) --init $(E)/sft-medium-$(1) --seed $(1) --data $$(<D)/rankings.jsonl \
	  --num_responses 8 --validation "" --epochs 2 --batch_size 16 --lr 5e-4 --eval_every 0 \
	  $$(if $$(findstring by_kind,$$@),,--closed_utility inverse_power),collapse.py,$$(@D))
$(foreach kind,one by_kind,$(E)/ppo-$(kind)-$(1)/report.json): $(E)/ppo-%-$(1)/report.json: \
  $(E)/collapse-%-$(1)/report.json ppo.py
	$$(call go,$$(PPO) --init $(E)/sft-medium-$(1) --reward $$(<D) --seed $(1),ppo.py,$$(@D))
$(E)/collapse-evaluation-$(1)/report.json: $(foreach kind,one by_kind,$(E)/ppo-$(kind)-$(1)/report.json)
	$(RUN) evaluate.py --policies $$(call list,$(E)/sft-medium-$(1) $$(^D)) --gold data/toy.py \
	  --judges $$(call list,$(foreach kind,one by_kind,$(E)/collapse-$(kind)-$(1))) --seed $(1) --by kind \
	  --prompts data/toy/prompts_test.jsonl --out_dir $$(@D) --overwrite
endef
$(foreach seed,$(SEEDS),$(eval $(call collapse_ppo,$(seed))))

collapse-ppo: $(SEEDS:%=$(E)/collapse-evaluation-%/report.json)

# --- the sources' figures in small: `make figures`, each in every seed ---

# Curves need evaluations along a run, held-out demonstrations among them: what the policy forgets.
ALONG := --ptx_validation data/toy/demonstrations_validation.jsonl --eval_every 5
# Points and rows are judged by evaluate.py, all policies on the same prompts (best-of-n on the first
# 500). Score and KL have settled long before iteration 30, but for beta 0, which never does.
LATER := --eval_every 0 --num_prompts 100
SHORT := $(LATER) --steps 30
# $(1) the run's name without its seed, $(2) seed, $(3) rewards' runs, $(4) flags, $(5) policy, if
# not SFT's, $(6) command, if not ppo.py's
define ppo_run
$(E)/$(1)-$(2)/report.json: $(foreach r,$(3),$(E)/$(r)/report.json) ppo.py
	$$(call go,$(or $(6),$(RUN) ppo.py) $(GOLD) --init $(E)/$(or $(5),sft-medium)-$(2) --seed $(2) \
	  $(if $(3),--reward $$(call list,$(3:%=$(E)/%)) )$(4),ppo.py,$$(@D))
endef
BEST := reward-medium-12000

# 1. Over-optimisation: beta 0 and the default, reward models of several data sizes; best-of-n.
free := $(LINES:%=free-%)
held := $(LINES:%=held-%)
# 2. Score against KL: betas. 0.2 is PPO's default, 0.3 is DPO's.
BETAS := 0 0.05 0.1 0.2 0.5
DPO_BETAS := 0.1 0.3 1
# 4. PPO without one of its parts, or with another in its place.
ABLATIONS := from_scratch top_k unwhitened epochs_1 epochs_4 kl reinforce rloo grpo
ABLATION_from_scratch := --value_init random
ABLATION_unwhitened := --no-whiten_advantages
ABLATION_epochs_1 := --update_epochs 1
ABLATION_epochs_4 := --update_epochs 4
ABLATION_kl := --surrogate kl
ABLATION_reinforce := --advantage reinforce
ABLATION_rloo := --advantage rloo --num_samples 4 --no-whiten_advantages
ABLATION_grpo := --advantage grpo --num_samples 4 --no-whiten_advantages --kl_in_loss --kl_estimator k3
# Samples of the 8 likeliest tokens, log-probabilities of all: an error that other code makes.
TOP_K = $(PYTHON) -c "import functools$$(comma) sys$$(comma) ppo; sys.argv[0] = 'ppo.py'; \
  ppo.generate = functools.partial(ppo.generate$$(comma) top_k=8); ppo.main()"
# 6. With a quarter of the labels turned round, on a pair of each of 4,000 prompts: one reward model,
# four, the least of four. 9. DPO on the same.
MEMBERS := 0 1 2 3
# 5. BLEU against references, by REINFORCE: the machine-translation example.
BLEU := --reward data/bleu.py --beta 0 --advantage rloo --num_samples 4 --update_epochs 1 \
  --steps 60
MLE := --ptx_data data/toy/demonstrations.jsonl --ptx_coef 0.1
BLEUS := scratch alone mixed

METHODS := chosen held-12000 dpo-beta-0.3
POINTS := chosen $(BETAS:%=ppo-beta-%) $(DPO_BETAS:%=dpo-beta-%) $(ABLATIONS:%=ablation-%)

define sources
$(foreach n,$(LINES),$(call ppo_run,free-$(n),$(1),reward-medium-$(n)-$(1),$(ALONG) --beta 0 --steps 80)
$(call ppo_run,held-$(n),$(1),reward-medium-$(n)-$(1),$(ALONG))
$(E)/best-of-$(n)-$(1)/report.json: $(E)/reward-medium-$(n)-$(1)/report.json evaluate.py
	$(RUN) evaluate.py --policies $(E)/sft-medium-$(1) --gold data/toy.py --best_of_n 32 --num_samples 1 --num_prompts 500 \
	  --proxy $(E)/reward-medium-$(n)-$(1) --seed $(1) --out_dir $$(@D) --overwrite
)
$(foreach b,$(BETAS),$(call ppo_run,ppo-beta-$(b),$(1),$(BEST)-$(1),$(SHORT) --beta $(b))
)
$(foreach b,$(DPO_BETAS),
$(E)/dpo-beta-$(b)-$(1)/report.json: $(E)/rankings-$(1)-12000.jsonl dpo.py
	$$(call go,$(DPO) --init $(E)/sft-medium-$(1) --data $(E)/rankings-$(1)-12000.jsonl --seed $(1) --beta $(b) \
	  --validation "" $(LATER) --cache $(E)/cache,dpo.py,$$(@D))
)
$(foreach a,$(filter-out top_k,$(ABLATIONS)),$(call ppo_run,ablation-$(a),$(1),$(BEST)-$(1),$(SHORT) $(ABLATION_$(a)))
)
$(call ppo_run,ablation-top_k,$(1),$(BEST)-$(1),$(SHORT),,$(TOP_K))
$(call ppo_run,ptx,$(1),$(BEST)-$(1),$(ALONG) --ptx_coef 1 --ptx_data data/toy/demonstrations.jsonl)

$(E)/chosen-$(1).jsonl: $(E)/feedback-$(1)/report.json
	$(PYTHON) data/convert.py best $$(<D)/rankings.jsonl $$@
$(E)/chosen-$(1)/report.json: $(E)/chosen-$(1).jsonl sft.py
	$$(call go,$(RUN) sft.py $(GOLD) --init $(E)/sft-medium-$(1) --data $$< --seed $(1) --lr 5e-4 \
	  --validation data/toy/demonstrations_validation.jsonl --prompts data/toy/prompts_validation.jsonl \
	  $(LATER),sft.py,$$(@D))

$(E)/untrained-$(1)/report.json: data/toy/bpe.tiktoken sft.py
	$$(call go,$(SFT) --seed $(1) --epochs 0 --num_prompts 10,sft.py,$$(@D))
$(E)/bleu-scratch-$(1)/report.json: $(E)/untrained-$(1)/report.json
$(E)/bleu-alone-$(1)/report.json $(E)/bleu-mixed-$(1)/report.json: $(E)/sft-medium-$(1)/report.json
$(call ppo_run,bleu-scratch,$(1),,$(ALONG) $(BLEU),untrained)
$(call ppo_run,bleu-alone,$(1),,$(ALONG) $(BLEU))
$(call ppo_run,bleu-mixed,$(1),,$(ALONG) $(BLEU) $(MLE))

$(BLEUS:%=$(E)/bleu-%-$(1)/report.json) $(E)/bleu-$(1)/report.json: data/bleu.py
$(E)/bleu-$(1)/report.json: $(BLEUS:%=$(E)/bleu-%-$(1)/report.json) evaluate.py
	$(RUN) evaluate.py --gold data/toy.py --judges data/bleu.py --seed $(1) --num_samples 1 --bootstrap 200 --out_dir $$(@D) \
	  --overwrite --policies $$(call list,$(E)/sft-medium-$(1) $(BLEUS:%=$(E)/bleu-%-$(1)))

$(E)/flipped-$(1).jsonl: $(E)/rankings-$(1)-4000.jsonl
	$(PYTHON) data/convert.py pairs $$< $$@ --flip 0.25 --seed $(1)
$(E)/unflipped-$(1).jsonl: $(E)/rankings-$(1)-4000.jsonl
	$(PYTHON) data/convert.py pairs $$< $$@ --seed $(1)
$(foreach m,$(MEMBERS),
$(E)/member-$(m)-$(1)/report.json: $(E)/flipped-$(1).jsonl $(E)/feedback-test-$(1)/report.json reward.py
	$$(call go,$(REWARD) --init $(E)/sft-medium-$(1) --data $$< --seed $$(shell expr 10 \* $(1) + $(m)) --eval_every 0 \
	  --validation $(E)/feedback-test-$(1)/rankings.jsonl,reward.py,$$(@D))
)
$(call ppo_run,single,$(1),member-0-$(1),$(ALONG) --beta 0 --steps 40)
$(foreach c,mean min,$(call ppo_run,$(c),$(1),$(MEMBERS:%=member-%-$(1)),$(ALONG) --beta 0 --steps 40 --combine $(c))
)
$(foreach l,dpo conservative robust unflipped,
$(E)/noise-$(l)-$(1)/report.json: $(E)/$(if $(filter unflipped,$(l)),unflipped,flipped)-$(1).jsonl dpo.py
	$$(call go,$(DPO) --init $(E)/sft-medium-$(1) --data $$< --seed $(1) --validation "" --num_prompts 500 --eval_every 0 \
	  --cache $(E)/cache $(if $(filter robust,$(l)),--loss robust) \
	  $(if $(filter conservative robust,$(l)),--label_smoothing 0.25),dpo.py,$$(@D))
)
# 2 and 4. Every policy on the same prompts.
$(E)/points-$(1)/report.json: $(foreach p,$(POINTS),$(E)/$(p)-$(1)/report.json) evaluate.py
	$(RUN) evaluate.py --gold data/toy.py --seed $(1) --num_samples 1 --bootstrap 200 --out_dir $$(@D) --overwrite \
	  --policies $$(call list,$(E)/sft-medium-$(1) $(POINTS:%=$(E)/%-$(1)))
# 3. The methods at several temperatures. 8. At temperature 1, four samples a prompt.
$(E)/temperatures-$(1)/report.json $(E)/diversity-$(1)/report.json: $(METHODS:%=$(E)/%-$(1)/report.json) evaluate.py
$(E)/temperatures-$(1)/report.json:
	$(RUN) evaluate.py --gold data/toy.py --seed $(1) --num_prompts 500 --num_samples 1 --bootstrap 200 --out_dir $$(@D) \
	  --overwrite --policies $$(call list,$(E)/sft-medium-$(1) $(foreach t,0 0.25 0.5 0.75 1,\
	  $(E)/sft-medium-$(1)@temperature=$(t) $(METHODS:%=$(E)/%-$(1)@temperature=$(t)) \
	  $(if $(filter-out 0,$(t)),$(E)/sft-medium-$(1)@temperature=$(t)@best_of=4:$(E)/$(BEST)-$(1))))
$(E)/diversity-$(1)/report.json:
	$(RUN) evaluate.py --gold data/toy.py --seed $(1) --num_prompts 500 --num_samples 4 --best_of_samples 4 --bootstrap 200 \
	  --out_dir $$(@D) --overwrite --policies $$(call list,$(E)/sft-medium-$(1) $(METHODS:%=$(E)/%-$(1)) \
	  $(E)/sft-medium-$(1)@best_of=4:$(E)/$(BEST)-$(1))
endef
$(foreach seed,$(SEEDS),$(eval $(call sources,$(seed))))

# Runs of one name in all seeds, as a list; of an evaluation's policy; and as files to wait for.
runs = $(call list,$(SEEDS:%=$(E)/$(1)-%))
# In an evaluation $(1), of policy $(2) as $(3).
policy = $(call list,$(foreach s,$(SEEDS),$(E)/$(1)-$(s)$(hash)$(E)/$(2)-$(s)$(3)))
best_of_4 = $(call list,$(foreach s,$(SEEDS),$(E)/$(1)-$(s)$(hash)$(E)/sft-medium-$(s)$(2)@best_of=4:$(E)/$(BEST)-$(s)))
point = $(call policy,points,$(1))
best_of = $(call list,$(foreach s,$(SEEDS),$(E)/best-of-$(1)-$(s)$(hash)best_of$(2)))
reports = $(foreach r,$(1),$(SEEDS:%=$(E)/$(r)-%/report.json))
FIGURE = $(PYTHON) evaluate.py
FIGURES := overoptimisation frontier ablations temperatures diversity tax bleu noise ensembles

figures: $(FIGURES:%=figure-%)

DEFAULT_BETA = $(foreach n,$(LINES),"beta 0.2$(comma) $(n) prompts=$(call runs,held-$(n))")
CHOOSING = $(foreach n,$(LINES),"best of n$(comma) $(n) prompts=$(call best_of,$(n))")
PROXY_AND_GOLD = --x sqrt_kl --y proxy,gold --y_labels "reward model's score (std of SFT)"
figure-overoptimisation: $(call reports,$(free) $(held) $(LINES:%=best-of-%))
	$(FIGURE) curves $(foreach n,$(LINES),"beta 0$(comma) $(n) prompts=$(call runs,free-$(n))") \
	  $(DEFAULT_BETA) $(CHOOSING) $(PROXY_AND_GOLD) --fit gold \
	  --title "Over-optimisation of reward models of three sizes of data" --out runs/figures/overoptimisation
	$(FIGURE) curves $(DEFAULT_BETA) $(CHOOSING) $(PROXY_AND_GOLD) --fit gold \
	  --title "The same near the start" --out runs/figures/overoptimisation_near

figure-frontier: $(call reports,points best-of-12000)
	$(FIGURE) points $(foreach b,$(filter-out 0,$(BETAS)),"PPO:$(b)=$(call point,ppo-beta-$(b))") \
	  $(foreach b,$(DPO_BETAS),"DPO:$(b)=$(call point,dpo-beta-$(b))") \
	  $(foreach n,2 4 8 16,"best of n (KL at most):$(n)=$(call best_of,12000,=$(n))") \
	  "SFT on chosen=$(call point,chosen)" "SFT=$(call point,sft-medium)" \
	  --title "Score against KL; labels are beta, or n" --out runs/figures/frontier

figure-temperatures: $(call reports,temperatures)
	$(FIGURE) points $(foreach t,0 0.25 0.5 0.75 1,$(foreach m,SFT=sft-medium SFT_on_chosen=chosen PPO=held-12000 \
	  DPO=dpo-beta-0.3,"$(subst _, ,$(firstword $(subst =, ,$(m)))):$(t)=$(call policy,temperatures,$(lastword $(subst =, ,$(m))),@temperature=$(t))")) \
	  $(foreach t,0.25 0.5 0.75 1,"best of 4:$(t)=$(call best_of_4,temperatures,@temperature=$(t))") \
	  --x label --y wins,gold --x_label "sampling temperature" \
	  --title "Against SFT sampled at temperature 1" --out runs/figures/temperatures

figure-ablations: $(call reports,points)
	$(FIGURE) rows "PPO=$(call point,ppo-beta-0.2)" "no KL=$(call point,ppo-beta-0)" \
	  "value network from scratch=$(call point,ablation-from_scratch)" "8 likeliest tokens sampled=$(call point,ablation-top_k)" \
	  "advantages not whitened=$(call point,ablation-unwhitened)" "1 epoch=$(call point,ablation-epochs_1)" \
	  "4 epochs=$(call point,ablation-epochs_4)" "J^KL=$(call point,ablation-kl)" \
	  "REINFORCE=$(call point,ablation-reinforce)" "RLOO$(comma) 4 samples=$(call point,ablation-rloo)" \
	  "GRPO$(comma) 4 samples=$(call point,ablation-grpo)" --columns gold,wins,kl,distinct_2,training_seconds \
	  --title "PPO without one of its parts, or with another in its place" --out runs/figures/ablations

figure-bleu: $(call reports,bleu)
	$(FIGURE) curves "RL from scratch=$(call runs,bleu-scratch)" "RL after MLE=$(call runs,bleu-alone)" \
	  "RL mixed with MLE$(comma) after MLE=$(call runs,bleu-mixed)" --y proxy,gold,nll \
	  --y_labels "smoothed BLEU of sentences" --title "BLEU as the reward; MLE alone is where the upper two begin" --out runs/figures/bleu
	$(FIGURE) rows "MLE=$(call policy,bleu,sft-medium)" "RL from scratch=$(call policy,bleu,bleu-scratch)" \
	  "RL after MLE=$(call policy,bleu,bleu-alone)" "RL mixed with MLE=$(call policy,bleu,bleu-mixed)" \
	  --columns data/bleu.py,gold,wins,kl,entropy --title "BLEU as the reward, on test prompts" --out runs/figures/bleu_rows
	for seed in $(SEEDS); do $(PYTHON) data/bleu.py $(E)/bleu-$$seed/samples-?.jsonl || exit 1; done

figure-ensembles: $(call reports,single mean min)
	$(FIGURE) curves "one reward model=$(call runs,single)" "mean of four=$(call runs,mean)" \
	  "least of four=$(call runs,min)" --x sqrt_kl --y proxy,gold \
	  --title "No KL penalty, a quarter of the labels turned round (the least of four scores less by nature)" \
	  --out runs/figures/ensembles

figure-tax: $(call reports,held-12000 free-12000 ptx)
	$(FIGURE) curves "PPO=$(call runs,held-12000)" "PPO$(comma) no KL=$(call runs,free-12000)" "PPO-ptx=$(call runs,ptx)" \
	  --y nll,gold --title "What the policy forgets" --out runs/figures/tax

figure-diversity: $(call reports,diversity)
	$(FIGURE) rows "SFT=$(call policy,diversity,sft-medium)" "SFT on chosen=$(call policy,diversity,chosen)" \
	  "PPO=$(call policy,diversity,held-12000)" "DPO=$(call policy,diversity,dpo-beta-0.3)" \
	  "best of 4=$(call best_of_4,diversity)" \
	  --columns distinct_2_a_prompt,different_a_prompt,entropy_2_a_prompt,distinct_1,distinct_2,entropy_2 \
	  --title "Diversity at temperature 1: of four responses to a prompt, and of all" --out runs/figures/diversity
	$(FIGURE) rows "SFT=$(call policy,diversity,sft-medium)" "SFT on chosen=$(call policy,diversity,chosen)" \
	  "PPO=$(call policy,diversity,held-12000)" "DPO=$(call policy,diversity,dpo-beta-0.3)" \
	  --columns entropy,kl,gold --title "Entropy of a response" --out runs/figures/entropy

figure-noise: $(call reports,$(foreach l,unflipped dpo conservative robust,noise-$(l)))
	$(FIGURE) rows "DPO$(comma) labels as they are=$(call runs,noise-unflipped)" "DPO=$(call runs,noise-dpo)" \
	  "conservative DPO=$(call runs,noise-conservative)" "robust DPO=$(call runs,noise-robust)" \
	  --columns gold,wins,kl,greedy_gold --title "A quarter of the labels turned round" --out runs/figures/noise

# --- tests ---

test: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@echo "the tests, in two halves side by side: some five minutes on two cores, then what they say"
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-half test-rest

# About as long as the others together.
HALF := $(patsubst %,tests/test_%.py,annotate copies data evaluate faults sft)
test-half:; @$(PYTHON) -m pytest $(HALF)
test-rest:; @$(PYTHON) -m pytest $(addprefix --ignore=,$(HALF))

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
