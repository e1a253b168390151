"""What the stages pass on: prompts, demonstrations, preferences; rewards; rollouts, and samples for
held-out prompts. No algorithm's objective or loop is in here. In this order:

    files             read_prompts, read_demonstrations, read_preferences, read_examples; batches
    rows              collate: several responses to a prompt in one row
    rewards           load_policy, load_reward_model, Reward (a model, or a Python file)
    rollouts          Rollout, sample_step, logprobs_of, kl_estimate, token_rewards, whiten
    learning by them  flags of ppo.py and grpo.py, Rewards (several, shaped), missing EOS, PPO-ptx
    samples           respond, numbers: what a policy says to held-out prompts, and what it is worth
    reward models     what reward.py and collapse.py have in common
    judgements        rates with intervals, Bradley-Terry ratings

A prompt, once read, is (line, ids): the line of its file, a dict, and its token ids. A `Rollout` is
a response to each of some prompts. Tensors as in model.py: (B, T), padded on the right, `mask` True
on response tokens, EOS included.
"""

import copy
import dataclasses
import importlib.util
import inspect
import itertools
import json
import math
import sys
from array import array
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from model import (
    GPT, add_adapters, generate, last_tokens, load_config, load_model, pack, pad, predicts,
    token_logprobs,
)  # fmt: skip
from run import TrainingFlags, onto, read_jsonl, refuse
from tokens import (
    END_OF_TEXT, Conversation, check_tokenizer, encode, identity, kept_template, load_tokenizer,
    response_of, tokenizer_files,
)  # fmt: skip

# How far a token's probability may be from itself in two forwards, as a share of it: sums round
# otherwise among other rows. Measured: 4e-6 in float32 on the embedded task, 1.5e-5 with logits
# near -100; 0.013 in float16, 0.11 in bfloat16. The bugs that are looked for change it far more.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}


# --- prompts, demonstrations, preferences ---------------------------------------------------------


def read_prompts(path, tokenizer, room, say=print, **kinds):
    """[(line, prompt ids)] of a prompts file, [] where path is empty. The last `room` ids of each
    are kept. `kinds`: {field: type} that lines must have; `task` and `unsafe` may be there."""
    if path and room < 1:
        refuse("--max_new_tokens: leaves a prompt no room in the model's positions")
    prompts, cut = [], 0
    for where, line in read_jsonl(path, {"prompt": True}) if path else ():
        for name, kind in {"task": str, "unsafe": bool}.items():
            if name in line and name not in kinds:
                check_field(where, line, name, kind)
        for name, kind in kinds.items():
            check_field(where, line, name, kind)
        ids = encode(tokenizer, line["prompt"], None, sys.maxsize)[0]
        prompts.append((line, ids[-room:]))
        cut += len(ids) > room
    if cut:
        say(f"{path}: {len(prompts)} prompts, {cut} of which lose their start")
    return prompts


def bare(text):
    """A response without an <|endoftext|> that is spelled out at its end, as in data sets of code
    that appends none: EOS is appended here, and the letters would be learnt."""
    while text.rstrip().endswith(END_OF_TEXT):
        text = text.rstrip().removesuffix(END_OF_TEXT)
    return text


def count_spelled(counts, written, texts):
    """Counts those that `bare` has made shorter, if any."""
    for before, text in zip(written, texts, strict=True):
        if text != before:
            name = f"without the {END_OF_TEXT} that they spell out"
            counts[name] = counts.get(name, 0) + 1


def check_field(where, line, name, kind):
    if not isinstance(line.get(name), kind):
        found = json.dumps(line[name])[:40] if name in line else "none"
        wanted = {str: "a string", bool: "true or false"}[kind]
        refuse(f"{where}: {name}: expected {wanted}, got {found}")


def read_demonstrations(path, tokenizer, max_length, overlong="cut", say=print, turns="last"):
    """[(prompt ids, response ids)] of a demonstrations file, [] where path is empty. What is too
    long loses its prompt's start; a response that still is, its end (`cut`), or its line is dropped
    (`drop`). turns "all": earlier turns of the assistant's, after what came before them, too."""
    examples, cut, dropped, spelled = [], 0, 0, {}
    for where, record in read_jsonl(path, {"prompt": True, "response": False}) if path else ():
        prompt, response = record["prompt"], bare(record["response"])
        if not response.strip():
            refuse(f"{where}: response: is empty but for {END_OF_TEXT}")
        count_spelled(spelled, [record["response"]], [response])
        for texts in [*(earlier_turns(prompt) if turns == "all" else ()), (prompt, response)]:
            long = sum(map(len, encode(tokenizer, *texts, sys.maxsize))) > max_length
            try:
                examples.append(encode(tokenizer, *texts, max_length, overlong == "cut"))
                cut += long
            except ValueError:
                dropped += 1
    if path and not examples:
        refuse(
            f"{path}:0: file: no response fits into {max_length} tokens; --overlong cut cuts them"
        )
    if path:
        tokens = sum(map(len, itertools.chain(*examples)))
        say(
            f"{path}: {len(examples)} lines, {tokens} tokens; {cut} cut, {dropped} dropped"
            + "".join(f"; {n} {how}" for how, n in spelled.items())
        )
    return examples


def earlier_turns(prompt):
    """(conversation, response) of each turn of the assistant's in a prompt."""
    messages = getattr(prompt, "messages", ())
    for before, (asked, said) in enumerate(itertools.pairwise(messages), 1):
        if asked["role"] == "user" and said["role"] == "assistant" and said["content"].strip():
            yield Conversation(messages[:before]), said["content"]


def read_responses(where, record, least=2):
    """The line's `responses`, bare, once they and what is parallel to them have been checked."""
    responses = record.get("responses")
    if not isinstance(responses, list) or len(responses) < least:
        refuse(f"{where}: responses: expected a list of {least} or more")
    for i, response in enumerate(responses):
        if not isinstance(response, str) or not bare(response).strip():
            refuse(f"{where}: responses: number {i + 1} is not a string with text in it")
    for name in ("scores", "policy"):
        if isinstance(record.get(name), list) and len(record[name]) != len(responses):
            refuse(f"{where}: {name}: expected {len(responses)} values, one a response")
    return [bare(response) for response in responses]


def read_preferences(path):
    """Yields (where, record, responses, pairs) for each line of comparisons or rankings.

    responses: best first. pairs: [(i, j, margin, label)], i before j: response i is better than
    response j with probability `label`, by `margin`. A ranking's margins are the differences of its
    `scores`, where it has them; equal scores are a tie, and no pair.
    """
    for where, record in read_jsonl(path, {"prompt": False}):
        if "task" in record:
            check_field(where, record, "task", str)
        if "responses" in record:
            responses = read_responses(where, record)
            known = "scores" in record
            scores = record["scores"] if known else list(range(len(responses), 0, -1))
            good = isinstance(scores, list) and all(map(is_number, scores))
            if not good or not all(a >= b for a, b in itertools.pairwise(scores)):
                refuse(f"{where}: scores: expected numbers that fall, as the best comes first")
            pairs = []
            for i, j in itertools.combinations(range(len(responses)), 2):
                if scores[i] > scores[j]:
                    pairs.append((i, j, float(scores[i] - scores[j]) if known else 0.0, 1.0))
            yield where, record, responses, pairs
            continue
        for name in ("chosen", "rejected"):
            if not isinstance(record.get(name), str) or not bare(record[name]).strip():
                refuse(f"{where}: {name}: expected a string with text in it")
        margin, label = record.get("margin", 0.0), record.get("label", 1.0)
        if not is_number(margin) or margin < 0:
            refuse(f"{where}: margin: expected a number of at least 0, got {str(margin)[:40]}")
        if not is_number(label) or not 0.5 <= label <= 1:
            refuse(f"{where}: label: expected a probability from 0.5 to 1, got {str(label)[:40]}")
        responses = [bare(record["chosen"]), bare(record["rejected"])]
        yield where, record, responses, [(0, 1, float(margin), float(label))]


def grade_of(margin):
    """A margin -> its grade, Llama 2's four steps: 0 negligibly better or unsure, 1 slightly
    better, 2 better, 3 significantly better. Rounded down, but 2.9999999 is 3."""
    return min(int(margin + 1e-6), 3)


def is_number(value):
    """Whether it is a number that arithmetic stays finite with."""
    return type(value) in (int, float) and abs(value) < 1e30


def read_examples(path, tokenizer, max_length, overlong="cut", say=print):
    """Comparisons or rankings as examples: dicts of `prompt` and `responses` (token ids, best
    first), `pairs` [(i, j, margin, label)], `texts` of the responses, and `line`, the line's other
    fields. [] where path is empty.

    Responses that are too long (and not `cut`), or equal to one before, are dropped, and lines
    without a pair.
    """
    examples, lines = [], 0
    counts = {"cut": 0, "too long": 0, "equal": 0, "lines without a pair": 0}
    for _, record, texts, pairs in read_preferences(path) if path else ():
        lines += 1
        written = record.get("responses") or [record["chosen"], record["rejected"]]
        count_spelled(counts, written, texts)
        prompt, kept = encode(tokenizer, record["prompt"], None, sys.maxsize)[0], {}
        limit = max_length - 1
        for k, text in enumerate(texts):
            ids = encode(tokenizer, "", text, sys.maxsize)[1]
            if len(ids) > limit and overlong == "drop":
                counts["too long"] += 1
                continue
            counts["cut"] += len(ids) > limit
            ids = array("i", ids[:limit])  # 4 bytes a token; a list has 36
            if ids in kept.values():
                counts["equal"] += 1
                continue
            kept[k] = ids
        place = {k: i for i, k in enumerate(kept)}
        pairs = [(place[i], place[j], m, p) for i, j, m, p in pairs if i in place and j in place]
        if not pairs:
            counts["lines without a pair"] += 1
            continue
        # One cut for the prompt: all of a line's responses are read after the same text.
        room = max_length - max(map(len, kept.values()))
        counts["cut"] += len(kept) * (len(prompt) > room)
        example = {"prompt": array("i", prompt[-room:]), "responses": list(kept.values())}
        example |= {"pairs": pairs, "texts": [texts[k] for k in kept]}
        others = ("responses", "chosen", "rejected")
        example["line"] = {name: value for name, value in record.items() if name not in others}
        examples.append(example)
    what = ", ".join(f"{n} {name}" for name, n in counts.items())
    if path and not examples:
        refuse(f"{path}:0: file: none of its {lines} lines has a pair to learn from ({what})")
    if path:
        pairs = sum(len(example["pairs"]) for example in examples)
        say(f"{path}: {len(examples)} lines, {pairs} pairs; responses: {what}")
    return examples


def grouped_batches(lengths, batch_size, seed):
    """One epoch's batches, lists of indices: random, but of like lengths, so that few are pads.

    Shuffles, sorts by length within pools of 64 batches, and shuffles the batches. Every index
    comes once; only one batch can be smaller than batch_size.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pool = 64 * batch_size
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    pools = [indices[np.argsort(np.asarray(lengths)[indices], kind="stable")] for indices in pools]
    order = np.concatenate(pools).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def batches_from(step, lengths, batch_size, seed):
    """`grouped_batches` of all epochs, from `step` on."""
    an_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in itertools.count(step // an_epoch):
        batches = grouped_batches(lengths, batch_size, [seed, epoch])
        yield from batches[step % an_epoch if epoch == step // an_epoch else 0 :]


def prompts_of_step(count, batch_size, step, seed):
    """Numbers of the prompts of one iteration: whole epochs of `count` prompts in random orders run
    on from iteration to iteration."""
    begin, end = step * batch_size, (step + 1) * batch_size
    epochs = range(begin // count, (end - 1) // count + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs]
    skip = begin - epochs[0] * count
    return np.concatenate(orders)[skip : skip + batch_size].tolist()


# --- several responses to a prompt in one row -----------------------------------------------------


def group_by_prompt(rows, n_embd):
    """Rows (prompt ids, response ids) -> [(prompt ids, [response ids, ...])] for `pack`: rows
    that follow each other to one prompt, as long as reading it once saves more than is lost.

    P prompt tokens less save 24 P C^2 FLOPs a layer, C = n_embd; R tokens beside S others cost
    8 R S C, since attention is computed, and hidden, between responses too.
    """
    groups, beside = [], 0
    for prompt, response in rows:
        fits = len(response) * beside <= 3 * n_embd * len(prompt)
        if groups and groups[-1][0] == prompt and fits:
            groups[-1][1].append(response)
            beside += len(response)
        else:
            groups.append((prompt, [response]))
            beside = len(response)
    return groups


def groups_of(prompt, responses, n_embd):
    """`group_by_prompt` of one prompt's responses."""
    return group_by_prompt([(prompt, response) for response in responses], n_embd)


def row_length(prompt, responses):
    """Columns of a prompt and all its responses in a row of `pack`."""
    return len(prompt) - 1 + sum(len(response) + 1 for response in responses)


def row_lengths(examples, n_embd):
    """Columns of the longest row of each example (`prompt`, `responses`)."""
    groups = [groups_of(e["prompt"], e["responses"], n_embd) for e in examples]
    return [max(row_length(*group) for group in some) for some in groups]


def batches_of_groups(groups, most):
    """Numbers of the groups, alike in length of row, in lists of at most `most` responses (more
    only where one group has more)."""
    batches, count = [], most
    for i in sorted(range(len(groups)), key=lambda i: row_length(*groups[i])):
        count += len(groups[i][1])
        if count > most:
            batches.append([])
            count = len(groups[i][1])
        batches[-1].append(i)
    return batches


def packed(examples):
    """`pack` of demonstrations (prompt ids, response ids)."""
    return pack([prompt for prompt, _ in examples], [[response] for _, response in examples])


def collate(examples, n_embd):
    """Examples of `read_examples` -> tokens, mask, segments (R, T), responses to a prompt beside
    each other where that is cheaper for a model of width n_embd; rows (B, K): the place of response
    k among all of the batch; keep (B, P) bool, margin and label (B, P), of the P = K-choose-2 pairs
    in the order of torch.triu_indices. An example with fewer than K responses repeats its first, in
    no pair that is kept."""
    K = max(len(example["responses"]) for example in examples)
    number = {pair: p for p, pair in enumerate(itertools.combinations(range(K), 2))}
    groups, rows, before = [], [], 0
    keep = torch.zeros(len(examples), len(number), dtype=torch.bool)
    margin, label = (torch.full(keep.shape, x, dtype=torch.float64) for x in (0.0, 1.0))
    for b, example in enumerate(examples):
        groups += groups_of(example["prompt"], example["responses"], n_embd)
        count = len(example["responses"])
        rows.append([*range(before, before + count), *[before] * (K - count)])
        before += count
        for i, j, m, probability in example["pairs"]:
            p = number[i, j]
            keep[b, p], margin[b, p], label[b, p] = True, m, probability
    return *pack(*zip(*groups, strict=True)), torch.tensor(rows), keep, margin, label


def score_rows(model, rows, size, run, at=last_tokens, of=None, name="the model"):
    """A scalar head's outputs, a list of numbers, for rows of (prompt ids, response ids), from all
    ranks; `size` responses a forward. Of a language model: what of(logits at `at(mask)`, tokens,
    mask) makes of them, (N,) or (N, numbers), one a response."""
    model.eval()
    scores, groups = [], group_by_prompt(rows, model.config.n_embd)
    batches = batches_of_groups(groups, size)
    for begin in range(0, len(batches), run.world):
        run.stop_if_told()
        run.progress("scored batches of responses", begin, len(batches))
        mine = batches[begin + run.rank : begin + run.rank + 1]
        indices = mine[0] if mine else batches[0]  # just to go along
        some = [groups[i] for i in indices]
        tokens, mask, segments = onto(run.device, *pack(*zip(*some, strict=True)))
        with torch.no_grad(), run.autocast:
            output = model(tokens, at(mask), segments)  # (N,), one a response
        output = (of(output, tokens, mask) if of else output).tolist()
        found = iter(output)
        for i in indices if mine else ():
            scores.append((i, list(itertools.islice(found, len(groups[i][1])))))
    scores = [score for _, row in sorted(run.gather(scores)) for score in row]
    check_scores(scores, name)
    return scores


# --- models and rewards ---------------------------------------------------------------------------

RAW = {"reward_mean": 0.0, "reward_std": 1.0, "score_transform": "identity"}


def load_policy(name, run, tokenizer="", template=None):
    """A language model in eval mode on the run's device, and its tokenizer (or another's), which
    lays prompts out by `template` (None: as the model's own)."""
    try:
        model, other, config = load_model(name), tokenizer, load_config(name)
        tokenizer = load_tokenizer(other or name, template or kept_template(config))
        check_tokenizer(tokenizer, name, config)
        if other:
            tokenizer_files(tokenizer)  # one that can't be saved is refused now
    except (OSError, ValueError) as error:
        refuse(error)
    if model.score is not None:
        refuse(f"{name}: has a scalar head, no language model's")
    return model.eval().to(run.place(), run.precision), tokenizer


def load_reward_model(directory, device="cpu"):
    """-> model, tokenizer, statistics {reward_mean, reward_std, score_transform} for `normalised`.

    Raises ValueError or OSError, in one line: no scalar head, statistics that are missing or no
    numbers (they are never guessed: other code relies on mean 0 and std 1), another tokenizer.
    """
    config, model = load_config(directory), load_model(directory, device)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, directory, config)
    if model.score is None:
        raise ValueError(f"{directory}: a language model, not a reward model: it has no score head")
    statistics = {name: config.get(name) for name in RAW}
    mean, std, transform = statistics.values()
    numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (mean, std))
    if not numbers or not std > 0 or transform not in ("identity", "sigmoid"):
        raise ValueError(
            f"{directory}: config.json: {statistics}: its scores were never normalised, and can't "
            f"be used; reward.py --init {directory} --normalise_with POLICY --epochs 0 --data FILE "
            f"--out_dir NEW does it"
        )
    return model, tokenizer, statistics


def add_scalar_head(policy):
    """A language model's trunk under a new scalar head, drawn from the default generator."""
    model = GPT(policy.config, scalar_head=True)
    weights = policy.state_dict() | {"score.weight": model.score.weight.detach()}
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights)
    return model


def learn_by_adapters(model, cfg):
    """With --lora_rank low-rank adapters learn, in the place of the model's weights."""
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha)


def reference_of(policy, cfg):
    """A copy of the policy that stays as it is now. Where adapters are to learn, the weights stay
    too: the copy has none of its own."""
    shared = {id(p): p for p in policy.parameters()} if cfg.lora_rank else {}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def set_dropout(model, rate):
    """Sets all dropout rates: a checkpoint's own is its pre-training's."""
    model.config = dataclasses.replace(model.config, dropout=rate)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        elif hasattr(module, "dropout"):
            module.dropout = rate


def normalised(raw, statistics):
    """(transform(raw) - mean) / std, raw a tensor of the head's outputs."""
    mean, std, transform = (statistics[name] for name in RAW)
    return ((torch.sigmoid(raw) if transform == "sigmoid" else raw) - mean) / std


def score_statistics(raw, transform="identity"):
    """What makes `normalised` scores of mean 0 and standard deviation 1 of these outputs (n,).

    ValueError when they are all equal.
    """
    scores = torch.sigmoid(raw) if transform == "sigmoid" else raw
    std = scores.std(correction=0).item()
    if not std > 0:
        raise ValueError(f"all {len(raw)} scores are {scores[0]:g}: they can't be normalised")
    return dict(zip(RAW, (scores.mean().item(), std, transform), strict=True))


def check_scores(scores, name):
    """Refuses scores that are not finite: they would lose, or tie, against everything, unseen."""
    for score in np.ravel(scores):
        if not math.isfinite(score):
            refuse(f"{name}: a response's score is {score}: not finite")


def reward_model_for(name, tokenizer, run):
    """-> a reward model in eval mode on the run's device, and its statistics; or the script ends,
    also where it reads other tokens than a policy of this tokenizer writes."""
    try:
        model, theirs, statistics = load_reward_model(name)
    except (OSError, ValueError) as error:
        refuse(error)
    if identity(theirs) != identity(tokenizer):
        refuse(
            f"{name}: another tokenizer or template ({theirs.name}) than the policy's "
            f"({tokenizer.name})"
        )
    return model.to(run.place(), run.precision), statistics


class Reward:
    """Scores responses: a Python file's score(prompt, response, **fields), or a reward model."""

    def __init__(self, name, tokenizer, run, raw=False):
        """raw: the head's outputs as they are, not normalised."""
        self.name, self.run, self.model, self.statistics = name, run, None, RAW
        if name.endswith(".py"):
            self.file = load_python(name)
            return
        model, statistics = reward_model_for(name, tokenizer, run)
        self.statistics = RAW if raw else statistics
        self.model = run.parallel(model.requires_grad_(False))

    def __call__(self, rollout, size):
        """Scores (B,), float64; of a model's, `size` rows a forward (0: all)."""
        if self.model is None:
            pairs = zip(rollout.lines, rollout.texts, strict=True)
            scores = [told(self.file, "score", line, text) for line, text in pairs]
            return torch.tensor(scores, dtype=self.run.wide, device=self.run.device)
        raw = []
        for tokens, mask in rollout.parts(size):
            with torch.no_grad(), self.run.autocast:
                raw.append(self.model(tokens, last_tokens(mask)).to(self.run.wide))
        raw = torch.cat(raw)
        check_scores(raw.tolist(), self.name)
        return normalised(raw, self.statistics)


def load_python(path, needs=("score",)):
    """A user's Python file as a module with one of the functions of `needs` at least: SIGNATURES
    has all that it may have."""
    spec = importlib.util.spec_from_file_location(f"user_file_{Path(path).stem}", path)
    if not Path(path).is_file() or spec is None:
        refuse(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        refuse(f"{path}: can't be run: {type(error).__name__}: {error}")
    asked = [name for name in (*needs, "explain") if hasattr(module, name)]
    known = {name: getattr(module, name) for name in asked}
    if not known.keys() & set(needs):
        expected = " or ".join(SIGNATURES[name] for name in needs)
        refuse(f"{path}: {' or '.join(needs)}: no such function; expected {expected}")
    for name, function in known.items():
        if not callable(function) or not takes_fields(function):
            refuse(f"{path}: {name}: expected {SIGNATURES[name]}: lines have fields of all kinds")
    return module


SIGNATURES = {
    "score": "score(prompt, response, **fields)",
    "explain": "explain(prompt, response, **fields)",
    "compare": "compare(prompt, a, b, **fields)",
}


def takes_fields(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # compiled code does not tell
        return True
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def told(module, function, line, response):
    """What a user's `score` (a number) or `explain` ({name: number}) says of a response."""
    fields = {name: value for name, value in line.items() if name not in ("prompt", "response")}
    try:
        found = getattr(module, function)(line["prompt"], response, **fields)
        if function == "explain":
            found = {name: float(x) for name, x in found.items() if name != "score"}
        else:
            found = float(found)
    except Exception as error:
        refuse(f"{module.__file__}: {function}: {type(error).__name__}: {error}")
    if not all(map(math.isfinite, found.values() if function == "explain" else [found])):
        refuse(
            f"{module.__file__}: {function}: {found} for {response[:40]!r} to "
            f"{line['prompt'][:40]!r}: not finite"
        )
    return found


def judged(gold, line, response):
    """{"gold": score, and the parts that explain it} of a response to a prompt's line; {} where
    gold is None."""
    if gold is None:
        return {}
    parts = told(gold, "explain", line, response) if hasattr(gold, "explain") else {}
    return {"gold": told(gold, "score", line, response)} | parts


# --- rollouts -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """A response to each of some prompts; rows are padded on the right."""

    lines: list  # the prompts', dicts
    tokens: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, True on responses, EOS included
    lengths: list  # of prompt and response together
    responses: list  # token ids
    texts: list  # without the EOS
    ended: torch.Tensor  # (B,) bool

    def counted(self, real):
        """The mask, (B, T), of the `real` first rows alone."""
        return self.mask & (torch.arange(len(self.mask), device=self.mask.device) < real)[:, None]

    def parts(self, size):
        """Tokens and mask of `size` rows at a time (0: all), without columns of pads."""
        for i in range(0, len(self.lines), size or len(self.lines)):
            rows = slice(i, i + (size or len(self.lines)))
            columns = slice(max(self.lengths[rows]))
            yield self.tokens[rows, columns], self.mask[rows, columns]

    def each(self, size, run, function, *args):
        """function(tokens, mask, *args) of all parts, without gradients, joined to (B, T)."""
        found, T = [], self.tokens.shape[1]
        for tokens, mask in self.parts(size):
            with torch.no_grad(), run.autocast:
                part = function(tokens, mask, *args)
            found.append(F.pad(part, (0, T - part.shape[1])))
        return torch.cat(found)


def rollout_of(prompts, responses, tokenizer, device):
    """Prompts (line, ids) and responses (ids) as a Rollout."""
    lines, ids = (list(some) for some in zip(*prompts, strict=True))
    lengths = [len(p) + len(r) for p, r in zip(ids, responses, strict=True)]
    texts, ended = zip(*(response_of(tokenizer, response) for response in responses), strict=True)
    tokens, mask, ended = onto(device, *pad(ids, responses), torch.tensor(ended))
    return Rollout(lines, tokens, mask, lengths, responses, list(texts), ended)


def sample_rollout(sampler, prompts, tokenizer, cfg, temperature, generator):
    """A response to each prompt, from the full softmax: truncated, its KL would be another's."""
    few = 8 * cfg.micro_batch_size or len(prompts)  # no more cache at once
    responses, size = [], sampled_at_once(sampler, prompts, cfg, few)
    for i in range(0, len(prompts), size):
        responses += generate(
            sampler,
            [ids for _, ids in prompts[i : i + size]],
            cfg.max_new_tokens,
            temperature=temperature,
            eos=tokenizer.ends,
            generator=generator,
        )
    return rollout_of(prompts, responses, tokenizer, sampler.wte.weight.device)


def sampled_at_once(sampler, prompts, cfg, few):
    """For how many prompts: `few`; but on a GPU, where a step takes about as long for one row as
    for hundreds, for as many as have 8 GiB of keys and values."""
    if not sampler.wte.weight.is_cuda:
        return few
    c, longest = sampler.config, max(len(ids) for _, ids in prompts) + cfg.max_new_tokens
    width = sampler.wte.weight.element_size()
    return max(2**33 // (2 * c.n_layer * c.n_kv_head * c.head_dim * longest * width), 1)


def sample_step(run, policy, prompts, tokenizer, num_samples=1):
    """-> the rollout of this rank's share of an iteration's batch_size episodes, num_samples to a
    prompt, and how many of its rows count, the first ones: a rank with a prompt less than others
    goes along with rows of weight 0, as they wait for it. Prompts in the order of their lengths: in
    one forward rows should be alike, as pads cost as much as tokens."""
    cfg, groups = run.cfg, run.cfg.batch_size // num_samples
    order = prompts_of_step(len(prompts), groups, run.step, cfg.seed)
    mine = sorted(order[run.rank :: run.world], key=lambda i: len(prompts[i][1]))
    along = order[: math.ceil(groups / run.world) - len(mine)]
    some = [prompts[i] for i in mine + along for _ in range(num_samples)]
    seed = (cfg.seed * 1_000_003 + run.step) * 4096 + run.rank
    generator = torch.Generator(run.device).manual_seed(seed)
    sampler = run.sampler(policy)
    rollout = sample_rollout(sampler, some, tokenizer, cfg, cfg.temperature, generator)
    run.stop_if_told()  # nothing has changed in this iteration: it will be begun again
    return rollout, len(mine) * num_samples


def logprobs_of(tokens, mask, model, temperature):
    """log pi of each response token, (B, T), at the temperature of sampling."""
    return token_logprobs(model(tokens, at=predicts(mask)), tokens, mask, temperature)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimates of KL(policy, reference) from tokens that the policy drew, (B, T), nats a token.

    k1 = log p - log q, p the policy: unbiased, signed. k2 = k1^2 / 2: biased, never below 0.
    k3 = q/p - 1 - log(q/p): unbiased, never below 0. Schulman 2020, "Approximating KL divergence".

    A good value is not a good gradient. On the policy's own tokens a step along grad k2 descends
    KL(p, q), along grad k3 KL(q, p), given what came before; grad k1 is 0 on average. Paid as a
    reward, a cost k moves the policy along E[k grad log p]: for k1 that is the gradient of the
    KL(p, q) of whole responses; for k2 and k3 it is next to nothing while p is near q.
    """
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kl estimator {kind}: expected k1, k2 or k3")


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """r_t = -beta (log pi_t - log pi_ref_t), and the score at each row's last response token, (B,
    T); 0 elsewhere.

    scores (B,); logprobs, ref_logprobs, mask (B, T). arXiv:1909.08593 eq. 2.
    """
    rewards = -beta * kl_estimate(logprobs, ref_logprobs) * mask
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * columns).argmax(1, keepdim=True)  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def whiten(x, mask, shift_mean=True, all_reduce=None):
    """(x - mean) / sqrt(var + 1e-8) over the mask, (B, T), 0 outside it; var is the biased one.

    shift_mean False adds the mean back, so that the scale alone changes. all_reduce: sums a tensor
    over the ranks; without it the statistics are of this rank's part alone.
    """
    inside = mask.to(x.dtype)

    def total(values):
        values = torch.stack(values)
        return values if all_reduce is None else all_reduce(values)

    count, first = total([inside.sum(), (x * inside).sum()])
    mean = first / count
    (second,) = total([((x - mean) ** 2 * inside).sum()])
    white = (x - mean) / (second / count + 1e-8).sqrt()
    return (white if shift_mean else white + mean) * inside


def explained_variance(returns, values, mask, all_reduce=None):
    """1 - var(returns - values) / var(returns) over the mask, and all ranks: 1 when the values
    foresee everything, 0 when they foresee nothing. All (B, T)."""
    inside = mask.to(returns.dtype)
    sums = [inside.sum()]
    for x in (returns, returns - values):
        sums += [(x * inside).sum(), (x**2 * inside).sum()]
    sums = torch.stack(sums) if all_reduce is None else all_reduce(torch.stack(sums))
    count, first, second, missed, missed2 = sums.tolist()
    spread = second / count - (first / count) ** 2
    return 1 - (missed2 / count - (missed / count) ** 2) / spread if spread > 0 else 0.0


# --- what reinforcement learning has in common ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PolicyFlags(TrainingFlags):
    """What every script has whose policy learns from its own samples."""

    prompts: Annotated[str, "prompts to respond to"] = "data/toy/prompts_train.jsonl"
    validation: Annotated[str, "held-out prompts; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    init: Annotated[str, "policy to start from, and the reference: a run directory"] = "runs/sft"
    gold: Annotated[
        str, "Python file whose score(prompt, response, **fields) is the truth", "validation"
    ] = ""
    out_dir: Annotated[str, "run directory"] = "runs/policy"
    steps: Annotated[int, "iterations, each of batch_size episodes"] = 50
    missing_eos_score: Annotated[
        float | None,
        "if a response did not end, the smaller of this and the batch's lowest; none: its own",
        "(-inf, inf)",
    ] = -1.0
    temperature: Annotated[float, "of sampling, and of every log-probability", "(0, inf)"] = 1.0
    max_new_tokens: Annotated[int, "longest response, tokens", "[1, inf)"] = 48
    num_prompts: Annotated[int, "held-out prompts in the last evaluation; others: a quarter"] = 1000
    batch_size: Annotated[int, "episodes an iteration, over all ranks", "[1, inf)"] = 128
    micro_batch_size: Annotated[int, "episodes a forward on one rank; 0: all of its share"] = 0
    warmup: Annotated[int, "iterations of linear warm-up (InstructGPT: 10)"] = 2
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019, Llama 2: 1e-5)"] = 1e-5
    log_every: Annotated[int, "iterations between printed lines", "[1, inf)"] = 1
    eval_every: Annotated[int, "iterations between evaluations; 0: only at the end"] = 10
    save_every: Annotated[int, "iterations between checkpoints; 0: only at the end"] = 10


@dataclasses.dataclass(frozen=True)
class RewardFlags(PolicyFlags):
    """What ppo.py and grpo.py have in common besides."""

    reward: Annotated[tuple[str, ...], "reward models, Python files with score(...)"] = (
        "runs/reward",
    )
    ptx_data: Annotated[str, "demonstrations for --ptx_coef; pre-training text: no prompt"] = ""
    ptx_validation: Annotated[
        str, "held-out demonstrations, whose nats a token each evaluation tells; empty: none"
    ] = ""
    out_dir: Annotated[str, "run directory"] = "runs/policy"
    reward_weights: Annotated[tuple[float, ...], "of each; empty: equal ones", "combine=mean"] = ()
    combine: Annotated[
        Literal["mean", "min", "llama2"],
        "of several rewards: mean; min (Coste et al. 2023); or llama2: of helpful,safe, the safe "
        "one's raw score where a prompt is `unsafe` or its sigmoid is below 0.15, else the other's",
    ] = "mean"
    shaping: Annotated[
        Literal["none", "clip", "whiten", "par"],
        "of scores, to learn from: none; clip (to --score_clip); whiten (mean 0, std 1 over a "
        "batch; Llama 2); par (sigmoid of the reward model's raw score less that of the prompt's "
        "`reference`)",
    ] = "none"
    score_clip: Annotated[float, "largest score, either way", "(0, inf)", "shaping=clip"] = 1.0
    num_samples: Annotated[int, "responses to each prompt of an iteration", "[1, inf)"] = 1
    minibatch_size: Annotated[
        int,
        "episodes an update, over all ranks, about: all updates are alike (InstructGPT: 64)",
        "[1, inf)",
    ] = 32
    update_epochs: Annotated[
        int, "passes over a rollout (Stiennon et al.: 4; InstructGPT: 1)", "[1, inf)"
    ] = 2
    stop_kl: Annotated[
        float,
        "mean nats a token from the old policy in an epoch, after which no other follows; 0: off",
    ] = 0.0
    entropy_coef: Annotated[float, "bonus a nat of entropy, a token (sources: 0)"] = 0.0
    ptx_coef: Annotated[
        float, "weight of demonstrations' nats a token in the policy's loss (InstructGPT: 27.8)"
    ] = 0.0
    ptx_batch_size: Annotated[int, "of them an update (InstructGPT: 8 an episode)", "[1, inf)"] = 32
    lr: Annotated[float, "the policy's peak learning rate (sources: 1e-6 to 1.5e-5)"] = 3e-4


def check_rewards(cfg):
    """Ends the script where flags of RewardFlags contradict each other."""
    weights = cfg.reward_weights
    for wrong, message in (
        (not cfg.reward, "--reward: expected one at least"),
        (weights and len(weights) != len(cfg.reward), "--reward_weights: expected one a --reward"),
        (weights and not sum(weights), "--reward_weights: all are 0"),
        (cfg.combine == "llama2" and len(cfg.reward) != 2, "--combine llama2: two, helpful,safe"),
        (
            cfg.shaping == "par" and len(cfg.reward) > 1,
            "--shaping par: reads one reward model's differences as log-odds, no several's",
        ),
        (cfg.batch_size % cfg.num_samples, "--num_samples: --batch_size is no whole groups of it"),
        (bool(cfg.ptx_data) != (cfg.ptx_coef > 0), "--ptx_coef, --ptx_data: only together"),
    ):
        if wrong:
            refuse(message)


def helpful_or_safe(helpful, safe, unsafe, threshold=0.15):
    """Llama 2's reward (arXiv:2307.09288 section 3.2.3) of two heads' raw outputs, (B,): the safe
    one's where the prompt is unsafe or sigmoid(safe) < threshold, else the helpful one's. Raw
    outputs are the logits of the scores, which is what it whitens."""
    decides = unsafe.logical_or(safe.sigmoid() < threshold)
    return torch.where(decides, safe, helpful)


def par_scores(scores, reference_scores):
    """mean_m sigmoid(score - reference score_m), (B,): preference as reward, arXiv:2502.18770.

    scores (B,), reference_scores (M, B): on the reward model's own scale, on which differences are
    log-odds.
    """
    return (scores - reference_scores).sigmoid().mean(0)


def combine_scores(scores, weights, combine):
    """Several rewards' scores (rewards, B) -> (B,): their weighted mean, or the least of them."""
    if combine == "min":
        return scores.min(0).values
    if combine == "mean":
        weights = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
        return (weights[:, None] * scores).sum(0) / weights.sum()
    raise ValueError(f"combine {combine}: expected mean or min")


class Rewards:
    """One or several rewards: what an episode is worth (--combine), and what is learnt from that
    (--shaping)."""

    def __init__(self, cfg, tokenizer, run):
        self.cfg, self.tokenizer, self.run = cfg, tokenizer, run
        raw = cfg.combine == "llama2"  # which reads scores as log-odds
        self.all = [Reward(name, tokenizer, run, raw) for name in cfg.reward]
        self.models = [reward.model for reward in self.all if reward.model]
        # A difference of scores on the reward model's own scale over that of normalised ones: equal
        # betas are no equal prices of a nat of KL where it differs. Of several rewards: 1.
        self.std = self.all[0].statistics["reward_std"] if len(self.all) == 1 else 1.0

    def __call__(self, rollout, size):
        """Scores combined, (B,) float64; `size` rows a forward (0: all)."""
        scores = torch.stack([reward(rollout, size) for reward in self.all])
        if self.cfg.combine == "llama2":
            unsafe = [line.get("unsafe", False) for line in rollout.lines]
            return helpful_or_safe(*scores, torch.tensor(unsafe, device=scores.device))
        weights = self.cfg.reward_weights or [1.0] * len(self.all)
        return combine_scores(scores, weights, self.cfg.combine)

    def shaped(self, rollout, real, size):
        """Scores to learn from, (B,). A batch's statistics are of the `real` first rows."""
        scores = self(rollout, size)
        if self.cfg.shaping == "clip":
            scores = scores.clamp(-self.cfg.score_clip, self.cfg.score_clip)
        elif self.cfg.shaping == "whiten":
            counted = torch.arange(len(scores), device=scores.device) < real
            scores = whiten(scores, counted, all_reduce=self.run.sum_tensor)
        elif self.cfg.shaping == "par":
            theirs = self(self.references(rollout), size)[None]
            scores = par_scores(self.std * scores, self.std * theirs)
        elif self.cfg.shaping != "none":
            raise ValueError(f"shaping {self.cfg.shaping}: expected none, clip, whiten or par")
        return scores

    def references(self, rollout):
        """The prompts' own `reference` responses as a rollout."""
        most = self.cfg.max_new_tokens + 1
        texts = [line["reference"] for line in rollout.lines]
        known = [encode(self.tokenizer, "", text, most, True)[1] for text in texts]
        begin = [n - len(r) for n, r in zip(rollout.lengths, rollout.responses, strict=True)]
        ids = [row[:n] for row, n in zip(rollout.tokens.tolist(), begin, strict=True)]
        prompts = list(zip(rollout.lines, ids, strict=True))
        found = rollout_of(prompts, known, self.tokenizer, self.run.device)
        return dataclasses.replace(found, texts=texts)


def punish_missing_eos(scores, ended, real, cfg, run):
    """Scores (B,), where a response did not end the smaller of --missing_eos_score and the lowest
    of the `real` first scores of all ranks: going on for ever can't pay, whatever their scale."""
    if cfg.missing_eos_score is None:
        return scores
    lowest = [float(scores[:real].min())] if real else []
    return scores.masked_fill(~ended, min([cfg.missing_eos_score, *run.gather(lowest)]))


def check_start(logprobs, ref_logprobs, cfg, run):
    """Ends the run, on all ranks, unless a policy that nothing has trained is the reference."""
    far = run.gather([float((logprobs - ref_logprobs).abs().max())])
    if not all(x <= (1e-3 if cfg.compile else 1e-5) for x in far):
        refuse(
            f"self-check: the untrained policy is {max(far):.1e} nats a token from the reference, "
            f"which is itself. Likely causes: dropout, another precision"
        )


def check_ratio(ratio, run):
    """Ends the run, on all ranks, unless every ratio of the first minibatch is 1."""
    far = run.gather([float((ratio - 1).abs().max())])
    if not all(x <= LIMITS[run.dtype] for x in far):
        refuse(
            f"self-check: the first minibatch's ratio is {max(far):.1e} off 1 (limit "
            f"{LIMITS[run.dtype]:.0e}): the update's forward is not that of the rollout's "
            f"log-probabilities. Likely causes: dropout, another temperature, positions or masks "
            f"that pads shift"
        )


def totals_of(rollout, scores, gaps, real, num_samples=1):
    """Sums over this rank's `real` first episodes, num_samples to a prompt; gaps (B, T): log-ratios
    to the reference."""
    means = scores[:real].view(-1, num_samples).mean(1)  # a prompt's
    return {
        "episodes": real,
        "score": scores[:real].sum().item(),
        "score_square": (scores[:real] ** 2).sum().item(),
        "prompt_square": num_samples * (means**2).sum().item(),
        "kl": gaps[:real].sum().item(),
        "eos": rollout.ended[:real].sum().item(),
        "empty": sum(not text.strip() for text in rollout.texts[:real]),
        "tokens": sum(map(len, rollout.responses[:real])),
    }


def record_of(totals, per_token, beta, times):
    """Sums over all ranks -> what is logged of an iteration: means an episode, `kl` in nats; means
    a trained token of what is in `per_token`; the scores' standard deviation, that of prompts'
    means, and that around them; shares of the time between `times`."""
    trained, episodes = totals.pop("trained"), totals.pop("episodes")
    record = {name: x / (trained if name in per_token else episodes) for name, x in totals.items()}
    all_of_it, between = (
        record.pop(name) - record["score"] ** 2 for name in ("score_square", "prompt_square")
    )
    variances = {"": all_of_it, "_between": between, "_within": all_of_it - between}
    record |= {f"score_std{name}": max(x, 0.0) ** 0.5 for name, x in variances.items()}
    record |= {"objective": record["score"] - beta * record["kl"], "beta": beta}
    for n, name in enumerate(("rollout_share", "scoring_share", "update_share")):
        record[name] = (times[n + 1] - times[n]) / (times[-1] - times[0])
    return record


def warnings_of(record, before, cfg):
    """What to say, in words, of an iteration's numbers; `before`: the first iteration's."""
    found = []
    if record["kl"] < -0.1:
        found.append(
            f"KL {record['kl']:.2f} is below 0: log-probabilities are not those that sampling used "
            f"(temperature, dropout), or there are too few episodes to tell"
        )
    if record["eos"] < 0.8 * before["eos"]:
        found.append("fewer responses end than at first: is the score high for not ending?")
    if record["eos"] < 0.5:
        found.append("most responses do not end: they all score the same, and nothing is learnt")
    if record["empty"] > 0.02:
        found.append(f"{record['empty']:.1%} of the responses are empty: is silence what pays?")
    if record["tokens"] > 0.9 * cfg.max_new_tokens:
        found.append("responses are about as long as --max_new_tokens: length may be what pays")
    if record.get("value_loss", 0) > 10 * max(before.get("value_loss", 0), 0.1):
        found.append("the value loss is ten times the first: lower --value_lr")
    return found


# --- demonstrations beside the reward (PPO-ptx) ---------------------------------------------------


def nll_sum(model, examples, run):
    """Sum of -log pi over the response tokens of demonstrations, nats, and their number."""
    tokens, mask, segments = onto(run.device, *packed(examples))
    with run.autocast:
        logits = model(tokens, predicts(mask), segments)  # (N, V)
    return -token_logprobs(logits, tokens, mask).sum(), mask.sum()


def add_ptx_gradient(model, ptx, update, size, cfg, run):
    """Adds the gradient of ptx_coef times the nats a token of an update's demonstrations, a mean
    over all ranks' tokens; -> this rank's nats and tokens, (2,). The policy's gradient is then the
    sum of both, as in InstructGPT, arXiv:2203.02155 eq. 2."""
    lines = prompts_of_step(len(ptx), cfg.ptx_batch_size, update, cfg.seed)
    lines = sorted(lines, key=lambda i: sum(map(len, ptx[i])))
    mine, most = lines[run.rank :: run.world], math.ceil(len(lines) / run.world)
    (total,) = run.sum([sum(len(ptx[i][1]) for i in mine)])
    sums = run.zeros(2)
    for rows, weight in run.micro_batches(mine, most, size, filler=lines[0]):
        nll, count = nll_sum(model, [ptx[i] for i in rows], run)
        run.scaler.scale(nll * (cfg.ptx_coef * weight * run.world / total)).backward()
        sums += weight * torch.stack([nll.detach().to(run.wide), count])
    return sums


def held_out_nll(model, examples, size, run):
    """{"nll": nats a token of held-out demonstrations}, over all ranks; {} of none."""
    if not examples:
        return {}
    mine = sorted(examples[run.rank :: run.world], key=lambda example: sum(map(len, example)))
    most, total = math.ceil(len(examples) / run.world), run.zeros(2)
    for some, weight in run.micro_batches(mine, most, size, filler=examples[0]):
        with torch.no_grad():
            nll, count = nll_sum(model, some, run)
        total += weight * torch.stack([nll.to(run.wide), count])
    nll, count = run.sum(total.tolist())
    return {"nll": nll / count}


# --- samples for held-out prompts -----------------------------------------------------------------


def respond(
    run, model, prompts, tokenizer, temperature, rows, seed, score=None, gold=None, kl_to=None
):
    """One response to each held-out prompt, from all ranks, in order: its line with `response` and
    `parts`: words, eos, gold and what explains it, proxy by `score` (a function of a rollout and of
    rows a forward), kl to the model `kl_to`, nats. `rows` a forward on one rank."""
    sampler, found = run.sampler(model), []
    generator = torch.Generator(run.device).manual_seed(seed * run.world + run.rank)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))  # few pads in a batch
    at_once = sampled_at_once(sampler, prompts, run.cfg, rows) if prompts else 1
    for begin in range(0, len(order), at_once * run.world):
        run.stop_if_told()
        run.progress("sampled held-out prompts", begin, len(order))
        of_all = order[begin : begin + at_once * run.world]
        mine = of_all[run.rank :: run.world]
        along = of_all[: math.ceil(len(of_all) / run.world) - len(mine)]  # as others wait
        some = [prompts[i] for i in mine + along]
        batch = sample_rollout(sampler, some, tokenizer, run.cfg, temperature, generator)
        scores = score(batch, rows).tolist() if score else []
        gaps, ended = [], batch.ended.tolist()
        if kl_to and temperature:  # greedy samples say nothing of the KL
            ours, theirs = (
                batch.each(rows, run, logprobs_of, m, temperature) for m in (model, kl_to)
            )
            gaps = (ours - theirs).sum(1).tolist()
        for n, i in enumerate(mine):
            parts = {"words": float(len(batch.texts[n].split())), "eos": float(ended[n])}
            parts |= judged(gold, batch.lines[n], batch.texts[n])
            parts |= {"proxy": scores[n]} if score else {}
            parts |= {"kl": gaps[n]} if gaps else {}
            found.append(batch.lines[n] | {"index": i, "response": batch.texts[n], "parts": parts})
    return sorted(run.gather(found), key=lambda sample: sample["index"])


def ended_rows(run, policy, prompts, tokenizer, rows, max_length):
    """(prompt ids, response ids) of a sample to each prompt, those that ended: what did not end has
    a score of its own in RL. Scores of reward models are normalised on them."""
    samples = respond(run, policy, prompts, tokenizer, 1.0, rows, run.cfg.seed)
    ended = [s for s in samples if s["parts"]["eos"] and s["response"].strip()]
    if len(ended) < 2:
        refuse(
            f"{len(ended)} of {len(samples)} samples to normalise on ended, 2 are needed at least: "
            f"more --num_prompts, or more --max_new_tokens than {run.cfg.max_new_tokens}"
        )
    run.say(
        f"scores are normalised on {len(ended)} samples ({len(samples) - len(ended)} more did not "
        f"end)" + (": few, 256 are usual" if len(ended) < 256 else "")
    )
    return [encode(tokenizer, s["prompt"], s["response"], max_length, True) for s in ended]


def distinct(texts, n):
    """Different n-grams of words over all n-grams, of all texts taken together (Li et al. 2016,
    arXiv:1510.03055); 0 when there are none."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def numbers(samples, base=None, missing_eos_score=None):
    """{name: mean} of samples' parts, TASK_name for each task; distinct_2; and win_rate by gold,
    else by proxy, against `base`, samples to the same prompts (ties half). The proxy of what did
    not end is the smaller of missing_eos_score and the lowest of all, as in training; None: its
    own. evaluate.py has intervals."""
    if not samples:
        return {}
    if missing_eos_score is not None and "proxy" in samples[0]["parts"]:
        proxies = (sample["parts"]["proxy"] for sample in (*samples, *(base or ())))
        least = {"proxy": min([missing_eos_score, *proxies])}
        samples, base = (
            [s if s["parts"]["eos"] else s | {"parts": s["parts"] | least} for s in some or ()]
            for some in (samples, base)
        )
    found, groups = {}, {"": samples}
    for sample in samples:
        if sample.get("task", "all") != "all":
            groups.setdefault(f"{sample['task']}_", []).append(sample)
    for prefix, some in groups.items():
        for name in sorted(set.intersection(*(set(sample["parts"]) for sample in some))):
            found[prefix + name] = float(np.mean([sample["parts"][name] for sample in some]))
    found["distinct_2"] = distinct([sample["response"] for sample in samples], 2)
    by = "gold" if "gold" in found else "proxy"
    if base and by in found:
        ours, theirs = (np.array([s["parts"][by] for s in some]) for some in (samples, base))
        found["win_rate"] = float(np.mean(0.5 + 0.5 * np.sign(ours - theirs)))
    return found


def brief(found):
    """What of `numbers`, and of a script's own held-out ones, is printed."""
    names = ("loss", "nll", "accuracy", "gold", "proxy", "win_rate", "kl", "eos", "words")
    return {name: found[name] for name in (*names, "distinct_2") if name in found}


def one_a_task(prompts):
    """The first (line, ids) of each task."""
    return list({p[0].get("task", "all"): p for p in reversed(prompts)}.values())[::-1]


def show(run, samples):
    """Logs and prints the first sample of each task."""
    for sample, _ in one_a_task([(sample, None) for sample in samples]):
        run.log("samples", {"step": run.step} | sample)
        parts = "  ".join(f"{name} {x:.3g}" for name, x in sample["parts"].items())
        run.say(f"  {sample['prompt'][-160:]!r}\n    -> {sample['response']!r}\n    {parts}")


# --- training a reward model ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RewardModelFlags(TrainingFlags):
    """What scripts that train a scalar head have besides; they set other defaults."""

    data: Annotated[tuple[str, ...], "rankings or comparisons, several files by commas"] = ()
    validation: Annotated[str, "held-out rankings or comparisons; empty: none"] = ""
    init: Annotated[
        str, "trunk to start from: a run or Hugging Face directory; a reward model goes on"
    ] = "runs/sft"
    tokenizer: Annotated[str, "gpt2, FILE.tiktoken or directory; empty: --init's"] = ""
    normalise_with: Annotated[
        str, "policy on whose samples scores get mean 0, std 1; empty: --init; none: don't"
    ] = ""
    prompts: Annotated[str, "prompts for those samples"] = "data/toy/prompts_train.jsonl"
    num_prompts: Annotated[
        int, "how many of them, a sample each (Ziegler et al.: 256)", "[2, inf)"
    ] = 1024
    max_new_tokens: Annotated[int, "longest of those samples, tokens", "[1, inf)"] = 48
    out_dir: Annotated[str, "run directory"] = "runs/reward"
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[
        Literal["drop", "cut"], "a response over max_length: drop it, or cut its end"
    ] = "drop"
    label_smoothing: Annotated[
        float, "probability that a pair's order is taken to be wrong", "[0, 0.5)"
    ] = 0.0
    epochs: Annotated[float, "passes over the data (all sources: 1; more overfits)"] = 1.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0


def load_trunk(cfg, run):
    """-> a reward model to train, its tokenizer, and how many tokens it may read: --init's trunk
    under a new scalar head, or --init itself where it is a reward model."""
    try:
        model = load_model(cfg.init)
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init)
        tokenizer_files(tokenizer)  # one that can't be saved is refused now, not after training
        check_tokenizer(tokenizer, cfg.init, load_config(cfg.init))
    except (OSError, ValueError) as error:
        refuse(error)
    if cfg.max_length == 1:
        refuse("--max_length: expected 2 or more")
    if model.score is None:
        torch.manual_seed(cfg.seed)
        model = add_scalar_head(model)
    elif not cfg.normalise_with:
        refuse(f"--init {cfg.init}: a reward model: --normalise_with must name a policy, or none")
    set_dropout(model, 0.0)
    positions = model.config.n_positions
    max_length = min(cfg.max_length or positions, positions)
    model = model.to(run.place(), run.precision)
    learn_by_adapters(model, cfg)
    return model, tokenizer, max_length


def load_yardstick(cfg, tokenizer, max_length, run):
    """-> the policy of --normalise_with, which must write in the reward model's tokens, and prompts
    for its samples; None and [] where it is none."""
    if cfg.normalise_with == "none":
        return None, []
    name = cfg.normalise_with or cfg.init
    policy, theirs = load_policy(name, run, cfg.tokenizer if name == cfg.init else "")
    if identity(theirs) != identity(tokenizer):
        refuse(
            f"--normalise_with {name}: another tokenizer or template ({theirs.name}) than "
            f"{cfg.init}'s ({tokenizer.name})"
        )
    if cfg.max_new_tokens >= max_length:
        refuse(f"--max_new_tokens: leaves a prompt no room in {max_length} tokens")
    room = policy.config.n_positions - cfg.max_new_tokens
    return policy, read_prompts(cfg.prompts, tokenizer, room, run.say)[: cfg.num_prompts]


def score_examples(model, examples, size, run):
    """`score_rows` of the responses of each example: a list of lists."""
    rows = [(e["prompt"], response) for e in examples for response in e["responses"]]
    scores = iter(score_rows(model, rows, size, run))
    return [list(itertools.islice(scores, len(e["responses"]))) for e in examples]


def statistics_of(model, rows, size, run, transform="identity"):
    """`score_statistics` of a model's scores of these rows; {} of no rows, and where all are equal:
    such a model is saved too, but its readers refuse it."""
    if not rows:
        return {}
    raw = torch.tensor(score_rows(model, rows, size, run), dtype=torch.float64)
    try:
        statistics = score_statistics(raw, transform)
    except ValueError as error:
        run.say(f"not normalised: {error}")
        return {}
    mean, std, _ = statistics.values()
    run.say(f"normalised: mean {mean:.3f}, std {std:.3f} on {len(rows)} samples")
    return statistics


# --- rates and ratings ----------------------------------------------------------------------------


def rate_interval(hits, counts):
    """[rate, low, high]: sum(hits) / sum(counts) with its 95% interval.

    hits, counts (n,): of groups (prompts), within which pairs are not independent. It is Wilson's
    interval for as many independent pairs as would vary like the groups; for as many pairs as there
    are groups, when nothing varies. One group has no interval.
    """
    hits, counts = np.asarray(hits, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    groups, total = int((counts > 0).sum()), float(counts.sum())
    if groups == 0:
        return [None, None, None]
    rate = float(hits.sum()) / total
    if groups == 1:
        return [rate, None, None]
    variance = ((hits - rate * counts) ** 2).sum() * groups / (groups - 1) / total**2
    n = rate * (1 - rate) / variance if variance > 0 else groups
    z = 1.96
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return [rate, float(centre - half), float(centre + half)]


def grouped_rate(rows):
    """[(group, hit)] -> {"rate": [rate, low, high], "pairs": how many}."""
    groups = {}
    for group, hit in rows:
        hits, count = groups.get(group, (0.0, 0))
        groups[group] = (hits + hit, count + 1)
    values = list(groups.values())
    return {
        "rate": rate_interval([h for h, _ in values], [c for _, c in values]),
        "pairs": len(rows),
    }


def connected(beats):
    """(..., n, n) bool, who beat whom -> (...): whether each leads to each by a chain of wins,
    without which some rating of greatest likelihood is infinite (Ford 1957)."""
    n = beats.shape[-1]
    reach = (beats | np.eye(n, dtype=bool)).astype(np.float64)
    for _ in range(max(n - 1, 1).bit_length()):
        reach = np.minimum(reach @ reach, 1.0)
    return (reach > 0).all((-2, -1))


def fit_ratings(wins, met=None):
    """Bradley-Terry scores of greatest likelihood, in nats of log-odds, of mean 0.

    wins (..., n, n): how often (row) beat (column), a tie being half a win each way. Where a chain
    of wins does not lead from everyone to everyone, half a win each way is added between all who
    met (in `met`, (n, n) bool, the games of these wins unless given): else a score is infinite.
    P(a beats b) = sigmoid(s_a - s_b), and 173.7178 s is on Elo's scale.

    Raises ValueError when some players never met, not even by way of others.
    """
    wins = np.asarray(wins, dtype=np.float64)
    n = wins.shape[-1]
    met = (wins + wins.swapaxes(-1, -2) > 0) if met is None else met
    if not connected(met).all():
        raise ValueError("some players never met, not even by way of others")
    weak = ~connected(wins > 0)
    wins = wins + 0.5 * (met & weak[..., None, None])
    games = wins + wins.swapaxes(-1, -2)
    scores = np.zeros(wins.shape[:-1])
    for _ in range(200):  # Newton's method on a concave likelihood, at most a nat a step
        p = 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))  # P(row beats column)
        gradient = (wins - games * p).sum(-1)
        if np.abs(gradient).max() < 1e-9 * games.sum((-2, -1)).max():
            break
        weight = games * p * (1 - p)
        hessian = np.eye(n) * weight.sum(-1)[..., None] - weight
        step = np.linalg.solve(hessian + 1 / n, gradient[..., None])[..., 0]  # keeps the mean at 0
        scores = scores + step * np.minimum(1, 1 / np.abs(step).max(-1, keepdims=True).clip(1e-12))
    return scores - scores.mean(-1, keepdims=True)
