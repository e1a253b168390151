"""Shared by the tests: a small vocabulary, small models, real public data where it is at hand."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from model import GPT, GPTConfig, load_tokenizer, save_model  # noqa: E402


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


def run_script(module, monkeypatch, *args):
    """A script's main(), in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    getattr(module, "stop_signals", []).clear()
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
CANNED = """import model, torch
def canned(sampler, prompts, ids, cfg, eos, seed, device):
    texts = [line['prompt'] for line in prompts]
    more = [0] * len(texts)
    for n in range(1, len(texts)):
        more[n] = more[n - 1] + 1 if texts[n] == texts[n - 1] else 0
    lengths = [len(text) + n for text, n in zip(texts, more)]
    responses = [(list(text.encode()) * 2)[: 2 + n % 6] + [eos] * (n % 3 > 0)
                 for text, n in zip(texts, lengths)]
    tokens, mask = model.pad(ids, responses)
    ended = torch.tensor([response[-1] == eos for response in responses])
    lengths = [len(p) + len(r) for p, r in zip(ids, responses)]
    return {{'lines': prompts, 'tokens': tokens, 'mask': mask, 'lengths': lengths,
            'responses': responses, 'ended': ended}}
{script}.sample_batch = canned
{script}.shutil.rmtree = lambda *args, **kwargs: None
"""


@contextmanager
def can_the_rollout(module):
    """CANNED in this process, while it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample_batch", module.sample_batch)
        patch.setattr(module.shutil, "rmtree", module.shutil.rmtree)
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
