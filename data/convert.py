"""Public data sets to this project's formats (data/README.md), one line at a time, no downloads.

    python data/convert.py hh          train.jsonl.gz comparisons.jsonl    # Anthropic's HH-RLHF
    python data/convert.py tldr        batch0.json    comparisons.jsonl    # OpenAI's TL;DR
    python data/convert.py alpaca      alpaca.json    demonstrations.jsonl # also the seed tasks
    python data/convert.py ultrafeedback uf.jsonl     rankings.jsonl
    python data/convert.py chat        prefs.jsonl    comparisons.jsonl    # lists of chat messages
    python data/convert.py best        rankings.jsonl demonstrations.jsonl # the best of each
    python data/convert.py pairs       rankings.jsonl comparisons.jsonl    # a pair of each, drawn
    python data/convert.py hh          train.jsonl.gz mine --split 0.05    # all files for `make`
    python data/convert.py ours        lines.jsonl    mine --split 0.05    # and of our own formats
    python data/convert.py hh          train.jsonl.gz turns.jsonl --turns  # prompts of messages
    python data/convert.py check       FILE...                             # what is it? is it good?

Input is JSON Lines or one JSON array, output JSON Lines; either may be plain or .gz. Lines that
hold nothing to learn from are dropped, counted and said why. What is not JSON at all ends the
conversion with exit status 2, and then nothing is written.

With --split the output is a folder with all that `make DATA=folder` wants: demonstrations (the best
response, where there are several), rankings (or comparisons) and prompts, each for training, for
validation and for the test. A prompt is on one side alone, by its hash: in all files, of all sets.

With --turns the prompts of hh, ultrafeedback and chat are lists of messages (role, content), for
models that have a template for them; without it, transcripts as HH-RLHF writes them.
"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
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
                text, at = line.decode("utf-8-sig" if number == 1 else "utf-8"), 0
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


# --- our formats ----------------------------------------------------------------------------------


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


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
        elif re.search("[\ud800-\udfff]", record[name]):
            yield name, "holds half of a surrogate pair, which is no text"

    if isinstance(record.get("prompt"), list):
        try:
            turns = turns_of(record["prompt"], "prompt")
            if not turns or turns[-1][0] != "user":
                yield "prompt", "expected messages of which the last is the user's"
            elif any(re.search("[\ud800-\udfff]", content) for _, content in turns):
                yield "prompt", "holds half of a surrogate pair, which is no text"
        except Unusable as error:
            yield "prompt", f"{error}".removeprefix("prompt: ")
    else:
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


# How sets made for other libraries write the end of a response out. Here it would be learnt as
# letters: an end-of-text token follows every response anyway.
MARKERS = re.compile(r"(?:<\|(?:endoftext|end_of_text|eot_id|im_end)\|>\s*)+\Z")


def without_markers(record):
    """The record, no response of which ends in one of MARKERS."""

    def stripped(text):
        found = MARKERS.search(text) if isinstance(text, str) else None
        return text[: found.start()].rstrip() if found else text

    names = [name for name in ("response", "chosen", "rejected") if name in record]
    changed = {name: stripped(record[name]) for name in names}
    if isinstance(record.get("responses"), list):
        changed["responses"] = [stripped(response) for response in record["responses"]]
    return record | changed


class Unusable(Exception):
    """Why there is nothing to learn from in a record."""


def refuse_faults(line, kind):
    for field, reason in faults(line, kind):
        raise Unusable(f"{field}: {reason.partition(', got')[0]}")  # one reason, whatever it got


def ranked(record):
    """The responses of a line of ours, best first: a ranking's, or a comparison's two."""
    if "responses" in record:
        refuse_faults(record, "rankings")
        return record["responses"]
    if "chosen" not in record:
        raise Unusable("no ranking or comparison")
    refuse_faults(record, "comparisons")
    return [record["chosen"], record["rejected"]]


def with_policies(record, responses, *indices):
    """What a line has beside its responses, `policy` of those at `indices` alone."""
    named = ("prompt", "responses", "response", "scores", "chosen", "rejected", "label", "margin")
    fields = {name: value for name, value in record.items() if name not in named}
    policy = fields.pop("policy", None)
    if isinstance(policy, list) and len(policy) == len(responses):
        found = [policy[i] for i in indices]
        fields["policy"] = found if len(found) > 1 else found[0]
    elif isinstance(policy, str):
        fields["policy"] = policy
    return fields


def best_of(line):
    """A line of ours as a demonstration, of its best response: SFT on what was chosen."""
    if kind_of(line) == "demonstrations":
        return line
    responses = ranked(line)
    found = {"prompt": line["prompt"], "response": responses[0]}
    return found | with_policies(line, responses, 0)


def convert_best(record):
    """Rankings or comparisons (ours) -> the best response of each as a demonstration."""
    yield best_of(record)


def convert_pairs(record, rng=None, flip=0.0):
    """Rankings (ours) -> a comparison of two of each, drawn; with --flip the wrong way round."""
    rng = rng or random.Random(0)
    responses = ranked(record)
    scores = record.get("scores") or list(range(len(responses), 0, -1))
    pairs = itertools.combinations(range(len(responses)), 2)
    pairs = [(i, j) for i, j in pairs if scores[i] != scores[j] and responses[i] != responses[j]]
    if not pairs:
        raise Unusable("no two responses differ, or all have one score")
    chosen, rejected = rng.choice(pairs)
    if rng.random() < flip:
        chosen, rejected = rejected, chosen
    line = {"prompt": record["prompt"], "chosen": responses[chosen]}
    line["rejected"] = responses[rejected]
    yield line | with_policies(record, responses, chosen, rejected)


def convert_ours(record):
    """Demonstrations, comparisons, rankings or prompts (ours) -> the same: to be split."""
    if "responses" in record:
        ranked(record)  # no samples, in which the best is not first
    yield record


# --- public formats -------------------------------------------------------------------------------
# Each takes a record and yields lines of ours, and strings: what is left out beside them, and why.
# A whole record without use is Unusable.

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ANSWER = "\n\nAssistant:"


def text_in(record, name):
    """The text of a field, "" where there is none."""
    text = record.get(name)
    if not isinstance(text, str | None):
        raise Unusable(f"{name}: expected text")
    return (text or "").strip()


def turns_of(messages, name):
    """[(role, text)] of a list of chat messages; empty system texts are none."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unusable(f"{name}: expected a list of messages")
    turns = []
    for message in messages:
        role, text = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable(f"a turn whose role is none of {', '.join(ROLES)}")
        if not isinstance(text, str) or message.get("tool_calls"):
            raise Unusable("a turn that is not text alone")
        if role == "system" and turns:
            raise Unusable("a system text after other turns")
        if role != "system" or text.strip():
            turns.append((role, text.strip()))
    return turns


def turns_before(record):
    """[(role, text)] of what comes first by fields of its own: `system`, and `history`, a list of
    questions with their answers."""
    system, history = text_in(record, "system"), record.get("history") or []
    turns = [("system", system)] if system else []
    if not isinstance(history, list):
        raise Unusable("history: expected pairs of texts")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_text, pair)):
            raise Unusable("history: expected pairs of texts")
        turns += [("user", pair[0].strip()), ("assistant", pair[1].strip())]
    return turns


def transcript(turns):
    """Turns as HH-RLHF's transcripts write them."""
    return "".join(f"\n\n{ROLES[role]}: {text}" for role, text in turns)


def turns_in(text):
    """((role, text), ...) of a transcript that ends in "Assistant:"."""
    roles = {name: role for role, name in ROLES.items()}
    before, *found = re.split(r"(?:^|\n\n)(System|Human|Assistant):", text.removesuffix(ANSWER))
    if before.strip() or not found:
        raise Unusable("no transcript of turns")
    return tuple((roles[x], said.strip()) for x, said in zip(found[::2], found[1::2], strict=True))


def laid_out(line, keep):
    """A line whose prompt is a tuple of turns as one with messages (`keep`), or with a transcript;
    a transcript as it is, or with messages."""
    turns = line.get("prompt")
    turns = turns_in(turns) if keep and isinstance(turns, str) else turns
    if not isinstance(turns, tuple):
        return line
    if keep and turns[-1][0] != "user":
        raise Unusable("the turn before the answer is not the user's")
    prompt = [{"role": role, "content": text} for role, text in turns]
    prompt = prompt if keep else transcript(turns) + ANSWER
    before = "" if keep else " "
    said = {
        name: before + line[name].strip()
        for name in ("response", "chosen", "rejected")
        if name in line
    }
    if "responses" in line:
        said["responses"] = [before + text.strip() for text in line["responses"]]
    return line | {"prompt": prompt} | said


def convert_hh(record):
    """{"chosen": transcript, "rejected": transcript}, alike up to the last assistant turn.

    The prompt keeps the turns and ends in "Assistant:"; the response keeps its leading space, so
    that the two, tokenised apart, are the tokens of the transcript.
    """
    texts = [record.get("chosen"), record.get("rejected")]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("no chosen and rejected transcripts")
    if not all(ANSWER in text for text in texts):
        raise Unusable("no assistant turn")
    (prompt, _, chosen), (other, _, rejected) = (text.rpartition(ANSWER) for text in texts)
    if any("\n\nHuman:" in response for response in (chosen, rejected)):
        raise Unusable("a person's turn follows the last assistant turn")
    if prompt != other:
        raise Unusable("the transcripts differ before the last assistant turn")
    prompt = transcript(turns_before(record)) + prompt + ANSWER
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def convert_tldr(record):
    """OpenAI's comparisons {"info", "summaries", "choice"}, or the filtered Reddit demonstrations
    {"subreddit", "title", "post", "summary"}; prompts as in Stiennon et al. 2020."""
    info = record.get("info", record)
    if not isinstance(info, dict) or not is_text(info.get("post")):
        raise Unusable("no Reddit post (a news article, perhaps)")
    if not is_text(info.get("subreddit")) or not is_text(info.get("title")):
        raise Unusable("a post without its subreddit or title")
    if turns_before(record):
        raise Unusable("a system text or a history, for which this prompt has no place")
    head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\n"
    prompt = f"{head}POST: {info['post'].strip()}\n\nTL;DR:"
    if "summaries" not in record:
        if "summary" not in record:
            raise Unusable("no summary")
        yield {"prompt": prompt, "response": " " + text_in(record, "summary")}
        return
    summaries, choice = record["summaries"], record.get("choice")
    if not isinstance(summaries, list) or len(summaries) != 2 or choice not in (0, 1):
        raise Unusable("not two summaries and a choice")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise Unusable("not two summaries and a choice")
    chosen, rejected = summaries[int(choice)], summaries[1 - int(choice)]
    line = {"prompt": prompt, "chosen": " " + text_in(chosen, "text")}
    line["rejected"] = " " + text_in(rejected, "text")
    policies = [chosen.get("policy"), rejected.get("policy")]
    if all(map(is_text, policies)):
        line["policy"] = policies
    if record.get("worker"):
        line["annotator"] = str(record["worker"])
    yield line


def convert_alpaca(record):
    """{"instruction", "input", "output"}, with `system` and `history` where there are any; or a
    seed task, of which each instance is a line."""
    heads = {"system": "System", "user": "Instruction", "assistant": "Response"}
    before = "".join(f"### {heads[role]}:\n{text}\n\n" for role, text in turns_before(record))
    instruction = text_in(record, "instruction")
    if not instruction:
        raise Unusable("no instruction")
    instances = record.get("instances") or [record]
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        raise Unusable("instances: expected a list of objects")
    for each in instances:
        if "output" not in each:
            yield "no output"
            continue
        prompt = f"{before}### Instruction:\n{instruction}\n\n"
        if text_in(each, "input"):
            prompt += f"### Input:\n{text_in(each, 'input')}\n\n"
        yield {"prompt": prompt + "### Response:\n", "response": text_in(each, "output")}


def convert_ultrafeedback(record):
    """{"instruction", "completions": [{"response", "overall_score", "model"}, ...]} -> a ranking by
    overall_score, in HH-RLHF's transcript form."""
    completions, instruction = record.get("completions"), text_in(record, "instruction")
    if not instruction or not isinstance(completions, list):
        raise Unusable("no instruction and completions")
    rated = []
    for completion in completions:
        try:
            score = float(completion["overall_score"])
        except (TypeError, ValueError, OverflowError, KeyError):
            score = math.nan
        if math.isfinite(score) and is_text(completion.get("response")):
            rated.append((score, completion))
    if len(rated) < 2:
        raise Unusable("fewer than two completions with a text and a score")
    for _ in range(len(completions) - len(rated)):
        yield "a completion without a text or a score, beside others that have them"
    rated.sort(key=lambda pair: -pair[0])
    prompt = (*turns_before(record), ("user", instruction))
    line = {"prompt": prompt, "responses": [c["response"] for _, c in rated]}
    line["scores"] = [score for score, _ in rated]
    policies = [completion.get("model") for _, completion in rated]
    yield line | ({"policy": policies} if all(map(is_text, policies)) else {})


def conversation(record, name):
    """(prompt, response) of a list of messages and what the record has before it: each turn once,
    also where the list begins with, or has in it, what stands before it."""
    turns, before = turns_of(record.get(name), name), turns_before(record)
    if isinstance(record.get("prompt"), list):
        before += turns_of(record["prompt"], "prompt")
    elif text_in(record, "prompt"):
        before.append(("user", text_in(record, "prompt")))
    if not turns or turns[-1][0] != "assistant":
        raise Unusable(f"{name}: does not end in the assistant's turn")
    *context, (_, response) = turns
    system = list(dict.fromkeys(turn for turn in before + context if turn[0] == "system"))
    if len(system) > 1:
        raise Unusable("two system texts that differ")
    before, context = ([t for t in some if t[0] != "system"] for some in (before, context))
    starts = range(len(context) - len(before) + 1)
    if not any(context[i : i + len(before)] == before for i in starts):
        following = [*context, turns[-1]]
        if before[-1][0] == following[0][0]:
            raise Unusable("prompt and messages don't fit together: two turns of one role meet")
        context = before + context
    if not system + context:
        raise Unusable(f"{name}: nothing comes before the answer")
    return (*system, *context), response


def convert_chat(record):
    """{"chosen": messages, "rejected": messages} -> a comparison; {"messages": messages} -> a
    demonstration. "prompt" (text, or messages), "system" and "history" may stand beside them. The
    response is the last message, by the assistant."""
    if "chosen" in record or "rejected" in record:
        sides = [conversation(record, name) for name in ("chosen", "rejected")]
        (prompt, chosen), (other, rejected) = sides
        if prompt != other:
            raise Unusable("the conversations differ before the last turn")
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    elif "messages" in record:
        prompt, response = conversation(record, "messages")
        yield {"prompt": prompt, "response": response}
    else:
        raise Unusable("no messages, nor chosen and rejected ones")


FORMATS = {
    "hh": convert_hh,
    "tldr": convert_tldr,
    "alpaca": convert_alpaca,
    "ultrafeedback": convert_ultrafeedback,
    "chat": convert_chat,
    "best": convert_best,
    "pairs": convert_pairs,
    "ours": convert_ours,
}


# --- writing --------------------------------------------------------------------------------------


def parts(line, split, seen):
    """Yields (file's name, line) of all that a line becomes in a folder for `make`. seen: the
    prompts before it."""
    # Later turns of a conversation hold its earlier ones, so all are on the side of the first.
    prompt = line["prompt"]
    if isinstance(prompt, list):
        prompt = transcript([(message["role"], message["content"]) for message in prompt])
    opening = re.split(r"\n\n(?:Assistant|### Response):", prompt)[0]
    place = int.from_bytes(hashlib.sha256(opening.encode()).digest()[:8]) / 2**64
    side = "_validation" if place < split else "_test" if place < 2 * split else "_train"
    kind = kind_of(line)
    best = line if kind == "prompts" else best_of(line)
    if prompt not in seen:
        seen.add(prompt)
        prompt = {name: best[name] for name in best if name not in ("policy", "annotator")}
        if "response" in prompt:
            prompt["reference"] = prompt.pop("response")
        yield f"prompts{side}.jsonl", prompt
    side = side.removeprefix("_train")
    if kind != "prompts":
        yield f"demonstrations{side}.jsonl", best
    if kind not in ("prompts", "demonstrations"):
        yield f"rankings{side}.jsonl", line  # comparisons are rankings of two


def fault_of(line):
    """Why there is nothing to learn from in a line of ours; None where there is."""
    try:
        refuse_faults(line, kind_of(line))
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    except Unusable as error:
        return f"{error}"
    except ValueError:  # valid JSON, but no text, or no number
        return "half of a surrogate pair, or a number beyond all bounds"
    equal = "chosen" in line and line["chosen"] == line["rejected"]
    return "the two responses are equal" if equal else None


def lines_of(name, source, counts, dropped, turns=False, **options):
    """Yields the good lines that a file's records become. counts: what is read, written, and marked
    (see MARKERS); dropped: what is not written, by its reason."""
    for _, record in stream_objects(source):
        counts["read"] += 1
        try:
            found = [
                x if isinstance(x, str) else laid_out(x, turns)
                for x in FORMATS[name](record, **options)
            ]
        except Unusable as error:
            found = [f"{error}"]
        for made in found:
            line = made if isinstance(made, str) else without_markers(made)
            reason = line if isinstance(line, str) else fault_of(line)
            if reason:
                dropped[reason] += 1
                continue
            counts["marked"] += line != made
            counts["written"] += 1
            yield line


def check_folder(folder, files, source):
    """Refuses a split that leaves a file empty, and another set's file beside its own."""
    for part, first in (("prompts", "_train"), ("demonstrations", ""), ("rankings", "")):
        names = [f"{part}{side}.jsonl" for side in (first, "_validation", "_test")]
        missing = [name for name in names if name not in files]
        if 0 < len(missing) < len(names):
            refuse(f"{source}: has too few lines for this --split: none comes to {missing[0]}")
        for name in missing:
            if (folder / name).exists():
                refuse(f"{folder / name}: is another set's, and its sides may be others")


def convert(name, source, target, split=0.0, **options):
    """Converts a file and prints what was read, written, dropped and why. With `split`, the shares
    of validation and of test, target is a folder."""
    target = Path(target)
    folder = target if split else target.parent
    made = split and not folder.exists()
    files, seen = {}, set()
    lines, counts, dropped = (collections.Counter() for _ in range(3))
    try:
        if made:
            folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp.") as scratch:
            with contextlib.ExitStack() as stack:
                for line in lines_of(name, source, counts, dropped, **options):
                    for file, part in parts(line, split, seen) if split else [(target.name, line)]:
                        if file not in files:
                            files[file] = stack.enter_context(open_file(f"{scratch}/{file}", "wb"))
                        files[file].write(json.dumps(part, ensure_ascii=False).encode() + b"\n")
                        lines[file] += 1
            if not files:
                read, reasons = counts["read"], dict(dropped.most_common(12))
                refuse(f"{source}: none of its {read} records is of the {name} format: {reasons}")
            if split:
                check_folder(folder, files, source)
            for file in files:
                with open(f"{scratch}/{file}", "rb") as written:
                    os.fsync(written.fileno())
                os.replace(f"{scratch}/{file}", folder / file)
    except OSError as error:
        refuse(f"{target}: could not be written: {error.strerror or error}")
    finally:
        if made:
            with contextlib.suppress(OSError):  # it has files in it
                folder.rmdir()
    read, written = counts["read"], counts["written"]
    print(f"{source}: read {read}, wrote {written} to {target}, dropped {sum(dropped.values())}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count}: {reason}")
    if counts["marked"]:
        print(f"  {counts['marked']} lines ended in a written-out <|endoftext|>: taken off")
    for file in sorted(files) if split else ():
        print(f"  {folder / file}: {lines[file]} lines")
    if split and "rankings.jsonl" not in files:
        print("  no preferences, so no rankings.jsonl")


# --- check ----------------------------------------------------------------------------------------


def check(path):
    """Says what a file is, and refuses it at its first bad line."""
    lines, marked, kind, tasks = 0, 0, None, collections.Counter()
    for where, record in stream_objects(path, arrays=False):
        kind = kind or kind_of(record)
        for field, reason in faults(record, kind):
            refuse(f"{where}: {field}: {reason}")
        lines += 1
        marked += without_markers(record) != record
        tasks[record.get("task", "none given")] += 1
    print(f"{path}: {kind}, {lines} lines, all good")
    if marked:
        print(f"  {marked} lines have a response that ends in a written-out <|endoftext|>")
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
        command.add_argument("target", help="our file to write, .jsonl or .jsonl.gz; or a folder")
        command.add_argument(
            "--split", type=float, default=0.0, help="share of prompts for validation, and for test"
        )
        if name in ("hh", "ultrafeedback", "chat"):
            command.add_argument("--turns", action="store_true", help="prompts of messages")
        if name == "pairs":
            command.add_argument("--flip", type=float, default=0.0, help="share of wrong labels")
            command.add_argument("--seed", type=int, default=0, help="of what is drawn")
    command = commands.add_parser("check", help="what are these files, and are they good?")
    command.add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "check":
        for file in args.files:
            check(file)
        return
    if not 0 <= args.split < 0.5:
        refuse(f"--split {args.split}: expected a share, 0 to 0.5")
    options = {"turns": args.turns} if hasattr(args, "turns") else {}
    if args.command == "pairs":
        if not 0 <= args.flip <= 1:
            refuse(f"--flip {args.flip}: expected a share, 0 to 1")
        options = {"rng": random.Random(args.seed), "flip": args.flip}
    convert(args.command, args.source, args.target, args.split, **options)


if __name__ == "__main__":
    main()
