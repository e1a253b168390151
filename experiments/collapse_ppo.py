"""Reward collapse: does it matter to a policy?

Claim: a reward model whose utility depends on the kind of prompt tells policies more (Song et al.
2023, arXiv:2305.17608, who did not train one).

What to look for: gold over SFT's of the prompts with many good answers (open) and with few
(closed), after PPO against each of two reward models, with one utility for all, and by kind; what
the latter has over the former. The spread of a reward model's scores over SFT's samples says where
it offers most, and there PPO goes; at one beta the price of a nat in raw score grows with it.

    python experiments/collapse_ppo.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import json
import statistics
from pathlib import Path

from common import (
    GOLD, against, by_seed, experiment, feedback, gains, golds, path_of, policies, prices, rows,
    start,
)  # fmt: skip

KINDS = "open", "closed"
MODELS = {"one utility": "one", "by kind": "by_kind"}


def runs(seed):
    """Eight responses each to 3,000 prompts; far fewer passes than it takes to interpolate."""
    ask = f"annotate.py {GOLD} --policy E/sft-{seed} --num_responses 8 --num_prompts 3000"
    flags = f"--init E/sft-{seed} --data E/eight-{seed}/rankings.jsonl --seed {seed}"
    flags += (
        ' --num_responses 8 --validation "" --epochs 2 --batch_size 16 --lr 5e-4 --eval_every 0'
    )
    found = feedback(seed) | {f"eight-{seed}": f"{ask} --seed {seed}"}
    found[f"collapse-one-{seed}"] = f"collapse.py {flags} --closed_utility inverse_power"
    found[f"collapse-by_kind-{seed}"] = f"collapse.py {flags}"
    for name in MODELS.values():
        found[f"ppo-{name}-{seed}"] = f"ppo.py {start(seed, f'E/collapse-{name}')}"
        score = f"--data E/collapse-evaluation-{seed}/samples-0.jsonl"  # SFT's
        score += f" --out E/scores-{name}-{seed}.jsonl"
        command = f"reward.py score --init E/collapse-{name}-{seed} {score}"
        found[f"scores-{name}-{seed}.jsonl"] = command
    names = [f"E/ppo-{name}-{seed}" for name in MODELS.values()]
    return found | {f"collapse-evaluation-{seed}": against(seed, names, "--by kind")}


def results(lab):
    groups = {"SFT": policies(lab, "E/collapse-evaluation-*", "E/sft-*")}
    for label, name in MODELS.items():
        groups[label] = policies(lab, "E/collapse-evaluation-*", f"E/ppo-{name}-*")
    columns = ["wins", "gold", "kl", "open_gold", "closed_gold", "open_over", "closed_over"]
    table = {}
    for label, name in MODELS.items():
        for column in columns:
            table[f"{label}: {column}"] = [found[column] for found in groups[label]]
        table[f"{label}: price of KL"] = prices(lab, f"E/ppo-{name}-*")
        for kind in KINDS:
            files = [path_of(lab, f"E/scores-{name}-*.jsonl", seed) for seed in lab.seeds]
            table[f"{label}: std of scores, {kind}"] = [spread(file, kind) for file in files]
    by_seed(lab, "collapse_ppo_seeds", table, 3)
    rows(lab, "collapse_ppo", groups, columns, "PPO against reward models with one utility or two")
    one, two = (golds(lab, "E/collapse-evaluation-*", f"E/ppo-{x}-*") for x in MODELS.values())
    gains(lab, "collapse_ppo_gains", {"by kind, over one utility": two - one}, by="kind")


def spread(file, kind):
    """Standard deviation of the scores of all samples to prompts of a kind."""
    lines = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    return statistics.pstdev(x for line in lines if line["kind"] == kind for x in line["scores"])


if __name__ == "__main__":
    experiment(__doc__, runs, results)
