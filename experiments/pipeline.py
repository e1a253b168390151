"""The pipeline on the embedded task: what `make` runs, over three seeds.

Claim: learning from feedback, by way of a reward model (PPO, best of 4) or without one (DPO), makes
a policy better than demonstrations do (Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022,
arXiv:2203.02155; Rafailov et al. 2023, arXiv:2305.18290).

What to look for: bars of gold, 5 at best, on the 1,000 test prompts, of sampled and of greedy
responses, with intervals over seeds; dots are the seeds. The tables have wins against SFT, KL, and
gold by task beside them, as a task may get worse where the mean rises; and what one policy has over
another, paired by prompt and seed, requests also by topic: the 148 benign ones are on 18.

    python experiments/pipeline.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    GOLD, by_seed, experiment, feedback, gains, golds, half_of, judging, number, over_seeds,
    policies, prices, pyplot, reports, rows, save, start,
)  # fmt: skip

GREEDY = "@temperature=0"
POLICIES = {
    "SFT": "E/sft-*",
    "SFT, greedy": f"E/sft-*{GREEDY}",
    "best of 4": "E/sft-*@best_of=4:E/reward-*",
    "PPO": "E/ppo-*",
    "PPO, greedy": f"E/ppo-*{GREEDY}",
    "DPO": "E/dpo-*",
    "DPO, greedy": f"E/dpo-*{GREEDY}",
}
OVER = {"best of 4": "SFT", "PPO": "SFT", "DPO": "SFT"}
OVER |= {f"{x}, greedy": "SFT, greedy" for x in ("PPO", "DPO")}
TASKS = "summary", "benign", "harmful"


def runs(seed):
    rankings = f"E/feedback-{seed}/rankings.jsonl"
    dpo = f"--data {rankings} --validation E/feedback-test-{seed}/rankings.jsonl --cache E/cache"
    names = ",".join(POLICIES.values()).replace("*", str(seed))
    evaluate = f"{GOLD} --policies {names} --judges E/reward-{seed} --seed {seed}"
    return feedback(seed) | {
        f"reward-{seed}": judging(seed, rankings),
        f"ppo-{seed}": f"ppo.py {start(seed, 'E/reward')}",
        f"dpo-{seed}": f"dpo.py {GOLD} --init E/sft-{seed} {dpo} --seed {seed}",
        f"pipeline-{seed}": f"evaluate.py {evaluate}",
    }


def results(lab):
    groups = {x: policies(lab, "E/pipeline-*", name) for x, name in POLICIES.items()}
    columns = ["gold", "wins", "kl", *(f"{task}_gold" for task in TASKS)]
    columns += ["made_up", "harmful_harmless", "tokens"]
    title = "Every policy on the test prompts"
    rows(lab, "pipeline_rows", groups, columns, title, differences=False)
    seeds, rewards = {}, reports(lab, "E/reward-*")
    for judge in ("gold", "labels"):
        for task in ("", *(f"{task}_" for task in TASKS)):
            label = f"reward model agrees with {judge}: {task.strip('_') or 'all'}"
            seeds[label] = [report[f"{judge}_{task}accuracy"] for report in rewards]
    seeds["reward model: calibration error"] = [report["ece"] for report in rewards]
    seeds["PPO: price of KL, raw score"] = prices(lab, "E/ppo-*")
    columns += ["harmful_complied", *(f"{task}_over" for task in TASKS)]
    for label, some in groups.items():
        known = [column for column in columns if all(column in found for found in some)]
        seeds |= {f"{label}: {column}": [found[column] for found in some] for column in known}
    by_seed(lab, "pipeline", seeds, 3)
    gold = {label: golds(lab, "E/pipeline-*", name) for label, name in POLICIES.items()}
    pairs = [*OVER.items(), ("DPO", "PPO"), ("DPO, greedy", "PPO, greedy")]
    gains(lab, "pipeline_gains", {f"{a} over {b}": gold[a] - gold[b] for a, b in pairs})
    plt = pyplot()
    if plt:
        draw(lab, plt, groups)


def draw(lab, plt, groups):
    """Bars of gold, with intervals over seeds; dots are the seeds."""
    figure, panel = plt.subplots(figsize=(6.5, 3.8))
    names = [label for label in POLICIES if "greedy" not in label]
    for how, shift, colour in (("", -0.2, "C0"), (", greedy", 0.2, "C1")):
        for x, name in enumerate(names):
            label = f"{name}{how}"
            if label in groups:
                seeds = [number(found["gold"]) for found in groups[label]]
                at, value = x + shift * (f"{name}, greedy" in groups), over_seeds(seeds)
                bar = {"color": colour, "alpha": 0.75, "capsize": 4}
                panel.bar(at, value[0], 0.38, yerr=half_of(value), **bar)
                panel.plot([at] * len(seeds), seeds, "k.", markersize=4)
        panel.bar(0, 0, color=colour, alpha=0.75, label="greedy" if how else "sampled")
    panel.axhline(5, color="grey", linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("gold score (5 at best)")
    panel.grid(alpha=0.3, axis="y")
    save(lab, "pipeline", figure, "", legend=panel)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
