"""PPO without one of its parts, or with another in its place.

Claims: a value network of its own, started as the reward model, does better than one from scratch
(Stiennon et al. 2020, arXiv:2009.01325); clipping beats a KL penalty on the step (Schulman et al.
2017, arXiv:1707.06347); RLOO does better than PPO, for less (Ahmadian et al. 2024,
arXiv:2402.14740); GRPO is better without the division by a group's std (Liu et al. 2025,
arXiv:2503.20783).

What to look for: gold over PPO's, paired by prompt and seed: what is "equivalent" can be left out
here. Then KL, what it was bought with, and the seconds of training. PPO without KL has not ended
falling after these 30 iterations. GRPO's rows part what goes with its std (in the loss beta is
outside the division) from what goes with k3, which descends the reverse KL.

    python experiments/ablations.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import functools
import sys

from common import (
    SHORT, against, experiment, gains, golds, policies, reward_model, rows, start,
)  # fmt: skip

PATCHED = "experiments/ablations.py"  # see `patched`
REINFORCE = "grpo.py --advantage reinforce --num_samples 1"
GRPO = "grpo.py --kl_in_loss --kl_estimator"
ABLATIONS = {  # run: label, script and flags; batches stay at 128 episodes
    "ppo": ("PPO", "ppo.py"),
    "no_kl": ("no KL", "ppo.py --beta 0"),
    "from_scratch": ("value network from scratch", "ppo.py --value_init random"),
    "top_k": ("8 likeliest tokens sampled", f"{PATCHED} ppo.py"),
    "unwhitened": ("advantages not whitened", "ppo.py --no-whiten_advantages"),
    "epochs_1": ("1 epoch", "ppo.py --update_epochs 1"),
    "epochs_4": ("4 epochs", "ppo.py --update_epochs 4"),
    "kl": ("J^KL", "ppo.py --surrogate kl"),
    "reinforce": ("REINFORCE, moving mean", REINFORCE),
    "no_baseline": ("REINFORCE, no baseline", f"{PATCHED} {REINFORCE}"),
    "rloo": ("RLOO", "grpo.py --advantage rloo"),
    "grpo": ("GRPO: std, k3 in the loss", f"{GRPO} k3"),
    "grpo_k2": ("GRPO: std, k2 in the loss", f"{GRPO} k2"),
    "grpo_no_std": ("GRPO: no std, k3 in the loss", f"{GRPO} k3 --no-group_std"),
    "grpo_reward": ("GRPO: std, KL in the reward", "grpo.py"),
}
BESIDE = {"reinforce": "no_baseline", "grpo_k2": "grpo", "grpo_no_std": "grpo"}
BESIDE |= {"grpo_reward": "grpo"}  # what else they are held to


def runs(seed):
    found = reward_model(seed)
    for name, (_, command) in ABLATIONS.items():
        found[f"ablation-{name}-{seed}"] = f"{command} {start(seed)} {SHORT}"
    names = [f"E/ablation-{name}-{seed}" for name in ABLATIONS]
    return found | {f"ablations-{seed}": against(seed, names)}


def results(lab):
    groups, gold = {}, {}
    for name, (label, _) in ABLATIONS.items():
        groups[label] = policies(lab, "E/ablations-*", f"E/ablation-{name}-*")
        gold[name] = golds(lab, "E/ablations-*", f"E/ablation-{name}-*")
    title = "PPO without one of its parts, or with another in its place"
    columns = ["gold", "wins", "kl", "distinct_2", "training_seconds"]
    rows(lab, "ablations", groups, columns, title)
    pairs = [*((name, "ppo") for name in list(ABLATIONS)[1:]), *BESIDE.items()]
    labels = {name: label for name, (label, _) in ABLATIONS.items()}
    gaps = {f"{labels[a]}, over {labels[b]}": gold[a] - gold[b] for a, b in pairs}
    gains(lab, "ablations_gains", gaps)


def patched(script):
    """`ablations.py ppo.py FLAGS`: ppo.py, but that it samples among the 8 likeliest tokens, while
    its log-probabilities are of all, an error that other code makes. `ablations.py grpo.py FLAGS`:
    reinforce without a baseline. Neither has a flag."""
    sys.path.insert(0, ".")
    import feedback
    import grpo
    import ppo
    import run

    sys.argv.pop(0)
    if script == "ppo.py":
        feedback.generate = functools.partial(feedback.generate, top_k=8)
    else:
        grpo.ADVANTAGES["reinforce"] = lambda returns, baseline, cfg: returns
    run.guarded(ppo.main if script == "ppo.py" else grpo.main)


if __name__ == "__main__":
    if sys.argv[1:2] in (["ppo.py"], ["grpo.py"]):
        patched(sys.argv[1])
    else:
        experiment(__doc__, runs, results)
