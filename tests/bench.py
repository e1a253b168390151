"""Measurements beside peers: the same weights, the same token ids, alternated in one process.

    make bench                                    # in an environment that has transformers

Each comparison has a gate: unless both sides give the same tokens, nothing is timed. Blocks run in
the order A B B A, so that a drift of the machine's speed falls on both; the figure is the median of
the pairs' ratios with a bootstrap 95% interval.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from model import GPT, GPTConfig, generate, make_encoding, save_model  # noqa: E402


def any_tokenizer():
    """Files need one, the timings do not: the weights are random, and what they say is noise."""
    return make_encoding({bytes([byte]): byte for byte in range(256)}, "bench")


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(ours, theirs, pairs, warm_ups=3):
    """Seconds of each side in `pairs` pairs of runs, alternated A B B A."""
    for _ in range(warm_ups):
        ours()
        theirs()
    times = ([], [])
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for side in order:
            times[side].append(seconds((ours, theirs)[side]))
    return times


def report(name, tokens, times):
    ratios = np.array(times[1]) / np.array(times[0])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    ours, theirs = (tokens / statistics.median(side) for side in times)
    print(
        f"{name}: {ours:,.0f} tokens/s, transformers {theirs:,.0f}; "
        f"ratio {np.median(ratios):.2f} [{low:.2f}, {high:.2f}] over {len(ratios)} pairs",
        flush=True,
    )


def bench_sampling(name, config, batch, prompt_length, new_tokens, pairs, ragged=False):
    """Sampled tokens a second, prefill included, at temperature 1 from the full softmax, no EOS."""
    torch.manual_seed(0)
    ours = GPT(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, ours, any_tokenizer())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.randint(0, config.vocab_size, (batch, prompt_length))
    lengths = [prompt_length - (i % (prompt_length // 2) if ragged else 0) for i in range(batch)]
    lists = [row[:n].tolist() for row, n in zip(prompts, lengths, strict=True)]
    inputs = torch.zeros_like(prompts)  # theirs are padded on the left
    for row, ids in zip(inputs, lists, strict=True):
        row[prompt_length - len(ids) :] = torch.tensor(ids)
    attention = torch.stack(
        [torch.arange(prompt_length) >= prompt_length - n for n in lengths]
    ).long()

    def their_generate(do_sample):
        return theirs.generate(
            inputs,
            attention_mask=attention,
            max_new_tokens=new_tokens,
            do_sample=do_sample,
            top_k=0,
            temperature=1.0 if do_sample else None,
            eos_token_id=None,
            pad_token_id=0,
        )

    tokens, mask = generate(ours, lists, new_tokens, temperature=0)
    greedy = their_generate(False)[:, prompt_length:]
    same = tokens[mask].view(batch, new_tokens) == greedy
    # Random weights leave near-ties, after which two rows go apart: nearly all rows must agree.
    if same.all(1).float().mean() < 0.98:
        sys.exit(
            f"{name}: greedy tokens differ in {(~same.all(1)).sum()} of {batch} rows: no timing"
        )
    generator = torch.Generator().manual_seed(1)
    times = compare(
        lambda: generate(ours, lists, new_tokens, generator=generator),
        lambda: their_generate(True),
        pairs,
    )
    report(name, batch * new_tokens, times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs at toy size (10)")
    parser.add_argument("--full", action="store_true", help="the 124M shape too (minutes)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, 2 threads, float32")
    toy_shape = GPTConfig(
        vocab_size=1024,
        n_positions=128,
        n_embd=128,
        n_layer=3,
        n_head=4,
        initializer_range=0.1,
    )
    bench_sampling("sampling, toy, 256 x (32 + 32)", toy_shape, 256, 32, 32, args.pairs)
    name = "sampling, toy, 256 x (17 to 32 + 32), ragged"
    bench_sampling(name, toy_shape, 256, 32, 32, args.pairs, ragged=True)
    bench_sampling("sampling, toy, 16 x (32 + 32)", toy_shape, 16, 32, 32, args.pairs)
    if args.full:
        bench_sampling("sampling, 124M, 16 x (32 + 32)", GPTConfig(), 16, 32, 32, 3)


if __name__ == "__main__":
    main()
