"""Measurements beside peers: the same weights, the same token ids, alternated in one process.

    make bench                                    # in an environment that has transformers

Each comparison has a gate: unless both sides give the same tokens, nothing is timed. Blocks run in
the order A B B A, so that a drift of the machine's speed falls on both; the figure is the median of
the pairs' ratios with a bootstrap 95% interval.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402
import trl  # noqa: E402
import trl.experimental.ppo as trl_ppo  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
from model import (  # noqa: E402
    GPT,
    GPTConfig,
    generate,
    load_model,
    load_tokenizer,
    make_encoding,
    pad,
    save_model,
    tiktoken_file,
)


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


def report(name, what, amount, times, peer="transformers"):
    """Amounts a second of both sides, and the median of their ratio with its 95% interval."""
    ratios = np.array(times[1]) / np.array(times[0])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    ours, theirs = (amount / statistics.median(side) for side in times)
    print(
        f"{name}: {ours:,.1f} {what} a second, {peer} {theirs:,.1f}; "
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
    report(name, "tokens", batch * new_tokens, times)


# --- PPO ------------------------------------------------------------------------------------------


def ppo_files(folder, config, prompts, tokenizer, prompt_length):
    """Prompts of up to prompt_length tokens, a policy that all but never ends a response, and a
    reward model; both sides start from these files. -> the prompts' token ids."""
    rng = np.random.default_rng(0)
    words = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab - 1)]
    words = [w for w in words if w[:1] == " " and w[1:].isalpha() and w.isascii()]
    ids, lines = [], []
    while len(ids) < prompts:
        text = "".join(rng.choice(words, int(rng.integers(prompt_length // 2, prompt_length + 1))))
        encoded = tokenizer.encode_ordinary(text)
        if len(encoded) <= prompt_length:
            lines.append({"prompt": text})
            ids.append(encoded)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    policy = GPT(config).eval()
    with torch.no_grad():
        eos = policy.wte.weight[tokenizer.eot_token]
        policy.ln_f.bias.copy_(-30 * eos / eos.square().sum())
    save_model(folder / "policy", policy, tokenizer, {})
    statistics_ = {"reward_mean": 0.0, "reward_std": 1.0, "score_transform": "identity"}
    save_model(folder / "reward", ppo.add_scalar_head(policy), tokenizer, statistics_)
    return ids


def our_ppo(folder, c, *more):
    """Seconds of each iteration of ppo.py, as it logs them; its run stays in folder/ours."""
    flags = ["--prompts", folder / "prompts.jsonl", "--validation", "", "--init", folder / "policy"]
    flags += ["--reward", folder / "reward", "--out_dir", folder / "ours", "--overwrite"]
    flags += ["--missing_eos_score", "none", "--save_every", 0, "--device", "cpu"]
    flags += ["--lr", 1e-4, "--value_lr", 1e-4, "--warmup", 0, "--final_lr", 1]
    flags += ["--adam_beta2", 0.999, "--adam_eps", 1e-8, "--clip_norm", 1e9]
    for name in ("batch_size", "minibatch_size", "update_epochs", "max_new_tokens", "steps"):
        flags += [f"--{name}", c[name]]
    stamps, real = [], ppo.prompts_of_step  # the first thing that an iteration does

    def stamped(*args):
        stamps.append(time.perf_counter())
        return real(*args)

    sys.argv = ["ppo.py", *map(str, flags), *more]
    ppo.prompts_of_step = stamped
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            ppo.main()
    finally:
        ppo.prompts_of_step = real
    return np.diff(stamps).tolist()


def their_ppo(folder, ids, c, micro_batch_size, accumulation):
    """Seconds of each iteration of TRL's PPOTrainer, and the trainer. Off: sample generation,
    reports, saves, gradient checkpointing, bf16. On: what it always computes and logs."""

    class Stamps(transformers.TrainerCallback):
        def __init__(self):
            self.at = []

        def on_step_end(self, *args, **kwargs):
            self.at.append(time.perf_counter())

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    heads = transformers.AutoModelForSequenceClassification
    value, reward = (heads.from_pretrained(folder / "reward", num_labels=1) for _ in "ab")
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in "ab"
    )
    for model in (value, reward, policy, reference):
        model.config.pad_token_id = tokenizer.pad_token_id
    args = trl_ppo.PPOConfig(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        num_sample_generations=0,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=c["batch_size"] // c["minibatch_size"],
        local_rollout_forward_batch_size=c["batch_size"],
        total_episodes=c["batch_size"] * c["steps"],
        response_length=c["max_new_tokens"],
        num_ppo_epochs=c["update_epochs"],
        temperature=1.0,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        vf_coef=1.0,
        kl_coef=ppo.Config.beta,
    )
    stamps = Stamps()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer = trl_ppo.PPOTrainer(
            args,
            tokenizer,
            policy,
            reference,
            reward,
            Dataset.from_list([{"input_ids": prompt} for prompt in ids]),
            value,
            eval_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in ids[:1]]),
            callbacks=[stamps],
        )
        began = time.perf_counter()
        trainer.train()
    return np.diff([began, *stamps.at]).tolist(), trainer


def ppo_gate(folder, ids, c):
    """One iteration with one update on the same written responses: scores, losses and the policy's
    new weights must agree, or nothing is timed."""
    c = c | {"batch_size": len(ids), "minibatch_size": len(ids), "update_epochs": 1, "steps": 1}
    length = c["max_new_tokens"]

    def canned(prompt):
        prompt = [int(i) for i in prompt]
        return np.random.default_rng(prompt).integers(0, max(prompt), length).tolist()

    def our_batch(sampler, lines, prompts, cfg, eos, seed, device):
        responses = [canned(prompt) for prompt in prompts]
        tokens, mask = pad(prompts, responses)
        lengths = [len(prompt) + length for prompt in prompts]
        batch = {"lines": lines, "tokens": tokens, "mask": mask, "lengths": lengths}
        ended = torch.ones(len(prompts), dtype=torch.bool)
        return batch | {"responses": responses, "ended": ended}

    trainer_module = sys.modules["trl.experimental.ppo.ppo_trainer"]

    def their_batch(model, queries, size, pad_id, config):
        responses = [canned(row[row != pad_id]) for row in queries]
        both = torch.cat([queries, torch.tensor(responses)], 1)
        logits = trainer_module.forward(model, both, pad_id).logits
        return both, logits[:, queries.shape[1] - 1 : -1]

    ours, theirs = ppo.sample_batch, trainer_module.batch_generation
    ppo.sample_batch, trainer_module.batch_generation = our_batch, their_batch
    try:
        our_ppo(folder, c)
        _, trainer = their_ppo(folder, ids, c, len(ids), 1)
    finally:
        ppo.sample_batch, trainer_module.batch_generation = ours, theirs
    logged = json.loads((folder / "ours/metrics.jsonl").read_text().splitlines()[0])
    found = trainer.state.log_history[0] if trainer.state.log_history else {}
    for our_name, their_name in (
        ("score", "objective/scores"),
        ("policy_loss", "loss/policy_avg"),
        ("value_loss", "loss/value_avg"),
    ):
        if not abs(logged[our_name] - found[their_name]) < 1e-4 * max(1, abs(found[their_name])):
            sys.exit(f"gate: {our_name} {logged[our_name]}, TRL's {found[their_name]}: no timing")
    their_weights = trainer.accelerator.unwrap_model(trainer.model).policy.state_dict()
    before = load_model(folder / "policy").state_dict()["wte.weight"]
    moved = load_model(folder / "ours").state_dict()["wte.weight"] - before
    gap = (their_weights["transformer.wte.weight"] - before - moved).norm() / moved.norm()
    # Adam's first step is lr times the gradient's sign: rounding shows where it is nearly 0.
    if not gap < 0.05:
        sys.exit(f"gate: the update differs by {gap:.3f} of its size: no timing")
    print(f"  gate: losses equal, updates {gap:.4f} apart")


def bench_ppo(name, config, tokenizer, prompt_length, c, pairs):
    """One iteration: rollout without end-of-text, scores, values, epochs of minibatches. Both sides
    do each block's first iteration untimed. TRL accumulates over the minibatches here, and so takes
    one optimiser step where ppo.py takes one a minibatch: the same forward and backward passes."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part, count in (("gate", min(16, c["batch_size"])), ("timing", c["batch_size"])):
            (folder / part).mkdir()
            ids = ppo_files(folder / part, config, count, tokenizer, prompt_length)
            if part == "gate":
                ppo_gate(folder / part, ids, c)
        folder = folder / "timing"
        accumulation = c["batch_size"] // c["minibatch_size"]
        times = ([], [])
        for i in range(pairs):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                if side == 0:
                    found = our_ppo(folder, c)
                else:
                    found = their_ppo(folder, ids, c, c["minibatch_size"], accumulation)[0]
                times[side].append(statistics.median(found[1:]))
    report(name, "episodes", c["batch_size"], times, "TRL")


# --- DPO ------------------------------------------------------------------------------------------


def our_dpo(folder, steps):
    """Seconds of each step of dpo.py on the same batch, and of caching the reference's."""
    flags = ["--data", folder / "pairs.jsonl", "--validation", "", "--prompts", "", "--cache", ""]
    flags += ["--init", folder / "policy", "--out_dir", folder / "ours", "--overwrite"]
    flags += ["--batch_size", 10**6, "--steps", steps, "--save_every", 0, "--device", "cpu"]
    flags += ["--lr", 1e-4, "--warmup", 0, "--final_lr", 1, "--adam_beta2", 0.999]
    flags += ["--log_every", 1]  # as theirs computes its metrics at every step
    stamps, caching = [], []
    real, compute = dpo.learning_rate, dpo.logprobs_of_rows

    def stamped(*args):
        stamps.append(time.perf_counter())
        return real(*args)

    def timed(*args):
        began = time.perf_counter()
        found = compute(*args)
        caching.append(time.perf_counter() - began)
        return found

    sys.argv = ["dpo.py", *map(str, flags)]
    dpo.learning_rate, dpo.logprobs_of_rows = stamped, timed
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            dpo.main()
    finally:
        dpo.learning_rate, dpo.logprobs_of_rows = real, compute
    return np.diff(stamps).tolist(), caching[0]


def their_dpo(folder, steps):
    """Seconds of each step of TRL's DPOTrainer, with its reference model in each, and the trainer.
    Off: reports, saves, gradient checkpointing, bf16. On: the metrics that it always computes."""

    class Stamps(transformers.TrainerCallback):
        def __init__(self):
            self.at = []

        def on_step_end(self, *args, **kwargs):
            self.at.append(time.perf_counter())

    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lines = [{name: line[name] for name in ("prompt", "chosen", "rejected")} for line in lines]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in "ab"
    )
    args = trl.DPOConfig(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        per_device_train_batch_size=len(lines),
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=None,
    )
    stamps = Stamps()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer = trl.DPOTrainer(
            policy,
            reference,
            args,
            train_dataset=Dataset.from_list(lines),
            processing_class=tokenizer,
            callbacks=[stamps],
        )
        trainer.train()
    return np.diff(stamps.at).tolist(), trainer


def bench_dpo(name, config, tokenizer, lines, pairs):
    """A step on a batch of pairs, the same in every step. Gate: the first step's update."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        save_model(folder / "policy", GPT(config), tokenizer, {})
        (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        our_dpo(folder, 1)
        _, trainer = their_dpo(folder, 1)
        before = load_model(folder / "policy").state_dict()["wte.weight"]
        moved = load_model(folder / "ours").state_dict()["wte.weight"] - before
        theirs = trainer.model.state_dict()["transformer.wte.weight"]
        gap = (theirs - before - moved).norm() / moved.norm()
        # Adam's first step is lr times the gradient's sign: rounding shows where it is nearly 0.
        if not gap < 0.05:
            sys.exit(f"gate: the update differs by {gap:.3f} of its size: no timing")
        print(f"  gate: updates {gap:.4f} apart")
        times, caching = ([], []), []
        for i in range(pairs):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                if side == 0:
                    found, cached = our_dpo(folder, 6)
                    caching.append(cached)
                else:
                    found = their_dpo(folder, 6)[0]
                times[side].append(statistics.median(found[1:]))
    report(name, "pairs", len(lines), times, "TRL")
    print(f"  caching the reference's log-probabilities, once: {statistics.median(caching):.3f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs at toy size (10)")
    parser.add_argument("--full", action="store_true", help="the 124M shape too (minutes)")
    parser.add_argument("--only", default="", help="sampling, ppo or dpo (all)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"TRL {trl.__version__}, 2 threads, float32"
    )
    toy_shape = GPTConfig(
        vocab_size=1024,
        n_positions=128,
        n_embd=128,
        n_layer=3,
        n_head=4,
        initializer_range=0.1,
    )
    if args.only in ("", "sampling"):
        bench_sampling("sampling, toy, 256 x (32 + 32)", toy_shape, 256, 32, 32, args.pairs)
        name = "sampling, toy, 256 x (17 to 32 + 32), ragged"
        bench_sampling(name, toy_shape, 256, 32, 32, args.pairs, ragged=True)
        bench_sampling("sampling, toy, 16 x (32 + 32)", toy_shape, 16, 32, 32, args.pairs)
        if args.full:
            bench_sampling("sampling, 124M, 16 x (32 + 32)", GPTConfig(), 16, 32, 32, 3)
    vocabulary = ROOT / "data/toy/bpe.tiktoken"
    if not vocabulary.exists():
        sys.exit(f"{vocabulary}: not there; python data/toy.py writes it")
    if args.only in ("", "ppo"):
        c = {"batch_size": 128, "minibatch_size": 32, "update_epochs": 2, "max_new_tokens": 32}
        c["steps"] = 4  # of which the first is not timed
        name = "PPO iteration, toy, 128 x (16 to 32 + 32), 2 epochs of 4 minibatches"
        bench_ppo(name, toy_shape, tiktoken_file(vocabulary), 32, c, args.pairs)
        if args.full:
            c |= {"batch_size": 8, "minibatch_size": 4, "steps": 3}
            name = "PPO iteration, 124M, 8 x (16 to 32 + 32), 2 epochs of 2 minibatches"
            bench_ppo(name, GPTConfig(), load_tokenizer("gpt2"), 32, c, 3)
    if args.only in ("", "dpo"):
        lines = (ROOT / "data/toy/comparisons.jsonl").read_text().splitlines()[:32]
        lines = [json.loads(line) for line in lines]
        toy = tiktoken_file(vocabulary)
        bench_dpo("DPO step, toy, 32 pairs, ragged", toy_shape, toy, lines, args.pairs)
        if args.full:
            gpt2 = load_tokenizer("gpt2")
            bench_dpo("DPO step, 124M, 8 pairs, ragged", GPTConfig(), gpt2, lines[:8], 3)


if __name__ == "__main__":
    main()
