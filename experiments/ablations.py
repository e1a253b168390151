"""PPO without one of its parts, or with another in its place.

Claims: a value network of its own, started as the reward model, does better than one from scratch
(Stiennon et al. 2020, arXiv:2009.01325); clipping beats a KL penalty on the step (Schulman et al.
2017, arXiv:1707.06347); RLOO does as well as PPO, for less (Ahmadian et al. 2024,
arXiv:2402.14740).

What to look for: the column of gold over PPO's, paired by seed: what is not surely below 0 can be
left out here. Then KL, what it was bought with, and the seconds of training. PPO without KL has not
ended falling after these 30 iterations.

    python experiments/ablations.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import functools
import sys

from common import SHORT, against, experiment, policies, ppo_at, rows, start

ABLATIONS = {  # run: label, script and flags; batches stay at 128 episodes
    "from_scratch": ("value network from scratch", "ppo.py --value_init random"),
    "top_k": ("8 likeliest tokens sampled", "experiments/ablations.py ppo.py"),
    "unwhitened": ("advantages not whitened", "ppo.py --no-whiten_advantages"),
    "epochs_1": ("1 epoch", "ppo.py --update_epochs 1"),
    "epochs_4": ("4 epochs", "ppo.py --update_epochs 4"),
    "kl": ("J^KL", "ppo.py --surrogate kl"),
    "reinforce": (
        "REINFORCE",
        "grpo.py --advantage reinforce --num_samples 1 --whiten_advantages",
    ),
    "rloo": ("RLOO, 4 samples", "grpo.py --advantage rloo"),
    "grpo": ("GRPO, 4 samples", "grpo.py --kl_in_loss --kl_estimator k3"),
}


def runs(seed):
    found = ppo_at(seed, 0.2) | ppo_at(seed, 0)
    for name, (_, command) in ABLATIONS.items():
        found[f"ablation-{name}-{seed}"] = f"{command} {start(seed)} {SHORT}"
    names = ["ppo-0.2", "ppo-0", *(f"ablation-{name}" for name in ABLATIONS)]
    return found | {f"ablations-{seed}": against(seed, [f"E/{name}-{seed}" for name in names])}


def results(lab):
    names = {"PPO": "ppo-0.2", "no KL": "ppo-0"}
    names |= {label: f"ablation-{name}" for name, (label, _) in ABLATIONS.items()}
    groups = {x: policies(lab, "E/ablations-*", f"E/{name}-*") for x, name in names.items()}
    title = "PPO without one of its parts, or with another in its place"
    columns = ["gold", "wins", "kl", "distinct_2", "training_seconds"]
    rows(lab, "ablations", groups, columns, title)


def sample_top_k():
    """`ablations.py ppo.py FLAGS`: ppo.py, but that it samples among the 8 likeliest tokens, while
    its log-probabilities are of all: an error that other code makes, so that it has no flag."""
    sys.path.insert(0, ".")
    import feedback
    import ppo
    import run

    feedback.generate = functools.partial(feedback.generate, top_k=8)
    sys.argv.pop(0)
    run.guarded(ppo.main)


if __name__ == "__main__":
    sample_top_k() if sys.argv[1:2] == ["ppo.py"] else experiment(__doc__, runs, results)
