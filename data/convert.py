"""Public data sets to this project's formats (data/README.md), one line at a time, no downloads.

    python data/convert.py hh          train.jsonl.gz comparisons.jsonl    # Anthropic's HH-RLHF
    python data/convert.py tldr        batch0.json    comparisons.jsonl    # OpenAI's TL;DR
    python data/convert.py alpaca      alpaca.json    demonstrations.jsonl # also the seed tasks
    python data/convert.py ultrafeedback uf.jsonl     rankings.jsonl
    python data/convert.py chat        prefs.jsonl    comparisons.jsonl    # lists of chat messages
    python data/convert.py best        rankings.jsonl demonstrations.jsonl # the best of each
    python data/convert.py pairs       rankings.jsonl comparisons.jsonl    # a pair of each, drawn
    python data/convert.py check       FILE                              # what it is, if it is good

Input is JSON Lines or one JSON array, output JSON Lines; either may be plain or .gz. Lines that
hold nothing to learn from are dropped, counted and said why. What is not JSON at all ends the
conversion with exit status 2, and then nothing is written.
"""

import argparse
import collections
import gzip
import itertools
import json
import math
import os
import random
import sys
import zlib
from pathlib import Path


def refuse(message):
    """Ends the script for bad input: one line, exit status 2."""
    # What is quoted in it may be of any length, and of many lines.
    print(" ".join(f"{message}".splitlines())[:2000], file=sys.stderr, flush=True)
    sys.exit(2)


# --- reading --------------------------------------------------------------------------------------


def open_file(path, mode):
    return (gzip.open if str(path).endswith(".gz") else open)(path, mode)


def refuse_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def stream_objects(path, arrays=True):
    """Yields (where, object) from JSON Lines, or from one JSON array; `where` is file:line."""
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    buffer, number, in_array, begin, seen, ended = "", 0, None, 1, 0, False
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not buffer:
                    begin = number
                text, at = line.decode("utf-8"), 0
                if in_array is None and text.strip():
                    in_array = text.lstrip().startswith("[") and arrays
                    text = text.lstrip()[1:] if in_array else text
                buffer += text
                while True:
                    skipped = " \t\r\n," if in_array else " \t\r\n"
                    while at < len(buffer) and buffer[at] in skipped:
                        at += 1
                    if at == len(buffer):
                        break
                    if ended:
                        refuse(f"{path}:{number}: line: something follows the end of the array")
                    if in_array and buffer[at] == "]":
                        ended, at = True, at + 1
                        continue
                    try:
                        record, end = decoder.raw_decode(buffer, at)
                    except json.JSONDecodeError as error:
                        # An object of several lines ends where the text read so far ends; an
                        # error before that is one.
                        if in_array and error.pos >= len(buffer.rstrip()) - 1:
                            break
                        raise
                    if not isinstance(record, dict):
                        kind = type(record).__name__
                        refuse(f"{path}:{begin}: line: expected an object, got {kind}")
                    seen += 1
                    yield f"{path}:{begin}", record
                    at, begin = end, number
                    if not in_array and buffer[at:].strip():
                        refuse(f"{path}:{number}: line: not JSON: more follows the object")
                buffer = buffer[at:]
            if buffer.strip() or (in_array and not ended):
                refuse(f"{path}:{number}: line: not JSON: the file ends in the middle")
    except UnicodeDecodeError as error:
        refuse(f"{path}:{number}: line: not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        refuse(f"{path}:{begin}: line: not JSON: {error}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        refuse(f"{path}:{number + 1}: line: not a whole gzip file: {error}")
    except OSError as error:
        refuse(f"{path}:0: file: can't be read: {error.strerror or error}")
    if not seen:
        refuse(f"{path}:0: file: is empty")


# --- the formats ----------------------------------------------------------------------------------
# Each takes a record and returns a line of ours, or a string: why there is nothing in it to learn.


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def compare(prompt, chosen, rejected, **fields):
    """A comparison, or why it is none."""
    if not is_text(prompt):
        return "no prompt"
    if not is_text(chosen) or not is_text(rejected):
        return "an empty response"
    if chosen == rejected:
        return "the two responses are equal"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | fields


def convert_hh(record):
    """{"chosen": transcript, "rejected": transcript}, alike up to the last assistant turn.

    The prompt keeps the turns and ends in "Assistant:"; the response keeps its leading space, so
    that the two, tokenised apart, are the tokens of the transcript.
    """
    turn = "\n\nAssistant:"
    texts = [record.get("chosen"), record.get("rejected")]
    if not all(isinstance(text, str) for text in texts):
        return "no chosen and rejected transcripts"
    if not all(turn in text for text in texts):
        return "no assistant turn"
    (prompt, _, chosen), (other, _, rejected) = (text.rpartition(turn) for text in texts)
    if prompt != other:
        return "the transcripts differ before the last assistant turn"
    return compare(prompt + turn, chosen, rejected)


def convert_tldr(record):
    """OpenAI's comparisons {"info", "summaries", "choice"}, or the filtered Reddit demonstrations
    {"subreddit", "title", "post", "summary"}; prompts as in Stiennon et al. 2020."""
    info = record.get("info", record)
    if not isinstance(info, dict) or not is_text(info.get("post")):
        return "no Reddit post (a news article, perhaps)"
    head = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\n"
    prompt = f"{head}POST: {info['post'].strip()}\n\nTL;DR:"
    if "summaries" in record:
        summaries, choice = record["summaries"], record.get("choice")
        whole = type(choice) is int and choice in (0, 1)
        if not isinstance(summaries, list) or len(summaries) != 2 or not whole:
            return "not two summaries and a choice"
        if not all(isinstance(s, dict) and is_text(s.get("text")) for s in summaries):
            return "an empty response"
        chosen, rejected = (" " + summaries[i]["text"].strip() for i in (choice, 1 - choice))
        policies = [str(summaries[i].get("policy")) for i in (choice, 1 - choice)]
        fields = {"policy": policies}
        if record.get("worker"):
            fields["annotator"] = str(record["worker"])
        return compare(prompt, chosen, rejected, **fields)
    if not is_text(record.get("summary")):
        return "no summary"
    return {"prompt": prompt, "response": " " + record["summary"].strip()}


def convert_alpaca(record):
    """{"instruction", "input", "output"}; or a seed task, whose first instance is taken."""
    instances = record.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        record = record | {name: instances[0].get(name) for name in ("input", "output")}
    if not is_text(record.get("instruction")):
        return "no instruction"
    if not is_text(record.get("output")):
        return "an empty response"
    prompt = f"### Instruction:\n{record['instruction'].strip()}\n\n"
    if is_text(record.get("input")):
        prompt += f"### Input:\n{record['input'].strip()}\n\n"
    return {"prompt": prompt + "### Response:\n", "response": record["output"].strip()}


def convert_ultrafeedback(record):
    """{"instruction", "completions": [{"response", "overall_score", "model"}, ...]} -> a ranking by
    overall_score, in HH-RLHF's transcript form."""
    completions = record.get("completions")
    if not is_text(record.get("instruction")) or not isinstance(completions, list):
        return "no instruction and completions"
    rated = []
    for completion in completions:
        if isinstance(completion, dict) and is_text(completion.get("response")):
            try:
                score = float(completion.get("overall_score"))
            except (TypeError, ValueError, OverflowError):
                continue
            if math.isfinite(score):
                text = " " + completion["response"].strip()
                rated.append((score, text, str(completion.get("model"))))
    if len(rated) < 2:
        return "fewer than two rated completions"
    scores, responses, policies = zip(*sorted(rated, key=lambda r: -r[0]), strict=True)
    return {
        "prompt": f"\n\nHuman: {record['instruction'].strip()}\n\nAssistant:",
        "responses": list(responses),
        "scores": list(scores),
        "policy": list(policies),
    }


def transcript(messages):
    """Chat messages before an answer, as HH-RLHF's transcripts write them; None if not such."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    text = ""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return None
        if message.get("role") not in names:
            return None
        text += f"\n\n{names[message['role']]}: {message['content'].strip()}"
    return text + "\n\nAssistant:" if text else None


def convert_chat(record):
    """{"chosen": messages, "rejected": messages} with an optional "prompt" (text, or the messages
    before them) -> a comparison; {"messages": messages} -> a demonstration. The response is the
    last message, by the assistant."""
    before = record.get("prompt")
    before = before if isinstance(before, list) else []

    def split(messages):
        if not isinstance(messages, list) or not messages:
            return None, None
        last = messages[-1]
        if not isinstance(last, dict) or last.get("role") != "assistant":
            return None, None
        if messages[: len(before)] != before:
            messages = before + messages
        if len(messages) == 1 and is_text(record.get("prompt")):
            messages = [{"role": "user", "content": record["prompt"]}, *messages]
        text = last.get("content")
        return transcript(messages[:-1]), " " + text.strip() if is_text(text) else None

    if "messages" in record:
        prompt, response = split(record["messages"])
        if prompt is None:
            return "no turns that end in the assistant's"
        return {"prompt": prompt, "response": response} if response else "an empty response"
    (prompt, chosen), (other, rejected) = split(record.get("chosen")), split(record.get("rejected"))
    if prompt is None or other is None:
        return "no turns that end in the assistant's"
    if prompt != other:
        return "the conversations differ before the last turn"
    return compare(prompt, chosen, rejected)


def ranked(record):
    """A ranking's responses, best first, or why there are none."""
    responses = record.get("responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(map(is_text, responses)):
        return "no ranking of two or more responses"
    scores = record.get("scores") or [0] * len(responses)
    if not isinstance(scores, list) or len(scores) != len(responses):
        return "not as many scores as responses"
    return responses


def with_policies(record, *indices):
    """What a ranking's line has beside its responses, `policy` of those at `indices` alone."""
    named = ("prompt", "responses", "response", "scores", "chosen", "rejected", "label", "margin")
    fields = {name: value for name, value in record.items() if name not in named}
    policy = fields.pop("policy", None)
    if isinstance(policy, list) and len(policy) == len(record["responses"]):
        found = [policy[i] for i in indices]
        fields["policy"] = found if len(found) > 1 else found[0]
    elif isinstance(policy, str):
        fields["policy"] = policy
    return fields


def convert_best(record):
    """Rankings (ours) -> the best response of each as a demonstration: SFT on what was chosen."""
    responses = ranked(record)
    if isinstance(responses, str):
        return responses
    if not isinstance(record.get("prompt"), str):
        return "no prompt"
    line = {"prompt": record["prompt"], "response": responses[0]}
    return line | with_policies(record, 0)


def convert_pairs(record, rng=None, flip=0.0):
    """Rankings (ours) -> a comparison of two of each, drawn; with --flip the wrong way round."""
    rng = rng or random.Random(0)
    responses = ranked(record)
    if isinstance(responses, str):
        return responses
    scores = record.get("scores") or list(range(len(responses), 0, -1))
    pairs = itertools.combinations(range(len(responses)), 2)
    pairs = [(i, j) for i, j in pairs if scores[i] != scores[j] and responses[i] != responses[j]]
    if not pairs:
        return "no two responses differ"
    chosen, rejected = rng.choice(pairs)
    if rng.random() < flip:
        chosen, rejected = rejected, chosen
    fields = with_policies(record, chosen, rejected)
    return compare(record.get("prompt"), responses[chosen], responses[rejected], **fields)


FORMATS = {
    "hh": convert_hh,
    "tldr": convert_tldr,
    "alpaca": convert_alpaca,
    "ultrafeedback": convert_ultrafeedback,
    "chat": convert_chat,
    "best": convert_best,
    "pairs": convert_pairs,
}


def convert(name, source, target, **options):
    """Converts a file and prints what was read, written, dropped and why."""
    target = Path(target)
    temporary = target.with_name(f".tmp.{target.name}")  # keeps the .gz at its end
    read, written, dropped = 0, 0, collections.Counter()
    try:
        with open_file(temporary, "wb") as file:
            for _, record in stream_objects(source):
                read += 1
                line = FORMATS[name](record, **options)
                if isinstance(line, str):
                    dropped[line] += 1
                    continue
                try:
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                except UnicodeEncodeError:  # valid JSON, but no text
                    dropped["half of a surrogate pair"] += 1
                    continue
                written += 1
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if not written:
            refuse(f"{source}: none of its {read} records is of the {name} format: {dict(dropped)}")
        os.replace(temporary, target)
    except OSError as error:
        refuse(f"{target}: could not be written: {error.strerror or error}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{source}: read {read}, wrote {written} to {target}, dropped {sum(dropped.values())}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count}: {reason}")


# --- check ----------------------------------------------------------------------------------------


def is_number(value):
    """Whether it is a number that arithmetic stays finite with."""
    return type(value) in (int, float) and abs(value) < 1e30


def fall(scores):
    return all(a >= b for a, b in itertools.pairwise(scores))


def kind_of(record):
    """Which of data/README.md's formats a line is of."""
    if "chosen" in record or "rejected" in record:
        return "comparisons"
    if "responses" in record:
        scores = record.get("scores")
        if not isinstance(scores, list) or not all(map(is_number, scores)):
            return "rankings" if "scores" in record else "rankings or samples"
        return "rankings" if fall(scores) else "samples"
    return "demonstrations" if "response" in record else "prompts"


def faults(record, kind):
    """Yields (field, what is wrong) of a line."""

    def text(name, may_be_empty=False):
        if name not in record:
            yield name, "is missing"
        elif not isinstance(record[name], str):
            yield name, f"expected a string, got {type(record[name]).__name__}"
        elif not may_be_empty and not record[name].strip():
            yield name, "is empty"
        elif any("\ud800" <= character <= "\udfff" for character in record[name]):
            yield name, "holds half of a surrogate pair, which is no text"

    yield from text("prompt", may_be_empty=kind in ("demonstrations", "prompts"))
    if kind == "demonstrations":
        yield from text("response")
    if kind == "comparisons":
        yield from text("chosen")
        yield from text("rejected")
        margin, label = record.get("margin", 0), record.get("label", 1)
        if not is_number(margin) or margin < 0:
            yield "margin", f"expected a number of at least 0, got {margin!r}"
        if not is_number(label) or not 0.5 <= label <= 1:
            yield "label", f"expected a probability from 0.5 to 1, got {label!r}"
    if kind.startswith("rankings") or kind == "samples":
        responses, scores = record.get("responses"), record.get("scores")
        if not isinstance(responses, list) or (len(responses) < 2 and kind == "rankings"):
            yield "responses", "expected a list of two strings or more"
        elif not responses or not all(map(is_text, responses)):
            yield "responses", "expected strings, none of them empty"
        elif "scores" in record and (
            not isinstance(scores, list)
            or len(scores) != len(responses)
            or not all(map(is_number, scores))
        ):
            yield "scores", f"expected {len(responses)} numbers, one a response"
        elif kind == "rankings" and not fall(scores or []):
            yield "scores", "expected numbers that fall, as the best comes first"
    if record.get("kind", "open") not in ("open", "closed"):
        yield "kind", f"expected open or closed, got {record['kind']!r}"
    if not isinstance(record.get("unsafe", False), bool):
        yield "unsafe", f"expected true or false, got {record['unsafe']!r}"
    for name in ("task", "annotator", "reference"):
        if name in record:
            yield from text(name)
    policy = record.get("policy", "")
    if not isinstance(policy, str) and not (
        isinstance(policy, list) and all(isinstance(name, str) for name in policy)
    ):
        yield "policy", "expected a string, or a list of them"


def check(path):
    """Says what a file is, and refuses it at its first bad line."""
    lines, kind, tasks = 0, None, collections.Counter()
    for where, record in stream_objects(path, arrays=False):
        kind = kind or kind_of(record)
        for field, reason in faults(record, kind):
            refuse(f"{where}: {field}: {reason}")
        lines += 1
        tasks[record.get("task", "none given")] += 1
    print(f"{path}: {kind}, {lines} lines, all good")
    for task, count in tasks.most_common(12):
        print(f"  task {task}: {count}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in FORMATS.items():
        command = commands.add_parser(name, help=function.__doc__.split("\n")[0])
        command.add_argument("source", help="the public file, .json, .jsonl or .gz")
        command.add_argument("target", help="our file to write, .jsonl or .jsonl.gz")
        if name == "pairs":
            command.add_argument("--flip", type=float, default=0.0, help="share of wrong labels")
            command.add_argument("--seed", type=int, default=0, help="of what is drawn")
    commands.add_parser("check", help="what is this file, and is it good?").add_argument("file")
    args = parser.parse_args()
    if args.command == "check":
        check(args.file)
    elif args.command == "pairs":
        if not 0 <= args.flip <= 1:
            refuse(f"--flip {args.flip}: expected a share, 0 to 1")
        rng = random.Random(args.seed)
        convert("pairs", args.source, args.target, rng=rng, flip=args.flip)
    else:
        convert(args.command, args.source, args.target)


if __name__ == "__main__":
    main()
