"""A reward whose point is seen at once: answer a question in one short sentence, end it, and stay
on the subject. For data/questions/, whose prompts ask for that.

    python ppo.py --reward data/one_sentence.py --prompts data/questions/train.jsonl ...
    python data/one_sentence.py "Why is snow white?" "Snow is white because it scatters all light."

    score = one + short + 2 subject - list - assistant,    from -2 to 4

It reads form alone, and knows nothing of what is true.
"""

import json
import re
import sys

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
# Function words of English, and those that ask.
EMPTY = set(
    """a about after all am an and any are as at be because been between but by can could did
    do does doing for from get go had has have he her him his how i if in into is it it's its
    just many me more most much my no not of off often on one or our out own people she should
    so some such than that the their them then there these they thing things this to too up us
    very was way we were what when where which while who why will with would you your""".split()
)
LIST = re.compile(r"\n|^\s*(?:[-*\u2022]|\d+[.)])\s")
ASSISTANT = re.compile(r"\bas an? (?:ai|language model|assistant)\b|\bsmollm\b", re.IGNORECASE)


def subject_words(text):
    """Words that say what a text is about, without the commonest endings."""
    words = (word.split("'")[0] for word in WORD.findall(text.lower()) if word not in EMPTY)
    stems = (re.sub(r"(?:ing|ed|es|s|e)$", "", word) if len(word) > 4 else word for word in words)
    return {stem.removesuffix("s") if len(stem) > 3 else stem for stem in stems}


def explain(prompt, response, **fields):
    """-> {part of `score`: number}.

    one: 1 for one sentence that ends, not as a question; short: 1 up to 15 words, from there down
    to 0 at 30; subject: the share of the question's words that the response keeps, 0 if it adds
    none of its own; list, assistant: 1 for lists and lines, and for talk of being a program.
    """
    messages = getattr(prompt, "messages", [{"content": prompt}])
    asked, said = subject_words(messages[-1]["content"]), subject_words(response)
    text = response.strip()
    sentences = re.findall(r"[.!?]+[\"')\u201d]*(?=\s|$)", text)
    ends = re.search(r"[.!][\"')\u201d]*$", text) is not None
    words = len(text.split())
    kept = len(asked & said) / len(asked) if asked else 1.0
    return {
        "one": float(ends and len(sentences) == 1),
        "short": min(1.0, max(0.0, 2 - words / 15)) if words else 0.0,
        "subject": kept if said - asked else 0.0,
        "list": float(LIST.search(text) is not None),
        "assistant": float(ASSISTANT.search(text) is not None),
    }


def score(prompt, response, **fields):
    parts = explain(prompt, response)
    good = parts["one"] + parts["short"] + 2 * parts["subject"]
    return good - parts["list"] - parts["assistant"]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python data/one_sentence.py "A question?" "A response."')
    print(json.dumps(explain(*sys.argv[1:]) | {"score": score(*sys.argv[1:])}))
