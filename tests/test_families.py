"""The families of model.py and tokens.py against transformers and tokenizers, on small ones of
random weights and of our own words; and on SmolLM2, where a folder of it is named."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from model import (
    generate, load_model, pack, pad, predicts, save_model, token_logprobs,
)  # fmt: skip
from tokens import Conversation, encode, load_tokenizer, text_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.peers
os.environ["HF_HUB_OFFLINE"] = "1"

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama 3.2": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama, biases, untied": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
}


def theirs(name, folder, scalar_head=False):
    """A small model of a family, saved by transformers; norms and biases at random too."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | settings)
    config.num_labels = 1
    auto = "AutoModelForSequenceClassification" if scalar_head else "AutoModelForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.float().eval().parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def by_name(model, gradients):
    return {name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_both_ways(name, scalar_head, tmp_path, tokenizer):
    """Outputs and gradients, and their outputs again from what we write."""
    model, ours = theirs(name, tmp_path, scalar_head), load_model(tmp_path)
    tokens = torch.randint(3, 1024, (1, 150), generator=torch.Generator().manual_seed(1))
    at = torch.zeros_like(tokens, dtype=torch.bool)
    at[:, -1] = True  # where theirs scores a text
    expected = model(tokens).logits
    found = ours(tokens, at)[:, None] if scalar_head else ours(tokens)
    assert (found - expected).abs().max() < 1e-4
    total = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    mine = torch.autograd.grad(found.square().sum(), list(ours.parameters()))
    sizes = [sum(g.double().square().sum() for g in some).sqrt() for some in (total, mine)]
    assert sizes[0] == pytest.approx(sizes[1].item(), rel=1e-4)
    mine, total = by_name(ours, mine), by_name(model, total)
    key = next(n for n in total if n.endswith("layers.1.self_attn.k_proj.weight"))
    q, k = ours.config.n_head * ours.config.head_dim, ours.config.n_kv_head * ours.config.head_dim
    gap = mine["h.1.attn.c_attn.weight"][q : q + k] - total[key]
    assert gap.abs().max() < 1e-4 * total[key].abs().max() + 1e-5

    save_model(tmp_path / "run", ours, tokenizer)
    assert load_model(tmp_path / "run").config == ours.config
    again = type(model).from_pretrained(tmp_path / "run", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (again(tokens).logits - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_and_packed_rows(name, tmp_path):
    """64 tokens after ragged prompts, by the cache; packed rows as single ones, in float64."""
    model, ours = theirs(name, tmp_path), load_model(tmp_path)
    prompts = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
    drawn = generate(ours, prompts, 64, temperature=0)
    for prompt, response in zip(prompts, drawn, strict=True):
        how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(torch.tensor([prompt]), eos_token_id=None, **how)[0]
        assert whole[len(prompt) :].tolist() == response

    ours, single = ours.double(), []
    responses = [[[11, 12], [13]], [[14, 15, 16]], [[20], [21, 22], [23]]]
    for prompt, some in zip(prompts, responses, strict=True):
        for response in some:
            tokens, mask = pad([prompt], [response])
            logits = ours(tokens, predicts(mask))
            single.append(token_logprobs(logits, tokens, mask)[mask])
    single = torch.cat(single)
    weights = torch.arange(len(single)).double()
    expected = torch.autograd.grad((single * weights).sum(), list(ours.parameters()))
    for width in (0, 14, 40):
        tokens, mask, segments = pack(prompts, responses, width)
        packed = token_logprobs(ours(tokens, predicts(mask), segments), tokens, mask)[mask]
        assert (packed - single).abs().max() < 1e-12
        found = torch.autograd.grad((packed * weights).sum(), list(ours.parameters()))
        scale = max(gradient.abs().max() for gradient in expected)
        gaps = [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
        assert max(gaps) < 1e-12 * scale


# --- tokenizers -----------------------------------------------------------------------------------

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
UNITS = (
    " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "a", "B", "hello", " world", "1", "23", " 4", "½",
    "Ⅷ", "é", "e\u0301", "日本", "😀", "!", "?!", "...", "<|im_end|>", "<|endoftext|>", "\u00a0",
    "_", "\u2028", "İ", "ß", "ﬁ", "٣", "\U000f0000",
)  # fmt: skip


def fuzzed(count):
    rng = random.Random(0)
    ranges = ((32, 127), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF))
    for _ in range(count):
        units = (
            rng.choice(UNITS) if rng.random() < 0.8 else chr(rng.randrange(*rng.choice(ranges)))
            for _ in range(rng.randrange(1, 30))
        )
        yield "".join(units)


def trained(folder, pre_tokenizer, normalizer=None, first=()):
    """A byte-level BPE that tokenizers learnt from our own files. first: special tokens."""
    from tokenizers import decoders, models, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 2000, "special_tokens": list(first), "show_progress": False}
    files = sorted(map(str, Path(__file__).parent.parent.glob("*.py")))
    made.train(files, trainers.BpeTrainer(initial_alphabet=alphabet, **how))
    if not first:
        made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    return made


def split(pattern):
    from tokenizers import Regex, pre_tokenizers

    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen", "smollm2"])
def test_tokenizers_of_families_agree(name, tmp_path):
    """On 20,000 texts. A text that spells a special token is text here: theirs is asked so too."""
    from tokenizers import normalizers, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name == "smollm2":
        made = trained(tmp_path, digits, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    elif name == "gpt2":
        made = trained(tmp_path, words)
    elif name == "qwen":
        made = trained(tmp_path, split(QWEN_SPLIT), normalizers.NFC())
    else:
        made = trained(tmp_path, split(LLAMA_SPLIT))
    made.encode_special_tokens = True
    ours = load_tokenizer(tmp_path)
    assert ours.n_vocab == made.get_vocab_size() and ours.template == "chatml"
    for text in fuzzed(20_000):
        assert ours.encode_ordinary(text) == made.encode(text).ids, repr(text)


# --- SmolLM2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    folder = os.environ.get("PLAINRLHF_SMOLLM2")
    if not folder:
        pytest.skip("PLAINRLHF_SMOLLM2 names no folder of data/smollm2.py")
    return Path(folder)


def test_smollm2(smollm2, tmp_path):
    """Real weights: logits, greedy decoding; what we write opens there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2).float().eval()
    ours, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    ids = encode(tokenizer, "What is the capital of France?", None, 999)[0]
    with torch.no_grad():
        gap = (ours(torch.tensor([ids])) - model(torch.tensor([ids])).logits).abs().max()
    assert gap < 1e-3  # of logits up to 30
    (response,) = generate(ours, [ids], 32, temperature=0, eos=tokenizer.ends)
    whole = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0]
    assert whole[len(ids) :].tolist() == response
    assert "Paris" in text_of(tokenizer, response)


def test_smollm2s_template_and_tokens(smollm2):
    ours = load_tokenizer(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    turns = [
        {"role": "user", "content": "My car is old."},
        {"role": "assistant", "content": "Sell it."},
        {"role": "user", "content": " Why?\n\n"},
    ]
    for messages in (turns, turns[:1], [{"role": "system", "content": "Be brief."}, *turns]):
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        expected = theirs.apply_chat_template(json.loads(json.dumps(messages)), **how)
        assert encode(ours, Conversation(messages), None, 999)[0] == expected
    plain = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    plain.encode_special_tokens = True
    for text in fuzzed(20_000):
        assert ours.encode_ordinary(text) == plain.encode(text).ids, repr(text)
