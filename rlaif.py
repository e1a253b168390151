r"""AI feedback: Constitutional AI (Bai et al., arXiv:2212.08073) and RLAIF (Lee et al.,
arXiv:2309.00267).

A language model, the judge, stands where people stood. It is asked which of two responses is
better, in both orders, and the next token's probabilities are the answer:

    p(first is better) = (softmax(l_1, l_2)_1 + softmax(l'_1, l'_2)_2) / 2

l being the log-probabilities of the answers "1" and "2", l' those with the responses swapped, for a
judge prefers positions too. The soft labels train a reward model (reward.py) or a policy (dpo.py).
Or the judge rates single responses, 1 to 10, and what it expects is the reward, by REINFORCE with a
learned baseline and no reward model in between:

    score = sum_i i p(i), on [-1, 1];  Z = (1 - beta) score - beta KL;  loss = -log pi(y|x) (Z - V)

Simplified against the papers: one update a rollout, and no cleaning of the responses' ends.

    python rlaif.py label --samples runs/feedback/samples.jsonl --judge runs/judge     # preferences
    python rlaif.py agree --data comparisons.jsonl --judges runs/judge    # how good a judge is
    python rlaif.py revise --policy runs/sft --judge runs/critic --prompts prompts.jsonl     # CAI
    python rlaif.py direct --init runs/sft --judge runs/rater             # RLAIF by ratings
    torchrun --nproc_per_node=8 rlaif.py direct --init runs/sft --judge runs/rater --lr 1e-5
    python rlaif.py label --samples samples.jsonl --judge http://localhost:8000/v1 --judge_model M \
        --template data/prompts/harmless.txt --constitution data/constitution.json

Sub-commands: label, agree, revise, direct. Each has its own --help.
"""

import dataclasses
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import numpy as np
import torch

from feedback import (
    PolicyFlags, add_scalar_head, brief, check_field, check_ratio, check_start, explained_variance,
    grouped_rate, judged, learn_by_adapters, load_policy, load_python, logprobs_of, numbers,
    punish_missing_eos, read_preferences, read_prompts, read_responses, record_of, reference_of,
    respond, sample_step, show, told, totals_of, warnings_of,
)  # fmt: skip
from model import (
    at_least_float32, generate, pad, predicts, spread, token_logprobs, weight_files, widest,
)  # fmt: skip
from run import (
    Run, RunFlags, adam, append_line, flags, guarded, onto, read_jsonl, refuse, schedule, sha256,
    stop_signals, write_jsonl,
)  # fmt: skip
from tokens import byte_alphabet, encode, identity, ids_of_text, plain, response_of

# --- mathematics ----------------------------------------------------------------------------------


def preference(first_logprobs, second_logprobs):
    """P(the first response is better) from the answers' log-probabilities in both orders.

    first_logprobs: of (1, 2), the first response being shown as 1; second_logprobs: the first being
    shown as 2. A softmax over the two answers, turned round in the second order, and averaged:
    Lee et al., arXiv:2309.00267 section 3.1. -> p, and the probability of answer 1 in each order.
    """
    both = first_logprobs, second_logprobs
    shares = [0.5 + 0.5 * math.tanh((one - two) / 2) for one, two in both]  # the logistic function
    return (shares[0] + 1 - shares[1]) / 2, shares


def position_bias(shares):
    """[(P(answer 1), P(answer 1) with the responses swapped)] -> {"same", "first"}: the share of
    pairs whose answer is the same position in both orders, and of these the share whose answer is
    the first. arXiv:2309.00267 appendix B."""
    same = [(a > 0.5) for a, b in shares if (a > 0.5) == (b > 0.5)]
    first = sum(same) / len(same) if same else None
    return {"same": len(same) / len(shares), "first": first}


def expected_rating(logprobs):
    """sum_i i P(i) over the answers 1..n, and that on [-1, 1]. arXiv:2309.00267 section 3.2.2."""
    weights = np.exp(np.asarray(logprobs) - np.max(logprobs))
    n = len(weights)
    rating = float((np.arange(1, n + 1) * weights).sum() / weights.sum())
    return rating, 2 * (rating - 1) / (n - 1) - 1


def penalised(scores, kl, beta):
    """Z = (1 - beta) score - beta KL, all (B,): what a whole response is worth, KL in nats a
    sequence. arXiv:2309.00267 appendix."""
    return (1 - beta) * scores - beta * kl


def reinforce(new_logprobs, values, worth, mask):
    """REINFORCE with a learned baseline -> policy losses, value losses, (B, T), 0 outside the mask.

    -log pi(a_t) (Z - V_t), the advantage being a constant, and (V_t - Z)^2 / 2: V_t says what the
    response will be worth, before token t. worth (B,), the others (B, T). Williams 1992.
    """
    advantages = (worth[:, None] - values).detach()
    return -advantages * new_logprobs * mask, 0.5 * (values - worth[:, None]) ** 2 * mask


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class JudgeFlags(RunFlags):
    """How a judge is asked, in every sub-command."""

    group = "algorithm"
    judge_model: Annotated[str, "the server's name of the model"] = ""
    template: Annotated[str, "how to ask"] = "data/prompts/toy.txt"
    in_flight: Annotated[int, "requests to a server at once, of each rank", "[1, inf)"] = 8
    reply_s: Annotated[float, "a server's time to reply, seconds", "(0, inf)"] = 60.0
    retries: Annotated[int, "how often a request is repeated"] = 5
    backoff_s: Annotated[float, "seconds before the first repetition, doubled each time"] = 1.0


# How a server is spoken to may be another when a run goes on.
FREE = ("in_flight", "reply_s", "retries", "backoff_s")
# Of a judge; where a policy learns too, it is run.py's.
Precision = Annotated[Literal["", "float32", "bfloat16", "float16", "float64"], "empty: float32"]


@dataclasses.dataclass(frozen=True)
class PreferenceFlags(JudgeFlags):
    """What those sub-commands have in common that ask which response is better."""

    group = "algorithm"
    max_rationale_tokens: Annotated[int, "longest rationale (Lee et al.: 512)", "[1, inf)"] = 128
    top_logprobs: Annotated[int, "likely tokens a server is asked for (OpenAI: 5)", "[1, inf)"] = 5
    dtype: Precision = ""


@dataclasses.dataclass(frozen=True)
class LabelConfig(PreferenceFlags):
    samples: Annotated[
        tuple[str, ...],
        "prompts with responses, or rankings; by commas: one policy's each, to be compared",
    ] = ("runs/feedback/samples.jsonl",)
    judge: Annotated[str, "a GPT run directory, or a server's URL with its /v1"] = "runs/judge"
    constitution: Annotated[str, "JSON list of principles, one drawn a pair; empty: none"] = ""
    mix: Annotated[str, "comparisons that are written first: people's, of helpfulness"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/labels"
    variant: Annotated[
        str, "base or detailed, with +cot (reasons first), +2shot, +8samples, +t0.7"
    ] = "base+cot"
    clamp: Annotated[
        tuple[float, ...],
        "probabilities no nearer to 0 and 1, low,high (CAI with rationales: 0.4,0.6)",
        "[0, 1]",
    ] = ()
    hard: Annotated[bool, "labels of 1 for the likelier; none where both are as likely"] = False
    pairs: Annotated[int, "pairs a prompt, drawn at random; 0: all"] = 1
    num_prompts: Annotated[int, "how many prompts, from the file's start; 0: all"] = 0


@dataclasses.dataclass(frozen=True)
class AgreeConfig(PreferenceFlags):
    data: Annotated[str, "comparisons or rankings by people, whose order judges are held to"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    judges: Annotated[tuple[str, ...], "run directories and URLs"] = ("runs/judge",)
    gold: Annotated[str, "Python file whose score is the truth, in the place of the order"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/agreement"
    variants: Annotated[tuple[str, ...], "see label's --variant"] = (
        "base", "detailed", "base+1shot", "detailed+1shot", "base+cot", "detailed+cot",
    )  # fmt: skip
    num_prompts: Annotated[int, "how many lines, a pair of each; 0: all"] = 1000


@dataclasses.dataclass(frozen=True)
class ReviseConfig(JudgeFlags):
    prompts: Annotated[str, "prompts to respond to, harmful ones among them"] = (
        "data/toy/prompts_train.jsonl"
    )
    policy: Annotated[str, "helpful-only policy that responds first: a run directory"] = "runs/sft"
    judge: Annotated[str, "who criticises and revises, as label's --judge"] = "runs/critic"
    constitution: Annotated[str, "JSON list of principles, drawn from"] = "data/constitution.json"
    mix: Annotated[str, "helpful demonstrations to add; empty: none"] = ""
    gold: Annotated[str, "Python file whose score and parts are shown by revision"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/revisions"
    template: Annotated[str, "with sections critique and revision"] = "data/prompts/toy.txt"
    revisions: Annotated[int, "of each response, one after another (CAI: 4)", "[1, inf)"] = 1
    temperature: Annotated[float, "of responses, critiques and revisions (CAI: 1)"] = 1.0
    max_new_tokens: Annotated[int, "longest of all three, tokens", "[1, inf)"] = 48
    mix_weight: Annotated[float, "how often --mix is passed over (0.5: half of it)", "mix"] = 1.0
    num_prompts: Annotated[int, "how many prompts, from the file's start; 0: all"] = 0
    dtype: Precision = ""


@dataclasses.dataclass(frozen=True)
class DirectConfig(JudgeFlags, PolicyFlags):
    judge: Annotated[str, "who rates, as label's --judge"] = "runs/rater"
    out_dir: Annotated[str, "run directory"] = "runs/direct"
    template: Annotated[str, "with sections rate and ratings"] = "data/prompts/toy.txt"
    top_logprobs: Annotated[int, "likely tokens a server is asked for", "[1, inf)"] = 20
    beta: Annotated[float, "KL coefficient (Lee et al.: 0.05)", "[0, 1]"] = 0.1
    steps: Annotated[int, "iterations, each of batch_size episodes and one update"] = 100
    batch_size: Annotated[int, "episodes an iteration, all ranks' (theirs: 128)", "[1, inf)"] = 64
    temperature: Annotated[
        float, "of sampling, and of every log-probability (theirs: 0.9)", "(0, inf)"
    ] = 1.0
    lr: Annotated[float, "the policy's peak learning rate (Lee et al.: 1e-5)"] = 1e-4
    value_lr: Annotated[float, "the value network's"] = 1e-3
    warmup: Annotated[int, "iterations of linear warm-up"] = 4
    eval_every: Annotated[int, "iterations between evaluations; 0: only at the end"] = 20
    save_every: Annotated[int, "iterations between checkpoints; 0: only at the end"] = 20


# --- what a judge is asked ------------------------------------------------------------------------

# What must stand in the sections of a template.
FIELDS = {
    "sample": ("{prompt}", "{response_1}", "{response_2}"),
    "rate": ("{prompt}", "{response}"),
    "critique": ("{prompt}", "{response}", "{principle}"),
    "revision": ("{critique}",),
    "principle": ("{principle}",),
    "ending": (),
    "ending rationale": (),
}
EXEMPLAR = ("prompt", "response_1", "response_2", "rationale")


def read_template(path):
    """The sections of a template, {name: text}: what stands between two `--- name` lines.

    The line break before the next section is not part of a text, so that `ending` can stop exactly
    where the answer's token starts. `answers` and `ratings` are JSON lists of single tokens;
    `exemplars` are JSON Lines with prompt, response_1, response_2, rationale and preferred.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        refuse(f"{path}:0: file: can't be read: {getattr(error, 'strerror', None) or error}")
    found, name = {}, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("--- "):
            name = line[4:].strip()
            if name in found:
                refuse(f"{path}:{number}: {name}: a second section of that name")
            found[name] = []
        elif not name:
            refuse(f"{path}:{number}: line: stands before the first `--- section`")
        else:
            found[name].append(line)
    sections = {name: "\n".join(lines) for name, lines in found.items()}
    for name in ("answers", "ratings"):
        try:
            sections[name] = json.loads(sections.get(name, "[]"))
        except (ValueError, RecursionError) as error:
            refuse(f"{path}:0: {name}: not JSON: {error}")
        good = isinstance(sections[name], list)
        if not good or not all(isinstance(x, str) and x.strip() for x in sections[name]):
            refuse(f"{path}:0: {name}: expected a list of strings with text in them")
    exemplars = []
    for line in filter(None, sections.get("exemplars", "").splitlines()):
        try:
            exemplar = json.loads(line)
            good = type(exemplar["preferred"]) is int and exemplar["preferred"] in (1, 2)
            good &= all(isinstance(exemplar[name], str) for name in EXEMPLAR)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            refuse(f"{path}:0: exemplars: expected {', '.join(EXEMPLAR)}, preferred (1 or 2)")
        exemplars.append(exemplar)
    for name, fields in FIELDS.items():
        absent = [field for field in fields if name in sections and field not in sections[name]]
        if absent or not sections.get(name, "x").strip():
            refuse(f"{path}:0: {name}: expected text with {', '.join(fields) or 'words'} in it")
    return sections | {"exemplars": exemplars, "path": str(path)}


def section(template, name):
    if name not in template:
        refuse(f"{template['path']}:0: {name}: no such section")
    return template[name]


def filled(text, fields):
    """{name} -> the field's text, stripped; braces in the fields themselves mean nothing."""
    pattern = "|".join(re.escape("{" + name + "}") for name in fields)
    return re.sub(pattern, lambda match: fields[match[0][1:-1]].strip(), text)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a judge is asked: `base` or `detailed`, exemplars, a rationale before the answer, and how
    many of those are sampled (self-consistency, Wang et al. 2022)."""

    preamble: str = "base"
    exemplars: int = 0
    rationale: bool = False
    samples: int = 1
    temperature: float = 0.0

    def __str__(self):
        name = f"{self.preamble} {self.exemplars}-shot" + " CoT" * self.rationale
        name += f" x{self.samples}" * (self.samples > 1)
        return name + f" T={self.temperature:g}" * (self.temperature > 0)


VARIANT = re.compile(
    r"(?P<preamble>base|detailed)|(?P<rationale>cot)|(?P<exemplars>\d+)shot|(?P<samples>\d+)samples"
    r"|t(?P<temperature>\d*\.?\d+)"
)


def read_variant(text):
    """detailed+cot+2shot+8samples+t0.7 -> Variant."""
    settings = {}
    for part in text.split("+"):
        match = VARIANT.fullmatch(part)
        if not match:
            refuse(f"variant {text}: {part}: expected base, detailed, cot, 2shot, 4samples, t0.7")
        name = match.lastgroup
        settings[name] = Variant.__annotations__[name](match[name])  # str, bool, int or float
    variant = Variant(**settings)
    if variant.exemplars > 8 or not 1 <= variant.samples <= 64:
        refuse(f"variant {text}: expected at most 8 exemplars, 1 to 64 samples")
    if variant.samples > 1 and not variant.temperature > 0:
        refuse(f"variant {text}: several samples are of rationales (cot) at a temperature (t0.7)")
    if variant.temperature > 0 and not variant.rationale:
        refuse(f"variant {text}: a temperature is of rationales (cot)")
    return variant


def question(template, variant, fields, rationale=None):
    """The prompt that asks which of two responses is better: preamble, exemplars, sample, ending.

    fields: prompt, response_1, response_2, perhaps principle. With a variant that reasons first,
    `rationale` None asks for the rationale, and a text goes before the ending.
    """
    parts, line = [section(template, f"preamble {variant.preamble}")], template.get("break", "\n")
    if len(template["exemplars"]) < variant.exemplars:
        refuse(f"{template['path']}: has {len(template['exemplars'])} exemplars")
    shown = [(e, e["rationale"], e["preferred"]) for e in template["exemplars"]]
    for one, reason, answer in [*shown[: variant.exemplars], (fields, rationale, None)]:
        lines = [filled(section(template, "sample"), one)]
        if "principle" in one:
            lines.append(filled(section(template, "principle"), one))
        if variant.rationale:
            lines.append(section(template, "ending rationale"))
            if reason is None:
                parts.append(line.join(lines))
                break
            lines[-1] += " " + reason.strip()
        lines.append(
            section(template, "ending") + (template["answers"][answer - 1] if answer else "")
        )
        parts.append(line.join(lines))
    return template.get("joint", "\n\n").join(parts)


def check_question(template, variant, pair):
    """Ends the script where a template can't ask this, before anything is written or asked."""
    if len(section(template, "answers")) != 2:
        refuse(f"{template['path']}:0: answers: expected two")
    fields = pair | {"response_1": pair["first"], "response_2": pair["second"]}
    question(template, variant, fields)
    question(template, variant, fields, "x" if variant.rationale else None)


def read_constitution(path):
    try:
        principles = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}:0: file: {error}")
    good = isinstance(principles, list) and principles
    if not good or not all(isinstance(p, str) and p.strip() for p in principles):
        refuse(f"{path}:0: file: expected a list of principles, each a text")
    return principles


# --- judges ---------------------------------------------------------------------------------------

BLOCK = 64  # requests that a judge in this process answers at once


class JudgeError(Exception):
    """Answers that can't be had, as a server is gone or SIGTERM came. What was answered is kept,
    and the same command goes on."""


class Judge:
    """Answers requests, and remembers them in a file, so that a labelling that was stopped asks
    nothing twice.

    A request is {"prompt", "answers"}, answered by the answers' log-probabilities as next tokens,
    [] where a server offers none of them; or {"prompt", "max_tokens", "temperature", "seed"},
    answered by a text. `ask` gets {key: request} and yields {key: answer} as they come. `depends`
    is what answers depend on beside the request.
    """

    def __init__(self, name, depends):
        self.name, self.depends = name, depends
        self.asked, self.absent = 0, 0  # requests answered anew; answers that were not offered

    def remember(self, run, memory):
        """Opens the file of answers, before anything is asked."""
        self.run, self.memory, self.known = run, Path(memory), {}
        data = self.memory.read_bytes() if self.memory.exists() else b""
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            with suppress(ValueError, TypeError):  # damaged: asked again
                self.known |= json.loads(line)
        if whole < len(data):  # a kill tore the last line: asked again
            os.truncate(self.memory, whole)
        return self

    def answers(self, requests):
        """The answers of requests, in order. JudgeError where one can't be had, or told to stop."""
        keys = [
            hashlib.sha256(json.dumps([self.depends, plain(request)]).encode()).hexdigest()
            for request in requests
        ]
        pairs = zip(keys, requests, strict=True)
        wanted, done = {key: request for key, request in pairs if key not in self.known}, 0
        for found in self.ask(wanted):
            self.known |= found
            # A line has all of them: texts by one generator are kept, or lost and asked again,
            # together, and come out the same. An answer that was not offered may be later.
            kept = {key: answer for key, answer in found.items() if answer != []}
            append_line(self.memory, kept)
            done += len(found)
            self.asked += len(found)
            self.run.progress(f"answers of {self.name}", done, len(wanted))
        if stop_signals:
            raise JudgeError("stopped by SIGTERM")
        return [self.known[key] for key in keys]

    def logprobs(self, prompts, answers):
        """[the answers' log-probabilities after it] of prompts."""
        return self.answers([{"prompt": prompt, "answers": answers} for prompt in prompts])

    def texts(self, prompts, seed, **how):
        """What follows prompts, each sampled by a seed of its own."""
        return self.answers(
            [{"prompt": x} | how | {"seed": seed + n} for n, x in enumerate(prompts)]
        )


class LocalJudge(Judge):
    """A GPT run directory in this process."""

    def __init__(self, directory, run, dtype):
        self.model, self.tokenizer = load_policy(directory, run)
        self.model.to(run.device, dtype).requires_grad_(False)  # whole, also beside --shard
        self.device = run.device
        files = [*weight_files(Path(directory)), Path(directory, "config.json")]
        read_as = identity(self.tokenizer)
        super().__init__(directory, f"{' '.join(map(sha256, files))} {dtype} {read_as}")
        first = torch.tensor([[self.tokenizer.eot_token]], device=run.device)
        with torch.no_grad():
            self.check_finite(self.model(first))  # sampling would go on with what are no numbers

    def ask(self, wanted):
        keys = list(wanted)
        if not any(request.get("temperature") for request in wanted.values()):
            keys.sort(key=lambda key: -len(wanted[key]["prompt"]))  # too long is refused at once
        for begin in range(0, len(keys), BLOCK):
            if stop_signals:
                return
            some = keys[begin : begin + BLOCK]
            requests = [wanted[key] for key in some]
            reply = self.next_tokens if "answers" in requests[0] else self.complete
            yield dict(zip(some, reply(requests), strict=True))

    def check_finite(self, found):
        if not found.isfinite().all():
            refuse(f"{self.name}: log-probabilities that are not finite; try --dtype")

    def encoded(self, request, room):
        """The ids of a prompt to a policy, laid out as it reads prompts, from its end; or of a
        question, a text that goes on in the answer, whole."""
        if request.get("cut"):
            return encode(self.tokenizer, request["prompt"], None, room)[0]
        ids = ids_of_text(self.tokenizer, request["prompt"])
        if len(ids) > room:
            refuse(f"{self.name}: a question of {len(ids)} tokens; room is for {room}")
        return ids

    def next_tokens(self, requests):
        answers = [self.tokenizer.encode_ordinary(text) for text in requests[0]["answers"]]
        for ids, text in zip(answers, requests[0]["answers"], strict=True):
            if len(ids) != 1:
                refuse(f"{self.name}: the answer {text!r} is {len(ids)} tokens, not one")
        rows = [self.encoded(request, self.model.config.n_positions) for request in requests]
        tokens, last = pad([row[:-1] for row in rows], [row[-1:] for row in rows])  # (B, T)
        with torch.no_grad():
            logits = self.model(tokens.to(self.device), at=last.to(self.device))  # (B, V)
        logprobs = at_least_float32(logits).log_softmax(-1)
        found = logprobs[:, [ids[0] for ids in answers]]
        self.check_finite(found)
        return found.tolist()

    def complete(self, requests):
        first = requests[0]
        room = self.model.config.n_positions - first["max_tokens"]
        responses = generate(
            self.model,
            [self.encoded(request, room) for request in requests],
            first["max_tokens"],
            temperature=first["temperature"],
            eos=self.tokenizer.ends,
            generator=torch.Generator(self.device).manual_seed(first["seed"]),
        )
        return [response_of(self.tokenizer, ids)[0] for ids in responses]


MARKS = " \n\t\rĠĊĉč▁"  # spaces and line breaks, as texts and vocabularies write them


def spellings(answer):
    """How a server may write an answer's token, MARKS around it aside: as text, in the letters that
    stand for bytes in byte-level BPE, as SentencePiece's bytes."""
    letters, data = byte_alphabet(), answer.strip().encode()
    as_bytes = "".join(f"<0x{byte:02X}>" for byte in data)
    return {answer.strip(), "".join(letters[byte] for byte in data), as_bytes}


def complaint(data):
    """What a server says in the place of an answer: the message in its JSON, or how its text (of a
    web page, say) begins."""
    text = data[:10_000].decode("utf-8", "replace")
    message = re.search(r'"(?:message|error|detail|msg)"\s*:\s*"((?:\\.|[^"\\])+)"', text)
    if message:
        return message[1].replace('\\"', '"')
    return re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", text).strip() or "nothing"


class ServerJudge(Judge):
    """A server of the completions API that vLLM, llama.cpp, Ollama and others speak, at a URL that
    the user names. Its key is read from the environment: PLAINRLHF_API_KEY."""

    def __init__(self, url, cfg):
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname
            good = good and parts.hostname.encode("idna") and re.fullmatch("[!-~]+", url)
        except ValueError:
            good = False
        if not good:
            refuse(f"--judge {url}: expected a run directory, http://... or https://...")
        self.url, self.cfg = url.rstrip("/") + "/completions", cfg
        self.opener = OpenerDirector()  # without handlers of errors, and of ways to other servers
        for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
            self.opener.add_handler(handler)
        self.headers = {"Content-Type": "application/json"}
        key = os.environ.get("PLAINRLHF_API_KEY", "").strip()
        if key:
            if not re.fullmatch("[!-~]+", key):
                refuse("PLAINRLHF_API_KEY: expected one word of ASCII characters")
            self.headers["Authorization"] = f"Bearer {key}"
        self.in_vain, self.offered = 0, ""  # unanswered questions in a row; likely tokens of one
        super().__init__(url, f"{self.url} {cfg.judge_model}")

    def ask(self, wanted):
        """When told to stop, or when an answer can't be had, asks nothing more, but waits for what
        is in flight: it is paid for."""
        failed, pool = [], ThreadPoolExecutor(self.cfg.in_flight)

        def answer(request):
            try:
                return None if failed or stop_signals else self.one(request)
            except JudgeError as error:
                failed.append(error)

        keys = {pool.submit(answer, request): key for key, request in wanted.items()}
        try:
            for future in as_completed(keys):
                if future.result() is not None:
                    yield {keys[future]: future.result()}
        finally:  # an answer can't be written, say: what waits is not asked
            pool.shutdown(cancel_futures=True)
        if failed and not stop_signals:
            raise failed[0]

    def one(self, request):
        body = {"model": self.cfg.judge_model, "prompt": request["prompt"]}
        if "answers" in request:
            body |= {"max_tokens": 1, "temperature": 0, "logprobs": self.cfg.top_logprobs}
            return self.post(body, lambda reply: self.of_answers(reply, request["answers"]))
        body |= {name: request[name] for name in ("max_tokens", "temperature", "seed")}
        return self.post(body, self.of_text)

    def of_text(self, reply):
        """A reply's text; half a character, which no file of text can hold, is left out."""
        return reply["choices"][0]["text"].encode("utf-8", "ignore").decode()

    def of_answers(self, reply, answers):
        """Log-probabilities of the answers, from a reply's most likely tokens: all that spell an
        answer add up. One that is not among them gets the least of them, which its own can't
        exceed; where none is: []."""
        given = reply["choices"][0]["logprobs"]
        top = given.get("top_logprobs") and given["top_logprobs"][0]  # {token: log-probability}
        if not top:  # llama.cpp's newer form, and that of chats
            top = {x["token"]: x["logprob"] for x in given["content"][0]["top_logprobs"]}
        if not top or not all(-1e9 < x < 1e-3 for x in top.values()):
            raise ValueError("no logarithms of probabilities")
        spelt = [spellings(answer) for answer in answers]
        found = [[x for token, x in top.items() if token.strip(MARKS) in some] for some in spelt]
        self.absent += found.count([])
        self.in_vain = 0 if any(found) else self.in_vain + 1
        if not any(found):
            self.offered = ", ".join(map(repr, top))[:200]
            if self.in_vain >= 16:
                raise self.unanswered("16 questions in a row")
            return []
        least = min(top.values())
        return [min(float(np.logaddexp.reduce(some)), 0.0) if some else least for some in found]

    def unanswered(self, what):
        return JudgeError(
            f"{self.url}: {what} unanswered: no answer of --template is among the likely tokens, "
            f"{self.offered}; try another template, or more --top_logprobs"
        )

    def post(self, body, read):
        """Sends, and reads the reply; again after what may pass: 408, 429, 5xx, a cut connection,
        no reply in time, a reply without what was asked for."""
        data = json.dumps(body).encode()
        for attempt in range(self.cfg.retries + 1):
            pause, passing = self.cfg.backoff_s * 2**attempt, True
            try:
                request = Request(self.url, data, self.headers)
                with self.opener.open(request, timeout=self.cfg.reply_s) as reply:
                    said = reply.read(10**7)
                if reply.status < 300:
                    return read(json.loads(said))
                where, after = (reply.headers.get(x, "") for x in ("Location", "Retry-After"))
                why = f"{reply.status} {reply.reason}: "
                why += f"leads to {where}" if where else complaint(said)
                passing = reply.status in (408, 429) or reply.status >= 500
                pause = max(pause, float(after)) if after.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:
                why = f"no whole reply ({getattr(error, 'reason', error)})"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                wanted = "log-probabilities" if "logprobs" in body else "text"
                why = f"gives no {wanted}: {complaint(said)}"
            until = time.time() + min(pause, 60.0) * (attempt < self.cfg.retries and passing)
            while time.time() < until and not stop_signals:
                time.sleep(0.2)
            if stop_signals or not passing:
                break
        why = "".join(letter if letter.isprintable() else " " for letter in why)
        why = " ".join(why.split())[:400] + f", {attempt + 1} times" * (attempt > 0)
        raise JudgeError(f"{self.url}: {why}")


def open_judge(name, run, dtype):
    return ServerJudge(name, run.cfg) if "://" in name else LocalJudge(name, run, dtype)


def begin(cfg):
    """-> the run of a sub-command that works in one process, and the precision of its judge."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        refuse("rlaif.py: runs in one process; split the file for several")
    return Run(cfg), getattr(torch, cfg.dtype or "float32")


# --- label, agree: which of two responses is better -----------------------------------------------


def judge_pairs(judge, template, variant, pairs, max_tokens, seed):
    """[[p, [share, share]]] of pairs: {"prompt", "first", "second"}, perhaps "principle"; None of a
    pair without an answer in both orders. JudgeError where those are most.

    Every pair is asked in both orders; with rationales, of each order `variant.samples` are
    sampled, and the answers after them averaged.
    """
    asked, K = [], variant.samples  # K questions a pair and order
    for pair in pairs:
        shared = {name: pair[name] for name in ("prompt", "principle") if name in pair}
        for one, two in (("first", "second"), ("second", "first")):
            asked += [shared | {"response_1": pair[one], "response_2": pair[two]}] * K
    reasons = [None] * len(asked)
    if variant.rationale:
        texts = judge.texts(
            [question(template, variant, one) for one in asked],
            seed * 1_000_003,
            max_tokens=max_tokens,
            temperature=variant.temperature,
        )
        # A judge that went on to the answer, or to another pair, is stopped there.
        reasons = [text.split(section(template, "ending").strip())[0] for text in texts]
    questions = [
        question(template, variant, one, reason) for one, reason in zip(asked, reasons, strict=True)
    ]
    answers, found = judge.logprobs(questions, template["answers"]), []
    for n in range(0, len(answers), 2 * K):
        first, second = answers[n : n + K], answers[n + K : n + 2 * K]
        both = [preference(a, b) for a, b in zip(first, second, strict=True) if a and b]
        means = [np.mean(x, axis=0).tolist() for x in zip(*both, strict=True)]  # none of nothing
        found.append(means or None)
    if 2 * found.count(None) > len(pairs):
        raise judge.unanswered(f"{found.count(None)} of {len(pairs)} pairs")
    return found


def say_bias(run, bias):
    first = "" if bias["first"] is None else f", the first position in {bias['first']:.1%} of these"
    same = f"{bias['same']:.1%}"
    run.say(f"position bias: the same position in both orders in {same} of pairs{first}")


def read_samples(paths, count):
    """[(line without its responses, responses, who wrote each)] of samples or rankings. Of several
    files, which are one policy's each, those of the prompts that all have."""
    files = []
    for path in paths:
        lines, seen = {}, {}
        for where, record in read_jsonl(path, {"prompt": False}):
            if "task" in record:
                check_field(where, record, "task", str)
            responses = read_responses(where, record, least=1 if len(paths) > 1 else 2)
            writers = record.get("policy")
            writers = writers if isinstance(writers, list) else [writers] * len(responses)
            others = ("responses", "scores", "policy", "annotator")
            line = {name: value for name, value in record.items() if name not in others}
            seen[line["prompt"]] = seen.get(line["prompt"], 0) + 1  # a prompt may come again
            lines[line["prompt"], seen[line["prompt"]]] = line, responses, writers
            if len(paths) == 1 and len(lines) == count:
                break
        files.append(lines)
    found = []
    for key, (line, responses, writers) in files[0].items():
        if all(key in lines for lines in files):
            for lines in files[1:]:
                responses, writers = responses + lines[key][1], writers + lines[key][2]
            found.append((line, responses, writers))
    return found[: count or len(found)]


def draw_pairs(lines, count, principles, seed, between=False):
    """[(line number, pair)]: `count` random pairs of different responses a prompt (0: all), each
    with a principle drawn at random when there are any. between: pairs of different writers, equal
    ones too, since a tie counts where policies are compared."""
    drawn = []
    for number, (line, responses, writers) in enumerate(lines):
        rng = random.Random(f"{seed} {number}")
        pairs, seen = [], set()
        for i, j in itertools.combinations(range(len(responses)), 2):
            texts = frozenset((responses[i], responses[j]))
            if between:
                pairs += [(i, j)] * (writers[i] != writers[j])
            elif len(texts) == 2 and texts not in seen:
                seen.add(texts)
                pairs.append((i, j))
        rng.shuffle(pairs)
        for one, two in pairs[: count or len(pairs)]:
            first, second = (one, two) if rng.random() < 0.5 else (two, one)
            pair = {"prompt": line["prompt"], "first": responses[first]}
            pair |= {"second": responses[second], "writers": [writers[first], writers[second]]}
            if principles:
                pair["principle"] = principles[int(rng.random() * len(principles))]
            drawn.append((number, pair))
    return drawn


def label(cfg):
    """Comparisons with soft labels, out_dir/comparisons.jsonl."""
    bounds = cfg.clamp or (0.0, 1.0)
    if len(bounds) != 2 or not bounds[0] <= 0.5 <= bounds[1]:
        refuse("--clamp: expected two numbers, at most and at least 0.5, by a comma")
    if not cfg.samples:
        refuse("--samples: expected a file")
    variant, template = read_variant(cfg.variant), read_template(cfg.template)
    principles = read_constitution(cfg.constitution) if cfg.constitution else []
    lines = read_samples(cfg.samples, cfg.num_prompts)
    mixed = [record for _, record, _, _ in read_preferences(cfg.mix)] if cfg.mix else []
    drawn = draw_pairs(lines, cfg.pairs, principles, cfg.seed, between=len(cfg.samples) > 1)
    if not drawn:
        refuse(f"{','.join(cfg.samples)}:0: file: no prompt has two responses to compare")
    check_question(template, variant, drawn[0][1])
    run, dtype = begin(cfg)
    judge = open_judge(cfg.judge, run, dtype)
    inputs = [*cfg.samples, cfg.template, cfg.constitution, cfg.mix, cfg.judge]
    run.open(inputs, free=FREE)
    judge.remember(run, run.out_dir / "answers.jsonl")

    pairs = [pair for _, pair in drawn]
    run.say(f"{len(pairs)} pairs of {len(lines)} prompts, asked in both orders: {variant}")
    found = judge_pairs(judge, template, variant, pairs, cfg.max_rationale_tokens, cfg.seed)
    labelled, undecided = [], 0
    for (number, pair), answer in zip(drawn, found, strict=True):
        if answer is None:
            continue
        p = min(max(answer[0], bounds[0]), bounds[1])
        if cfg.hard and abs(p - 0.5) < 1e-6:  # which is better would be a matter of chance
            undecided += 1
            continue
        better, worse = ("first", "second") if p >= 0.5 else ("second", "first")
        record = lines[number][0] | {"chosen": pair[better], "rejected": pair[worse]}
        record |= {"label": 1.0 if cfg.hard else max(p, 1 - p), "annotator": cfg.judge}
        if "principle" in pair:
            record["principle"] = pair["principle"]
        if None not in pair["writers"]:
            record["policy"] = pair["writers"][:: 1 if better == "first" else -1]
        labelled.append(record)
    without = f"without a label: {found.count(None)} pairs unanswered, {undecided} undecided"
    if not labelled:
        sys.exit(f"{cfg.judge}: all {len(pairs)} are {without}")
    write_jsonl(run.out_dir / "comparisons.jsonl", mixed + labelled)

    mean_label = float(np.mean([record["label"] for record in labelled]))
    report = {"pairs": len(pairs), "mixed": len(mixed), "mean_label": mean_label}
    report |= {"unanswered": found.count(None), "undecided": undecided}
    report["position_bias"] = position_bias([answer[1] for answer in found if answer])
    say_bias(run, report["position_bias"])
    run.say(
        f"{run.out_dir / 'comparisons.jsonl'}: {len(mixed + labelled)} comparisons, {len(mixed)} "
        f"of them mixed in; mean label {mean_label:.3f}; {judge.asked} answers"
    )
    if len(labelled) < len(pairs):
        run.say(without)
    if judge.absent:
        run.say(
            f"{judge.absent} answers not among the likely tokens: beside one, the least of these"
        )
    run.finish(report | {"asked": judge.asked, "absent_answers": judge.absent})


def ordered_pairs(cfg, gold):
    """[{"prompt", "task", "first", "second"}]: a random pair of each line whose order people, or
    gold, know; the first is the better one."""
    rng, found = random.Random(cfg.seed), []
    for _, record, responses, pairs in read_preferences(cfg.data):
        pairs = [(i, j) for i, j, _, probability in pairs if probability > 0.5]
        if gold:
            scores = [told(gold, "score", record, response) for response in responses]
            pairs = [
                (i, j) if scores[i] > scores[j] else (j, i)
                for i, j in itertools.combinations(range(len(responses)), 2)
                if scores[i] != scores[j]
            ]
        if pairs:
            better, worse = pairs[int(rng.random() * len(pairs))]
            pair = {"prompt": record["prompt"], "task": record.get("task", "all")}
            found.append(pair | {"first": responses[better], "second": responses[worse]})
        if cfg.num_prompts and len(found) == cfg.num_prompts:
            break
    if not found:
        refuse(f"{cfg.data}:0: file: no pair is ordered")
    return found


def agreement(pairs, found, seed):
    """How often `judge_pairs` found the first response better: {task: its rate}, ties half; the
    rate of one order alone, in which the first is answer 1 or 2 at random; the position bias."""
    hits = [0.5 + 0.5 * float(np.sign(p - 0.5)) for p, _ in found]
    cell = {"all": grouped_rate(list(enumerate(hits)))}
    for task in dict.fromkeys(pair["task"] for pair in pairs if pair["task"] != "all"):
        some = [(n, hit) for n, hit in enumerate(hits) if pairs[n]["task"] == task]
        cell[task] = grouped_rate(some)
    coin = random.Random(f"{seed} orders")
    single = [
        float(shares[0] > 0.5) if coin.random() < 0.5 else float(shares[1] < 0.5)
        for _, shares in found
    ]
    cell["one_order"] = grouped_rate(list(enumerate(single)))
    return cell | {"position_bias": position_bias([shares for _, shares in found])}


def agree(cfg):
    """How often judges prefer what people, or gold, prefer; by judge, variant and task."""
    if not cfg.variants or not cfg.judges:
        refuse("--variants, --judges: expected at least one")
    variants, template = [read_variant(text) for text in cfg.variants], read_template(cfg.template)
    pairs = ordered_pairs(cfg, load_python(cfg.gold) if cfg.gold else None)
    for variant in variants:
        check_question(template, variant, pairs[0])
    run, dtype = begin(cfg)
    judges = {name: open_judge(name, run, dtype) for name in cfg.judges}
    run.open([cfg.data, cfg.template, cfg.gold, *cfg.judges], free=FREE)

    table, chosen = {name: {} for name in judges}, {}
    for name, judge in judges.items():
        judge.remember(run, run.out_dir / "answers.jsonl")
        for variant in variants:
            found = judge_pairs(judge, template, variant, pairs, cfg.max_rationale_tokens, cfg.seed)
            kept = [n for n, answer in enumerate(found) if answer]
            some = [pairs[n] for n in kept], [found[n] for n in kept]
            cell = table[name][str(variant)] = agreement(*some, cfg.seed)
            chosen[f"{name} {variant}"] = {n: found[n][0] > 0.5 for n in kept}
            _, low, high = cell["all"]["rate"]
            interval = "" if low is None else f"; all in [{low:.3f}, {high:.3f}]"
            rates = [f"{what} {x['rate'][0]:.3f}" for what, x in cell.items() if "rate" in x]
            run.say(f"{name}  {variant}: {', '.join(rates)}{interval}")
            say_bias(run, cell["position_bias"])
            cell["unanswered"] = len(pairs) - len(kept)
        if judge.absent:
            run.say(f"{judge.absent} answers of {name} were not among its likely tokens")
    between = {}
    for a, b in itertools.combinations(chosen, 2):
        same = [float(x == chosen[b][n]) for n, x in chosen[a].items() if n in chosen[b]]
        between[f"{a} / {b}"] = grouped_rate(list(enumerate(same)))["rate"]
    run.finish({"pairs": len(pairs), "judges": table, "between": between})


# --- revise: Constitutional AI's supervised stage -------------------------------------------------


def passes(records, weight, seed):
    """The records, `weight` times: whole passes, and of the last, partial one a random choice."""
    whole, part = divmod(round(weight * len(records)), len(records))
    chosen = sorted(random.Random(f"{seed} passes").sample(range(len(records)), part))
    return records * whole + [records[i] for i in chosen]


def revise(cfg):
    """Responses, then critiques and revisions of them, each by a principle drawn at random:
    out_dir/revisions.jsonl has all with their numbers, 0 being the response; demonstrations.jsonl
    what sft.py learns from, every revision and the helpful demonstrations."""
    template, principles = read_template(cfg.template), read_constitution(cfg.constitution)
    to_criticise, to_revise = (section(template, name) for name in ("critique", "revision"))
    lines = [record for _, record in read_jsonl(cfg.prompts, {"prompt": True})]
    lines = lines[: cfg.num_prompts or len(lines)]
    texts = {"prompt": True, "response": False}
    helpful = [record for _, record in read_jsonl(cfg.mix, texts)] if cfg.mix else []
    gold = load_python(cfg.gold) if cfg.gold else None
    run, dtype = begin(cfg)
    policy, critic = LocalJudge(cfg.policy, run, dtype), open_judge(cfg.judge, run, dtype)
    inputs = [cfg.prompts, cfg.template, cfg.constitution, cfg.mix, cfg.gold]
    run.open([*inputs, cfg.policy, cfg.judge], free=FREE)
    policy.remember(run, run.out_dir / "responses.jsonl")
    critic.remember(run, run.out_dir / "answers.jsonl")

    # The responses. A prompt that is too long loses its start, as everywhere; a question must fit.
    how = {"max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    seeds = [(cfg.seed * 1009 + n) * 1_000_003 for n in range(2 * cfg.revisions + 1)]
    responses = policy.texts([line["prompt"] for line in lines], seeds[0], **how, cut=True)
    kept = [n for n, response in enumerate(responses) if response.strip()]
    empty = len(lines) - len(kept)
    lines, responses = [lines[n] for n in kept], [responses[n] for n in kept]
    first = {"revision": 0}
    records = [line | {"response": r} | first for line, r in zip(lines, responses, strict=True)]
    for number in range(1, cfg.revisions + 1):
        drawn = random.Random(f"{cfg.seed} principles {number}")
        chosen = [principles[int(drawn.random() * len(principles))] for _ in lines]
        asked = [
            filled(to_criticise, {"prompt": line["prompt"], "response": r, "principle": p})
            for line, r, p in zip(lines, responses, chosen, strict=True)
        ]
        critiques = critic.texts(asked, seeds[2 * number - 1], **how)
        asked = [
            text + filled(to_revise, {"critique": critique})
            for text, critique in zip(asked, critiques, strict=True)
        ]
        for n, revision in enumerate(critic.texts(asked, seeds[2 * number], **how)):
            if not revision.strip():  # the response before it stays, and is revised again
                empty += 1
                continue
            # As the response began: what stands between it and its prompt belongs to it.
            space = responses[n][: len(responses[n]) - len(responses[n].lstrip())]
            responses[n] = space + revision.strip()
            record = lines[n] | {"response": responses[n], "revision": number}
            records.append(record | {"principle": chosen[n], "critique": critiques[n].strip()})
    learnt = [record for record in records if record["revision"]]
    added = passes(helpful, cfg.mix_weight, cfg.seed) if helpful else []
    write_jsonl(run.out_dir / "revisions.jsonl", records)
    write_jsonl(run.out_dir / "demonstrations.jsonl", learnt + added)

    by_revision, own = {}, ("revision", "principle", "critique")
    for number in range(cfg.revisions + 1):
        samples = [record for record in records if record["revision"] == number]
        fields = [{k: v for k, v in record.items() if k not in own} for record in samples]
        samples = [r | {"parts": judged(gold, r, r["response"])} for r in fields]
        means = by_revision[number] = numbers(samples)
        names = [k for k in means if k.split("_")[-1] in ("gold", "harmless", "helpful")]
        shown = [f"{name} {means[name]:.3f}" for name in names]
        run.say(f"revision {number}: {', '.join([f'{len(samples)} responses', *shown])}")
    run.say(
        f"{run.out_dir / 'demonstrations.jsonl'}: {len(learnt)} revisions and {len(added)} helpful "
        f"demonstrations; {empty} empty ones left out"
    )
    report = {"prompts": len(lines), "empty": empty, "helpful": len(added)}
    run.finish(report | {"by_revision": by_revision})


# --- direct: RLAIF without a reward model ---------------------------------------------------------

# What is summed over the tokens of an iteration's update, and logged as means a token.
SUMMED = ("policy_loss", "value_loss", "entropy")
SHOWN = ("score", "rating", "kl", "eos", "tokens", "entropy", "value_loss", "explained_variance")


def state_values(model, tokens, mask):
    """The value network's values, (B, T): column t is of the state before token t is chosen. 0
    outside the mask."""
    output = model(tokens, at=predicts(mask))  # (N,)
    return spread(output, mask)


def ratings(judge, template, lines, texts):
    """A judge's scores of responses: the ratings that it expects, on [-1, 1]; 0 where it offers
    none."""
    questions = [
        filled(template["rate"], {"prompt": line["prompt"], "response": text})
        for line, text in zip(lines, texts, strict=True)
    ]
    found = judge.logprobs(questions, template["ratings"])
    return [expected_rating(logprobs)[1] if logprobs else 0.0 for logprobs in found]


class Rater:
    """A judge's ratings as this rank's scores. The ranks don't ask at the same places, so that one
    whose judge fails can't end there: it goes on with NaN until all ask whether they can."""

    def __init__(self, judge, template):
        self.judge, self.template, self.failed = judge, template, ""

    def __call__(self, rollout, rows=0):
        """Scores (B,), float64. How many rows go through a forward is the judge's own matter."""
        scores = [math.nan] * len(rollout.texts)
        if not self.failed:
            try:
                scores = ratings(self.judge, self.template, rollout.lines, rollout.texts)
            except JudgeError as error:
                self.failed = f"{error}"
        return rollout.tokens.new_tensor(scores, dtype=widest(rollout.tokens.device))

    def end_if_failed(self, run):
        """Ends all ranks together, saved, where the judge of one has no answers."""
        run.stop_if_told()
        failed = run.gather([self.failed] if self.failed else [])
        if failed:
            run.save()
            run.wait()  # when one rank ends, torchrun ends the others: let rank 0 finish
            why = f"{failed[0]}; stopped at step {run.step}; --resume goes on, asks nothing twice"
            sys.exit(why if run.rank == 0 else 1)


def check_room(judge, template, prompts, max_new_tokens):
    """Ends the script where a prompt's question may be too long for a judge in this process: now,
    not when that prompt is drawn."""
    if isinstance(judge, LocalJudge):
        for line, _ in prompts:
            asked = filled(template["rate"], {"prompt": line["prompt"], "response": ""})
            judge.encoded({"prompt": asked}, judge.model.config.n_positions - max_new_tokens)


def direct(cfg):
    """A policy that learns from a judge's ratings: out_dir is a run directory like ppo.py's, with
    what the judge said in answers/, a file a rank."""
    template = read_template(cfg.template)
    section(template, "rate")
    if len(template["ratings"]) != 10:
        refuse(f"{cfg.template}:0: ratings: expected ten answers")
    run = Run(cfg)  # device, precision, ranks

    # Three models: the policy and the value network learn, the reference doesn't. All stay in eval
    # mode: with dropout the log-probabilities would not be those that sampling used.
    policy, tokenizer = load_policy(cfg.init, run)
    reference = run.parallel(reference_of(policy, cfg))
    value_model = add_scalar_head(policy)
    torch.nn.init.zeros_(value_model.score.weight)
    value_model.eval().to(run.place(), run.precision)
    learn_by_adapters(policy, cfg)
    learn_by_adapters(value_model, cfg)

    # Prompts, and everything else that a resumed run must find unchanged.
    room = policy.config.n_positions - cfg.max_new_tokens
    prompts = read_prompts(cfg.prompts, tokenizer, room, run.say)
    held_out = read_prompts(cfg.validation, tokenizer, room, run.say)
    gold = load_python(cfg.gold) if cfg.gold else None
    judge = open_judge(cfg.judge, run, run.precision)
    check_room(judge, template, prompts + held_out, cfg.max_new_tokens)
    inputs = [cfg.prompts, cfg.validation, cfg.template, cfg.gold, cfg.init, cfg.judge]
    run.open(inputs, total=cfg.steps, free=FREE)
    # In a folder, as resuming cuts logs off: what a judge said is kept.
    (run.out_dir / "answers").mkdir(exist_ok=True)
    rater = Rater(judge.remember(run, run.out_dir / f"answers/{run.rank}.jsonl"), template)

    modules = {"policy": policy, "value": value_model}
    peaks = {"policy": cfg.lr, "value": cfg.value_lr}
    forward = {name: run.parallel(model) for name, model in modules.items()}  # compiled, under DDP
    optimizers = {name: adam(model, peaks[name], cfg) for name, model in modules.items()}
    now = run.resume(modules, optimizers, first=None)
    share = math.ceil(cfg.batch_size / run.world)  # episodes of the rank with most
    size = cfg.micro_batch_size or share
    if not run.checkpoint:  # without a checkpoint --resume would begin anew, and answers be lost
        run.saved = -1
        run.save()

    # Held-out prompts: the policy's samples against the reference's. A win is between independent
    # draws, hence two seeds.
    few, seed = held_out[: max(cfg.num_prompts // 4, 1)], 2 * 1_000_003 * (cfg.seed + 1)
    how = {"tokenizer": tokenizer, "temperature": cfg.temperature, "rows": 4 * size}
    how |= {"score": rater, "gold": gold, "kl_to": reference}
    base = respond(run, reference, few, seed=seed, **how)
    rater.end_if_failed(run)
    while True:
        run.save_or_stop()
        if run.evaluation_due():
            samples = respond(run, policy, few, seed=seed + 1, **how)
            rater.end_if_failed(run)
            found = numbers(samples, base, cfg.missing_eos_score)
            run.log_evaluation(found, brief(found))
            show(run, samples)
        if run.step == cfg.steps:
            break

        # 1. Rollout: responses to this rank's prompts, `real` of them not just to go along.
        times = [time.time()]
        rollout, real = sample_step(run, policy, prompts, tokenizer)
        times.append(time.time())

        # 2. The judge's scores of whole responses, and the reference's log-probabilities.
        absent = judge.absent
        scores = rater(rollout)  # (B,)
        absent = judge.absent - absent
        rater.end_if_failed(run)
        scores = punish_missing_eos(scores, rollout.ended, real, cfg, run)
        ref_logprobs = rollout.each(size, run, logprobs_of, reference, cfg.temperature)  # (B, T)
        if run.step == run.first:  # without gradients; those of the update's forward must agree
            logprobs = rollout.each(size, run, logprobs_of, forward["policy"], cfg.temperature)
            if run.step == 0:
                check_start(logprobs, ref_logprobs, cfg, run)
        times.append(time.time())

        # 3. One update: the responses are the present policy's, so that its gradient is unbiased.
        rate = schedule(run.step, cfg.steps, cfg)  # of the peak
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * peaks[name]
        (total,) = run.sum([sum(map(len, rollout.responses[:real]))])  # tokens
        sums = run.zeros(len(SUMMED))
        gaps, expected = torch.zeros_like(ref_logprobs), torch.zeros_like(ref_logprobs)  # (B, T)
        for rows, weight in run.micro_batches(list(range(real)), share, size, filler=0):
            columns = slice(max(rollout.lengths[i] for i in rows))
            (rows,) = onto(run.device, torch.tensor(rows))
            tokens, mask = rollout.tokens[rows, columns], rollout.mask[rows, columns]
            with run.autocast:
                logits = forward["policy"](tokens, at=predicts(mask))  # (N, V)
                values = state_values(forward["value"], tokens, mask)
            new_logprobs = token_logprobs(logits, tokens, mask, cfg.temperature)
            gap = new_logprobs.detach() - ref_logprobs[rows, columns]
            worth = penalised(scores[rows], gap.sum(1).to(run.wide), cfg.beta).to(values.dtype)
            policy_losses, value_losses = reinforce(new_logprobs, values, worth, mask)
            loss = policy_losses.sum() + value_losses.sum()
            # One mean over micro-batches and ranks; DDP averages: undo it.
            run.scaler.scale(loss * (weight * run.world / total)).backward()
            if run.step == run.first:
                ratio = (new_logprobs.detach() - logprobs[rows, columns]).exp()
                check_ratio(ratio, run)
            # The samples' mean -log pi is on average the entropy.
            found = [policy_losses.sum(), value_losses.sum(), -new_logprobs.sum()]
            sums += weight * torch.stack([x.detach().to(run.wide) for x in found])
            gaps[rows, columns], expected[rows, columns] = gap, values.detach()
        norms = {name: run.clip(optimizers[name], modules[name]) for name in modules}
        for optimizer in optimizers.values():
            run.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        run.scaler.update()
        times.append(time.time())
        run.step += 1

        # 4. What happened, in numbers over all ranks.
        totals = totals_of(rollout, scores, gaps, real) | {"absent": absent}
        totals |= dict(zip(SUMMED, sums.tolist(), strict=True)) | {"trained": totals["tokens"]}
        record = record_of(run.sum(totals), SUMMED, cfg.beta, times)
        record["objective"] = penalised(record["score"], record["kl"], cfg.beta)
        record["rating"] = 5.5 + 4.5 * record["score"]
        record["absent"] /= 10  # ratings not among a server's likely tokens
        worth = penalised(scores, gaps.sum(1).to(run.wide), cfg.beta).to(gaps.dtype)
        returns = worth[:, None] * rollout.mask  # (B, T)
        explained = explained_variance(returns, expected, rollout.counted(real), run.sum_tensor)
        record |= {"explained_variance": explained, "lr": rate * cfg.lr}
        record |= {f"{name}_norm": norm for name, norm in norms.items()}
        now.first = now.first or {name: record[name] for name in ("eos", "value_loss")}
        if run.due(cfg.log_every):
            run.log("metrics", record, {name: record[name] for name in SHOWN})
            for warning in warnings_of(record, now.first, cfg):
                run.say(f"  warning: {warning}")
            if record["absent"] > 0.5:
                run.say("  warning: most ratings are not among the server's likely tokens")

    # The finished policy, then what it is worth on held-out prompts.
    run.save_model(policy, tokenizer, stage="rlaif")
    (asked,) = run.sum([judge.asked])  # by this process: a resumed run asks nothing twice
    some = held_out[: cfg.num_prompts]
    samples = respond(run, policy, some, seed=seed + 1, **how)
    others = respond(run, reference, some, seed=seed, **how)
    rater.end_if_failed(run)
    found = numbers(samples, others, cfg.missing_eos_score)
    run.finish({"episodes": run.step * cfg.batch_size, "asked": asked} | found)


# --- main -----------------------------------------------------------------------------------------


def main():
    commands = {
        "label": (LabelConfig, label),
        "agree": (AgreeConfig, agree),
        "revise": (ReviseConfig, revise),
        "direct": (DirectConfig, direct),
    }
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        refuse(f"rlaif.py: expected a sub-command: {', '.join(commands)}")
    config, job = commands[sys.argv[1]]
    try:
        job(flags(config, __doc__, sys.argv[1]))
    except JudgeError as error:
        print(f"{error}; what was answered is kept, --resume goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM if stop_signals else 1)


if __name__ == "__main__":
    guarded(main)
