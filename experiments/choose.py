"""The KL penalty's beta, of PPO and of DPO: chosen on validation prompts, by a rule set beforehand.

The rule, for each of the two. Policies of three seeds respond four times to each of the 1,000
validation prompts, at temperature 1; gold plays the people who would judge the responses.

1. A beta is allowed if in no seed one of the three tasks has lost more than 0.2 points to SFT.
2. The best is the allowed beta of the highest gold, a mean over prompts and seeds.
3. Chosen is the largest allowed beta whose gold is no more than one standard error below the
   best's: of what can't be told apart, what moves least. The error is that of their difference,
   paired by prompt and seed, requests on one topic being one draw.

Where the chosen beta is the first or the last of those tried, more are to be tried. What is chosen
becomes the default of ppo.py and dpo.py. No number of a test prompt is read here.

Sources: Breiman et al. 1984, section 3.4.3, for the one standard error; betas of the sources are in
the scripts' --help.

What to look for: gold rises as beta falls, and falls again, one task before the others. The price
of KL is beta in units of the reward model's raw score: what compares runs of two reward models.

    python experiments/choose.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    DPO_BETAS, MARGIN, OVER_BOTH, PPO_BETAS, PROMPTS, against, dpo_at, experiment, golds,
    interval_text, markdown, mean_and_error, over_both, over_seeds, points, policies, ppo_at,
    prices, read_lines, tasks_of, topics_of, within, write,
)  # fmt: skip

BETAS = {"PPO": PPO_BETAS, "DPO": DPO_BETAS}


def runs(seed):
    found = {}
    for beta in PPO_BETAS:
        found |= ppo_at(seed, beta)
    for beta in DPO_BETAS:
        found |= dpo_at(seed, beta)
    names = [f"E/{method.lower()}-{beta}-{seed}" for method in BETAS for beta in BETAS[method]]
    flags = f"--prompts {PROMPTS.format('validation')} --num_samples 4 --bootstrap 200"
    return found | {f"choose-{seed}": against(seed, names, flags)}


def results(lab):
    sft, groups, chosen = golds(lab, "E/choose-*", "E/sft-*", "validation"), {}, {}
    lines = read_lines(PROMPTS.format("validation"))[: sft.shape[1]]
    tasks, topics = tasks_of(lines), topics_of(lines)
    cells = [["", "gold over SFT's", *(f"{task}, least of the seeds" for task in tasks)]]
    cells[0] += ["KL", "price of KL", "by the rule"]
    for method, betas in BETAS.items():
        names = {beta: f"E/{method.lower()}-{beta}-*" for beta in betas}
        gained = {b: golds(lab, "E/choose-*", x, "validation") - sft for b, x in names.items()}
        chosen[method], said = choose(gained, tasks, topics)
        for beta, name in names.items():
            found = groups[f"{method}:{beta}"] = policies(lab, "E/choose-*", name)
            texts = [interval_text(over_both(within(gained[beta], tasks), topics))]
            texts += [f"{lowest(gained[beta], of):.2f}" for of in tasks.values()]
            for seeds in ([line["kl"] for line in found], prices(lab, name)):
                texts.append(interval_text(over_seeds(seeds) if seeds else None, 3))
            cells.append([f"{method}, beta {beta}", *texts, said[beta]])
    write(lab, "choose_rule", {"chosen": chosen}, [*markdown(cells), "", OVER_BOTH])
    columns = ["gold", *(f"{task}_over" for task in tasks)]
    points(lab, "choose", groups, "sqrt_kl", columns, "Betas on validation prompts")


def lowest(gained, of):
    """The least mean, among the seeds, of the prompts of a task."""
    return gained[:, of].mean(1).min()


def choose(gained, tasks, topics):
    """The rule -> the chosen beta, None where none is allowed; {beta: what it says of it}.
    gained {beta: gold over SFT's (seeds, prompts)}, tasks {task: numbers of its prompts}."""
    lost = {x: [t for t, of in tasks.items() if lowest(gained[x], of) < -MARGIN] for x in gained}
    said = {beta: f"{', '.join(names)} lost" for beta, names in lost.items()}
    allowed = [beta for beta in gained if not lost[beta]]
    if not allowed:
        return None, said
    best = max(allowed, key=lambda beta: gained[beta].mean())
    for beta in allowed:
        behind, error, _ = mean_and_error(within(gained[best] - gained[beta], tasks), topics)
        said[beta] = "as good as the best" if behind <= error else "less gold"
    said[best] = "the best"
    chosen = max(beta for beta in allowed if said[beta] != "less gold")
    said[chosen] += ": chosen"
    if chosen in (min(gained), max(gained)):
        said[chosen] += ", but try more betas"
    return chosen, said


if __name__ == "__main__":
    experiment(__doc__, runs, results)
