"""BLEU as the reward: the example of machine translation.

Claims: a reward of BLEU mixed with maximum likelihood (MLE) gives a little more BLEU and no gain
for people (Wu et al. 2016, GNMT, arXiv:1609.08144); RL from scratch does not start (Ranzato et al.
2015, arXiv:1511.06732).

What to look for: RL from scratch stays at 0; after MLE, BLEU rises. Whether gold does is people's
side of it. Mixed with MLE, held-out demonstrations stay likely (on the right). MLE alone is where
the upper two begin.

    python experiments/bleu.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import subprocess
import sys

from common import (
    ALONG, GOLD, SFT, against, curves, evaluations, experiment, feedback, gains, golds, path_of,
    policies, rows,
)  # fmt: skip

RL = "grpo.py --advantage rloo --whiten_advantages --beta 0 --update_epochs 1 --steps 60"
MLE = "--ptx_data data/toy/demonstrations.jsonl --ptx_coef 0.1"
BLEUS = {
    "RL from scratch": "bleu-scratch",
    "RL after MLE": "bleu-alone",
    "RL mixed with MLE, after MLE": "bleu-mixed",
}


def runs(seed):
    found = feedback(seed) | {f"untrained-{seed}": f"{SFT} --epochs 0 --seed {seed}"}
    for name, init, more in (
        ("scratch", "untrained", ""),
        ("alone", "sft", ""),
        ("mixed", "sft", MLE),
    ):
        flags = f"{GOLD} --init E/{init}-{seed} --reward data/bleu.py {ALONG} {more} --seed {seed}"
        found[f"bleu-{name}-{seed}"] = f"{RL} {flags}"
    flags = "--judges data/bleu.py --num_samples 1 --bootstrap 200"
    names = [f"E/{name}-{seed}" for name in BLEUS.values()]
    return found | {f"bleu-{seed}": against(seed, names, flags)}


def results(lab):
    along = {label: evaluations(lab, f"E/{name}-*") for label, name in BLEUS.items()}
    labels = ["smoothed BLEU of sentences", "gold score (points)", "held-out nats a token"]
    title = "BLEU as the reward; MLE alone is where the upper two begin"
    curves(lab, "bleu", along, "step", ["proxy", "gold", "nll"], title, y_labels=labels)
    groups, gold = {}, {}
    for number, (label, name) in enumerate(({"MLE": "sft"} | BLEUS).items()):
        gold[label] = golds(lab, "E/bleu-*", f"E/{name}-*")
        groups[label] = policies(lab, "E/bleu-*", f"E/{name}-*")
        for seed, found in zip(lab.seeds, groups[label], strict=True):
            found["corpus_bleu"] = corpus_bleu(
                path_of(lab, f"E/bleu-*/samples-{number}.jsonl", seed)
            )
    columns = ["corpus_bleu", "data/bleu.py", "gold", "wins", "kl", "entropy"]
    rows(lab, "bleu_rows", groups, columns, "BLEU as the reward, on test prompts")
    gains(lab, "bleu_gains", {f"{label}, over MLE": gold[label] - gold["MLE"] for label in BLEUS})


def corpus_bleu(path):
    """BLEU-4 of all responses as one corpus, as data/bleu.py prints it."""
    done = subprocess.run([sys.executable, "data/bleu.py", path], capture_output=True, check=True)
    return float(done.stdout.split(b"BLEU ")[1].split()[0])


if __name__ == "__main__":
    experiment(__doc__, runs, results)
