"""A GPT: the network of GPT-2, Llama, Qwen and their like, its tokenizer, sampling,
log-probabilities, files.

Every script of this project imports this file; this file imports tokens.py alone of ours. A run
directory is a Hugging Face directory, so that a checkpoint of theirs opens here and one of ours
there.

Conventions, the same in every script: sequences are padded on the right; column t of any (B, T)
tensor describes `tokens[:, t]`; `mask` is True on response tokens, EOS included; masks come from
lengths, never from a token's id. Sizes: B rows, T positions, V vocabulary, N selected positions, K
responses per prompt, C = n_embd, H heads, G heads of keys and values, D numbers a head.

    python model.py runs/sft --prompt "How do I fix a bike?" --num_samples 3
    python model.py runs/sft                                  # interactive
"""

import argparse
import codecs
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tokens import (
    check_space, check_tokenizer, encode, load_tokenizer, read_json, tokenizer_files,
    tokenizer_hash, whole_file, write_json,
)  # fmt: skip

# MKL looks for its kernels of exp, log, sqrt and the like when the first of them is called. When
# two threads make that call at once, one may compute with a coarser kernel, that once (pytorch
# issue 188792; in 7% of forked processes here, a loss 1e-5 off). One thread makes it now, or no run
# would be sure to repeat bit for bit.
torch.ones(1).exp()
# cuDNN's attention is torch's first choice on Hopper, and makes a plan, some 30 ms, for each length
# of keys that it has not met: every step of sampling, every longest row of a batch.
torch.backends.cuda.enable_cudnn_sdp(False)

# --- the network ----------------------------------------------------------------------------------

# What a family does that no field of its config.json says, and `asks`: fields that it must have, as
# they have defaults of their own there. GPT-2 stands apart: LayerNorm, learned positions, biases,
# tanh GELU; all others have RMSNorm, RoPE, SwiGLU.
FAMILIES = {
    "gpt2": {"heads": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")},
    "llama": {"heads": ("LlamaForCausalLM", "LlamaForSequenceClassification")},  # SmolLM2 too
    "qwen2": {"heads": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"), "qkv_bias": True},
    "qwen3": {"heads": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"), "qk_norm": "head",
              "asks": ("head_dim",)},
    "smollm3": {"heads": ("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"), "tied": True,
                "asks": ("no_rope_layers",)},
    "olmo2": {"heads": ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification"), "qk_norm": "all",
              "norm_after": True},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """A network's hyper-parameters; the defaults are those of GPT-2, 124M.

    `dropout` stands for GPT-2's three rates (embd_pdrop, attn_pdrop, resid_pdrop) at once.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.0
    model_type: str = "gpt2"  # one of FAMILIES
    n_kv_head: int = 0  # heads of keys and values, shared by n_head / n_kv_head; 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd
    attention_bias: bool = False  # GPT-2 has all biases
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    rope: dict | None = None  # as config.json's rope_parameters
    no_rope_layers: list | None = None  # a number a layer, 0 where it has no RoPE; None: all have

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        derived = {"n_kv_head": self.n_head, "n_inner": 4 * self.n_embd}
        for name, value in (derived | {"head_dim": self.n_embd // self.n_head}).items():
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                wrong = getattr(self, name)
                raise ValueError(f"{name}: expected an integer of at least 0, got {wrong!r}")
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of {self.n_kv_head} key heads"
            )
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        layers = self.no_rope_layers
        good = isinstance(layers, list) and len(layers) == self.n_layer
        if layers is not None and not (good and all(x in (0, 1) for x in layers)):
            raise ValueError(f"no_rope_layers: expected {self.n_layer} numbers, 0 or 1")
        for name in ("layer_norm_epsilon", "initializer_range", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected a probability below 1, got {self.dropout}")

    @property
    def is_gpt2(self):
        return self.model_type == "gpt2"

    def says(self, name):
        return FAMILIES[self.model_type].get(name)

    def norm(self, size=None):
        kind = nn.LayerNorm if self.is_gpt2 else nn.RMSNorm
        return kind(size or self.n_embd, eps=self.layer_norm_epsilon)


@functools.cache
def frequencies(rope, D, device):
    """RoPE's angles a position, (D / 2,), float32 (Su et al. 2021, arXiv:2104.09864); rope: the
    items of config.json's rope_parameters."""
    rope = dict(rope)
    angles = rope["rope_theta"] ** (-torch.arange(0, D, 2, device=device).float() / D)
    if rope["rope_type"] == "linear":
        return angles / rope["factor"]
    if rope["rope_type"] == "llama3":  # slow ones are stretched, fast ones kept, a ramp between
        turns = rope["original_max_position_embeddings"] * angles / (2 * math.pi)  # in a text
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return angles * (keep + (1 - keep) / rope["factor"])
    return angles


def rotate(x, cos, sin):
    """x (B, T, H, D), its two halves of a head turned against each other, as Hugging Face keeps
    them; cos and sin (B or 1, T, 1, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@functools.cache
def compiled(function):
    return torch.compile(function)


def attend(q, k, v, visible=None, causal=True, dropout=0.0):
    """Softmax attention of queries (B, H, T, D) to keys and values (B, G, columns, D): to those
    that `visible` allows, a mask or from `seen`; without it to those not after them, or to all."""
    if isinstance(visible, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q, k, v, block_mask=visible, enable_gqa=True)
    causal, shared = causal and visible is None, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, visible, dropout, causal, enable_gqa=shared)


PARTS = 1 << 20  # a segment is PARTS x example + part: 0 is the prompt, k its response k


def seen(segments, dense=True):
    """What each token of a row of `pack` sees: itself and what stands before it, of its own example
    alone, in the prompt (part 0) or in its own response. A mask (B, 1, T, T), or, not `dense`,
    flex_attention's."""
    example, part = segments // PARTS, segments % PARTS

    def sees(b, h, q, k):
        of_it = (part[b, k] == 0) | (part[b, k] == part[b, q])
        return (k <= q) & (example[b, k] == example[b, q]) & of_it

    B, T = segments.shape
    if not dense:
        return create_block_mask(sees, B, None, T, T, device=segments.device)
    rows, columns = (torch.arange(n, device=segments.device) for n in (B, T))
    return sees(rows[:, None, None], 0, columns[:, None], columns)[:, None]


def places(segments):
    """How many tokens each token of a row of `pack` sees before it, (B, T): its position. 0 on
    pads."""
    columns = torch.arange(segments.shape[1], device=segments.device)

    def start_of(keys):  # the column where the run of equal keys that a token is in begins
        first = F.pad(keys[:, 1:] != keys[:, :-1], (1, 0), value=True)
        return (columns * first).cummax(1).values

    example, answers = segments // PARTS, segments % PARTS > 0
    prompt = start_of(2 * example + answers) - start_of(example)  # its length; 0 inside it
    return (columns - start_of(segments) + prompt) * (segments >= 0)


class Linear(nn.Linear):
    """W x + b; with an adapter of rank R, (alpha / R) B A x besides (LoRA, arXiv:2106.09685)."""

    scale = 0.0  # of no adapter

    def adapt(self, rank, alpha):
        """B is 0, so that nothing changes before it learns."""
        self.A = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.scale else y


def add_adapters(model, rank, alpha):
    """Low-rank adapters on the matrices of all blocks, drawn from the default generator. They learn
    in the place of all weights but those of a scalar head."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear):
            module.adapt(rank, alpha)
            module.to(module.weight.device, module.weight.dtype)
    if model.score is not None:
        model.score.requires_grad_()


def weights_of(model):
    """{name: tensor} of a model's weights, its adapters merged into them."""
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.scale:
            B, A = weights.pop(f"{name}.B"), weights.pop(f"{name}.A")
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.scale * B @ A
    return weights


class Attention(nn.Module):
    def __init__(self, config, rotated):
        super().__init__()
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        self.heads, self.dim, self.rotated = (H, G, G), D, rotated
        self.dropout, bias = config.dropout, config.is_gpt2 or config.attention_bias
        # Query, key, value in one.
        self.c_attn = Linear(config.n_embd, (H + 2 * G) * D, bias or bool(config.says("qkv_bias")))
        self.c_proj = Linear(H * D, config.n_embd, bias)
        self.qk_norm = config.says("qk_norm")  # None, "head" or "all"
        if self.qk_norm:
            of_all = self.qk_norm == "all"
            self.q_norm = config.norm(H * D if of_all else D)
            self.k_norm = config.norm(G * D if of_all else D)

    def forward(self, x, angles=None, cache=None, start=0, visible=None):
        """x (B, T, C) -> (B, T, C). `cache` (2, B, G, columns, D) takes keys and values at
        start..start+T. From start > 0, one new token a row sees all that `visible` (B, 1, 1,
        columns) allows of what is there; where start is a tensor, of all the cache."""
        B, T = x.shape[:2]
        q, k, v = self.c_attn(x).split([n * self.dim for n in self.heads], 2)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.view(B, T, -1, self.dim) for z in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None and self.rotated:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        decoding = torch.is_tensor(start) or start > 0
        if torch.is_tensor(start):
            k, v = (c.index_copy_(2, start, new) for c, new in zip(cache, (k, v), strict=True))
        elif cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            if decoding:
                k, v = cache[:, :, :, : start + 1]
                visible = None if visible is None else visible[..., : start + 1]
        if decoding:
            q = q.reshape(B, k.shape[1], -1, self.dim)  # heads that share keys are as more queries
        y = attend(q, k, v, visible, not decoding, self.dropout if self.training else 0.0)
        return self.c_proj(y.reshape(B, -1, T, self.dim).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        bias, self.gated = config.is_gpt2 or config.mlp_bias, not config.is_gpt2
        # SwiGLU's gate and what it lets through in one.
        self.c_fc = Linear(config.n_embd, config.n_inner * (1 + self.gated), bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.c_proj(F.silu(gate) * x)
        return self.c_proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, rotated=True):
        super().__init__()
        self.norm_after = config.says("norm_after")
        self.ln_1 = config.norm()
        self.attn = Attention(config, rotated)
        self.ln_2 = config.norm()
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, angles=None, cache=None, start=0, visible=None, keep=None):
        """x (B, T, C) -> (B, T, C); with `keep` (N,), places of the flattened (B, T), (N, C)."""
        y = self.attn(x if self.norm_after else self.ln_1(x), angles, cache, start, visible)
        if keep is not None:
            x, y = (z.flatten(0, 1).index_select(0, keep) for z in (x, y))
        x = x + self.drop(self.ln_1(y) if self.norm_after else y)
        y = self.mlp(x if self.norm_after else self.ln_2(x))
        return x + self.drop(self.ln_2(y) if self.norm_after else y)


class GPT(nn.Module):
    """A decoder of one of FAMILIES: blocks with a norm before attention and MLP, or after.

    With `scalar_head` the trunk carries one linear output a position and no language-model head:
    a reward or value model. Modules bear the names of Hugging Face's GPT-2. With
    `checkpoint_activations` set, the backward pass computes each block's activations anew: of all
    a block has, its input alone is kept.
    """

    def __init__(self, config, scalar_head=False):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.is_gpt2 else None
        self.drop = nn.Dropout(config.dropout)
        rotated = config.no_rope_layers or [1] * config.n_layer
        self.h = nn.ModuleList(Block(config, bool(x)) for x in rotated)
        self.ln_f = config.norm()
        self.score = nn.Linear(config.n_embd, 1, bias=False) if scalar_head else None
        apart = not (config.tie_word_embeddings or scalar_head)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False) if apart else None
        self.initialise()

    def initialise(self):
        """GPT-2's initial weights; the scalar head's std is 1/sqrt(n_embd + 1), as in the
        code of Ziegler et al. 2019 (arXiv:1909.08593)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name == "score.weight":
                nn.init.normal_(parameter, std=(self.config.n_embd + 1) ** -0.5)
            elif name.endswith("c_proj.weight"):
                # 2 n_layer projections add up in the residual stream: keep its variance at std^2.
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    def embed(self, tokens, positions):
        """Tokens (B, T) at positions (B or 1, T) -> x (B, T, C), and RoPE's cosines and sines."""
        x = self.wte(tokens)
        if self.wpe is not None:
            return self.drop(x + self.wpe(positions)), None
        rope = tuple(self.config.rope.items())
        turn = frequencies(rope, self.config.head_dim, positions.device)
        angles = positions[..., None, None] * turn  # (B or 1, T, 1, D / 2)
        return self.drop(x), (angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    def trunk(self, tokens, positions, caches=None, start=0, visible=None, at=None):
        """Hidden states (B, T, C) after the last norm, of tokens (B, T) at `positions`; with `at`
        (B, T) bool there alone, (N, C): the last block's MLP runs on no more."""
        x, angles = self.embed(tokens, positions)
        if at is not None and at.shape != tokens.shape:
            raise ValueError(f"at is {tuple(at.shape)}, tokens are {tuple(tokens.shape)}")
        keep = None if at is None else places_of(at)
        for i, block in enumerate(self.h):
            some = keep if i == len(self.h) - 1 else None
            if self.checkpoint_activations and torch.is_grad_enabled() and caches is None:
                x = checkpoint(block, x, angles, None, 0, visible, some, use_reentrant=False)
            else:
                x = block(x, angles, None if caches is None else caches[i], start, visible, some)
        return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> logits (..., V), or (...) with a scalar head."""
        if self.score is not None:
            # In float32 under autocast too: it is differences between scores that count.
            return (at_least_float32(hidden) * self.score.weight[0]).sum(-1)
        return self.logits(hidden, self.head_weight())

    def logits(self, hidden, head_weight):
        return F.linear(hidden, head_weight)[..., : self.config.vocab_size]

    def head_weight(self):
        """The head, (V, C), which may be the embeddings; in half precision less its mean, which
        shifts all logits alike, and with rows of 0 to a multiple of 64: a GPU's products are slow
        where rows are not aligned.

        Softmax does not see the shift. GPT-2's logits lie near -100, where bfloat16's numbers are
        0.5 apart: centred, log-probabilities come five times nearer to float32's (0.08 off on
        average without, 0.015 with it).
        """
        weight = self.wte.weight if self.lm_head is None else self.lm_head.weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        if half or torch.is_autocast_enabled(weight.device.type):
            weight = F.pad(weight - weight.mean(0), (0, 0, 0, -len(weight) % 64))
        return weight

    def states(self, tokens, at=None, segments=None):
        """Hidden states (B, T, C) or (N, C) that the head reads; arguments as of `forward`."""
        T, longest, visible = tokens.shape[1], self.config.n_positions, None
        if segments is not None and not segments.is_cuda and segments.max() <= 1:
            segments = None  # one example a row, of one response: plain causal attention is faster
        if segments is not None:
            dense = not segments.is_cuda or (self.training and self.config.dropout > 0)
            visible, positions = seen(segments, dense), places(segments)
        elif longest < T:
            raise ValueError(f"{T} tokens exceed the model's {longest} positions")
        else:
            positions = torch.arange(T, device=tokens.device)[None]
        return self.trunk(tokens, positions, visible=visible, at=at)

    def forward(self, tokens, at=None, segments=None):
        """Next-token logits, or scalars, of right-padded tokens (B, T) int64.

        Args:
            at: (B, T) bool; the head (and the last MLP) runs on these positions alone, row by row:
                over a vocabulary of 50,257 it costs as much memory as all the rest. None:
                everywhere.
            segments: (B, T), of rows with several examples, from `pack`.

        Returns:
            (B, T, V) when `at` is None, else (N, V), N = at.sum(); with a scalar head (B, T) or
            (N,). Column t has read tokens[:, :t + 1], with `segments` what `seen` says of them:
            pads, being on the right, are never read.
        """
        return self.head(self.states(tokens, at, segments))


# --- log-probabilities ----------------------------------------------------------------------------


def predicts(mask):
    """(B, T) bool: the positions whose next token is in `mask`, where its logits are.

    The one shift in the code base: the logits at column t are those of column t + 1's token. Column
    0 has nothing before it that could predict it, so it must not be in the mask.
    """
    return F.pad(mask.bool()[:, 1:], (0, 1))


def token_logprobs(logits, tokens, mask, temperature=1.0):
    """log pi(token | tokens before it), in nats, at the masked positions.

    Args:
        logits: (N, V), the model's output at `predicts(mask)`.
        tokens, mask: (B, T); mask.sum() == N.
        temperature: divides the logits, as in sampling.

    Returns:
        (B, T), 0 outside the mask; float32 at least, whatever the logits' type.
    """
    where = places_of(mask)  # (N,)
    targets = tokens.flatten().index_select(0, where)
    return spread(fused(logprob_of, logits)(logits, targets, temperature), mask, where)


def places_of(mask):
    """Where a mask of any shape is True, (N,), when flattened. Whoever asks waits for a GPU."""
    return mask.flatten().nonzero().squeeze(1)


def spread(values, mask, where=None):
    """values (N,) at the places of mask (B, T), in their order, and 0 elsewhere: (B, T)."""
    where = places_of(mask) if where is None else where
    return values.new_zeros(mask.numel()).index_copy(0, where, values).view(mask.shape)


def logprob_of(logits, targets, temperature):
    """log softmax(logits / temperature) of each row's target, (N,)."""
    logits = at_least_float32(logits)
    if temperature != 1:  # dividing would hold a second (N, V) tensor
        logits = logits / temperature
    # Gather, then subtract: log_softmax would hold a second (N, V) tensor for the backward pass.
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def entropy(logits, temperature=1.0):
    """Entropy (N,) in nats of the softmax of each row of logits (N, V) / temperature."""
    return fused(entropy_of, logits)(logits, temperature)


def entropy_of(logits, temperature):
    logits = at_least_float32(logits)
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    # A token that was filtered out has log-probability -inf and adds 0, not 0 * -inf = NaN.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def fused(function, logits):
    """The function; on a GPU compiled, as one by one its steps would read and write all of (N, V),
    float32, some twenty times."""
    return compiled(function) if logits.is_cuda else function


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def widest(device):
    """The type for long sums: float64, but that Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def last_tokens(mask):
    """(B, T) bool: the last token of each response in `mask`, EOS when it ended: where a reward
    model's score is. In rows from `pad` there is one a row, in those from `pack` one for each
    response, in their order; so model(tokens, last_tokens(mask)) has a score for each, (N,). A
    response without a token has none.
    """
    return mask.bool() & ~predicts(mask)


def pad(prompts, responses):
    """Lists of token ids -> tokens (B, T) int64, padded on the right with 0, and mask (B, T) bool,
    True on the responses. T is the longest row's length."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    T = max(lengths)
    rows = [[*p, *r] + [0] * (T - n) for p, r, n in zip(prompts, responses, lengths, strict=True)]
    begin = torch.tensor([len(p) for p in prompts])[:, None]  # (B, 1)
    columns = torch.arange(T)
    mask = (columns >= begin) & (columns < torch.tensor(lengths)[:, None])
    return torch.tensor(rows), mask


def response_sums(values, mask):
    """values (N,) or (N, numbers), at the tokens of `mask` (B, T), summed over each of its
    responses, in their order: (M,) or (M, numbers)."""
    mask = mask.bool()
    begins = (mask & ~F.pad(mask[:, :-1], (1, 0))).flatten().index_select(0, places_of(mask))
    lengths = F.pad(places_of(begins), (0, 1), value=len(values)).diff()  # (M,)
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def pack(prompts, responses, width=0):
    """Examples, each a prompt with all its responses, in rows of several: what is short wastes no
    row, and a prompt is read once (at 30 + 14 tokens 2.1 times the speed of `pad` with four
    responses, 1.5 times with two; arXiv:2410.20305).

    An example is the prompt but for its last token, then for each response that token and the
    response: so every response's first token too is predicted by the column before it. Examples
    keep their order, and fill rows of at most `width` columns, or as many as the longest has.

    Args:
        prompts: lists of token ids. responses: for each a list of lists of token ids.

    Returns:
        tokens (R, T) int64, padded on the right with 0; mask (R, T) bool, True on the responses;
        segments (R, T) int64, for `GPT.forward`: PARTS x the example's number in its row, + k on
        response k = 1, 2, ... and its copy of the prompt's last token; -1 on pads.
    """
    rows, longest = [], width
    for prompt, some in zip(prompts, responses, strict=True):
        n = len(prompt) - 1
        longest = max(longest, n + sum(len(response) + 1 for response in some))
    for prompt, some in zip(prompts, responses, strict=True):
        shared, n = list(prompt[:-1]), len(prompt) - 1
        ids = sum(([prompt[-1], *response] for response in some), shared)
        inside = sum(([0] + [1] * len(response) for response in some), [0] * n)
        part = sum(([k] * (len(r) + 1) for k, r in enumerate(some, 1)), [0] * n)
        if not rows or len(rows[-1][0]) + len(ids) > longest:
            rows.append(([], [], []))
        row, number = rows[-1], 1 + (rows[-1][2][-1] // PARTS if rows[-1][2] else -1)
        for column, more in zip(
            row, (ids, inside, [PARTS * number + k for k in part]), strict=True
        ):
            column += more
    T = max(len(row[0]) for row in rows)
    tokens, mask, segments = (
        torch.tensor([row[i] + [filler] * (T - len(row[i])) for row in rows])
        for i, filler in enumerate((0, 0, -1))
    )
    return tokens, mask.bool(), segments


# --- sampling -------------------------------------------------------------------------------------


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row from softmax(logits / temperature), by inverting its distribution function.

    Args:
        logits: (B, V). uniform: (B,) float64 in [0, 1), the only randomness: one number a row,
            where the Gumbel trick or multinomial draw one for each of the V tokens.
        temperature: 0 takes the most likely token. top_k: 0 is off. top_p: 1 is off; the smallest
            set of tokens that holds this probability, after temperature.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = at_least_float32(logits)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, sorted=True).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        sorted_p, order = probabilities.sort(-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # the probability of all tokens that rank higher
        sorted_p = sorted_p.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, sorted_p)
    # In float64: next to 1, float32 has no room for the tails of a large vocabulary.
    cumulative = probabilities.cumsum(-1, dtype=widest(logits.device))
    # 1 - uniform is in (0, 1]: the first token whose cumulative probability reaches it has a
    # probability above 0, and there always is one.
    threshold = (1 - uniform)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold)  # (B, 1)
    if top_k or top_p < 1:
        # A GPU sums in parallel, so that the sums may fall by a rounding, which a draw can hit.
        taken_out = probabilities.gather(1, drawn) == 0
        drawn = torch.where(taken_out, probabilities.argmax(-1, keepdim=True), drawn)
    return drawn.squeeze(-1)


class Replayed:
    """What a step of `decode` computes, always in the same places of memory, so that a GPU can be
    told once and do it again: a small model's kernels take less time than Python needs to start
    them. Attention goes over up to 256 columns more than there are yet."""

    def __init__(self, model, head_weight, caches, visible, column):
        """`column`: the first that is still empty."""
        self.model, self.head_weight, self.caches = model, head_weight, caches
        (_, B, _, columns, _), device = caches[0].shape, caches[0].device
        self.tokens, self.positions = torch.zeros(2, B, 1, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        if visible is None:
            visible = torch.ones(B, 1, 1, columns, dtype=torch.bool, device=device)
        self.visible, self.size = visible.clone(), 0
        self.visible[..., column:] = False

    def __call__(self, tokens, positions, column):
        """Logits (B, V) of tokens (B,) at positions (B,), which are written to the column."""
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions[:, None])
        self.column.fill_(column)
        self.visible[..., column] = True
        if column >= self.size:
            self.size = (column // 256 + 1) * 256
            self.again = recorded(self.compute) if tokens.is_cuda else self.compute
        self.again()
        return self.logits

    def compute(self):
        caches = [cache[:, :, :, : self.size] for cache in self.caches]
        inputs = self.tokens, self.positions, caches, self.column, self.visible[..., : self.size]
        self.logits = self.model.logits(self.model.trunk(*inputs)[:, 0], self.head_weight)


def recorded(step):
    """What has a GPU do all kernels of step() again."""
    step()  # libraries set up what they need when they are first called: not while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@torch.inference_mode()
def decode(
    model, prompts, max_new_tokens, num_samples, temperature, top_k, top_p, eos, generator,
    static=None,
):  # fmt: skip
    """`generate`, one step at a time: yields the next token of every row, (B,), at most
    max_new_tokens times; an `eos` again for rows that have ended. Stops when all have. Inference
    mode spares bookkeeping: 6% of the time of 16 toy rows. static: whether steps are `Replayed`;
    None: on a GPU."""
    N, K = len(prompts), num_samples
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("every prompt needs at least one token")
    if longest + max_new_tokens > model.config.n_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{model.config.n_positions} positions"
        )
    if model.training and model.config.dropout > 0:
        raise ValueError("dropout is on: call model.eval() before sampling")
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    static = device.type == "cuda" if static is None else static
    G, D = model.config.n_kv_head, model.config.head_dim
    ends = torch.tensor([] if eos is None else eos, dtype=torch.int64, device=device).flatten()
    P = longest - 1  # the last token of a prompt is read by the first step, as a sampled one is

    # Keys and values of every layer and row. Prompts without their last token fill columns 0 to
    # P - 1, pads included; later tokens begin at column P in every row, so that a step writes one
    # slice. Positions, not columns, say where a token stands. Each prompt is read once, some 4,096
    # tokens at a time (which fit into a CPU's caches: 1.4 times the speed), and its K samples get
    # copies.
    columns = P + max_new_tokens
    columns += -columns % 64 if static else 0  # GPUs like rows that are aligned
    make = torch.zeros if static else torch.empty  # 0 times what is hidden should be 0
    caches = make(len(model.h), 2, N, K, G, columns, D, device=device, dtype=dtype)
    if P > 0:
        tokens = pad([prompt[:-1] for prompt in prompts], [[]] * N)[0].to(device)  # (N, P)
        places, nowhere = torch.arange(P, device=device)[None], torch.zeros_like(tokens).bool()
        size = max(4096 // P, 1)
        for i in range(0, N, size):
            some = slice(i, i + size)  # whose outputs nobody asks for
            model.trunk(tokens[some], places, caches[:, :, some, 0], at=nowhere[some])
        caches[:, :, :, 1:, :, :P] = caches[:, :, :, :1, :, :P]
    caches = list(caches.flatten(2, 3))  # each (2, B, H, columns, D), a prompt's samples adjacent
    next_tokens = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    positions = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    next_tokens, positions = next_tokens.repeat_interleave(K), positions.repeat_interleave(K)
    visible = None
    if any(len(prompt) < longest for prompt in prompts):  # else there are no pads to hide
        column = torch.arange(columns, device=device)
        visible = (column < positions[:, None]) | (column >= P)  # (B, columns)
        visible = visible[:, None, None]

    head_weight, replayed = model.head_weight(), None
    rows = torch.arange(N * K, device=device)  # those still computed
    ended = torch.zeros(N * K, dtype=torch.bool, device=device)  # of those rows, whether done
    for step in range(max_new_tokens):
        if static:
            replayed = replayed or Replayed(model, head_weight, caches, visible, P + step)
            logits = replayed(next_tokens, positions, P + step)  # (rows, V)
        else:
            inputs = next_tokens[:, None], positions[:, None], caches, P + step, visible
            logits = model.logits(model.trunk(*inputs)[:, 0], head_weight)
        positions = positions + 1
        # Every row has its number at every step, so that retiring others changes no sample.
        source = generator.device if generator else device
        uniform = torch.rand(N * K, generator=generator, device=source, dtype=widest(source))
        next_tokens = sample(logits, uniform.to(device)[rows], temperature, top_k, top_p)
        if eos is None:
            yield next_tokens
            continue
        next_tokens = torch.where(ended, ends[0], next_tokens)
        ended = ended | torch.isin(next_tokens, ends)
        yield ends[0].repeat(N * K).index_copy(0, rows, next_tokens)
        # Asking which rows go on makes a GPU wait: every eighth step. Compacting copies the cache:
        # when a quarter of the rows have ended.
        if step % 8 == 7:
            going = (~ended).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) <= 0.75 * len(rows):
                rows, ended, next_tokens = rows[going], ended[going], next_tokens[going]
                positions = positions[going]
                caches = [cache[:, going] for cache in caches]
                visible = None if visible is None else visible[going]
                replayed = None


def generate(
    model,
    prompts,
    max_new_tokens,
    *,
    num_samples=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos=None,
    generator=None,
):
    """Samples `num_samples` responses to each prompt, from the full softmax unless told otherwise.

    Args:
        prompts: lists of token ids, of any lengths, none empty.
        max_new_tokens: responses end there if `eos` does not come first.
        num_samples: K. temperature: 0 is greedy. top_k, top_p: as in `sample`.
        eos: the id, or several, that ends a response, and belongs to it; None: nothing does.
        generator: torch.Generator; the same one gives the same tokens.

    Returns:
        lists of token ids, len(prompts) * K of them, a prompt's adjacent.

    Raises:
        ValueError: an empty prompt, or more positions than the model has.
    """
    how = (num_samples, temperature, top_k, top_p, eos, generator)
    steps = decode(model, prompts, max_new_tokens, *how)
    ends, responses = {eos} if isinstance(eos, int) else set(eos or ()), []
    for row in torch.stack(list(steps), 1).tolist():
        length = next((t for t, token in enumerate(row, 1) if token in ends), len(row))
        responses.append(row[:length])
    return responses


# --- files ----------------------------------------------------------------------------------------


def save_model(directory, model, tokenizer, extra=None):
    """Writes config.json, model.safetensors and the tokenizer as Hugging Face's ...ForCausalLM
    (GPT2LMHeadModel), or with a scalar head ...ForSequenceClassification with one label, which
    gives our score on one unpadded sequence. `extra` (a dict) goes into config.json: `stage`,
    `reward_mean`, ..."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files, config, tensors = tokenizer_files(tokenizer), model.config, {}
    for name, tensor in weights_of(model).items():
        prefix = "transformer." if config.is_gpt2 else "model."
        prefix = "" if name in ("score.weight", "lm_head.weight") else prefix
        for its_name, part in theirs(name, tensor, config).items():
            tensors[prefix + its_name] = part.detach().float().cpu().contiguous()
    check_space(directory / "model.safetensors", tensors.values())
    with whole_file(directory / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name, text in files.items():
        with whole_file(directory / name) as temporary:
            temporary.write_text(text, "utf-8")
    scalar = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    fields = fields_of(config) | (scalar if model.score is not None else {})
    fields["architectures"] = [FAMILIES[config.model_type]["heads"][model.score is not None]]
    fields["bos_token_id"] = tokenizer.eot_token if tokenizer.bos is None else tokenizer.bos
    fields["eos_token_id"] = list(tokenizer.ends) if tokenizer.ends[1:] else tokenizer.eot_token
    # Without a pad token theirs scores the last token, as we do: EOS.
    fields |= {"pad_token_id": None, "torch_dtype": "float32", "template": tokenizer.template}
    fields["tokenizer"] = tokenizer_hash(tokenizer)
    write_json(directory / "config.json", fields | (extra or {}))


# Our names of a block's weights, and those of Hugging Face's files for Llama and the like.
IN_A_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),  # which stands before the MLP
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}
NORMS_AFTER = {"ln_1": ("post_attention_layernorm",), "ln_2": ("post_feedforward_layernorm",)}


def theirs(name, tensor, config):
    """{name: tensor} of one of our weights in Hugging Face files, where `transformer.` or `model.`
    stands before it: views of its parts."""
    if config.is_gpt2:  # which keeps linear weights as (in, out): its Conv1D
        linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        return {name: tensor.t() if linear else tensor}
    module, kind = name.rsplit(".", 1)
    if not module.startswith("h."):
        return {f"{ {'wte': 'embed_tokens', 'ln_f': 'norm'}.get(module, module) }.{kind}": tensor}
    _, i, module = module.split(".", 2)
    names = (IN_A_BLOCK | (NORMS_AFTER if config.says("norm_after") else {}))[module]
    sizes = [len(tensor) // len(names)] * len(names)
    if len(names) == 3:
        sizes = [heads * config.head_dim for heads in (config.n_head, *2 * [config.n_kv_head])]
    parts = zip(names, tensor.split(sizes), strict=True)
    return {f"layers.{i}.{theirs}.{kind}": part for theirs, part in parts}


# Our names of what config.json has, and its own: GPT-2's, and those of Llama and the like.
OURS = "vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon initializer_range"
IN_GPT2S_CONFIG = {name: name for name in OURS.split()} | {"dropout": "resid_pdrop"}
SAME = "vocab_size head_dim initializer_range attention_bias mlp_bias tie_word_embeddings"
IN_CONFIG = {name: name for name in (*SAME.split(), "no_rope_layers")} | {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
}
# What a config.json may say of things that are not here: nothing, or these values.
GPT2_ALONE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
OTHERS_ALONE = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
}
NEEDED = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers",
          "num_attention_heads", "intermediate_size", "rms_norm_eps")  # fmt: skip
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPES = {"default": (), "linear": ("factor",), "llama3": STRETCH}  # and the numbers of each


def fields_of(config):
    """config.json's fields of a network, of the versions of transformers before and after 5."""
    names = IN_GPT2S_CONFIG if config.is_gpt2 else IN_CONFIG
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    if config.is_gpt2:
        fields |= {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
        fields |= {"activation_function": "gelu_new", "tie_word_embeddings": True}
    else:
        rope = config.rope
        fields |= {"hidden_act": "silu", "rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        fields |= {"rope_scaling": None if rope["rope_type"] == "default" else rope}
    return fields | {"model_type": config.model_type}


def rope_of(path, fields):
    """The RoPE of a config.json's fields, {rope_type, rope_theta, the numbers of its type}."""
    where = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    given = fields.get(where) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {where}: expected an object, got {given!r}")
    given = {"rope_theta": fields.get("rope_theta")} | given
    kind = given.pop("type", None) or given.pop("rope_type", "default")
    if kind not in [*ROPES]:
        raise ValueError(f"{path}: rope_type: {kind!r} is none of {', '.join(ROPES)}")
    for name in sorted(given.keys() - {"rope_type", "rope_theta", *STRETCH}):
        raise ValueError(f"{path}: {where}: {name} is not known here")
    rope = {"rope_type": kind}
    for name in ("rope_theta", *ROPES[kind]):
        rope[name] = given.get(name)
        if type(rope[name]) not in (int, float) or not 0 < rope[name] < math.inf:
            raise ValueError(f"{path}: {name}: expected a number above 0, got {rope[name]!r}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(f"{path}: high_freq_factor: expected more than low_freq_factor")
    return rope


def config_of(directory, fields):
    """The GPTConfig of a config.json; ValueError, naming the field, of what is not here."""
    path, family = Path(directory) / "config.json", fields.get("model_type", "gpt2")
    if family not in [*FAMILIES]:
        raise ValueError(f"{path}: model_type: {family!r} is none of {', '.join(FAMILIES)}")
    for name, allowed in (GPT2_ALONE if family == "gpt2" else OTHERS_ALONE).items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"{path}: {name}: {fields[name]!r} is not known here ({allowed[0]!r})")
    if fields.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is not known here")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{path}: layer_types: other than full_attention is not known here")
    names = IN_GPT2S_CONFIG if family == "gpt2" else IN_CONFIG
    settings = {x: fields[y] for x, y in names.items() if fields.get(y) is not None}
    if family != "gpt2":
        for name in (*NEEDED, *FAMILIES[family].get("asks", ())):
            if fields.get(name) is None:
                raise ValueError(f"{path}: {name}: is missing")
        settings.setdefault("tie_word_embeddings", FAMILIES[family].get("tied", False))
        settings["rope"] = rope_of(path, fields)
    try:
        return GPTConfig(model_type=family, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_config(directory):
    """config.json of a run or of a Hugging Face directory, as a dict.

    Raises ValueError or OSError, in one line, when it is not there or no network of ours.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a model directory: it has no config.json")
    fields = read_json(path)
    config_of(directory, fields)
    return fields


def load_model(directory, device="cpu"):
    """The GPT of a run or a Hugging Face directory, in float32 and in eval mode.

    Takes language models, bare ones, and ...ForSequenceClassification of one label; one file or
    shards; names with or without `transformer.` and `model.`; any floating type. It has a scalar
    head if the files do.

    Raises:
        ValueError or OSError, in one line: no such files, a weight missing, unknown or of another
        shape, a head that is not tied and should be, weights that exist as a pickle only.
    """
    directory = Path(directory)
    config, tensors = config_of(directory, load_config(directory)), {}

    old = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # no weights
    for path in weight_files(directory):
        try:
            found = load_file(path)
        except Exception as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
        for name in found:
            if not name.endswith(old):
                short = name.removeprefix("transformer.").removeprefix("model.")
                tensors[short] = found[name]
    scalar_head = "score.weight" in tensors
    blocks = len({name.split(".")[1] for name in tensors if re.match(r"(h|layers)\.\d", name)})
    if blocks != config.n_layer:  # before a network of any size is made
        raise ValueError(f"{directory}: has {blocks} blocks, config.json says {config.n_layer}")

    try:
        with torch.device("meta"):  # no time spent on initial weights that would be overwritten
            model = GPT(config, scalar_head).to_empty(device=device)
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError(f"{directory / 'config.json'}: of no size that a network has") from None
    for name, weight in model.state_dict().items():
        for its_name, part in theirs(name, weight, config).items():
            if its_name not in tensors:
                raise ValueError(f"{directory}: weight {its_name} is missing")
            tensor = tensors.pop(its_name)
            if tensor.shape != part.shape:
                raise ValueError(
                    f"{directory}: weight {its_name} has shape {tuple(tensor.shape)}, config.json "
                    f"says {tuple(part.shape)}"
                )
            part.copy_(tensor)
            if not part.isfinite().all():
                raise ValueError(f"{directory}: weight {its_name} has numbers that are not finite")
    head = tensors.pop("lm_head.weight", None)  # left if tied, or if a scalar head replaces it
    if head is not None and not scalar_head and not torch.equal(head.to(weight), model.wte.weight):
        raise ValueError(
            f"{directory}: lm_head.weight is not the embeddings, and config.json ties it"
        )
    for name in tensors:
        raise ValueError(f"{directory}: weight {name} is none of a {config.model_type}'s")
    return model.eval()


def weight_files(directory):
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: weight_map: expected an object of weight: file")
        paths = [directory / Path(name).name for name in sorted(set(names.values()))]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: named in {index.name}, but not there")
        return paths
    if (directory / "pytorch_model.bin").exists():
        raise ValueError(
            f"{directory}: its weights are a pickle (pytorch_model.bin), which can run code and is "
            "never loaded here; save them as safetensors first"
        )
    raise FileNotFoundError(f"{directory}: no model.safetensors")


# --- python model.py RUN --------------------------------------------------------------------------


def stream(model, tokenizer, prompt, args, generator):
    """Prints samples of one prompt token by token."""
    room = max(model.config.n_positions - args.max_new_tokens, 1)  # of less, `decode` says so
    prompt_ids = encode(tokenizer, prompt, None, sys.maxsize)[0]
    if len(prompt_ids) > room:
        print(f"the prompt loses its first {len(prompt_ids) - room} tokens", file=sys.stderr)
        prompt_ids = prompt_ids[-room:]
    for k in range(args.num_samples):
        if args.num_samples > 1:
            print(f"[{k + 1}]", end="", flush=True)
        # A character may be split between tokens: print it when its last byte has come.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        how = (1, args.temperature, args.top_k, args.top_p, None, generator)
        for next_tokens in decode(model, [prompt_ids], args.max_new_tokens, *how):
            token = int(next_tokens[0])
            if token in tokenizer.ends:
                break
            print(decoder.decode(tokenizer.bytes_of(token)), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Sample from a checkpoint.")
    parser.add_argument("run", help="a run directory or a Hugging Face directory")
    parser.add_argument("--prompt", help="the text to continue (without it: interactive)")
    parser.add_argument("--num_samples", type=int, default=1, help="samples a prompt (1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 is off (1.0)")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="tokens (48)")
    parser.add_argument("--tokenizer", help="gpt2, FILE.tiktoken or a directory (the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("expected --temperature >= 0, --top_k >= 0 and --top_p in (0, 1]")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        parser.error("expected --num_samples and --max_new_tokens of at least 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # of what the terminal can't show
    try:
        model = load_model(args.run, args.device)
        if model.score is not None:
            raise ValueError(f"{args.run}: has a scalar head; it scores text and writes none")
        tokenizer = load_tokenizer(args.tokenizer or args.run)
        check_tokenizer(tokenizer, args.run, load_config(args.run))
        generator = torch.Generator(args.device).manual_seed(args.seed)
        if args.prompt is not None:
            stream(model, tokenizer, args.prompt, args, generator)
            return
        while True:
            stream(model, tokenizer, input("\nprompt> "), args, generator)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: --device
        print(str(error).split("\n")[0], file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
