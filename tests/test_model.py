"""model.py against a GPT-2 and a Llama in NumPy, sampling by hand, recomputation of the whole."""

import base64
import copy
import io
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from feedback import learn_by_adapters, reference_of
from model import (
    PARTS, GPT, GPTConfig, Linear, decode, entropy, generate, last_tokens, load_config, load_model,
    pack, pad, predicts, sample, save_model, token_logprobs,
)  # fmt: skip
from tokens import tokenizer_hash, write_json

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


def turn_in_numpy(x, t, rope):
    """RoPE of a head at position t: its halves are the parts of complex numbers, which turn."""
    half, turned = len(x) // 2, []
    for j in range(half):
        speed = rope["rope_theta"] ** (-2 * j / len(x))
        if rope["rope_type"] == "linear":
            speed /= rope["factor"]
        if rope["rope_type"] == "llama3":
            turns = rope["original_max_position_embeddings"] / (2 * math.pi / speed)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            slow, share = speed / rope["factor"], (turns - low) / (high - low)
            inside = share * speed + (1 - share) * slow
            speed = slow if turns < low else speed if turns > high else inside
        turned.append((x[j] + 1j * x[j + half]) * np.exp(1j * t * speed))
    return np.concatenate([np.real(turned), np.imag(turned)])


def llama_in_numpy(weights, config, tokens):
    """Hidden states after the last norm of Llama and the like, a position and a head at a time."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(x, name):
        return x / math.sqrt((x**2).mean() + config.layer_norm_epsilon) * w[f"{name}.weight"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    H, G, D, family = config.n_head, config.n_kv_head, config.head_dim, config.model_type
    stream = [w["wte.weight"][token] for token in tokens]
    for i in range(config.n_layer):
        attn, after = f"h.{i}.attn", family == "olmo2"
        keys, values, queries = [], [], []
        for t, x in enumerate(stream):
            qkv = linear(x if after else norm(x, f"h.{i}.ln_1"), f"{attn}.c_attn")
            q, k, v = np.split(qkv, [H * D, (H + G) * D])
            if family == "olmo2":
                q, k = norm(q, f"{attn}.q_norm"), norm(k, f"{attn}.k_norm")
            q, k, v = (np.split(z, len(z) // D) for z in (q, k, v))
            if family == "qwen3":
                q, k = [[norm(x, f"{attn}.{y}_norm") for x in z] for z, y in ((q, "q"), (k, "k"))]
            if config.no_rope_layers is None or config.no_rope_layers[i]:
                q, k = [[turn_in_numpy(x, t, config.rope) for x in z] for z in (q, k)]
            queries.append(q), keys.append(k), values.append(v)
        for t, x in enumerate(stream):
            heads = []
            for h in range(H):
                g = h * G // H  # neighbours share keys and values
                scores = [queries[t][h] @ keys[u][g] / math.sqrt(D) for u in range(t + 1)]
                weight = np.exp(np.array(scores) - max(scores))
                heads.append(sum(weight[u] * values[u][g] for u in range(t + 1)) / weight.sum())
            y = linear(np.concatenate(heads), f"{attn}.c_proj")
            x = x + (norm(y, f"h.{i}.ln_1") if after else y)
            gate, up = np.split(
                linear(x if after else norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), 2
            )
            y = linear(gate / (1 + np.exp(-gate)) * up, f"h.{i}.mlp.c_proj")
            stream[t] = x + (norm(y, f"h.{i}.ln_2") if after else y)
    return np.stack([norm(x, "ln_f") for x in stream])


THETA = {"rope_type": "default", "rope_theta": 100.0}
STRETCHED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 64}
LINEAR = THETA | {"rope_type": "linear", "factor": 4.0}
FAMILIES = {
    "llama3": {"model_type": "llama", "rope": STRETCHED},
    "llama-linear": {
        "model_type": "llama",
        "rope": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
}


@pytest.fixture
def family(small_gpt):
    def make(name, **more):
        settings = {"n_kv_head": 2, "n_inner": 40, "rope": THETA} | FAMILIES[name] | more
        return randomise(small_gpt(dtype=torch.float64, **settings))

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_of_the_families(family, name):
    model = family(name)
    tokens = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(2))
    hidden = llama_in_numpy(model.state_dict(), model.config, tokens[0].tolist())
    head = model.wte if model.lm_head is None else model.lm_head
    logits = hidden @ head.weight.detach().numpy().T
    assert np.abs(model(tokens)[0].detach().numpy() - logits).max() < 1e-5  # angles are float32


@pytest.mark.parametrize("name", FAMILIES)
def test_families_decode_by_the_cache_and_in_packed_rows(family, name):
    """What is sampled greedily has the highest logit in the whole row, and a packed row gives what
    single ones do."""
    model = family(name)
    drawn = generate(model, RAGGED, 20, temperature=0)
    tokens, mask = pad(RAGGED, drawn)
    logits = model(tokens, predicts(mask))
    assert torch.equal(logits.argmax(-1), tokens[mask])
    responses = [[response, response[:3]] for response in drawn]
    packed, inside, segments = pack(RAGGED, responses, 60)
    assert len(packed) < len(RAGGED)
    first = segments[inside] % PARTS == 1
    assert (model(packed, predicts(inside), segments)[first] - logits).abs().max() < 1e-12


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
    """`at` changes no output and no gradient, and the last MLP and the head run there alone."""
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
    # 4 rows; from the last block's MLP on (ln_2, c_fc, c_proj, ln_f) the 6 positions asked for.
    assert set(rows) == {4, 6} and rows.count(6) == 2 * 4


@pytest.mark.parametrize("shape", [(1, 9), (2, 9), (4, 9), (3, 8), (9, 3)])
def test_positions_of_another_shape_are_no_positions(small_gpt, shape):
    with pytest.raises(ValueError, match="at is"):
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


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_begin_as_the_model_and_are_merged(small_gpt, tmp_path, tokenizer):
    """Nothing changes before B learns; then the merged weights say the same, and the weights below,
    which the reference shares, are what they were bit for bit."""
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    for scalar_head in (False, True):
        policy, cfg = small_gpt(scalar_head), SimpleNamespace(lora_rank=3, lora_alpha=6.0, seed=0)
        before, base = policy(tokens).detach(), copy.deepcopy(policy.state_dict())
        reference = None if scalar_head else reference_of(policy, cfg)
        learn_by_adapters(policy, cfg)
        assert torch.equal(policy(tokens), before)
        learning = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert len(learning) == 2 * 4 * 2 + scalar_head  # A and B of four matrices in two blocks
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name in learning:
                    parameter += 0.1 * torch.randn_like(parameter)
        after, mlp = policy(tokens), policy.h[1].mlp.c_fc
        assert (after - before).abs().max() > 0.1
        if reference:
            assert torch.equal(reference(tokens), before)
            ours, others = dict(policy.named_parameters()), dict(reference.named_parameters())
            assert all(ours[name] is others[name] for name in base)  # no second copy
        save_model(tmp_path, policy, tokenizer)
        merged = load_model(tmp_path)
        assert merged.state_dict().keys() == base.keys()
        assert (merged(tokens) - after).abs().max() < 1e-5 * after.abs().max()
        gap = merged.h[1].mlp.c_fc.weight - base["h.1.mlp.c_fc.weight"]
        assert (gap - 6 / 3 * mlp.B @ mlp.A).abs().max() < 1e-6


def test_an_adapter_of_full_rank_reaches_what_the_weights_reach():
    """A linear map's least squares, by as many steps of the same optimiser."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6).double(), torch.randn(64, 4).double()
    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().sum()
    for rank in (2, 4):
        module = Linear(6, 4, bias=False).double()
        module.adapt(rank, rank)
        module.double().weight.requires_grad_(False)
        optimizer = torch.optim.LBFGS([module.A, module.B], max_iter=500, tolerance_change=1e-14)

        def loss(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            total = (module(x) - y).square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        assert (loss() < best * (1 + 1e-8)) == (rank == 4)  # of rank 2 it is not


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


def test_pad():
    tokens, mask = pad([[1, 2], [3]], [[4], [5, 6, 7]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_pad_token_equal_to_eos_is_still_trained():
    """A response that holds token 0, the filling of the pads, keeps it in the mask."""
    _, mask = pad([[1], [1]], [[0], [2, 0]])
    assert mask.tolist() == [[False, True, False], [False, True, True]]


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
    responses = generate(
        model, RAGGED, n, num_samples=K, temperature=temperature, eos=eos, generator=generator
    )
    draws = torch.Generator().manual_seed(5)
    how = {"generator": draws, "dtype": torch.float64}
    uniforms = torch.stack([torch.rand(len(RAGGED) * K, **how) for _ in range(n)], 1)
    lengths = set()
    for b, response in enumerate(responses):
        numbers = uniforms[b].tolist()
        expected = uncached(model, RAGGED[b // K], response, numbers, temperature)
        assert response == expected
        assert len(response) == n or response[-1] == eos
        assert eos not in response[:-1]
        lengths.add(len(expected))
    assert len(responses) == len(RAGGED) * K
    if eos is not None and temperature == 1.0:
        assert len(lengths) > 3 and max(lengths) == 64  # some ended early, some never


@pytest.mark.parametrize("name, eos", [("gpt2", None), ("llama3", None), ("llama3", 3)])
def test_steps_in_the_same_places_draw_the_same_tokens(small_gpt, family, name, eos):
    """As a GPU replays them, but not recorded: over two sizes of the cache, ragged prompts and
    equal ones, rows that end and are retired."""
    more = {"n_positions": 400}
    model = small_gpt(**more) if name == "gpt2" else family(name, **more)
    for prompts in (RAGGED, [[1, 2], [3, 4]]):
        steps = [
            list(decode(model, prompts, 280, 2, 1.0, 0, 1.0, eos, generator, static))
            for static in (False, True)
            for generator in [torch.Generator().manual_seed(5)]
        ]
        for plain, replayed in zip(*steps, strict=True):
            assert torch.equal(plain, replayed)


def test_generation_is_deterministic_and_differs_between_samples(small_gpt):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(small_gpt(), RAGGED, 20, num_samples=4, eos=0, generator=generator)

    assert run(1) == run(1) != run(2)
    assert run(1)[0] != run(1)[1]


def test_decode_stops_when_all_rows_have_ended(small_gpt):
    """A model that always says 7 ends all rows at once: at most eight steps are taken."""
    model = small_gpt()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(50 * model.wte.weight[7])
    steps = list(decode(model, RAGGED, 64, 1, 1.0, 0, 1.0, 7, None))
    assert len(steps) == 8
    assert generate(model, RAGGED, 64, eos=7) == [[7]] * 4


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
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts = np.bincount(sample(logits.expand(n, 12), uniform, **settings).numpy(), minlength=12)
    assert (counts[p == 0] == 0).all()
    inside = p > 0
    statistic = ((counts - n * p)[inside] ** 2 / (n * p)[inside]).sum()
    # The 99.9th percentile of chi-squared with 1..11 degrees of freedom.
    limits = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26]
    assert statistic < limits[inside.sum() - 2]


def test_the_ends_of_the_uniform_never_pick_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 3)
    uniform = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    assert set(sample(logits, uniform).tolist()) <= {1, 2}
    assert sample(logits, uniform)[1] == 1 and sample(logits, uniform)[0] == 2


def test_tails_of_a_large_vocabulary_can_be_drawn():
    """A token of half the mass, and 50,000 after it of 1e-8 each: summed in float32 they all stay
    at the same number, and none but the first is ever drawn."""
    tail = 50_000
    p = torch.tensor([1 - 1e-8 * tail] + [1e-8] * tail, dtype=torch.float64)
    places = torch.tensor([1, tail // 3, tail // 2, tail])
    uniform = 1 - p.cumsum(0)[places] + 5e-9  # in the middle of each one's share
    found = sample(p.log().float().expand(4, -1), uniform)
    assert (found - places).abs().max() <= 2  # by float32's rounding of 1e-8


def test_a_token_that_was_taken_out_is_not_drawn_whatever_the_sums(monkeypatch):
    """As on a GPU, where sums of zeros may differ by a rounding."""
    honest = torch.Tensor.cumsum
    rounded = torch.tensor([0.0, 1e-15, 0.0, 0.0])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, *a, **k: honest(x, *a, **k) + rounded)
    logits, uniform = torch.tensor([[1.0, 0.5, 3.0, 2.0]]), torch.tensor([1 - 2**-53]).double()
    assert sample(logits, uniform, top_k=2).tolist() == [2]


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
    refused("weight extra is none of a gpt2's", weights=tensors | {"extra": torch.zeros(1)})
    other = {"transformer.wpe.weight": torch.zeros(3, 32)}
    refused(r"wpe.weight has shape \(3, 32\), config.json says \(96, 32\)", weights=tensors | other)
    refused(
        "lm_head.weight is not the embeddings, and config.json ties it",
        weights=tensors | {"lm_head.weight": torch.zeros(1024, 32)},
    )
    refused("activation_function: 'relu' is not known here", {"activation_function": "relu"})
    refused("model_type: 'gemma2' is none of gpt2, llama", {"model_type": "gemma2"})
    refused(r"c_fc.weight has shape \(32, 128\), config.json says \(32, 7\)", {"n_inner": 7})
    llama = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "rope_theta": 1e4}
    llama |= {"max_position_embeddings": 96, "num_hidden_layers": 2, "intermediate_size": 64}
    llama |= {"rms_norm_eps": 1e-6}
    refused("n_head 4 is not a multiple of 3 key heads", llama | {"num_key_value_heads": 3})
    refused("config.json: rms_norm_eps: is missing", llama | {"rms_norm_eps": None})
    refused("config.json: head_dim: is missing", llama | {"model_type": "qwen3"})
    refused("config.json: no_rope_layers: is missing", llama | {"model_type": "smollm3"})
    refused("rope_theta: expected a number above 0, got None", llama | {"rope_theta": None})
    stretched = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    refused("high_freq_factor: expected a number", llama | {"rope_scaling": stretched})
    refused("rope_type: 'yarn' is none of default", llama | {"rope_scaling": {"type": "yarn"}})
    for layers in (["sliding_attention"], 5):
        refused("layer_types: other than full_attention", llama | {"layer_types": layers})
    refused("model_type: .'llama'. is none of", llama | {"model_type": ["llama"]})
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        refused(f"{name}: expected true or false, got 'false'", llama | {name: "false"})
    for layers in ([1], [1, 2], "11", 2):
        refused("no_rope_layers: expected 2 numbers, 0 or 1", llama | {"no_rope_layers": layers})
    for rope in (["default"], "default", 3):
        refused("rope_parameters: expected an object", llama | {"rope_parameters": rope})
    refused("rope_type: .'linear'. is none of", llama | {"rope_scaling": {"type": ["linear"]}})
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    refused("rope_parameters: full_attention is not", llama | {"rope_parameters": by_layer})
    stretched |= {"high_freq_factor": 1.0, "original_max_position_embeddings": 64}
    refused("high_freq_factor: expected more than", llama | {"rope_parameters": stretched})
    refused("quantization_config is not known", llama | {"quantization_config": {"bits": 4}})
    refused("config.json: n_layer: expected an integer", {"n_layer": "two"})
    for bad in (math.nan, math.inf):
        norm = tensors["transformer.ln_f.weight"].clone()
        norm[3] = bad
        diverged = tensors | {"transformer.ln_f.weight": norm}
        refused("run: weight ln_f.weight has numbers that are not finite", weights=diverged)
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
        ((run, "--prompt", "x", "--max_new_tokens", 64), "64 new ones exceed"),
        ((run, "--top_p", 0), "expected --temperature >= 0"),
        (
            (run, "--prompt", "x", "--tokenizer", run.with_name("bytes.tiktoken")),
            "was trained with",
        ),
    ]:
        assert run_script(sys.modules["model"], monkeypatch, *args, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
