"""A GPT with GPT-2's architecture: the network, its tokenizer, sampling, log-probabilities, files.

Every script of this project imports this file; this file imports nothing of ours. A run directory
is a Hugging Face GPT-2 directory, so that a checkpoint of theirs opens here and one of ours there.

Conventions, the same in every script: sequences are padded on the right; column t of any (B, T)
tensor describes `tokens[:, t]`; `mask` is True on response tokens, EOS included; masks come from
lengths, never from a token's id. Sizes: B sequences, T positions, V vocabulary, N selected
positions, M cells computed, K responses per prompt, C = n_embd, H heads, D = C / H.

    python model.py runs/sft --prompt "How do I fix a bike?" --num_samples 3
    python model.py runs/sft                                  # interactive
"""

import argparse
import base64
import binascii
import codecs
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# MKL looks for its kernels of exp, log, sqrt and the like when the first of them is called. When
# two threads make that call at once, one may compute with a coarser kernel, that once (pytorch
# issue 188792; in 7% of forked processes here, a loss 1e-5 off). One thread makes it now, or no run
# would be sure to repeat bit for bit.
torch.ones(1).exp()

END_OF_TEXT = "<|endoftext|>"
# GPT-2's split into words: contractions, letters, digits, other signs, spaces; a word takes along
# the space before it.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


# --- the network ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """GPT-2's hyper-parameters under the names of Hugging Face's config.json, those of the 124M.

    `dropout` stands for their three rates (embd_pdrop, attn_pdrop, resid_pdrop) at once.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected a probability below 1, got {self.dropout}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def qkv(self, x, cache=None, start=0, grid=None):
        """x (B, T, C), or (M, C) with `grid` as of `Block.forward` -> queries, keys and values,
        (B, H, T, D) each. `cache` (2, B, H, columns, D) takes keys and values at start..start+T."""
        y = self.c_attn(x)
        if grid is not None:
            y = y.index_select(0, grid.flatten()).view(*grid.shape, -1)
        B, T = y.shape[:2]
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in y.chunk(3, 2))
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
        return q, k, v

    def forward(self, x, cache=None, start=0, visible=None, grid=None, keep=None):
        """x (B, T, C) -> (B, T, C); with `grid` and `keep` as of `Block.forward` (M, C) -> (N, C).
        Queries see what `visible` (B, 1, T or 1, columns) allows, or, without it, what lies before
        them; from start > 0 all that is in `cache`, for which see `qkv`."""
        q, k, v = self.qkv(x, cache, start, grid)
        B, H, T, D = q.shape
        if start > 0:
            # One new token a row: everything in the cache lies before it, so no causal mask.
            k, v = cache[:, :, :, : start + T]
            visible = None if visible is None else visible[..., : start + T]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=start == 0 and visible is None,
        )
        y = y.transpose(1, 2)  # (B, T, H, D)
        if grid is None:
            return self.c_proj(y.reshape(B, T, H * D))
        return self.c_proj(y.reshape(B * T, H * D).index_select(0, keep))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0, visible=None, grid=None, keep=None):
        """x (B, T, C) -> (B, T, C).

        With `grid` (B, T) int64, x is (M, C), the cells that `GPT.trunk` has not left out: row b's
        column t is x[grid[b, t]], which is its last cell before where that one was left out. What
        comes out is (N, C) then, at the places `keep` (N,) of the flattened (B, T): all M or some.
        """
        y = self.attn(self.ln_1(x), cache, start, visible, grid, keep)
        if grid is not None and len(keep) < len(x):  # else it is all M, in x's order
            x = x.index_select(0, grid.flatten()[keep])
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2: pre-LayerNorm blocks, learned absolute positions, tanh GELU, head tied to `wte`.

    With `scalar_head` the trunk carries one linear output a position and no language-model head:
    a reward or value model. Modules bear the names of Hugging Face's GPT-2. With
    `checkpoint_activations` set, the backward pass computes each block's activations anew: of all
    layers only their inputs are kept, for a third more work.
    """

    def __init__(self, config, scalar_head=False):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.score = nn.Linear(config.n_embd, 1, bias=False) if scalar_head else None
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

    def trunk(self, tokens, positions, caches=None, start=0, visible=None, at=None):
        """Hidden states (B, T, C) after the last LayerNorm, of tokens (B, T) at `positions`; with
        `at` (B, T) bool there alone, (N, C).

        What follows a row's last position of `at`, pads above all, then exists only in attention:
        all else runs on the M cells up to there (1.13 times the speed where 22% are pads), and the
        last block's MLP and attention's projection on the N alone (SFT of the embedded task: 1.1).
        """
        grid = cells = wanted = None
        if at is not None:
            used = at.flip(1).cumsum(1).flip(1) > 0  # (B, T): at `at`, or before some of it
            used[:, 0] = True  # an empty row would have no cell to copy
            cells, wanted = (where.flatten().nonzero().squeeze(1) for where in (used, at))
            # What is left out is, in attention, a copy of the last cell before: no query sees it.
            grid = (used.flatten().cumsum(0) - 1).view(tokens.shape)
            tokens, positions = tokens.flatten()[cells], positions.expand_as(at).flatten()[cells]
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C) or (M, C)
        for i, block in enumerate(self.h):
            keep = wanted if i == len(self.h) - 1 else cells
            if self.checkpoint_activations and torch.is_grad_enabled() and caches is None:
                x = checkpoint(block, x, None, start, visible, grid, keep, use_reentrant=False)
            else:
                x = block(x, None if caches is None else caches[i], start, visible, grid, keep)
        return self.ln_f(x)

    def read(self, tokens, caches):
        """Fills `caches` with the keys and values of tokens (B, T) from position 0. Nobody asks for
        the outputs, so the last block computes none."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block, cache in zip(self.h[:-1], caches, strict=False):
            x = block(x, cache)
        last = self.h[-1]
        last.attn.qkv(last.ln_1(x), caches[-1])

    def head(self, hidden):
        """(..., C) -> logits (..., V), or (...) with a scalar head."""
        if self.score is not None:
            # In float32 under autocast too: it is differences between scores that count.
            return (at_least_float32(hidden) * self.score.weight[0]).sum(-1)
        return F.linear(hidden, self.head_weight())

    def head_weight(self):
        """The embeddings, (V, C); in half precision less their mean, which shifts all logits alike.

        Softmax does not see the shift. GPT-2's logits lie near -100, where bfloat16's numbers are
        0.5 apart: centred, log-probabilities come five times nearer to float32's (0.08 off on
        average without, 0.015 with it).
        """
        weight = self.wte.weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        if half or torch.is_autocast_enabled(weight.device.type):
            weight = weight - weight.mean(0)
        return weight

    def states(self, tokens, at=None, segments=None):
        """Hidden states (B, T, C) or (N, C) that the head reads; arguments as of `forward`."""
        T, longest = tokens.shape[1], self.config.n_positions
        if segments is not None:
            visible = (segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])
            visible = visible.tril()  # (B, T, T)
            positions = (visible.sum(2) - 1) * (segments >= 0)  # a token's place in what it sees
            return self.trunk(tokens, positions, visible=visible[:, None], at=at)
        if longest < T:
            raise ValueError(f"{T} tokens exceed the model's {longest} positions")
        return self.trunk(tokens, torch.arange(T, device=tokens.device), at=at)

    def forward(self, tokens, at=None, segments=None):
        """Next-token logits, or scalars, of right-padded tokens (B, T) int64.

        Args:
            at: (B, T) bool; the head (and the last MLP) runs on these positions alone, row by row:
                over a vocabulary of 50,257 it costs as much memory as all the rest. What follows a
                row's last one is not computed, see `trunk`. None: everywhere.
            segments: (B, T), of rows with several responses to one prompt, from `pad_beside` in
                feedback.py.

        Returns:
            (B, T, V) when `at` is None, else (N, V), N = at.sum(); with a scalar head (B, T) or
            (N,). Column t has read tokens[:, :t + 1], with `segments` those of 0 and of its own:
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
    logits = at_least_float32(logits)
    if temperature != 1:  # dividing would hold a second (N, V) tensor
        logits = logits / temperature
    targets = tokens[mask.bool()]  # (N,)
    # Gather, then subtract: log_softmax would hold a second (N, V) tensor for the backward pass.
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)  # (N,)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask.bool(), logprobs)


def entropy(logits, temperature=1.0):
    """Entropy (N,) in nats of the softmax of each row of logits (N, V) / temperature."""
    logits = at_least_float32(logits)
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    # A token that was filtered out has log-probability -inf and adds 0, not 0 * -inf = NaN.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def last_tokens(mask):
    """(B, T) bool: the last token of each response in `mask`, EOS when it ended: where a reward
    model's score is. In rows from `pad` there is one a row, in those from feedback.pad_beside one
    for each response, in their order; so model(tokens, last_tokens(mask)) has a score for each,
    (N,). A response without a token has none.
    """
    return mask.bool() & ~predicts(mask)


# --- text to tokens -------------------------------------------------------------------------------


def load_tokenizer(name):
    """A `tiktoken.Encoding` with GPT-2's split pattern and <|endoftext|> as its only special token;
    what asks for more is refused.

    Args:
        name: "gpt2"; a FILE.tiktoken (one "base64 rank" a line); or a directory with a Hugging Face
            tokenizer.json or vocab.json, such as a run.

    Raises:
        ValueError or OSError, in one line, when there is no such vocabulary or it is damaged.
    """
    path = Path(name)
    if path.is_dir():
        try:
            return directory_tokenizer(path)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{path}: its tokenizer's files are damaged: {error}") from None
    if path.suffix == ".tiktoken":
        return tiktoken_file(path)
    if str(name) != "gpt2":
        raise ValueError(
            f"tokenizer {name}: expected gpt2, a .tiktoken file or a directory that holds one"
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises: no network, a refusal, a bad hash
        raise ValueError(
            "tokenizer gpt2: its vocabulary is not cached and could not be downloaded "
            f"({type(error).__name__}). Set TIKTOKEN_CACHE_DIR to a folder where tiktoken has "
            'cached it (once, with a network: TIKTOKEN_CACHE_DIR=DIR python -c "import tiktoken; '
            "tiktoken.get_encoding('gpt2')\"), or give a GPT-2 directory that has a tokenizer.json "
            "or a vocab.json"
        ) from None


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, {byte: character}: Hugging Face's files write
    tokens so. Printable Latin-1 stands for itself; the others are numbered from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}


def make_encoding(ranks, where, eos=None):
    """The Encoding of mergeable `ranks` {bytes: rank}; <|endoftext|> has the number `eos`, or takes
    the next one."""
    eos = len(ranks) if eos is None else eos
    if sorted([*ranks.values(), eos]) != list(range(len(ranks) + 1)):
        raise ValueError(
            f"{where}: its {len(ranks)} tokens and {END_OF_TEXT} ({eos}) are not numbered 0 to "
            f"{len(ranks)}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{where}: no token for byte {missing[0]}, so not every text has tokens")
    return tiktoken.Encoding(
        name=str(where),
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: eos},
    )


def tiktoken_file(path):
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}:{number}: expected a token in base64 and its rank") from None
    return make_encoding(ranks, path)


def directory_tokenizer(directory):
    tokenizer_json, vocab_json = directory / "tokenizer.json", directory / "vocab.json"
    if tokenizer_json.exists():
        contents = read_json(tokenizer_json)
        model = contents.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise ValueError(f"{tokenizer_json}: model: expected a byte-level BPE, as GPT-2's")
        vocab, merges, path = model.get("vocab"), model.get("merges"), tokenizer_json
        added = {one.get("content"): one.get("id") for one in contents.get("added_tokens") or ()}
        check_like_gpt2(path, contents)
    elif vocab_json.exists():
        vocab, merges, path, added = read_json(vocab_json), None, vocab_json, {}
        if (directory / "merges.txt").exists():
            lines = (directory / "merges.txt").read_text("utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise ValueError(f"{directory}: no tokenizer here (tokenizer.json or vocab.json)")
    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        raise ValueError(f"{path}: vocab: expected an object of token: number")
    if merges is not None:  # numbers stand for the order of merges here
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        longer = (rank for token, rank in vocab.items() if len(token) > 1 and token != END_OF_TEXT)
        if [vocab.get("".join(pair)) for pair in pairs] != sorted(longer):
            raise ValueError(f"{path}: tokens are not numbered in the order of their merges")
    for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            beside = read_json(directory / name)
            added |= beside if name == "added_tokens.json" else {}
            check_like_gpt2(directory / name, beside)
    for token in added:
        if token != END_OF_TEXT:
            raise ValueError(f"{path}: the added token {token!r} is not known here")
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    ranks, eos = {}, added.get(END_OF_TEXT, vocab.get(END_OF_TEXT))
    for token, rank in vocab.items():
        if token == END_OF_TEXT:
            continue
        if not all(character in to_byte for character in token):
            raise ValueError(f"{path}: {token!r} is not a token of a byte-level BPE, as GPT-2's")
        ranks[bytes(to_byte[character] for character in token)] = rank
    tokenizer, config = make_encoding(ranks, path, eos), {}
    if (directory / "config.json").exists():
        config = read_json(directory / "config.json")
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    # What no text can have is a number that another vocabulary's configuration left.
    if any(i is not None and i < tokenizer.n_vocab and i != tokenizer.eot_token for i in ends):
        raise ValueError(
            f"{directory / 'config.json'}: eos_token_id: {config['eos_token_id']} is not "
            f"{END_OF_TEXT}, which ends a response here, and is number {tokenizer.eot_token}"
        )
    return tokenizer


def check_like_gpt2(path, fields):
    """ValueError where a tokenizer's file asks for what is not GPT-2's, and would be ignored."""
    words, after, model = (
        x if isinstance(x := fields.get(name), dict) else {}
        for name in ("pre_tokenizer", "post_processor", "model")
    )
    eos = fields.get("eos_token") or END_OF_TEXT
    others = {
        "normalizer": fields.get("normalizer"),
        "pre_tokenizer": "pre_tokenizer" in fields and words.get("type") != "ByteLevel",
        "pre_tokenizer's use_regex false": words.get("use_regex") is False,
        "add_prefix_space": words.get("add_prefix_space") or fields.get("add_prefix_space"),
        # A template without special tokens adds nothing.
        "post_processor": after.get("special_tokens")
        or after.get("type", "ByteLevel") not in ("ByteLevel", "TemplateProcessing"),
        "add_bos_token": fields.get("add_bos_token"),
        "eos_token": (eos.get("content") if isinstance(eos, dict) else eos) != END_OF_TEXT,
        "added_tokens_decoder": any(
            one.get("content") != END_OF_TEXT
            for one in (fields.get("added_tokens_decoder") or {}).values()
        ),
    }
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    others |= {f"model.{name}": model.get(name) for name in names}
    for name, found in others.items():
        if found:
            raise ValueError(f"{path}: {name}: not GPT-2's, whose tokenizer alone is known here")


def bytes_of(tokenizer, token):
    """A token's bytes; U+FFFD's for one that the tokenizer does not have, as a model whose
    vocabulary is padded to a round size can sample."""
    if token >= tokenizer.n_vocab:
        return "\ufffd".encode()
    return tokenizer.decode_single_token_bytes(token)


def text_of(tokenizer, ids):
    """The text of token ids, whatever a model sampled."""
    return b"".join(bytes_of(tokenizer, token) for token in ids).decode("utf-8", "replace")


def check_tokenizer(tokenizer, directory, config):
    """ValueError unless the model in `directory`, with that config.json, can use the tokenizer."""
    known, found = config.get("tokenizer"), tokenizer_hash(tokenizer)
    if known not in (None, found):
        raise ValueError(
            f"{directory}: was trained with the tokenizer {known}, not with {tokenizer.name}, "
            f"which is {found}"
        )
    embeddings = config.get("vocab_size", GPTConfig.vocab_size)
    if embeddings < tokenizer.n_vocab:
        raise ValueError(
            f"{directory}: has {embeddings} embeddings, the tokenizer {tokenizer.name} "
            f"{tokenizer.n_vocab} tokens"
        )


def tokenizer_hash(tokenizer):
    """Twelve hex digits that two tokenizers share just when they number the same tokens alike."""
    digest = hashlib.sha256()
    for rank in range(tokenizer.n_vocab):
        token = tokenizer.decode_single_token_bytes(rank)
        digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()[:12]


def tokenizer_files(tokenizer):
    """{file name: contents}, so that `transformers.AutoTokenizer` opens the directory."""
    ranks = {
        tokenizer.decode_single_token_bytes(rank): rank
        for rank in range(tokenizer.n_vocab)
        if rank != tokenizer.eot_token
    }
    alphabet = byte_alphabet()

    def written(token):
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        # Merging with lower ranks only must leave two parts: the merge that made this token.
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = pairs.index(min(pairs))
            if pairs[first] >= rank:
                raise ValueError(f"token {token!r} can't be reached by merging two others")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([written(parts[0]), written(parts[1])])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"content": END_OF_TEXT, "lstrip": False, "rstrip": False, "single_word": False}
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [
            {"id": tokenizer.eot_token, "special": True, "normalized": False} | special
        ],
        "pre_tokenizer": byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {written(t): r for t, r in ranks.items()} | {END_OF_TEXT: tokenizer.eot_token},
            "merges": merges,
        },
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    return {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config}


def token_ids(tokenizer, text):
    """The token ids of a text. A run of a million spaces would overflow tiktoken's stack: such runs
    are taken in pieces."""
    most, cuts = 100_000, []
    for run in re.finditer(r"\s+", text) if len(text) > most else ():
        cuts += range(run.start() + most, run.end(), most)
    pieces = (text[begin:end] for begin, end in pairwise([0, *cuts, len(text)]))
    return [token for piece in pieces for token in tokenizer.encode_ordinary(piece)]


def encode(tokenizer, prompt, response, max_length, cut_response=False):
    """Token ids of a prompt and of its response with EOS, two lists, at most max_length together.

    The two are encoded apart: a merge across the border would change the prompt's tokens. An empty
    prompt becomes one EOS, since column 0 can't be predicted. `response` None is a prompt alone:
    the second list is empty. Too long, the prompt loses its start (its end is what is answered),
    down to one token; if that is not enough, the response loses its end, EOS included, when
    `cut_response`.

    Raises:
        ValueError: the response alone is too long, and `cut_response` is False.
    """
    prompt_ids = token_ids(tokenizer, prompt) or [tokenizer.eot_token]
    response_ids = []
    if response is not None:
        response_ids = [*token_ids(tokenizer, response), tokenizer.eot_token]
    if len(response_ids) > max_length - 1:
        if not cut_response:
            raise ValueError(
                f"a response of {len(response_ids)} tokens leaves no room in {max_length}"
            )
        response_ids = response_ids[: max_length - 1]
    return prompt_ids[-(max_length - len(response_ids)) :], response_ids


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


# --- sampling -------------------------------------------------------------------------------------


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row from softmax(logits / temperature), by inverting its distribution function.

    Args:
        logits: (B, V). uniform: (B,) in [0, 1), the only randomness: one number a row, where the
            Gumbel trick or multinomial draw one for each of the V tokens.
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
    cumulative = probabilities.cumsum(-1)
    # 1 - uniform is in (0, 1]: the first token whose cumulative probability reaches it has a
    # probability above 0, and there always is one.
    threshold = (1 - uniform)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold).squeeze(-1)


@torch.inference_mode()
def decode(
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
    """`generate`, one step at a time: yields the next token of every row, (B,), at most
    max_new_tokens times; `eos` again for rows that have ended. Stops when all have. In inference
    mode, which spares each operation's bookkeeping: 1.06 times the speed of 16 toy rows."""
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
    H, D = model.config.n_head, model.config.n_embd // model.config.n_head
    P = longest - 1  # the last token of a prompt is read by the first step, as a sampled one is

    # Keys and values of every layer and row. Prompts fill columns 0..P and later tokens columns P..
    # of every row alike, so that a step writes one slice; positions, not columns, say where a
    # token stands. Each prompt is read once, some 4,096 tokens at a time (which fit into a CPU's
    # caches: 1.4 times the speed), and its K samples get copies.
    columns = P + max_new_tokens
    caches = torch.empty(len(model.h), 2, N, K, H, columns, D, device=device, dtype=dtype)
    if P > 0:
        tokens = pad([prompt[:-1] for prompt in prompts], [[]] * N)[0].to(device)  # (N, P)
        size = max(4096 // P, 1)
        for i in range(0, N, size):
            model.read(tokens[i : i + size], caches[:, :, i : i + size, 0])
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

    head_weight = model.head_weight()
    rows = torch.arange(N * K, device=device)  # those still computed
    ended = torch.zeros(N * K, dtype=torch.bool, device=device)  # of those rows, whether done
    for step in range(max_new_tokens):
        hidden = model.trunk(next_tokens[:, None], positions[:, None], caches, P + step, visible)
        logits = F.linear(hidden[:, 0], head_weight)  # (rows, V)
        positions = positions + 1
        # Every row has its number at every step, so that retiring others changes no sample.
        source = generator.device if generator else device
        uniform = torch.rand(N * K, generator=generator, device=source).to(device)
        next_tokens = sample(logits, uniform[rows], temperature, top_k, top_p)
        if eos is None:
            yield next_tokens
            continue
        next_tokens = torch.where(ended, eos, next_tokens)
        ended = ended | (next_tokens == eos)
        yield torch.full((N * K,), eos, device=device).index_copy(0, rows, next_tokens)
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
        eos: the id that ends a response, and belongs to it; None: nothing does.
        generator: torch.Generator; the same one gives the same tokens.

    Returns:
        tokens (B, T) int64 and mask (B, T) bool, B = len(prompts) * K, a prompt's samples adjacent,
        padded on the right, T the longest row's length.

    Raises:
        ValueError: an empty prompt, or more positions than the model has.
    """
    steps = decode(
        model,
        prompts,
        max_new_tokens,
        num_samples=num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos=eos,
        generator=generator,
    )
    new = torch.stack(list(steps), 1)  # (B, n)
    B, n = new.shape
    device = new.device
    new_lengths = torch.full((B,), n, device=device)
    if eos is not None:
        is_eos = new == eos
        new_lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, new_lengths)
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device)
    begin = begin.repeat_interleave(num_samples)[:, None]  # (B, 1)
    end = begin + new_lengths[:, None]

    tokens = pad(prompts, [[]] * len(prompts))[0].to(device).repeat_interleave(num_samples, 0)
    tokens = F.pad(tokens, (0, n))
    tokens.scatter_(1, begin + torch.arange(n, device=device), new)
    columns = torch.arange(tokens.shape[1], device=device)
    tokens[columns >= end] = 0
    mask = (columns >= begin) & (columns < end)
    T = int(end.max())
    return tokens[:, :T], mask[:, :T]


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then makes it `path` at once: a reader, or a machine that
    dies half-way, sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors' files are their owner's
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: could not be written: {error}") from error
        raise


def check_space(path, tensors):
    """OSError, in one line, unless the disk that `path` is to be on has room for the tensors."""
    size = sum(x.numel() * x.element_size() for x in tensors)
    free = shutil.disk_usage(Path(path).parent).free
    if size > free:
        raise OSError(
            f"{path}: not written: {size / 2**30:.3f} GiB do not fit into the {free / 2**30:.3f} "
            f"GiB that are free"
        )


def finite(contents):
    """JSON values with null for what is no finite number: JSON has no NaN."""
    if isinstance(contents, dict):
        return {name: finite(x) for name, x in contents.items()}
    if isinstance(contents, list | tuple):
        return [finite(x) for x in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents


def write_json(path, contents):
    text = json.dumps(finite(contents), indent=2, ensure_ascii=False)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def read_json(path):
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        contents = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents


def save_model(directory, model, tokenizer, extra=None):
    """Writes config.json, model.safetensors and the tokenizer as Hugging Face's GPT2LMHeadModel, or
    with a scalar head GPT2ForSequenceClassification with one label, which gives our score on one
    unpadded sequence. `extra` (a dict) goes into config.json: `stage`, `reward_mean`, ..."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(tokenizer)
    config = model.config
    fields = dataclasses.asdict(config)
    dropout = fields.pop("dropout")
    fields |= {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "bos_token_id": tokenizer.eot_token,
        "eos_token_id": tokenizer.eot_token,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "tokenizer": tokenizer_hash(tokenizer),
    }
    if model.score is not None:
        fields["architectures"] = ["GPT2ForSequenceClassification"]
        fields |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Hugging Face's GPT-2 keeps linear weights as (in, out): its Conv1D.
        tensor = tensor.t() if is_transposed(name) else tensor
        name = name if name == "score.weight" else "transformer." + name
        tensors[name] = tensor.detach().float().cpu().contiguous()
    check_space(directory / "model.safetensors", tensors.values())
    with whole_file(directory / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name, contents in files.items():
        write_json(directory / name, contents)
    write_json(directory / "config.json", fields | (extra or {}))


def is_transposed(name):
    return name.startswith("h.") and name.endswith(
        (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    )


def load_config(directory):
    """config.json of a run or of a Hugging Face GPT-2 directory, as a dict.

    Raises ValueError or OSError, in one line, when it is not there or is not a GPT-2's.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a model directory: it has no config.json")
    fields = read_json(path)
    expected = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * fields["n_embd"] if type(fields.get("n_embd")) is int else None),
    }
    for name, allowed in expected.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"{path}: {name}: {fields[name]!r} is not GPT-2's ({allowed[0]!r})")
    return fields


def load_model(directory, device="cpu"):
    """The GPT of a run or a Hugging Face GPT-2 directory, in float32 and in eval mode.

    Takes GPT2LMHeadModel, GPT2Model and GPT2ForSequenceClassification of one label; one file or
    shards; names with or without `transformer.`; any floating type. It has a scalar head if the
    files do.

    Raises:
        ValueError or OSError, in one line: no such files, a weight missing, unknown or of another
        shape, a head that is not tied, weights that exist as a pickle only.
    """
    directory = Path(directory)
    fields = load_config(directory)
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    settings = {name: value for name, value in fields.items() if name in known}
    try:
        config = GPTConfig(**settings | {"dropout": fields.get("resid_pdrop", 0.0)})
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None

    tensors = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensors[name.removeprefix("transformer.")] = file.get_tensor(name)
        except Exception as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    tensors = {
        name: tensor.t() if is_transposed(name) else tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks of old versions
    }
    lm_head = tensors.pop("lm_head.weight", None)
    if lm_head is not None and not torch.equal(lm_head, tensors.get("wte.weight", lm_head)):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight; GPT-2 ties them")

    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # First what the sizes follow from: a wrong number would ask for a network of any size.
    shapes = {"wpe.weight": (config.n_positions, config.n_embd)}
    shapes["wte.weight"] = (config.vocab_size, config.n_embd)
    check_shapes(directory, {name: found[name] for name in shapes if name in found}, shapes)
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    if blocks != config.n_layer:
        raise ValueError(f"{directory}: has {blocks} blocks, config.json says {config.n_layer}")
    with torch.device("meta"):  # no time spent on initial weights that would be overwritten
        model = GPT(config, scalar_head="score.weight" in tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(directory, found, shapes)
    # Copies: safetensors maps the file, all of which would stay while one weight is a view of it.
    as_float32 = {"dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
    weights = {name: tensor.to(**as_float32) for name, tensor in tensors.items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{directory}: weight {name} holds numbers that are not finite")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_().to(device).eval()


def check_shapes(directory, found, expected):
    """ValueError unless these two {weight: shape} are the same."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{directory}: weight {name} is missing")
        if name not in expected:
            raise ValueError(f"{directory}: weight {name} is not GPT-2's")
        if found[name] != expected[name]:
            raise ValueError(
                f"{directory}: weight {name} has shape {found[name]}, "
                f"config.json says {expected[name]}"
            )


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
    room = model.config.n_positions - args.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in the model's "
            f"{model.config.n_positions} positions"
        )
    prompt_ids = encode(tokenizer, prompt, None, sys.maxsize)[0]
    if len(prompt_ids) > room:
        print(f"the prompt loses its first {len(prompt_ids) - room} tokens", file=sys.stderr)
        prompt_ids = prompt_ids[-room:]
    for k in range(args.num_samples):
        if args.num_samples > 1:
            print(f"[{k + 1}]", end="", flush=True)
        # A character may be split between tokens: print it when its last byte has come.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for next_tokens in decode(
            model,
            [prompt_ids],
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            generator=generator,
        ):
            token = int(next_tokens[0])
            if token == tokenizer.eot_token:
                break
            print(decoder.decode(bytes_of(tokenizer, token)), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Sample from a checkpoint.")
    parser.add_argument("run", help="a run directory or a Hugging Face GPT-2 directory")
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
