"""RLHF of a real language model on two cores: SmolLM2-135M-Instruct learns to answer everyday
questions in one short sentence, which its prompts ask for and it does a quarter of the time.

The truth, data/one_sentence.py, reads form alone. Simulated people see it through noise, a quarter
of their judgements are wrong, and a reward model learns from them; GRPO, PPO, DPO and best-of-4
then go after that. All of them train adapters, on the prompts of data/questions/.

What to look for: gold rises, and KL is its price. Parts of gold tell what was learnt, the samples
in E/real-evaluation-0/report.md, side by side, what was lost: nobody asked whether they are true.
The model itself, asked which of two answers is better, tells how far such a judge can be trusted.

    make real            # fetches and converts the model first, into runs/smollm2; one seed
    python experiments/real.py [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import by_seed, experiment, path_of, policies, read_lines, reports, rows

GOLD = "--gold data/one_sentence.py"
QUESTIONS = "data/questions"
TRAIN = f"--prompts {QUESTIONS}/train.jsonl"
HELD = f"--validation {QUESTIONS}/validation.jsonl"
LORA = "--lora_rank 16 --warmup 2"
# Longest responses: people judge those that end; a policy pays for not ending.
JUDGED, LEARNT = "--max_new_tokens 64", "--max_new_tokens 32"
EPISODES = "--steps 10 --batch_size 32 --minibatch_size 16 --micro_batch_size 8"
LATER = "--eval_every 0 --num_prompts 40"
MODEL, WARM = "runs/smollm2", "@temperature=0.7"  # at 1 a model as small as this is hard to follow
METHODS = {"SmolLM2": MODEL + WARM, "best of 4": f"{MODEL}{WARM}@best_of=4:E/real-reward-*"}
METHODS |= {name: f"E/real-{name.lower()}-*{WARM}" for name in ("GRPO", "PPO", "DPO")}
POLICIES = METHODS | {"SmolLM2, greedy": f"{MODEL}@temperature=0"}


def runs(seed):
    ask = f"annotate.py {GOLD} --policy {MODEL}{WARM} {JUDGED} --micro_batch_size 16 --seed {seed}"
    people = f"E/real-feedback-{seed}/rankings.jsonl"
    held = f"E/real-feedback-validation-{seed}/rankings.jsonl"
    begin = f"{GOLD} --init {MODEL} --seed {seed} {LORA}"
    how = f"{LEARNT} --temperature 0.7 {LATER}"
    learn = f"{begin} --reward E/real-reward-{seed} {TRAIN} {HELD} {EPISODES} {how}"
    names = ",".join(POLICIES.values()).replace("*", str(seed))
    asked = f"--template data/prompts/helpful.txt --seed {seed}"
    samples = f"E/real-evaluation-{seed}/samples"
    found = {
        f"real-feedback-{seed}": f"{ask} {TRAIN}",
        f"real-feedback-validation-{seed}": f"{ask} --prompts {QUESTIONS}/validation.jsonl",
        f"real-reward-{seed}": f"reward.py {begin} --data {people} --validation {held} {TRAIN} "
        f"--num_prompts 256 {JUDGED} --batch_size 8 --lr 1e-3",
        f"real-grpo-{seed}": f"grpo.py {learn} --lr 1e-3",
        f"real-ppo-{seed}": f"ppo.py {learn} --lr 1e-3 --value_lr 1e-3",
        f"real-dpo-{seed}": f"dpo.py {begin} --data {people} --validation {held} --beta 0.1 "
        f"--prompts {QUESTIONS}/validation.jsonl {how} --batch_size 8 --micro_batch_size 4 "
        f'--lr 5e-4 --cache ""',
        f"real-evaluation-{seed}": f"evaluate.py {GOLD} --prompts {QUESTIONS}/test.jsonl {LEARNT} "
        f"--policies {names} --judges E/real-reward-{seed} --show one,short,subject,list "
        f"--num_shown 12 --num_samples 2 --micro_batch_size 32 --seed {seed}",
        # The model as a judge: against gold, and of what its training made of it.
        f"real-agreement-{seed}": f"rlaif.py agree {GOLD} --judges {MODEL} --variants base "
        f"--data {people} --num_prompts 100 {asked}",
    }
    for n, name in list(enumerate(METHODS))[1:]:
        run = f"real-judged-{name.lower().replace(' ', '_')}-{seed}"
        found[run] = (
            f"rlaif.py label --judge {MODEL} --samples {samples}-0.jsonl,{samples}-{n}.jsonl "
            f"--variant base {asked}"
        )
    return found


def preferred(lab, run, name):
    """For each seed the share of answers by a policy that the model prefers to its own, a tie being
    half, among pairs for which it names one of the two."""
    wins = []
    for seed in lab.seeds:
        lines = read_lines(path_of(lab, f"E/{run}-{seed}/comparisons.jsonl", seed))
        won = [line["policy"][0] == path_of(lab, name, seed) for line in lines]
        won = [x if line["label"] > 0.5 else 0.5 for x, line in zip(won, lines, strict=True)]
        wins.append(sum(won) / len(won))
    return wins


def results(lab):
    groups = {label: policies(lab, "E/real-evaluation-*", name) for label, name in POLICIES.items()}
    columns = ["gold", "wins", "kl", "words", "eos", "one", "short", "subject", "list"]
    title = "SmolLM2-135M learns to answer in one short sentence"
    rows(lab, "real", groups, columns, title, differences=False)
    table, found = {}, reports(lab, "E/real-evaluation-*")
    over = {f"{label}: gold over SmolLM2's": name for label, name in list(POLICIES.items())[1:]}
    for label, name in over.items():
        names = [path_of(lab, name, seed) for seed in lab.seeds]
        of = zip(names, (report["difference"]["gold"] for report in found), strict=True)
        table[label] = [differences[name][MODEL + WARM] for name, differences in of]
    label = "reward model agrees with gold"
    table[label] = [report["gold_accuracy"] for report in reports(lab, "E/real-reward-*")]
    for report in reports(lab, "E/real-agreement-*"):
        found = next(iter(next(iter(report["judges"].values())).values()))  # of its one variant
        for label, value in (("both orders", found["all"]), ("one order", found["one_order"])):
            label = f"SmolLM2, asked in {label}, agrees with gold"
            table[label] = [*table.get(label, []), value["rate"]]
        label = "SmolLM2 names the same position in both orders"
        table[label] = [*table.get(label, []), found["position_bias"]["same"]]
    for label, name in list(METHODS.items())[1:]:
        run = f"real-judged-{label.lower().replace(' ', '_')}"
        table[f"{label}: preferred by SmolLM2 to its own"] = preferred(lab, run, name)
    by_seed(lab, "real_seeds", table, differences=over)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
