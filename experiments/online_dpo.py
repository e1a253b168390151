"""DPO online: learning from judged samples of the policy's own, round by round.

Claim: at as many judged pairs, online DPO does better than offline (Guo et al. 2024, OAIF,
arXiv:2402.04792; Dong et al. 2024, RLHF Workflow, arXiv:2405.07863).

What to look for: wins and gold of the online run beside the offline one's, at about the same number
of pairs, judged by the same simulated annotator, and KL, what they were bought with; what online
has over offline, paired by prompt and seed.

    python experiments/online_dpo.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    GOLD, LATER, against, by_seed, experiment, feedback, gains, golds, policies, reports, rows,
)  # fmt: skip

# Two responses to each of 5,120 prompts; one annotator, who agrees with gold in 75% of pairs: in
# online rounds that is noise of 1.91 gold points.
ANNOTATOR = "--num_responses 2 --annotators 1 --noise_spread 0 --bias 0 --overlap 0"
NAMES = {"SFT": "sft", "offline": "offline", "online": "online"}
EVALUATION = "E/online-evaluation-*"


def runs(seed):
    ask = f"annotate.py {GOLD} --policy E/sft-{seed} {ANNOTATOR} --num_prompts 5120 --seed {seed}"
    dpo = f'dpo.py {GOLD} --init E/sft-{seed} --validation "" {LATER} --cache "" --seed {seed}'
    online = "--online data/toy.py --judge_noise 1.91 --rounds 20"
    names = [f"E/{x}-{seed}{t}" for x in ("offline", "online") for t in ("", "@temperature=0")]
    names = [f"E/sft-{seed}@temperature=0", *names]
    return feedback(seed) | {
        f"pairs-{seed}": ask,
        f"offline-{seed}": f"{dpo} --data E/pairs-{seed}/rankings.jsonl",
        f"online-{seed}": f"{dpo} {online}",
        f"online-evaluation-{seed}": against(seed, names),
    }


def results(lab):
    groups, table = {}, {}
    for label, name in NAMES.items():
        groups[label] = policies(lab, EVALUATION, f"E/{name}-*")
        greedy = policies(lab, EVALUATION, f"E/{name}-*@temperature=0")
        for found, other in zip(groups[label], greedy, strict=True):
            found |= {"greedy_gold": other["gold"], "greedy_wins": other["wins"]}
    columns = ["gold", "wins", "greedy_gold", "greedy_wins", "kl"]
    for label in ("offline", "online"):
        judged = [report["labels"] for report in reports(lab, f"E/{label}-*")]
        table[f"{label}: judged pairs"] = judged
        for column in columns:
            table[f"{label}: {column}"] = [found[column] for found in groups[label]]
    by_seed(lab, "online_dpo_seeds", table)
    rows(lab, "online_dpo", groups, columns, "DPO offline and online, at as many judged pairs")
    pairs = {}
    for label, how in {"sampled": "", "greedy": "@temperature=0"}.items():
        online, offline = (golds(lab, EVALUATION, f"E/{x}-*{how}") for x in ("online", "offline"))
        pairs[f"online over offline, {label}"] = online - offline
    gains(lab, "online_dpo_gains", pairs)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
