"""BLEU (Papineni et al. 2002) of a response against its prompt's `reference`, as a reward.

    python ppo.py --reward data/bleu.py --prompts prompts.jsonl      # lines with `reference`
    python data/bleu.py runs/evaluation/samples-0.jsonl              # BLEU of a policy's samples

    BLEU-4 = min(1, exp(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4)

p_n: n-grams of the responses that are in their references, each counted at most as often as it
stands there, over all their n-grams; c, r: words of the responses, of the references. One sentence
has few n-grams and often none of four words in common: `score` adds one to counts and totals of
n = 2, 3, 4 (Lin and Och 2004), so that every word gained is paid for. `corpus_bleu` is the figure
to report, over all responses and without that. Words are what spaces and punctuation separate, in
lower case.
"""

import collections
import json
import math
import re
import sys

WORD = re.compile(r"\w+|[^\w\s]")
ORDERS = (1, 2, 3, 4)


def words_of(text):
    return WORD.findall(text.lower())


def matches(response, reference, n):
    """n-grams of a response (a list of words) that its reference has too, and all of them."""
    grams, known = (
        collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for words in (response, reference)
    )
    return sum(min(count, known[gram]) for gram, count in grams.items()), sum(grams.values())


def corpus_bleu(pairs, smoothing=0.0):
    """BLEU-4, 0 to 1, of pairs (response, reference), texts, all counts being summed over them.

    smoothing: added to matches and totals of n > 1.
    """
    pairs = [(words_of(response), words_of(reference)) for response, reference in pairs]
    c, r = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    log_precisions = []
    for n in ORDERS:
        found = [matches(*pair, n) for pair in pairs]
        hits, total = (sum(counts) + smoothing * (n > 1) for counts in zip(*found, strict=True))
        if not hits:
            return 0.0
        log_precisions.append(math.log(hits / total))
    return math.exp(min(0.0, 1 - r / c) + sum(log_precisions) / len(ORDERS))


def score(prompt, response, *, reference, **fields):
    """Smoothed BLEU-4 of one response, 0 to 1."""
    return corpus_bleu([(response, reference)], smoothing=1.0)


def explain(prompt, response, *, reference, **fields):
    """Shares of n-grams that the reference has, and how long the response is beside it."""
    ours, theirs = words_of(response), words_of(reference)
    parts = {"length_ratio": len(ours) / max(len(theirs), 1)}
    for n in ORDERS:
        hits, total = matches(ours, theirs, n)
        parts[f"precision_{n}"] = hits / max(total, 1)
    return parts


def main():
    """Prints BLEU-4 of each samples file, all its responses being one corpus. Samples files leave
    out responses that are empty, and so does this figure."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        pairs, where = [], path
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path}:{number}"
                    record = json.loads(line)
                    texts = [record["reference"], *record["responses"]]
                    if not isinstance(record["responses"], list) or set(map(type, texts)) != {str}:
                        raise ValueError("expected texts")
                    pairs += [(text, texts[0]) for text in texts[1:]]
            found = corpus_bleu(pairs)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            print(f"{where}: no samples with `reference`: {error!r}", file=sys.stderr)
            sys.exit(2)
        print(f"{path}: BLEU {found:.4f} of {len(pairs)} responses")


if __name__ == "__main__":
    main()
