"""Shared by the tests: a small vocabulary, small models, real public data where it is at hand."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# One thread here, in scripts that are started and on ranks: their weights are held to each other's.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import feedback  # noqa: E402
import run  # noqa: E402
from model import GPT, GPTConfig, load_model, save_model  # noqa: E402
from tokens import load_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """The embedded task's files for seed 0."""
    out = tmp_path_factory.mktemp("toy")
    command = [sys.executable, str(ROOT / "data/toy.py"), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def tokenizer(toy_data):
    return load_tokenizer(toy_data / "bpe.tiktoken")


@pytest.fixture
def small_gpt():
    """A GPT of 2 layers with weights large enough that nothing is nearly uniform."""

    def make(scalar_head=False, dtype=torch.float32, seed=0, **settings):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = GPTConfig(**sizes | {"initializer_range": 0.3} | settings)
        return GPT(config, scalar_head).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def shared():
    """The folder that PLAINRLHF_SHARED names: public data and GPT-2's vocabulary."""
    folder = os.environ.get("PLAINRLHF_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PLAINRLHF_SHARED names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken-cache"))
    return load_tokenizer("gpt2")


# --- running scripts ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals_as_before():
    """A Run takes SIGTERM for itself, and remembers it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    run.stop_signals.clear()
    signal.signal(signal.SIGTERM, handler)


def run_script(module, monkeypatch, *args):
    """A script's main(), in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    run.stop_signals.clear()
    try:
        module.main()
    except SystemExit as ended:
        return ended.code
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, handler)
    return 0


# A rollout that does not depend on the ranks: each prompt's responses are written by its text, the
# second to one prompt in a row by one letter more, and so on; and checkpoints are kept. For
# `on_ranks`, or by can_the_rollout.
CANNED = """import feedback, run
def canned(sampler, prompts, tokenizer, cfg, temperature, generator):
    texts, eos = [line['prompt'] for line, _ in prompts], tokenizer.eot_token
    more = [0] * len(texts)
    for n in range(1, len(texts)):
        more[n] = more[n - 1] + 1 if texts[n] == texts[n - 1] else 0
    lengths = [len(text) + n for text, n in zip(texts, more)]
    responses = [(list(text.encode()) * 2)[: 2 + n % 6] + [eos] * (n % 3 > 0)
                 for text, n in zip(texts, lengths)]
    return feedback.rollout_of(prompts, responses, tokenizer, sampler.wte.weight.device)
feedback.sample_rollout = canned
if hasattr({script}, 'sample_rollout'):
    {script}.sample_rollout = canned
run.shutil.rmtree = lambda *args, **kwargs: None
"""


@contextmanager
def can_the_rollout(module):
    """CANNED in this process, while it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for place in {feedback, module}:
            if hasattr(place, "sample_rollout"):
                patch.setattr(place, "sample_rollout", place.sample_rollout)
        patch.setattr(run.shutil, "rmtree", run.shutil.rmtree)
        exec(CANNED.format(script=module.__name__), {module.__name__: module})
        yield patch


def same_run(out, other):
    """Weights, and logs but for times, are the same, bit for bit."""

    def steps(lines):
        return [{k: v for k, v in line.items() if not k.endswith("_share")} for line in lines]

    assert weights(out) == weights(other)
    assert steps(metrics(out)) == steps(metrics(other))
    for log in ("samples.jsonl", "rounds.jsonl"):
        assert (out / log).exists() == (other / log).exists()
        if (out / log).exists():
            assert (out / log).read_bytes() == (other / log).read_bytes()


def metrics(out):
    """A run's metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def weights(out):
    return (out / "model.safetensors").read_bytes()


def gradient(out):
    """The gradient of a run's first step: Adam's first moment after one step from zero is 0.1 times
    it, and checkpoints keep it in float64."""
    tensors = load_file(out / "checkpoint-1/tensors.safetensors")
    moments = {name: t for name, t in tensors.items() if name.endswith("exp_avg")}
    assert moments and all(t.dtype == torch.float64 for t in moments.values())
    return torch.cat([10 * moments[name].flatten() for name in sorted(moments)])


@pytest.fixture(scope="session")
def policy_run(toy_data, tokenizer, tmp_path_factory):
    """A run directory with an untrained language model on the embedded task's vocabulary, which
    ends one response in six at each token."""
    directory = tmp_path_factory.mktemp("policy") / "run"
    torch.manual_seed(0)
    sizes = {"n_positions": 96, "n_embd": 16, "n_layer": 1, "n_head": 2}
    policy = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, initializer_range=0.3, **sizes)).eval()
    with torch.no_grad():
        eos = policy.wte.weight[tokenizer.eot_token]
        policy.ln_f.bias.copy_(5.5 * eos / eos.square().sum())
    save_model(directory, policy, tokenizer, {"stage": "sft"})
    return directory


def policy_of_arms(directory, tokenizer):
    """Saves a policy whose one-token responses " golf", " chess", " tennis" have probabilities 0.5,
    0.3, 0.2; returns these tokens."""
    arms = [tokenizer.encode_ordinary(f" {word}")[0] for word in ("golf", "chess", "tennis")]
    torch.manual_seed(0)
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    policy = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    with torch.no_grad():  # the last LayerNorm's bias is all that reaches the logits
        policy.ln_f.weight.zero_()
        policy.ln_f.bias.copy_(30 * torch.eye(8)[0])  # large: what learns are the arms' embeddings
        policy.wte.weight.zero_()
        policy.wte.weight[:, 0] = -10
        for arm, p in zip(arms, (0.5, 0.3, 0.2), strict=True):
            policy.wte.weight[arm, 0] = math.log(p) / 30
    save_model(directory, policy, tokenizer, {})
    return arms


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is cut short, and goes on ---------------------------------------------------------------


def at_call(place, function, call, what):
    """Code, for `on_ranks`: `what` is run just before that call of place.function."""
    return (
        f"real_{function}, calls_{function} = {place}.{function}, []\n"
        f"def {function}(*args, **kwargs):\n"
        f"    calls_{function}.append(1)\n"
        f"    if len(calls_{function}) == {call}:\n"
        f"        {what}\n"
        f"    return real_{function}(*args, **kwargs)\n"
        f"{place}.{function} = {function}\n"
    )


def terminate_at(patch, place, function, call):
    """SIGTERM to this process, just before that call of place.function."""
    real, calls = getattr(place, function), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    patch.setattr(place, function, interrupted)


def words_of(cfg):
    """The flags that make the Config `cfg`."""
    words = []
    for name, value in vars(cfg).items():
        if value == getattr(type(cfg), name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else f"{value}"]
    return words


# --- supervised fine-tuning -----------------------------------------------------------------------

SMALL = "--n_layer 1 --n_embd 16 --n_head 2 --n_positions 64 --max_new_tokens 8 --device cpu"


@pytest.fixture(scope="session")
def sft_data(toy_data, tmp_path_factory):
    """A folder with 44 demonstrations of very different lengths, 8 held out and 6 prompts."""
    folder = tmp_path_factory.mktemp("sft")
    for name, source, count in [
        ("train.jsonl", "demonstrations.jsonl", 44),
        ("held.jsonl", "demonstrations_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_validation.jsonl", 6),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    (folder / "bpe.tiktoken").write_bytes((toy_data / "bpe.tiktoken").read_bytes())
    return folder


def sft_flags(data, out, *more):
    """Flags of sft.py on `sft_data`."""
    files = ["--data", data / "train.jsonl", "--validation", data / "held.jsonl"]
    files += ["--prompts", data / "prompts.jsonl", "--tokenizer", data / "bpe.tiktoken"]
    return [*map(str, files), "--out_dir", str(out), *SMALL.split(), *map(str, more)]


# --- reinforcement learning -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def rl_data(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with 20 prompts, 9 held out, 5 demonstrations, a policy, and two normalised reward
    models, which disagree."""
    folder = tmp_path_factory.mktemp("rl")
    for name, source, count in [
        ("prompts.jsonl", "prompts_train.jsonl", 20),
        ("held.jsonl", "prompts_validation.jsonl", 9),
        ("demonstrations.jsonl", "demonstrations.jsonl", 5),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    policy = load_model(policy_run)  # its checkpoint has dropout; scripts must turn it off
    policy.config = dataclasses.replace(policy.config, dropout=0.1)
    save_model(folder / "policy", policy, tokenizer, {"stage": "sft"})
    torch.manual_seed(3)
    model = feedback.add_scalar_head(load_model(policy_run))
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    save_model(folder / "reward", model, tokenizer, {"stage": "reward"} | statistics)
    with torch.no_grad():
        model.score.weight.mul_(-0.5)
    statistics |= {"reward_mean": -0.2, "reward_std": 0.7}
    save_model(folder / "other", model, tokenizer, {"stage": "reward"} | statistics)
    return folder


def rl_flags(data, out, *more):
    """Flags of ppo.py and grpo.py on `rl_data`."""
    files = ["--prompts", data / "prompts.jsonl", "--validation", data / "held.jsonl"]
    files += ["--init", data / "policy", "--reward", data / "reward", "--max_new_tokens", 8]
    files += ["--num_prompts", 9, "--device", "cpu", "--out_dir", out]
    return list(map(str, [*files, *more]))


def distance_to_the_optimum(module, folder, tokenizer, *more):
    """A script's total variation, after 40 iterations, from the optimum of methods.md section 0:
    three one-token responses of reference probabilities 0.5, 0.3, 0.2 and rewards 0, 1, 2, at beta
    0.5: pi_ref exp(r / beta) / Z."""
    arms = policy_of_arms(folder / "policy", tokenizer)
    (folder / "arms.py").write_text(
        "def score(prompt, response, **fields):\n"
        "    return {' golf': 0, ' chess': 1, ' tennis': 2}[response]\n"
    )
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "Which?"}])
    args = ["--init", folder / "policy", "--reward", folder / "arms.py", "--validation", ""]
    args += ["--prompts", folder / "prompts.jsonl", "--max_new_tokens", 1, "--device", "cpu"]
    args += ["--missing_eos_score", "none", "--no-whiten_advantages", "--beta", 0.5]
    args += ["--steps", 40, "--batch_size", 128, "--minibatch_size", 128, "--update_epochs", 2]
    args += ["--final_lr", 0.01, "--lr", 0.003, "--out_dir", folder / "run", *more]
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(module, patch, *args) == 0
    with torch.no_grad():
        logits = load_model(folder / "run")(torch.tensor([tokenizer.encode_ordinary("Which?")]))
    found = logits[0, -1].softmax(-1)[arms]
    assert found.sum() > 0.999
    return 0.5 * (found - torch.tensor([0.036667, 0.162559, 0.800774])).abs().sum().item()


# What an iteration of ppo.py or grpo.py does with the canned rollout, one sequence at a time, in
# python numbers, without pads, masks or batches, from the papers' equations and Adam's.


class Hand:
    """The models of `rl_data` in float64, and what an iteration has in common. c: a Config."""

    def __init__(self, data, tokenizer, c):
        self.c, self.tokenizer, self.steps_of_adam, self.moments = c, tokenizer, 0, {}
        self.policy, self.reward_model, self.value_model = (
            load_model(data / name).double() for name in ("policy", "reward", "other")
        )
        self.reference = copy.deepcopy(self.policy)
        self.lines = read_lines(data / "prompts.jsonl")
        ptx = read_lines(data / "demonstrations.jsonl")
        self.ptx = [[self.ids(line[k]) for k in ("prompt", "response")] for line in ptx]

    def ids(self, text):
        return self.tokenizer.encode_ordinary(text)

    def score(self, ids):
        """The reward, normalised, of all of ids; to learn from its preferences, raw."""
        raw = self.reward_model(torch.tensor([ids]))[0, -1]
        return raw if self.c.shaping == "par" else (raw - 0.1) / 1.2

    def value(self, ids):
        """The value network's, on its own scale, of the state after ids."""
        return (self.value_model(torch.tensor([ids]))[0, -1] + 0.2) / 0.7

    def logprobs(self, model, prompt, response, temperature=None):
        """log pi of each token of the response, and the entropies that they were drawn with."""
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        laws = (logits / (temperature or self.c.temperature)).log_softmax(-1)
        chosen = [law[token] for law, token in zip(laws, response, strict=True)]
        return chosen, [-(law.exp() * law).sum() for law in laws]

    def kl(self, logprob, ref_logprob):
        """k2 or k3 of a token."""
        x = ref_logprob - logprob
        return x**2 / 2 if self.c.kl_estimator == "k2" else x.exp() - 1 - x

    def episodes(self, step, beta, num_samples=1):
        """The rollout of an iteration: dicts with prompt, response, `old` and `ref`
        log-probabilities, shaped score, `rewards` of tokens after the KL at beta's price, and
        `kl`."""
        c, found = self.c, []
        chosen = feedback.prompts_of_step(
            len(self.lines), c.batch_size // num_samples, step, c.seed
        )
        chosen = sorted(chosen, key=lambda i: len(self.ids(self.lines[i]["prompt"])))
        for i, n in ((i, n) for i in chosen for n in range(num_samples)):
            text = self.lines[i]["prompt"]
            prompt, length = self.ids(text), len(text) + n
            response = (list(text.encode()) * 2)[: 2 + length % 6]
            response += [self.tokenizer.eot_token] * (length % 3 > 0)
            episode = {"prompt": prompt, "response": response}
            with torch.no_grad():
                episode["old"], _ = self.logprobs(self.policy, prompt, response)
                episode["ref"], _ = self.logprobs(self.reference, prompt, response)
                score = self.score(prompt + response)
                if c.shaping == "par":
                    there = self.ids(self.lines[i]["reference"])[:8]
                    there += [self.tokenizer.eot_token] * (len(there) < 8)
                    score = 1 / (1 + (self.score(prompt + there) - score).exp())
                if c.shaping == "clip":
                    score = score.clamp(-c.score_clip, c.score_clip)
                both = list(zip(episode["old"], episode["ref"], strict=True))
                episode["score"], episode["kl"] = score, sum(old - ref for old, ref in both).item()
                episode["rewards"] = [-beta * (old - ref) for old, ref in both]
            found.append(episode)
        if c.shaping == "whiten":
            scores = [episode["score"] for episode in found]
            for episode in found:
                centred = episode["score"] - np.mean(scores)
                episode["score"] = centred / math.sqrt(np.var(scores) + 1e-8)
        least = min(-1.0, *(episode["score"] for episode in found))
        for episode in found:
            ended = episode["response"][-1] == self.tokenizer.eot_token
            episode["rewards"][-1] = episode["rewards"][-1] + (episode["score"] if ended else least)
        if c.whiten_rewards:
            rewards = [reward.item() for episode in found for reward in episode["rewards"]]
            mean, std = np.mean(rewards), math.sqrt(np.var(rewards) + 1e-8)
            for episode in found:
                episode["rewards"] = [(x - mean) / std + mean for x in episode["rewards"]]
        return found

    def whitened(self, episodes):
        """Advantages of mean 0 and standard deviation 1 over all tokens, if the Config says so."""
        if self.c.whiten_advantages:
            every = [float(a) for episode in episodes for a in episode["advantages"]]
            mean, std = np.mean(every), math.sqrt(np.var(every) + 1e-8)
            for episode in episodes:
                episode["advantages"] = [(a - mean) / std for a in episode["advantages"]]

    def minibatches(self, episodes, step, epoch):
        c = self.c
        order = np.random.default_rng([c.seed, step, epoch, 0]).permutation(len(episodes))
        count = math.ceil(c.batch_size / c.minibatch_size)
        return [[episodes[i] for i in order[number::count]] for number in range(count)]

    def clipped_gain(self, ratio, advantage):
        low, high = 1 - self.c.clip, 1 + self.c.clip
        return min(ratio * advantage, ratio.clamp(low, high) * advantage)

    def demonstrations(self):
        """ptx_coef times the nats a token of an update's demonstrations; 0 without any."""
        c, nll = self.c, []
        if not c.ptx_coef:
            return 0.0
        numbers = feedback.prompts_of_step(
            len(self.ptx), c.ptx_batch_size, self.steps_of_adam, c.seed
        )
        for prompt, text in (self.ptx[i] for i in numbers):
            response = [*text, self.tokenizer.eot_token]
            nll += [-x for x in self.logprobs(self.policy, prompt, response, 1.0)[0]]
        return c.ptx_coef * sum(nll) / len(nll)

    def adam(self, loss, step, learning):
        """A step of AdamW on {parameters, a list: peak learning rate}, each clipped by itself; all
        steps are of the warm-up."""
        c = self.c
        self.steps_of_adam += 1
        for parameters, peak in learning:
            rate = peak * (step + 1) / c.warmup
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            scale = min(1.0, c.clip_norm / (norm + 1e-6))
            for p, g in zip(parameters, gradients, strict=True):
                m, v = self.moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                m = 0.9 * m + 0.1 * scale * g
                v = c.adam_beta2 * v + (1 - c.adam_beta2) * (scale * g) ** 2
                self.moments[p] = m, v
                m = m / (1 - 0.9**self.steps_of_adam)
                v = v / (1 - c.adam_beta2**self.steps_of_adam)
                with torch.no_grad():
                    if p.dim() == 2:
                        p *= 1 - rate * c.weight_decay
                    p -= rate * m / (v.sqrt() + c.adam_eps)


def same_parameters(checkpoint, named):
    """That a checkpoint's modules are {name: module}, to 1e-9, and that there are no others."""
    found = load_file(checkpoint / "tensors.safetensors")
    modules = {key.split(".")[0] for key in found if not key.startswith("adam_")}
    assert modules == set(named)
    for module, model in named.items():
        for name, expected in model.state_dict().items():
            difference = (found[f"{module}.{name}"] - expected).norm()
            assert difference / expected.norm().clamp(min=1e-6) < 1e-9, (module, name, difference)
