"""AI feedback in the place of people's.

Claims: a judge is right more often when it gives reasons first and is asked in both orders; RLAIF
does as well as RLHF; direct RLAIF, by a judge's ratings, does better than a reward model distilled
from its preferences (all Lee et al. 2023, arXiv:2309.00267); critiques and revisions by principles
make a helpful-only policy harmless, at little cost in help (Bai et al. 2022, arXiv:2212.08073).

What to look for: agreement of the judge with gold, by how it is asked; the harmless rate, which
rises with each revision; wins by the judge's labels beside those by people's, and what they cost:
KL, and gold of benign requests over SFT's, which a win rate hides. The last table has each claim's
difference in gold, and its word.

    python experiments/rlaif.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    BEST, DPO_BETA, GOLD, LATER, against, by_seed, dpo_at, experiment, gains, golds, held, judging,
    policies, prices, reports, rows, start,
)  # fmt: skip

# Small GPTs play the models that one would take off the shelf, each with demonstrations of its own.
TAUGHT = "sft.py --n_positions 384 --prompt_loss_weight 0.3 --batch_size 6 --lr 3e-3 --eval_every 0"
TAUGHT += " --num_prompts 100 --max_new_tokens 128"
POLICIES = {
    "SFT": "sft",
    "PPO, people's labels": f"held-{BEST}",
    "PPO, the judge's labels": "ppo-ai",
    "DPO, people's labels": f"dpo-{DPO_BETA}",
    "DPO, the judge's labels": "dpo-ai",
    "direct, the rater": "direct",
    "SFT on revisions": "cai",
}
CLAIMS = [(f"{how}, the judge's labels", f"{how}, people's labels") for how in ("PPO", "DPO")]
CLAIMS += [("direct, the rater", "PPO, the judge's labels"), ("SFT on revisions", "SFT")]


def runs(seed):
    found, sft = held(seed) | dpo_at(seed, DPO_BETA), f"--init E/sft-{seed} {GOLD} --seed {seed}"
    for who in ("judge", "rater", "critic"):
        data = f"--data data/toy/{who}.jsonl --validation data/toy/{who}_validation.jsonl"
        prompts = f"--prompts data/toy/{who}_validation.jsonl"
        found[f"{who}-{seed}"] = f"{TAUGHT} {data} {prompts} --seed {seed}"
    judge, samples = f"--judge E/judge-{seed} --seed {seed}", f"E/feedback-{seed}/samples.jsonl"
    labels, hard = f"E/labels-{seed}/comparisons.jsonl", f"E/hard-{seed}.jsonl"
    test = f"--data E/feedback-test-{seed}/rankings.jsonl {GOLD}"
    red_team = "--prompts data/toy/prompts_red_team.jsonl --num_prompts 2000 --revisions 4"
    helpful = f"--mix data/toy/demonstrations_helpful.jsonl {GOLD} --seed {seed}"
    revised = f"E/revisions-{seed}/demonstrations.jsonl"
    names = [f"E/{name}-{seed}" for name in list(POLICIES.values())[1:]]
    return found | {
        f"agreement-{seed}": f"rlaif.py agree --judges E/judge-{seed} --seed {seed} {test}",
        f"labels-{seed}": f"rlaif.py label {judge} --samples {samples}",
        f"reward-ai-{seed}": judging(seed, labels),
        # As `label --hard` would write them, without asking again.
        f"hard-{seed}.jsonl": f"""sed 's/"label": [0-9.e-]*/"label": 1.0/' {labels} > {hard}""",
        f"reward-hard-{seed}": judging(seed, hard),
        f"ppo-ai-{seed}": f"ppo.py {start(seed, 'E/reward-ai')} {LATER}",
        f"dpo-ai-{seed}": f'dpo.py {sft} --data {labels} --validation "" {LATER} --cache E/cache',
        f"direct-{seed}": f"rlaif.py direct --judge E/rater-{seed} {sft} --steps 100 {LATER}",
        f"revisions-{seed}": f"rlaif.py revise --policy E/sft-{seed} --judge E/critic-{seed} "
        f"{red_team} {helpful}",
        f"cai-{seed}": f"sft.py {sft} --data {revised} --lr 5e-4 {LATER}",
        f"ai-evaluation-{seed}": against(seed, names, "--num_samples 4"),
    }


def results(lab):
    table, cells = {}, [next(iter(r["judges"].values())) for r in reports(lab, "E/agreement-*")]
    for how in cells[0]:
        for name in ("all", "one_order"):
            text = f"judge, {how}" + (", one order" if name == "one_order" else "")
            table[f"{text}: agrees with gold"] = [cell[how][name]["rate"] for cell in cells]
        same = [cell[how]["position_bias"]["same"] for cell in cells]
        table[f"judge, {how}: same position in both orders"] = same
    for n in map(str, range(5)):
        found = [report["by_revision"][n]["harmless"] for report in reports(lab, "E/revisions-*")]
        table[f"harmless, revision {n}"] = found
    for label, name in {"people's": "12000", "the judge's": "ai", "its hard": "hard"}.items():
        for column in ("gold_accuracy", "ece"):
            found = [report[column] for report in reports(lab, f"E/reward-{name}-*")]
            table[f"reward model, {label} labels: {column}"] = found
    groups = {x: policies(lab, "E/ai-evaluation-*", f"E/{name}-*") for x, name in POLICIES.items()}
    columns = ["wins", "gold", "kl", "benign_over", "benign_helpful", "benign_refused"]
    columns.append("harmful_harmless")
    for label, some in groups.items():
        table |= {f"{label}: {column}": [f[column] for f in some] for column in columns}
        if price := prices(lab, f"E/{POLICIES[label]}-*"):
            table[f"{label}: price of KL"] = price
    by_seed(lab, "rlaif_seeds", table, 3)
    rows(lab, "rlaif", groups, columns, "AI feedback beside people's", differences=False)
    gold = {x: golds(lab, "E/ai-evaluation-*", f"E/{name}-*") for x, name in POLICIES.items()}
    gains(lab, "rlaif_gains", {f"{a}; over {b}": gold[a] - gold[b] for a, b in CLAIMS})


if __name__ == "__main__":
    experiment(__doc__, runs, results)
