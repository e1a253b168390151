"""model.py against a GPT-2 in NumPy, sampling by hand, and recomputation of the whole."""

import base64
import copy
import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from model import (
    END_OF_TEXT, GPT, GPTConfig, check_tokenizer, decode, encode, entropy, generate, last_tokens,
    load_config, load_model, load_tokenizer, make_encoding, pad, predicts, read_json, sample,
    save_model, text_of, token_ids, token_logprobs, tokenizer_hash, whole_file, write_json,
)  # fmt: skip

# --- the network ----------------------------------------------------------------------------------


def gpt2_in_numpy(weights, config, tokens):
    """Hidden states after the last LayerNorm, one sequence, one position and head at a time."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(x, name):
        x = (x - x.mean()) / math.sqrt(x.var() + config.layer_norm_epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    d = config.n_embd // config.n_head
    stream = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(tokens)]
    for i in range(config.n_layer):
        qkv = [np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3) for x in stream]
        for t in range(len(tokens)):
            heads = []
            for h in range(config.n_head):
                part = slice(h * d, (h + 1) * d)
                scores = [qkv[t][0][part] @ qkv[u][1][part] / math.sqrt(d) for u in range(t + 1)]
                weight = np.exp(np.array(scores) - max(scores))
                weight /= weight.sum()
                heads.append(sum(weight[u] * qkv[u][2][part] for u in range(t + 1)))
            stream[t] = stream[t] + linear(np.concatenate(heads), f"h.{i}.attn.c_proj")
        for t, x in enumerate(stream):
            hidden = gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
            stream[t] = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return np.stack([norm(x, "ln_f") for x in stream])


def randomise(model):
    """Biases and LayerNorms too, which start at 0 and 1 and would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def test_forward_is_gpt2(small_gpt):
    model = randomise(small_gpt(dtype=torch.float64))
    tokens = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(2))
    hidden = gpt2_in_numpy(model.state_dict(), model.config, tokens[0].tolist())
    logits = hidden @ model.wte.weight.detach().numpy().T
    assert np.abs(model(tokens)[0].detach().numpy() - logits).max() < 1e-10
    scorer = GPT(model.config, scalar_head=True).double()
    scorer.load_state_dict(model.state_dict(), strict=False)
    expected = hidden @ scorer.score.weight.detach().numpy()[0]
    assert np.abs(scorer(tokens)[0].detach().numpy() - expected).max() < 1e-10


def test_checkpointed_activations_change_no_gradient_and_keep_less():
    """Bit for bit, dropout too, which must be drawn alike both times; of each layer but its input
    nothing is kept for the backward pass."""
    config = GPTConfig(20, 32, 16, n_layer=4, n_head=2, dropout=0.2, initializer_range=0.3)
    torch.manual_seed(0)
    model, tokens = GPT(config), torch.randint(0, 20, (3, 32))
    gradients, kept = [], []
    for model.checkpoint_activations in (False, True):
        sizes = []
        torch.manual_seed(1)
        hooks = (lambda x: (sizes.append(x.numel()), x)[1], lambda x: x)  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(tokens).logsumexp(-1).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(sizes))
        model.zero_grad()
    assert all(map(torch.equal, *gradients))
    assert kept[1] < 0.4 * kept[0]


def test_initial_weights():
    config = GPTConfig(
        vocab_size=500, n_positions=200, n_embd=256, n_layer=8, n_head=4, initializer_range=0.05
    )
    torch.manual_seed(0)
    model = GPT(config, scalar_head=True)
    for name, parameter in model.named_parameters():
        std = parameter.std().item()
        if name.endswith("bias"):
            assert std == 0
        elif "ln_" in name:
            assert parameter.eq(1).all()
        elif name == "score.weight":
            assert std == pytest.approx(257**-0.5, rel=0.15)
        elif "c_proj" in name:
            assert std == pytest.approx(0.05 / math.sqrt(16), rel=0.02)
        else:
            assert std == pytest.approx(0.05, rel=0.02)
    assert "lm_head.weight" not in model.state_dict()


def test_gpt2_sizes():
    """The parameter counts of gpt2, gpt2-medium, gpt2-large and gpt2-xl."""
    sizes = [
        (768, 12, 12, 124439808),
        (1024, 24, 16, 354823168),
        (1280, 36, 20, 774030080),
        (1600, 48, 25, 1557611200),
    ]
    for n_embd, n_layer, n_head, count in sizes:
        with torch.device("meta"):
            model = GPT(GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_only_what_is_asked_for_is_computed(small_gpt):
    """`at` changes no output and no gradient, and outside attention nothing runs on what follows a
    row's last position of `at`."""
    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    at = torch.zeros(4, 9, dtype=torch.bool)
    at[1, [2, 5]] = at[2, 3] = at[3, [0, 7, 8]] = True  # of the first row nothing
    rows = []
    for scalar_head in (False, True):
        model = small_gpt(scalar_head, torch.float64)
        everywhere, there = model(tokens)[at], model(tokens, at)
        assert there.shape == everywhere.shape and (there - everywhere).abs().max() < 1e-12
        weights = torch.randn_like(there)
        expected = torch.autograd.grad((everywhere * weights).sum(), list(model.parameters()))
        found = torch.autograd.grad((there * weights).sum(), list(model.parameters()))
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-11
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
                module.register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
        model(tokens, at)
    # 1 + 6 + 4 + 9 cells; from the last block's projection on (c_proj, ln_2, c_fc, c_proj, ln_f)
    # the 6 asked for.
    assert set(rows) == {20, 6} and rows.count(6) == 2 * 5


@pytest.mark.parametrize("shape", [(1, 9), (2, 9), (4, 9), (3, 8), (9, 3)])
def test_positions_of_another_shape_are_no_positions(small_gpt, shape):
    with pytest.raises((RuntimeError, IndexError)):
        small_gpt()(torch.zeros(3, 9, dtype=torch.int64), torch.ones(shape, dtype=torch.bool))


def test_garbage_in_the_pads_changes_nothing(small_gpt):
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7]]
    tokens, mask = pad(prompts, responses)
    garbage = tokens.clone()
    garbage[1, 2:] = torch.tensor([49, 33, 21])
    for scalar_head in (False, True):
        model = small_gpt(scalar_head)
        if scalar_head:
            outputs = [model(x, last_tokens(mask)) for x in (tokens, garbage)]
        else:
            outputs = [token_logprobs(model(x, predicts(mask)), x, mask) for x in (tokens, garbage)]
        assert torch.equal(*outputs)
    with_alone, alone = small_gpt()(tokens)[1, :2], small_gpt()(tokens[1:, :2])[0]
    assert torch.allclose(with_alone, alone, atol=1e-5)


def test_the_first_exponentials_of_a_process_are_as_all_others():
    """Where two threads made MKL's first call at once, one of them was a little off in some 7% of
    processes: a resumed run's first step was then not the uninterrupted one's, bit for bit. In a
    process that has imported nothing else, which might have made that call."""
    code = (
        "import os, torch, model\n"
        "def same():\n"
        "    x = torch.rand(160, 600)\n"
        "    return torch.equal(x.exp(), x.exp())\n"
        "torch.set_num_threads(2)\n"
        "for _ in range(100):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(0 if same() else 1)\n"
        "    print(os.waitpid(pid, 0)[1])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["0"] * 100


def test_too_many_positions(small_gpt):
    with pytest.raises(ValueError, match="97 tokens exceed the model's 96 positions"):
        small_gpt()(torch.zeros(1, 97, dtype=torch.int64))


def test_bad_config():
    with pytest.raises(ValueError, match="n_embd 30 is not a multiple of n_head 4"):
        GPTConfig(n_embd=30, n_head=4)
    with pytest.raises(ValueError, match="n_layer"):
        GPTConfig(n_layer=0)
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(dropout=1.0)


# --- log-probabilities ----------------------------------------------------------------------------


def test_logits_far_from_zero_under_autocast(small_gpt):
    """As GPT-2's, which lie near -100: an offset that all tokens share costs no precision."""
    model = small_gpt(vocab_size=200)
    tokens = torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.wte.weight[:, 3], model.ln_f.weight[3], model.ln_f.bias[3] = 0.7, 0, -140
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(tokens)
        sampler = copy.deepcopy(model).bfloat16()(tokens)
    for logits, limit in ((rounded, 0.02), (sampler, 0.04)):  # not centred: 0.127 and 0.13
        assert exact.mean() < -90 and logits.mean().abs() < 1
        errors = (logits.float().log_softmax(-1) - exact.log_softmax(-1)).abs()
        assert errors.mean() < limit


def test_token_logprobs_vector():
    """Four positions, three tokens, a prompt of two: computed by hand. The response's log-probs
    come from the logits one column before, the prompt's last among them."""
    logits = torch.tensor([[0.5, -1, 2], [1, 0, -1], [0.2, 0.3, 0.1], [2, -2, 0]])
    tokens = torch.tensor([[0, 2, 1, 2]])
    mask = torch.tensor([[False, False, True, True]])
    at = predicts(mask)
    assert at.tolist() == [[False, True, True, False]]
    logprobs = token_logprobs(logits[at[0]], tokens, mask)
    expected = torch.tensor([[0, 0, -1.407606, -1.201943]])
    assert torch.allclose(logprobs, expected, atol=1e-6)
    everything = torch.tensor([[False, True, True, True]])
    logprobs = token_logprobs(logits[predicts(everything)[0]], tokens, everything)
    assert -logprobs.sum().item() / 3 == pytest.approx(0.950287, abs=1e-6)


def test_token_logprobs_temperature_and_types():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(7, 13, generator=generator)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 2:6], mask[2, 1:4] = True, True
    tokens = torch.randint(0, 13, (3, 6), generator=generator)
    for temperature in (1.0, 0.7):
        found = token_logprobs(logits, tokens, mask, temperature)
        rows = iter(logits.double().numpy())
        for b in range(3):
            for t in range(6):
                expected = 0.0
                if mask[b, t]:
                    z = next(rows) / temperature
                    expected = z[tokens[b, t]] - np.log(np.exp(z).sum())
                assert found[b, t].item() == pytest.approx(expected, abs=1e-5)
    assert token_logprobs(logits.bfloat16(), tokens, mask).dtype == torch.float32
    assert token_logprobs(logits.double(), tokens, mask.float()).dtype == torch.float64


def test_entropy():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [100.0, 0, 0, 0], [1.0, -math.inf, 1.0, -math.inf]]
    )
    assert torch.allclose(entropy(logits), torch.tensor([math.log(4), 0, math.log(2)]), atol=1e-6)
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(entropy(logits, 0.7), entropy(logits / 0.7), atol=1e-6)
    assert entropy(logits.bfloat16(), 0.7).dtype == torch.float32


def test_last_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]]).bool()
    assert last_tokens(mask).nonzero().tolist() == [[0, 3], [1, 5], [2, 1], [2, 4]]


# --- text to tokens -------------------------------------------------------------------------------


def test_encode_appends_eos_and_joins_nothing(tokenizer):
    eos = tokenizer.eot_token
    prompt, response = encode(tokenizer, "I play go", "lf with my cousin.", 64)
    assert prompt == tokenizer.encode_ordinary("I play go")
    assert response == [*tokenizer.encode_ordinary("lf with my cousin."), eos]
    assert encode(tokenizer, "", "My car.", 64)[0] == [eos]
    assert encode(tokenizer, "My car.", None, 64)[1] == []
    # The text of the special token is text, not the token.
    assert eos not in encode(tokenizer, END_OF_TEXT, None, 64)[0]


def test_encode_cuts_the_prompt_first(tokenizer):
    whole_prompt, whole = encode(tokenizer, "My car. My boat. My tent.", " I feel sad.", 64)
    prompt, response = encode(tokenizer, "My car. My boat. My tent.", " I feel sad.", 8)
    assert response == whole and prompt == whole_prompt[-3:]
    with pytest.raises(ValueError, match="5 tokens leaves no room in 5"):
        encode(tokenizer, "My car.", " I feel sad.", 5)
    prompt, response = encode(tokenizer, "My car.", " I feel sad.", 5, cut_response=True)
    assert response == whole[:4] and len(prompt) == 1 and tokenizer.eot_token not in response


def test_the_hash_tells_where_tokens_end():
    """Two vocabularies whose last two tokens, written one a line, would be the same text."""
    single = {bytes([byte]): byte for byte in range(256)}
    ranks = [single | {b"aa\n": 256, b"bb": 257}, single | {b"aa": 256, b"\nbb": 257}]
    assert len({tokenizer_hash(make_encoding(r, "x")) for r in ranks}) == 2


def test_a_model_with_fewer_embeddings_than_the_tokenizer_has_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"has 1023 embeddings, the tokenizer .* 1024 tokens"):
        check_tokenizer(tokenizer, "run", {"vocab_size": 1023})
    check_tokenizer(tokenizer, "run", {"vocab_size": 1030, "tokenizer": tokenizer_hash(tokenizer)})
    check_tokenizer(tokenizer, "run", {})


def test_text_of_ids_that_a_padded_vocabulary_has(tokenizer):
    ids = [*tokenizer.encode_ordinary("My car"), 1030, *tokenizer.encode_ordinary(".")]
    assert text_of(tokenizer, ids) == "My car\ufffd."


def test_pad():
    tokens, mask = pad([[1, 2], [3]], [[4], [5, 6, 7]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_pad_token_equal_to_eos_is_still_trained():
    """A response that holds token 0, the filling of the pads, keeps it in the mask."""
    _, mask = pad([[1], [1]], [[0], [2, 0]])
    assert mask.tolist() == [[False, True, False], [False, True, True]]


def test_tokenizer_survives_a_run_directory(tokenizer, tmp_path, small_gpt, toy_data):
    save_model(tmp_path / "run", small_gpt(vocab_size=1024), tokenizer)
    again = load_tokenizer(tmp_path / "run")
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    texts = ["My cousin sold my lamp. TL;DR:", " naïve café 3.14 \n\n  x", "日本 😀", "", "don't"]
    for text in texts:
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.decode(again.encode_ordinary(text)) == text
    contents = read_json(tmp_path / "run/tokenizer.json")["model"]
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old/vocab.json", contents["vocab"])
    assert tokenizer_hash(load_tokenizer(tmp_path / "old")) == tokenizer_hash(tokenizer)


def test_bad_tokenizers(tmp_path, monkeypatch):
    bad = tmp_path / "bad.tiktoken"
    whole = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    for lines, message in [
        (["IQ== 0", "!!! 1"], r"bad.tiktoken:2: expected a token in base64 and its rank"),
        (["IQ== 0", "IQ=="], r"bad.tiktoken:2: expected"),
        (["IQ== 5"], r"its 1 tokens and <\|endoftext\|> \(1\) are not numbered 0 to 1"),
        (["IQ== 0"], r"no token for byte 0"),
        ([*whole[:-1], "IQ== 255"], r"are not numbered 0 to 255"),
    ]:
        bad.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(bad)
    with pytest.raises(ValueError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected gpt2"):
        load_tokenizer("gpt3")
    for contents, message in [
        ("[1]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ('{"model": {"type": "Unigram"}}', "expected a byte-level BPE"),
        ('{"model": {"vocab": {"a": "b"}}}', "expected an object of token: number"),
        ('{"model": {"vocab": {"\\u3042": 1}}}', "not a token of a byte-level BPE"),
    ]:
        (tmp_path / "tokenizer.json").write_text(contents)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_a_tokenizer_is_used_exactly_or_refused_by_name(tokenizer, tmp_path, small_gpt):
    folder = tmp_path / "run"
    save_model(folder, small_gpt(vocab_size=1024), tokenizer)
    whole = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")

    def refused(message, change=(), beside=(), **others):
        write_json(folder / "tokenizer.json", whole | dict(change))
        write_json(folder / "tokenizer_config.json", settings | dict(beside))
        for name in ("added_tokens", "special_tokens_map"):
            write_json(folder / f"{name}.json", others.get(name, {}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder)

    start = {"id": 1024, "content": "<|im_start|>"}
    lower = {"type": "Lowercase"}
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"ids": [0]}}}
    words = {"type": "Sequence", "pretokenizers": []}
    refused("added token '<|im_start|>'", {"added_tokens": [*whole["added_tokens"], start]})
    refused("tokenizer.json: normalizer: not GPT-2's", {"normalizer": lower})
    refused("tokenizer.json: post_processor: not", {"post_processor": template})
    roberta = {"type": "RobertaProcessing"}
    refused("tokenizer.json: post_processor: not", {"post_processor": roberta})
    nothing = template | {"special_tokens": {}}  # as transformers 5 writes GPT-2's
    write_json(folder / "tokenizer.json", whole | {"post_processor": nothing})
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer)
    refused("tokenizer.json: pre_tokenizer: not GPT-2's", {"pre_tokenizer": words})
    for name, value, message in [
        ("add_prefix_space", True, "tokenizer.json: add_prefix_space: not GPT-2's"),
        ("use_regex", False, "tokenizer.json: pre_tokenizer's use_regex false: not"),
    ]:
        refused(message, {"pre_tokenizer": whole["pre_tokenizer"] | {name: value}})
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        refused(f"json: model.{name}: not GPT-2's", {"model": whole["model"] | {name: "x"}})
    refused("added_tokens.json: the added|the added token '<s>'", added_tokens={"<s>": 1024})
    refused("map.json: eos_token: not GPT-2's", special_tokens_map={"eos_token": "<|im_end|>"})
    for name, value in [
        ("eos_token", {"content": "</s>"}),
        ("add_prefix_space", True),
        ("add_bos_token", True),
        ("added_tokens_decoder", {"1024": start}),
    ]:
        refused(f"tokenizer_config.json: {name}: not GPT-2's", beside={name: value})
    refused("its tokenizer's files are damaged", {"added_tokens": [3]})
    # The end of text at another place than the last: as Hugging Face's course trains them.
    vocab = whole["model"]["vocab"]
    first = {token: (rank + 1) % 1024 for token, rank in vocab.items()}  # which was the last
    added = [whole["added_tokens"][0] | {"id": 0}]
    first_last = {"model": whole["model"] | {"vocab": first}, "added_tokens": added}
    for merges in (whole["model"]["merges"][::-1], whole["model"]["merges"][:9]):
        change = {"model": whole["model"] | {"merges": merges}}
        refused("tokens are not numbered in the order of their merges", change)
    write_json(folder / "tokenizer.json", whole | first_last)
    for name in ("tokenizer_config", "added_tokens", "special_tokens_map"):
        write_json(folder / f"{name}.json", {})
    with pytest.raises(ValueError, match=r"json: eos_token_id: 1023 is not <\|endoftext\|>, whi"):
        load_tokenizer(folder)
    write_json(folder / "config.json", {"eos_token_id": [0, 50256]})  # no token has that number
    other, text = load_tokenizer(folder), "How do I fix a bike?"
    assert other.eot_token == 0
    assert other.encode_ordinary(text) == [i + 1 for i in tokenizer.encode_ordinary(text)]
    save_model(tmp_path / "again", small_gpt(vocab_size=1024), other)
    again = load_tokenizer(tmp_path / "again")
    assert again.eot_token == 0 and tokenizer_hash(again) == tokenizer_hash(other)


def test_a_million_spaces_are_tokens_too(tokenizer):
    text = "a" + " " * 1_000_000 + "\n" * 250_000 + "b"
    ids = token_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    text = "a  b\n\n" * 30_000 + " " * 99_999 + "c"  # nothing here has to be taken apart
    assert token_ids(tokenizer, text) == tokenizer.encode_ordinary(text)


def test_gpt2_vocabulary_without_cache_or_network(tmp_path):
    """In a process of its own, since tiktoken keeps what it has loaded."""
    code = (
        "import tiktoken.load\n"
        "def offline(*args, **kwargs): raise ConnectionError('no network')\n"
        f"os.environ['TIKTOKEN_CACHE_DIR'] = {str(tmp_path)!r}\n"
        "tiktoken.load.read_file = offline\n"
        "model.load_tokenizer('gpt2')"
    )
    done = on_ranks("model", code, 1)
    assert "Set TIKTOKEN_CACHE_DIR to a folder" in done.stderr.splitlines()[-1]


# --- sampling -------------------------------------------------------------------------------------


def uncached(model, prompt, response, uniforms, temperature):
    """What should have been drawn at each of a response's tokens, from the same numbers and in
    float64, by the forward that keeps no cache."""
    found = []
    with torch.no_grad():
        rows = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double().numpy()
    for logits, uniform in zip(rows, uniforms, strict=False):
        if temperature == 0:
            found.append(int(logits.argmax()))
        else:
            p = np.exp(logits / temperature - (logits / temperature).max())
            cumulative = np.cumsum(p) / p.sum()
            found.append(int(np.argmax(cumulative >= 1 - uniform)))
    return found


RAGGED = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
@pytest.mark.parametrize("eos", [None, 3])
def test_cached_equals_uncached(small_gpt, temperature, eos):
    """64 tokens, ragged prompts, K = 3; with EOS, rows end at different steps and are retired."""
    model, K, n = small_gpt(initializer_range=0.2), 3, 64
    generator = torch.Generator().manual_seed(5)
    tokens, mask = generate(
        model, RAGGED, n, num_samples=K, temperature=temperature, eos=eos, generator=generator
    )
    draws = torch.Generator().manual_seed(5)
    uniforms = torch.stack([torch.rand(len(RAGGED) * K, generator=draws) for _ in range(n)], 1)
    lengths = set()
    for b in range(len(RAGGED) * K):
        prompt = RAGGED[b // K]
        response = tokens[b][mask[b]].tolist()
        expected = uncached(model, prompt, response, uniforms[b].double().tolist(), temperature)
        assert response == expected
        assert len(response) == n or response[-1] == eos
        assert eos not in response[:-1]
        assert tokens[b, : len(prompt)].tolist() == prompt and not mask[b, : len(prompt)].any()
        assert tokens[b, len(prompt) + len(expected) :].eq(0).all()
        lengths.add(len(expected))
    assert tokens.shape == mask.shape
    if eos is not None and temperature == 1.0:
        assert len(lengths) > 3 and max(lengths) == 64  # some ended early, some never


def test_generation_is_deterministic_and_differs_between_samples(small_gpt):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(small_gpt(), RAGGED, 20, num_samples=4, eos=0, generator=generator)[0]

    assert torch.equal(run(1), run(1))
    assert run(1).shape != run(2).shape or not torch.equal(run(1), run(2))
    assert not torch.equal(run(1)[0], run(1)[1])


def test_decode_stops_when_all_rows_have_ended(small_gpt):
    """A model that always says 7 ends all rows at once: at most eight steps are taken."""
    model = small_gpt()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(50 * model.wte.weight[7])
    steps = list(decode(model, RAGGED, 64, eos=7))
    assert len(steps) == 8
    tokens, mask = generate(model, RAGGED, 64, eos=7)
    assert mask.sum(1).tolist() == [1, 1, 1, 1] and tokens.shape[1] == 8


def test_generate_refuses(small_gpt):
    with pytest.raises(ValueError, match="at least one token"):
        generate(small_gpt(), [[1], []], 4)
    with pytest.raises(ValueError, match="prompt of 90 tokens and 7 new ones exceed"):
        generate(small_gpt(), [[1] * 90], 7)
    with pytest.raises(ValueError, match="dropout is on"):
        generate(small_gpt(dropout=0.1).train(), [[1]], 4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}],
    ids=str,
)
def test_sampling_frequencies(settings):
    """Chi-squared of 200,000 draws against the softmax, cut by hand to the tokens allowed."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    p = (logits.double() / settings.get("temperature", 1.0)).softmax(0).numpy()
    order = np.argsort(-p)
    if top_k := settings.get("top_k"):
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p := settings.get("top_p"):
        kept = int(np.argmax(np.cumsum(p[order]) >= top_p)) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    n = 200_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(4))
    counts = np.bincount(sample(logits.expand(n, 12), uniform, **settings).numpy(), minlength=12)
    assert (counts[p == 0] == 0).all()
    inside = p > 0
    statistic = ((counts - n * p)[inside] ** 2 / (n * p)[inside]).sum()
    # The 99.9th percentile of chi-squared with 1..11 degrees of freedom.
    limits = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26]
    assert statistic < limits[inside.sum() - 2]


def test_the_ends_of_the_uniform_never_pick_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 3)
    uniform = torch.tensor([0.0, 1 - 2**-24, 0.5])
    assert set(sample(logits, uniform).tolist()) <= {1, 2}
    assert sample(logits, uniform)[1] == 1 and sample(logits, uniform)[0] == 2


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar_head", [False, True])
def test_model_survives_its_files(small_gpt, tokenizer, tmp_path, scalar_head):
    model = randomise(small_gpt(scalar_head, vocab_size=1024))
    save_model(tmp_path, model, tokenizer, {"stage": "test", "reward_mean": 0.25})
    again = load_model(tmp_path)
    assert again.config == model.config and not again.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert all(parameter.requires_grad for parameter in again.parameters())
    fields = load_config(tmp_path)
    assert fields["stage"] == "test" and fields["reward_mean"] == 0.25
    assert fields["tokenizer"] == tokenizer_hash(tokenizer)
    assert not list(tmp_path.glob(".*"))


def test_a_model_lets_go_of_its_file(small_gpt, tokenizer, tmp_path):
    """A mapped file would stay in memory beside the weights, and change them when it changes."""
    save_model(tmp_path, small_gpt(), tokenizer)
    model = load_model(tmp_path)
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_layouts_open(small_gpt, tokenizer, tmp_path):
    """No prefix, half precision, shards, stored causal masks and an explicit head, as found."""
    model = small_gpt(vocab_size=1024)
    save_model(tmp_path / "a", model, tokenizer)
    tensors = load_file(tmp_path / "a/model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for dtype in (torch.float16, torch.bfloat16):
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        save_file({n: t.to(dtype) for n, t in bare.items()}, tmp_path / "b/model.safetensors")
        half = load_model(tmp_path / "b")
        assert half.wte.weight.dtype == torch.float32
        assert torch.equal(half.wte.weight, model.wte.weight.to(dtype).float())
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / "c" / file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    write_json(tmp_path / "c/model.safetensors.index.json", {"weight_map": weight_map})
    sharded = load_model(tmp_path / "c")
    tokens = torch.randint(0, 1024, (2, 10))
    assert torch.equal(sharded(tokens), model(tokens))
    (tmp_path / "c/model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2-of-2.safetensors: named in"):
        load_model(tmp_path / "c")


def test_bad_checkpoints(small_gpt, tokenizer, tmp_path):
    run = tmp_path / "run"
    save_model(run, small_gpt(vocab_size=1024), tokenizer)
    config, tensors = load_config(run), load_file(run / "model.safetensors")

    def refused(message, fields=None, weights=None, error=ValueError):
        write_json(run / "config.json", config | (fields or {}))
        save_file(tensors if weights is None else weights, run / "model.safetensors")
        with pytest.raises(error, match=message):
            load_model(run)

    without = {n: t for n, t in tensors.items() if n != "transformer.h.1.ln_2.bias"}
    refused("weight h.1.ln_2.bias is missing", weights=without)
    refused("weight extra is not GPT-2's", weights=tensors | {"extra": torch.zeros(1)})
    other = {"transformer.wpe.weight": torch.zeros(3, 32)}
    refused(r"wpe.weight has shape \(3, 32\), config.json says \(96, 32\)", weights=tensors | other)
    refused("GPT-2 ties them", weights=tensors | {"lm_head.weight": torch.zeros(1024, 32)})
    refused("activation_function: 'relu' is not GPT-2's", {"activation_function": "relu"})
    refused("model_type: 'llama'", {"model_type": "llama"})
    refused("n_inner: 7", {"n_inner": 7})
    refused("config.json: n_layer: expected an integer", {"n_layer": "two"})
    for bad in (math.nan, math.inf):
        norm = tensors["transformer.ln_f.weight"].clone()
        norm[3] = bad
        diverged = tensors | {"transformer.ln_f.weight": norm}
        refused("run: weight ln_f.weight holds numbers that are not finite", weights=diverged)
    two_labels = tensors | {"score.weight": torch.zeros(2, 32)}
    refused(r"score.weight has shape \(2, 32\)", weights=two_labels)
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(run)
    (run / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="never loaded here"):
        load_model(run)
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("interrupted")
    message = r"file.json: could not be written: .*No space"
    with pytest.raises(OSError, match=message), whole_file(path):
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_files_may_be_read_as_the_umask_says(small_gpt, tokenizer, tmp_path):
    """safetensors writes its own for the owner alone."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            save_model(tmp_path / f"{mask}", small_gpt(vocab_size=1024), tokenizer)
        finally:
            os.umask(before)
        files = list((tmp_path / f"{mask}").iterdir())
        assert {path.stat().st_mode & 0o777 for path in files} == {mode} and len(files) == 4


# --- python model.py RUN --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=1024, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    directory = tmp_path_factory.mktemp("model") / "run"
    save_model(directory, GPT(config), tokenizer)
    save_model(directory.with_name("scorer"), GPT(config, scalar_head=True), tokenizer)
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    directory.with_name("bytes.tiktoken").write_text("\n".join(lines))
    return directory


def test_sampler(run, monkeypatch, capsys):
    flags = ["--num_samples", 2, "--temperature", 0.8, "--max_new_tokens", 6, "--device", "cpu"]
    words = list(map(str, [run, "--prompt", "How do I fix a bike?", *flags]))
    script = str(ROOT / "model.py")
    code = f"import runpy\nsys.argv = {[script, *words]!r}\n"
    done = on_ranks("model", f"{code}runpy.run_path({script!r}, run_name='__main__')\n", 1)
    assert done.returncode == 0 and done.stdout.startswith("[1]") and "\n[2]" in done.stdout
    assert run_script(sys.modules["model"], monkeypatch, *words) == 0
    assert capsys.readouterr().out == done.stdout


def test_sampler_interactive(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("My\nI\n"))
    flags = ["--max_new_tokens", 4, "--top_k", 3, "--top_p", 0.9, "--device", "cpu"]
    assert run_script(sys.modules["model"], monkeypatch, run, *flags) == 0
    assert capsys.readouterr().out.count("prompt> ") == 3


def test_sampler_refuses(run, monkeypatch, capsys):
    for args, message in [
        ((run / "nothing",), "not a model directory"),
        ((run.with_name("scorer"), "--prompt", "x"), "has a scalar head"),
        ((run, "--prompt", "x", "--max_new_tokens", 64), "leaves no room for a prompt"),
        ((run, "--top_p", 0), "expected --temperature >= 0"),
        (
            (run, "--prompt", "x", "--tokenizer", run.with_name("bytes.tiktoken")),
            "was trained with",
        ),
    ]:
        assert run_script(sys.modules["model"], monkeypatch, *args, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
