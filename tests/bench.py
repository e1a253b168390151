"""Measurements beside peers and against the machine's floor.

    make bench                    # everything that takes less than some minutes a line
    make bench BENCH=--full       # the 124M shape too
    python tests/bench.py --gpu   # on a GPU: GPT-2's shape, without peers

Both sides start from the same files, on the same lines, and take the same batches with dropout
off, each by its own script. Each comparison has a gate: losses equal to 1e-5, parameters after a
step to 1e-4 and the step to a twentieth of its length, or the same greedy tokens; PPO's scores and
losses to 1e-4, its update to a twentieth; else nothing is timed. Blocks run in the order A B B A,
so that a drift of the machine's speed falls on both; within a block the first step is not timed.
The figure is the median of the pairs' ratios with a bootstrap 95% interval. The floor of a piece
of work is its FLOPs over the matrix rate that this machine showed, or its bytes over the rate of
copies, whichever is more.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import feedback  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from model import GPT, GPTConfig, add_adapters, generate, load_model, save_model, theirs  # noqa: E402
from tokens import END_OF_TEXT, Tokenizer, tiktoken_file  # noqa: E402

TOY = GPTConfig(
    vocab_size=1024, n_positions=128, n_embd=128, n_layer=3, n_head=4, initializer_range=0.1
)
SMOLLM2 = GPTConfig(  # SmolLM2-135M's shape, but for its vocabulary of 49,152
    model_type="llama", n_positions=8192, n_embd=576, n_layer=30, n_head=9, n_kv_head=3,
    n_inner=1536, rope={"rope_type": "default", "rope_theta": 100000.0},
)  # fmt: skip
MODULES = {"sft": sft, "reward": reward, "dpo": dpo}
# {work: the least ratio to the peer that we want}
TARGETS = {
    "SFT step, toy, 32 lines as": 2.5,
    "reward step, toy, 32 lines as": 3.0,
    "DPO step, toy, 32 lines as": 4.0,
    "SFT step, toy": 1.6,
    "reward step, toy": 1.8,
    "DPO step, toy": 2.8,
    "SFT step, 124M": 1.15,
    "reward step, 124M": 1.15,
    "DPO step, 124M": 1.15,
    "PPO iteration, toy": 3.0,
    "PPO iteration, 124M": 1.5,
    "sampling, toy, 256": 3.0,
    "sampling, toy, 16": 3.0,
    "sampling, 124M": 1.7,
    "SFT step, SmolLM2": 1.15,
    "sampling, SmolLM2": 1.5,
}
# Lengths in GPT-2's tokens, deciles from 5% to 95%, of 1,000 comparisons of HH-RLHF (harmless).
HH_PROMPTS = (16, 20, 28, 58, 80, 106, 134, 168, 225, 349)
HH_RESPONSES = (6, 11, 16, 22, 28, 38, 48, 61, 83, 135)


def any_tokenizer():
    """Files need one, the timings do not: the weights are random, and what they say is noise."""
    return Tokenizer("bench", {bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})


def quietly(function, *args):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return function(*args)


# --- measuring ------------------------------------------------------------------------------------


def seconds(function):
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Machine:
    """What it can do at best: FLOP/s of a square product, bytes/s read and written."""

    def __init__(self, device="cpu", dtype=torch.float32, full=False):
        n, size = (8192, 2**30) if full else (1536, 2**29)
        a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in "abc")
        source, sink = (torch.empty(size // 4, device=device) for _ in "ab")
        source.fill_(1)
        times = [seconds(lambda: torch.mm(a, b, out=c)) for _ in range(12)]
        copies = [seconds(lambda: sink.copy_(source)) for _ in range(12)]
        self.flops = 2 * n**3 / min(times)
        self.bytes = 2 * size / min(copies)

    def floor(self, flops, n_bytes=0):
        """Seconds."""
        return max(flops / self.flops, n_bytes / self.bytes)


def weights_of(config):
    """Entries of the matrices of all blocks; what a token is multiplied by, but for the head."""
    heads = 2 * config.n_head + 2 * config.n_kv_head
    mlp = (2 if config.is_gpt2 else 3) * config.n_inner
    return config.n_layer * config.n_embd * (heads * config.head_dim + mlp)


def forward_flops(config, lengths, outputs):
    """FLOPs of a forward pass over rows of these lengths, pads left out, causal attention counted
    as half a square; `outputs` positions go through the head of a language model."""
    width = config.n_head * config.head_dim
    attention = 2 * config.n_layer * width * sum(n * n for n in lengths)
    head = 2 * config.vocab_size * config.n_embd * outputs
    return 2 * weights_of(config) * sum(lengths) + attention + head


def sampling_floor(machine, config, prompts, samples, new_tokens, width=4):
    """Seconds: prompts read once, then steps that read all weights and the caches so far."""
    rows, total = len(prompts) * samples, machine.floor(forward_flops(config, prompts, 0))
    weights = weights_of(config) + config.vocab_size * config.n_embd
    for step in range(new_tokens):
        columns = samples * sum(prompts) + rows * step
        flops = 2 * weights * rows
        flops += 4 * config.n_layer * config.n_head * config.head_dim * columns
        cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * columns
        total += machine.floor(flops, width * (weights + cache))
    return total


def compare(ours, theirs, pairs, warm_ups=3):
    """Seconds of each side in `pairs` pairs of runs, alternated A B B A."""
    for _ in range(warm_ups):
        ours()
        theirs()
    times = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            times[side].append(seconds((ours, theirs)[side]))
    return times


def report(name, amounts, times, peer, floor=None):
    """Amounts ({unit: how many}) a second of both sides, the median of the ratios of times with its
    95% interval, and what our time is of the floor."""
    ratios = np.array(times[1]) / np.array(times[0])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    ours, theirs = (statistics.median(side) for side in times)
    speeds = ", ".join(
        f"{amount / ours:,.0f} {unit} a second ({amount / theirs:,.0f})"
        for unit, amount in amounts.items()
    )
    target = next((TARGETS[key] for key in TARGETS if name.startswith(key)), None)
    ratio = np.median(ratios)
    verdict = ""
    if target:
        verdict = f"; target {target:g}: {'met' if ratio >= target else 'NOT met'}"
    above = f"; {ours / floor:.1f} x the floor" if floor else ""
    print(
        f"{name}: {ours * 1e3:,.1f} ms, {peer} {theirs * 1e3:,.1f}; ratio {ratio:.2f} [{low:.2f}, "
        f"{high:.2f}] over {len(ratios)} pairs{verdict}{above}; {speeds}",
        flush=True,
    )


# --- one optimiser step of sft.py, reward.py, dpo.py ----------------------------------------------


def plain_words(tokenizer):
    """Words with a space before them that are one token each, alone and in a row."""
    words = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab - 1)]
    words = [w for w in words if w[:1] == " " and w[1:].isalpha() and w.isascii()]
    return [w for w in words if len(tokenizer.encode_ordinary(w)) == 1]


def lines_of(tokenizer, lengths, responses=2):
    """Lines of random words: `lengths` are (prompt, first response, second, ...), in tokens, the
    end of text counted."""
    rng, words, lines = np.random.default_rng(0), plain_words(tokenizer), []
    for prompt, *rest in lengths:
        texts = ["".join(rng.choice(words, n)) for n in (prompt, *(n - 1 for n in rest))]
        line = {"prompt": texts[0], "response": texts[1], "responses": texts[1 : responses + 1]}
        line |= {
            "chosen": texts[1],
            "rejected": texts[-1],
            "scores": [float(-i) for i in range(responses)],
        }
        lines.append(line)
    return lines


def as_in_hh(count, longest):
    """(prompt, chosen, rejected) lengths, cut to `longest` together."""
    rng = np.random.default_rng(1)
    drawn = [
        (rng.choice(HH_PROMPTS), rng.choice(HH_RESPONSES), rng.choice(HH_RESPONSES))
        for _ in range(count)
    ]
    return [(min(int(p), longest - max(a, b)), int(a), int(b)) for p, a, b in drawn]


def step_files(kind, folder, config, tokenizer, lines):
    """What both sides start from."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = GPT(config)
    if kind == "reward":
        model = feedback.add_scalar_head(model.eval())
    save_model(folder / "model", model, tokenizer, {})
    names = {
        "sft": ("prompt", "response"),
        "reward": ("prompt", "responses", "scores"),
        "dpo": ("prompt", "chosen", "rejected"),
    }[kind]
    text = "".join(json.dumps({name: line[name] for name in names}) + "\n" for line in lines)
    (folder / "lines.jsonl").write_text(text)


def our_step(kind, folder, steps, *more):
    """-> seconds of each step of our script, all lines in each, and of what DPO does first: the
    reference's log-probabilities, once."""
    module, stamps, caching = MODULES[kind], [], []
    flags = ["--data", folder / "lines.jsonl", "--validation", "", "--init", folder / "model"]
    flags += ["--out_dir", folder / "ours", "--overwrite", "--batch_size", 10**6, "--steps", steps]
    flags += ["--save_every", 0, "--lr", 5e-5, "--warmup", 0, "--final_lr", 1]
    flags += ["--adam_beta2", 0.999, "--clip_norm", 1]
    flags += ["--log_every", 1]  # as theirs computes its metrics at every step
    flags += {"sft": ["--prompts", ""], "dpo": ["--prompts", "", "--cache", "", "--beta", 0.1]}.get(
        kind, ["--normalise_with", "none"]
    )
    real = module.schedule

    def stamped(step, *args):
        if len(stamps) == step:  # perhaps asked for each group of parameters
            stamps.append(time.perf_counter())
        return real(step, *args)

    module.schedule = stamped
    if kind == "dpo":
        compute = dpo.logprobs_of_rows

        def timed(*args):
            began = time.perf_counter()
            found = compute(*args)
            caching.append(time.perf_counter() - began)
            return found

        dpo.logprobs_of_rows = timed
    sys.argv = [f"{kind}.py", *map(str, flags), *map(str, more)]
    if "--device" not in sys.argv:
        sys.argv += ["--device", "cpu"]
    try:
        quietly(module.main)
    finally:
        module.schedule = real
        if kind == "dpo":
            dpo.logprobs_of_rows = compute
    return np.diff(stamps).tolist(), sum(caching)


def their_step(kind, folder, steps, loss="chunked_nll", micro=0):
    """-> seconds of each step of TRL's trainer, and the trainer. Off: reports, saves, gradient
    checkpointing, bfloat16, dropout. On: the metrics that it always computes; DPO's reference in
    every step, as is its default (ours is read once, before the steps, and reported apart).
    `micro`: lines of a micro-batch, 0 for all."""
    import transformers
    import trl
    from datasets import Dataset

    class Stamps(transformers.TrainerCallback):
        def __init__(self):
            self.at = []

        def on_step_end(self, *args, **kwargs):
            self.at.append(time.perf_counter())

    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    if kind == "sft":
        lines = [{"prompt": line["prompt"], "completion": line["response"]} for line in lines]
    if kind == "reward":
        pairs = [(line["prompt"], *line["responses"]) for line in lines]
        lines = [{"chosen": p + a, "rejected": p + b} for p, a, b in pairs]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    # TRL's reward model reads the last token that is no pad: the end of text must not be one.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    heads = transformers.AutoModelForSequenceClassification
    if kind == "reward":
        model = heads.from_pretrained(folder / "model", num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer, settings, more, models = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {"max_length": None, "loss_type": loss}, []),
        "reward": (trl.RewardTrainer, trl.RewardConfig, {"max_length": None}, []),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"max_length": None, "beta": 0.1}, [model]),
    }[kind]
    if models:
        models = [transformers.AutoModelForCausalLM.from_pretrained(folder / "model")]
    args = settings(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        per_device_train_batch_size=micro or len(lines),
        gradient_accumulation_steps=len(lines) // (micro or len(lines)),
        max_steps=steps,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        **more,
    )
    stamps = Stamps()

    def train():
        made = trainer(
            model,
            *models,
            args=args,
            train_dataset=Dataset.from_list(lines),
            processing_class=tokenizer,
            callbacks=[stamps],
        )
        made.train()
        return made

    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        made = quietly(train)
    return np.diff(stamps.at).tolist(), made


def step_gate(kind, folder, name, micro):
    """The first loss to 1e-5, the parameters after the step to 1e-4; and, as a step is no longer
    than that, the step itself to a twentieth of its length (Adam's first is the learning rate times
    the gradient's sign, in which rounding shows where a gradient is nearly 0)."""
    our_step(kind, folder, 1, "--micro_batch_size", micro)
    _, trainer = their_step(kind, folder, 1)
    record = json.loads((folder / "ours/metrics.jsonl").read_text().splitlines()[0])
    their_loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    first = load_model(folder / "model")
    before, after = first.state_dict(), load_model(folder / "ours").state_dict()
    trained = {
        name.removeprefix("transformer.").removeprefix("model."): tensor
        for name, tensor in trainer.model.state_dict().items()
    }
    gaps, moves, largest = [], [], 0.0
    for key, ours in after.items():
        for name, part in theirs(key, ours, first.config).items():
            gaps.append((trained[name] - part).norm())
            largest = max(largest, (trained[name] - part).abs().max().item())
        moves.append((ours - before[key]).norm())
    apart = (torch.stack(gaps).norm() / torch.stack(moves).norm()).item()
    gap = abs(record["loss"] - their_loss)
    if not (gap < 1e-5 * max(1, their_loss) and apart < 0.05 and largest <= 1e-4):
        sys.exit(f"{name}: losses {gap:.1e} apart, steps {apart:.3f}, parameters {largest:.1e}")
    return f"  gate: losses {gap:.0e} apart, steps {apart:.4f} of their length"


def step_floor(kind, machine, config, lengths):
    """Three forward passes' FLOPs, a backward being two, each prompt read once; Adam's bytes. DPO's
    reference is counted apart."""
    flops = 0
    for prompt, *responses in lengths:
        responses = responses[: 1 if kind == "sft" else None]
        outputs = 0 if kind == "reward" else sum(responses)
        flops += forward_flops(config, [prompt], outputs)
        for response in responses:  # causal attention over the prompt and itself
            whole = forward_flops(config, [prompt + response], 0)
            flops += whole - forward_flops(config, [prompt], 0)
    parameters = weights_of(config) + config.vocab_size * config.n_embd
    adam = machine.floor(0, 4 * 7 * parameters)  # reads 4 and writes 3 numbers a parameter
    return machine.floor(3 * flops) + adam


def bench_step(kind, shape, config, tokenizer, lengths, pairs, machine, micro=0, memory=False):
    """A step on the same lines each time, in micro-batches of `micro` lines (0: all at once); TRL's
    in such ones or at once, with SFT's loss in either of its forms, as is fastest."""
    name = {"sft": "SFT step", "reward": "reward step", "dpo": "DPO step"}[kind] + f", {shape}"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        step_files(kind, folder, config, tokenizer, lines_of(tokenizer, lengths))
        gate = step_gate(kind, folder, name, micro)
        # Memory is of the thrifty form of SFT's loss, their default.
        losses = ("nll", "chunked_nll") if kind == "sft" else ("",)
        ways = itertools.product(losses, sorted({0, micro}))
        way = min(ways, key=lambda way: np.median(their_step(kind, folder, 6, *way)[0][1:]))
        times, caching = ([], []), []
        for i in range(pairs):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                if side == 0:
                    found, cached = our_step(kind, folder, 6, "--micro_batch_size", micro)
                    caching.append(cached)
                else:
                    found = their_step(kind, folder, 6, *way)[0]
                times[side].append(statistics.median(found[1:]))
        prompts = sum(p for p, *_ in lengths)
        responses = sum(sum(rest[: 1 if kind == "sft" else None]) for _, *rest in lengths)
        amounts = {"prompt tokens": prompts, "response tokens": responses}
        floor = step_floor(kind, machine, config, lengths)
        report(name, amounts, times, "TRL", floor)
        size = f"lines a forward: {micro or 'all'}, TRL {way[1] or 'all'}"
        print(f"{gate}; {size}" + f"; TRL's loss: {way[0]}" * (kind == "sft"))
        if kind == "dpo":
            print(f"  the reference's log-probabilities, once: {statistics.median(caching):.3f} s")
        if memory:
            peaks = [peak_of(kind, side, folder) for side in ("ours", "theirs")]
            print("  memory above that of the imports: {:,.0f} MiB, TRL {:,.0f}".format(*peaks))


def peak_of(kind, side, folder, *more):
    """MiB that three steps add to the peak of a process of their own; `more`: our flags."""
    command = [sys.executable, __file__, "--peak", kind, side, str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(done.stdout.split("peak ")[1])


def bench_memory(config, tokenizer, lengths):
    """Peak memory of three SFT steps: all weights, activations computed anew, adapters."""
    ways = {"all weights": (), "activations anew": ("--checkpoint_activations",)}
    ways |= {"adapters of rank 16": ("--lora_rank", "16")}
    ways["both"] = ways["activations anew"] + ways["adapters of rank 16"]
    with tempfile.TemporaryDirectory() as folder:
        step_files("sft", Path(folder), config, tokenizer, lines_of(tokenizer, lengths))
        for way, flags in ways.items():
            peak = peak_of("sft", "ours", folder, *flags)
            print(f"  memory above that of the imports, {way}: {peak:,.0f} MiB", flush=True)


def print_peak(kind, side, folder, *more):
    """In a process of its own: that of `peak_of`."""
    if side == "theirs":  # what importing costs is no step's memory
        import transformers
        import trl
        from datasets import Dataset  # noqa: F401

        for names in ("SFT", "Reward", "DPO"):
            getattr(trl, f"{names}Trainer"), getattr(trl, f"{names}Config")
        _ = transformers.GPT2LMHeadModel, transformers.GPT2ForSequenceClassification

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # a child's peak begins as its parent's
    before = resident("VmRSS")
    if kind == "ppo":
        c = {"batch_size": 4, "minibatch_size": 4, "update_epochs": 1, "max_new_tokens": 4}
        our_ppo(Path(folder), c | {"steps": 2}, *more)
    else:
        (our_step if side == "ours" else their_step)(kind, Path(folder), 3, *more)
    print(f"peak {resident('VmHWM') - before}")


# --- sampling -------------------------------------------------------------------------------------


def bench_sampling(name, config, batch, prompt_length, new_tokens, pairs, machine, ragged=False):
    """Sampled tokens a second, prefill included, at temperature 1 from the full softmax, no EOS."""
    import transformers

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

    drawn = torch.tensor(generate(ours, lists, new_tokens, temperature=0))
    greedy = their_generate(False)[:, prompt_length:]
    same = drawn == greedy
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
    floor = sampling_floor(machine, config, lengths, 1, new_tokens)
    report(name, {"tokens": batch * new_tokens}, times, "transformers", floor)


# --- PPO ------------------------------------------------------------------------------------------


def ppo_files(folder, config, prompts, tokenizer, prompt_length, ragged=True):
    """Prompts of up to prompt_length tokens, a policy that all but never ends a response, and a
    reward model; both sides start from these files. -> the prompts' token ids."""
    rng = np.random.default_rng(0)
    shortest = prompt_length // 2 if ragged else prompt_length
    lengths = rng.integers(shortest, prompt_length + 1, prompts)
    lines = lines_of(tokenizer, [(int(n), 1) for n in lengths])
    lines = [{"prompt": line["prompt"]} for line in lines]
    ids = [tokenizer.encode_ordinary(line["prompt"]) for line in lines]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    policy = GPT(config).eval()
    with torch.no_grad():
        eos = policy.wte.weight[tokenizer.eot_token]
        if getattr(policy.ln_f, "bias", None) is not None:
            policy.ln_f.bias.copy_(-30 * eos / eos.square().sum())
    save_model(folder / "policy", policy, tokenizer, {})
    statistics_ = {"reward_mean": 0.0, "reward_std": 1.0, "score_transform": "identity"}
    save_model(folder / "reward", feedback.add_scalar_head(policy), tokenizer, statistics_)
    return ids


def our_ppo(folder, c, *more):
    """Seconds of each iteration of ppo.py, as it logs them; its run stays in folder/ours."""
    flags = ["--prompts", folder / "prompts.jsonl", "--validation", "", "--init", folder / "policy"]
    flags += ["--reward", folder / "reward", "--out_dir", folder / "ours", "--overwrite"]
    flags += ["--missing_eos_score", "none", "--save_every", 0]
    flags += ["--lr", 1e-4, "--value_lr", 1e-4, "--warmup", 0, "--final_lr", 1]
    flags += ["--adam_beta2", 0.999, "--adam_eps", 1e-8, "--clip_norm", 1e9]
    for name in ("batch_size", "minibatch_size", "update_epochs", "max_new_tokens", "steps"):
        flags += [f"--{name}", c[name]]
    stamps, real = [], ppo.sample_step  # the first thing that an iteration does

    def stamped(*args):
        stamps.append(time.perf_counter())
        return real(*args)

    sys.argv = ["ppo.py", *map(str, flags), *map(str, more)]
    if "--device" not in sys.argv:
        sys.argv += ["--device", "cpu"]
    ppo.sample_step = stamped
    try:
        quietly(ppo.main)
    finally:
        ppo.sample_step = real
    return np.diff(stamps).tolist()


def their_ppo(folder, ids, c):
    """Seconds of each iteration of TRL's PPOTrainer, and the trainer. Off: sample generation,
    reports, saves, gradient checkpointing, bf16. On: what it always computes and logs."""
    import transformers
    import trl.experimental.ppo as trl_ppo
    from datasets import Dataset

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
        per_device_train_batch_size=c["batch_size"],
        gradient_accumulation_steps=1,
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

    def our_batch(sampler, prompts, tokenizer, cfg, temperature, generator):
        responses = [canned(prompt) for _, prompt in prompts]
        return feedback.rollout_of(prompts, responses, tokenizer, sampler.wte.weight.device)

    import trl.experimental.ppo  # noqa: F401

    trainer_module = sys.modules["trl.experimental.ppo.ppo_trainer"]

    def their_batch(model, queries, size, pad_id, config):
        responses = [canned(row[row != pad_id]) for row in queries]
        both = torch.cat([queries, torch.tensor(responses)], 1)
        logits = trainer_module.forward(model, both, pad_id).logits
        return both, logits[:, queries.shape[1] - 1 : -1]

    ours, theirs = feedback.sample_rollout, trainer_module.batch_generation
    feedback.sample_rollout, trainer_module.batch_generation = our_batch, their_batch
    try:
        our_ppo(folder, c)
        _, trainer = their_ppo(folder, ids, c)
    finally:
        feedback.sample_rollout, trainer_module.batch_generation = ours, theirs
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
    return f"  gate: scores and losses equal to 1e-4, updates {gap:.4f} of their length apart"


def ppo_floor(machine, config, prompts, c, width=4):
    """Seconds of one iteration: sampling; a forward of policy, reference, value network and reward
    model; epochs of forward and backward of policy and value network, and their updates."""
    new = c["max_new_tokens"]
    rows, outputs = [p + new for p in prompts], new * len(prompts)
    policy = machine.floor(forward_flops(config, rows, outputs))
    trunk = machine.floor(forward_flops(config, rows, 0))
    updates = c["update_epochs"] * c["batch_size"] // c["minibatch_size"]
    parameters = 2 * (weights_of(config) + config.vocab_size * config.n_embd)
    adam = updates * machine.floor(0, 4 * 7 * parameters)
    sampled = sampling_floor(machine, config, prompts, 1, new, width)
    return sampled + (2 + 3 * c["update_epochs"]) * (policy + trunk) + adam


def bench_ppo(name, config, tokenizer, prompt_length, c, pairs, machine):
    """One iteration: rollout without end-of-text, scores, values, epochs of minibatches. Both sides
    do each block's first iteration untimed. The same forward and backward passes and, with all of a
    batch as TRL's micro-batch, an optimiser step for each minibatch on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part, count in (("gate", min(16, c["batch_size"])), ("timing", c["batch_size"])):
            (folder / part).mkdir()
            ids = ppo_files(folder / part, config, count, tokenizer, prompt_length)
            if part == "gate":
                gate = ppo_gate(folder / part, ids, c)
        folder = folder / "timing"
        times = ([], [])
        for i in range(pairs):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                if side == 0:
                    found = our_ppo(folder, c)
                else:
                    found = their_ppo(folder, ids, c)[0]
                times[side].append(statistics.median(found[1:]))
    prompts = [len(prompt) for prompt in ids]
    amounts = {"prompt tokens": sum(prompts), "response tokens": len(ids) * c["max_new_tokens"]}
    report(name, amounts, times, "TRL", ppo_floor(machine, config, prompts, c))
    print(gate)


# --- how cost grows -------------------------------------------------------------------------------


def exponent(sizes, times):
    """The slope of log time over log size, by least squares, and its standard error."""
    x, y = np.log(sizes), np.log(times)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    residual = y - y.mean() - slope * (x - x.mean())
    error = np.sqrt(residual @ residual / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return slope, error


def bench_growth(tokenizer):
    """One thing grows at a time, the rest is as it is: fitted exponents of time, and of the memory
    that a process adds."""

    def step(kind, lengths, **sizes):
        config = GPTConfig(**{**vars(TOY), "n_positions": 1024, **sizes})
        responses = len(lengths[0]) - 1
        with tempfile.TemporaryDirectory() as folder:
            lines = lines_of(tokenizer, lengths, responses)
            step_files(kind, Path(folder), config, tokenizer, lines)
            times = our_step(kind, Path(folder), 6)[0]
            return statistics.median(times[1:]), peak_of(kind, "ours", folder)

    def sampled(batch, prompt, new):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**vars(TOY), "n_positions": 1024})).eval()
        prompts = torch.randint(0, 1024, (batch, prompt)).tolist()
        with torch.no_grad():
            work = lambda: generate(model, prompts, new)  # noqa: E731
            return min(seconds(work) for _ in range(3)), None

    for name, sizes, work in [
        ("SFT step / lines", (16, 32, 64, 128, 256), lambda n: step("sft", [(32, 16)] * n)),
        (
            "SFT step / tokens a line",
            (48, 96, 192, 384, 768),
            lambda n: step("sft", [(n // 2,) * 2] * 16),
        ),
        (
            "SFT step / prompt's tokens",
            (48, 96, 192, 384, 768),
            lambda n: step("sft", [(n, 16)] * 16),
        ),
        ("SFT step / width", (64, 128, 256, 512), lambda n: step("sft", [(32, 16)] * 16, n_embd=n)),
        ("SFT step / layers", (2, 4, 8, 16), lambda n: step("sft", [(32, 16)] * 16, n_layer=n)),
        (
            "reward step / K responses",
            (2, 4, 8, 16),
            lambda n: step("reward", [(32, *[16] * n)] * 16),
        ),
        ("sampling / prompts", (16, 64, 256, 1024), lambda n: sampled(n, 32, 32)),
        ("sampling / new tokens", (32, 64, 128, 256, 512), lambda n: sampled(64, 32, n)),
    ]:
        found = [work(size) for size in sizes]
        times = ", ".join(
            f"{size}: {time * 1e3:,.0f} ms" for size, (time, _) in zip(sizes, found, strict=True)
        )
        slope, error = exponent(sizes, [time for time, _ in found])
        print(f"{name}: time to the power {slope:.2f} +- {error:.2f} ({times})", flush=True)
        if found[0][1]:
            slope, error = exponent(sizes, [memory for _, memory in found])
            peaks = ", ".join(f"{memory:,.0f}" for _, memory in found)
            print(f"  memory to the power {slope:.2f} +- {error:.2f} ({peaks} MiB)", flush=True)


def bench_ranks(config, tokenizer, lengths, pairs):
    """sft.py on one process of two threads beside two processes of one, tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        step_files("sft", folder, config, tokenizer, lines_of(tokenizer, lengths))
        speeds = ([], [])
        for i in range(pairs):
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                out = folder / f"ranks_{side}"
                flags = (
                    f"--data {folder}/lines.jsonl --validation= --prompts= --init {folder}/model"
                )
                flags += f" --out_dir {out} --overwrite --steps 40 --log_every 10 --device cpu"
                launch = [sys.executable]
                if side:
                    launch += "-m torch.distributed.run --standalone --nproc_per_node=2".split()
                subprocess.run(
                    [*launch, str(ROOT / "sft.py"), *flags.split()],
                    env=os.environ | {"OMP_NUM_THREADS": "1" if side else "2"},
                    check=True,
                    capture_output=True,
                )
                records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
                speeds[side].append(statistics.median(r["tokens_per_s"] for r in records[1:]))
    one, two = map(statistics.median, speeds)
    print(f"SFT, toy: {one:,.0f} tokens a second on one rank, {two:,.0f} on two", flush=True)


# --- memory ---------------------------------------------------------------------------------------

QWEN = {"model_type": "qwen2", "rope": {"rope_type": "default", "rope_theta": 1e6}}
LARGER = {
    "Qwen2.5-0.5B": GPTConfig(
        vocab_size=151936, n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_inner=4864, **QWEN
    ),
    "Qwen2.5-1.5B": GPTConfig(
        vocab_size=151936, n_embd=1536, n_layer=28, n_head=12, n_kv_head=2, n_inner=8960, **QWEN
    ),
    "Llama-3.1-8B": GPTConfig(
        model_type="llama", vocab_size=128256, n_embd=4096, n_layer=32, n_head=32, n_kv_head=8,
        n_inner=14336, tie_word_embeddings=False, rope=QWEN["rope"],
    ),
}  # fmt: skip


def kept(config, script, ranks=1, adapters=0, gpu=True):
    """Bytes a GPU of what a script keeps beside activations, when that is most: weights in float32
    of all its models and Adam's two moments of what learns, and either gradients, or a whole copy
    to sample with, in bfloat16 on a GPU, none on the CPU. All but that are cut over `ranks` with
    --shard. Counted on models of these sizes without memory."""

    def count(*models, learnt=False):
        parameters = (p for model in models for p in model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad or not learnt)

    with torch.device("meta"):
        policy, value, other, reward = (
            GPT(config, scalar) for scalar in (False, True, False, True)
        )
        learning = [policy, value] if script == "ppo" else [policy]
        for model in learning if adapters else ():
            add_adapters(model, adapters, 16.0)
    # Adapters spare the reference of PPO and GRPO; DPO has its own while it samples held-out ones.
    frozen = [reward, *[other] * (not adapters)] if script != "dpo" else []
    update = 4 * count(*learning, *frozen) + 12 * count(*learning, learnt=True)
    sampling = 4 * count(*learning, *frozen) + 8 * count(*learning, learnt=True)
    sampling += 4 * count(other) * (script == "dpo")
    return max(update / ranks, sampling / ranks + 2 * count(other) * gpu)


def bench_kept(tokenizer):
    """What PPO and DPO keep at SmolLM2's size, computed and measured, then larger models' table."""
    for script in ("ppo", "dpo"):
        for adapters in (0, 16):
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                if script == "ppo":
                    ppo_files(folder, SMOLLM2, 4, tokenizer, 8)
                else:
                    step_files("dpo", folder, SMOLLM2, tokenizer, lines_of(tokenizer, [(8, 4, 4)]))
                peak = peak_of(script, "ours", folder, "--lora_rank", str(adapters))
            computed = kept(SMOLLM2, script, adapters=adapters, gpu=False) / 2**20
            print(
                f"{script}.py, SmolLM2-135M, float32, adapters of rank {adapters}: {computed:,.0f} "
                f"MiB are kept, {peak:,.0f} at most were used",
                flush=True,
            )
    ways = [("DDP", 1, 0), ("adapters of rank 16", 1, 16)]
    ways += [(f"--shard, {ranks}", ranks, 0) for ranks in (8, 16)]
    print("| GB a GPU | " + " | ".join(name for name, *_ in ways) + " |")
    print("|---" * (1 + len(ways)) + "|")
    for name, config in LARGER.items():
        for script in ("ppo", "grpo", "dpo"):
            cells = (f"{kept(config, script, *way) / 1e9:,.1f}" for _, *way in ways)
            print(f"| {name}, `{script}.py` | " + " | ".join(cells) + " |", flush=True)


# --- on a GPU -------------------------------------------------------------------------------------

GPT2 = GPTConfig()
GPT2_SIZES = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


def words_of_gpt2():
    """A vocabulary of GPT-2's size that needs no download."""
    pairs = [bytes([32 + i // 256, i % 256]) for i in range(50_000)]
    tokens = [bytes([i]) for i in range(256)] + pairs
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Tokenizer("bench", ranks, {END_OF_TEXT: len(ranks)})


def bench_gpu(full):
    """Steps, decoding, PPO and memory of GPT-2's shape, or a rehearsal in small, on any device. The
    first of each is told apart: it meets new shapes, and compiles."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128}
    config, tokenizer = GPTConfig(**{} if full else small), words_of_gpt2()
    machines = {dtype: Machine(device, dtype, full) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, machine in machines.items():
        print(
            f"{dtype}: {machine.flops / 1e12:,.1f} TFLOP/s, {machine.bytes / 1e9:,.0f} GB/s",
            flush=True,
        )
    ways = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        T, rows, micro = (1024, 64, 32) if full else (64, 4, 2)
        lengths = [(1, T - 1, T - 1)] * rows
        step_files("sft", folder, config, tokenizer, lines_of(tokenizer, lengths))
        flops = 3 * forward_flops(config, [T] * rows, (T - 1) * rows)
        for dtype, compiled in ways:
            flags = ["--device", device, "--dtype", str(dtype)[6:], "--micro_batch_size", micro]
            if full:
                torch.cuda.reset_peak_memory_stats()
            times = our_step("sft", folder, 12, *flags, *["--compile"] * compiled)[0]
            time_ = statistics.median(times[4:])
            first = f"the first step {times[0]:.1f} s"
            peak = json.loads((folder / "ours/report.json").read_text())["peak_memory_gib"]
            print(
                f"SFT, {rows} x {T}, {dtype}{', compiled' * compiled}: {rows * T / time_:,.0f} "
                f"tokens a second (target 480,000), {flops / time_ / machines[dtype].flops:.0%} of "
                f"the matrix rate, {peak} GiB; {first}",
                flush=True,
            )

    model = GPT(config).eval().to(device, torch.bfloat16)
    for batch, most, ragged in ((64, 3, False), (64, 3, True), (512, 2, False), (512, 2, True)):
        prompt, new = (128, 128) if full else (8, 8)
        lengths = [prompt - (i % (prompt // 2) if ragged else 0) for i in range(batch)]
        prompts = [torch.randint(0, config.vocab_size, (n,)).tolist() for n in lengths]
        long, short = (
            [seconds(lambda work=(model, prompts, n): generate(*work)) for _ in range(4)]
            for n in (new, new // 2)
        )
        step = (min(long) - min(short)) / (new - new // 2)
        floors = (
            sampling_floor(machines[torch.bfloat16], config, lengths, 1, n, width=2)
            for n in (new, new // 2)
        )
        floor = next(floors) - next(floors)
        floor /= new - new // 2
        print(
            f"decode, {batch} rows{', ragged' * ragged}, bfloat16: {step * 1e3:.2f} ms a step, "
            f"{batch / step:,.0f} tokens a second, {step / floor:.1f} x the floor of "
            f"{floor * 1e3:.2f} ms (target {most}); the first {new} tokens {long[0]:.1f} s, then "
            f"{min(long):.1f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        c = {"batch_size": 512, "minibatch_size": 64, "update_epochs": 4, "max_new_tokens": 128}
        c |= {"steps": 4}
        if not full:
            c |= {"batch_size": 8, "minibatch_size": 4, "max_new_tokens": 8}
        prompt = c["max_new_tokens"]
        ids = ppo_files(folder, config, c["batch_size"], tokenizer, prompt)
        floor = ppo_floor(machines[torch.bfloat16], config, [len(i) for i in ids], c, width=2)
        for dtype, compiled in ways:
            flags = ["--device", device, "--dtype", str(dtype)[6:], *["--compile"] * compiled]
            first, *times = our_ppo(folder, c, *flags)
            time_ = statistics.median(times)
            record = json.loads((folder / "ours/metrics.jsonl").read_text().splitlines()[-1])
            shares = {k: round(v, 2) for k, v in record.items() if k.endswith("_share")}
            print(
                f"PPO iteration, {c['batch_size']} x ({prompt // 2} to {prompt} + {prompt}), "
                f"{dtype}{', compiled' * compiled}: {time_:.2f} s, {time_ / floor:.1f} x the floor "
                f"of {floor:.2f} s (target 2.5); the first {first:.1f} s; {shares}",
                flush=True,
            )

    for name, sizes in GPT2_SIZES.items() if full else [("in small", {})]:
        T, rows = (1024, 8) if full else (64, 2)
        larger = GPTConfig(**{**vars(config), **sizes})
        with tempfile.TemporaryDirectory() as folder:
            folder, peaks = Path(folder), []
            step_files(
                "sft", folder, larger, tokenizer, lines_of(tokenizer, [(1, T - 1, 2)] * rows)
            )
            for flag in ([], ["--checkpoint_activations"]):
                if full:
                    torch.cuda.reset_peak_memory_stats()
                try:
                    flags = ["--device", device, "--dtype", "bfloat16"]
                    times = our_step("sft", folder, 4, *flags, *flag)[0]
                    peak = json.loads((folder / "ours/report.json").read_text())["peak_memory_gib"]
                    peaks.append(f"{peak} GiB, {times[-1] * 1e3:,.0f} ms a step")
                except torch.OutOfMemoryError:
                    peaks.append("out of memory")
        print(f"SFT of {name}, {rows} x {T}: {peaks[0]}; checkpointed {peaks[1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs at toy size (10)")
    parser.add_argument("--full", action="store_true", help="the 124M shape too (45 minutes)")
    parts = ["steps", "sampling", "ppo", "smollm2", "memory", "growth", "ranks"]
    parser.add_argument("--only", default="", choices=["", *parts], help="one part (all)")
    parser.add_argument(
        "--gpu",
        nargs="?",
        const="full",
        choices=["full", "small"],
        help="GPT-2's shape, no peers; --gpu small rehearses it, on any device",
    )
    parser.add_argument("--peak", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.peak:
        return print_peak(*args.peak)
    if args.gpu:
        if args.gpu == "full" and not torch.cuda.is_available():
            sys.exit("--gpu: there is none; --gpu small rehearses it")
        return bench_gpu(args.gpu == "full")

    try:
        import transformers
        import trl
        from datasets import disable_progress_bars
    except ImportError as error:
        sys.exit(f"{error}: make bench installs it, beside torch")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    vocabulary = ROOT / "data/toy/bpe.tiktoken"
    if not vocabulary.exists():
        sys.exit(f"{vocabulary}: not there; python data/toy.py writes it")
    toy, large = tiktoken_file(vocabulary), words_of_gpt2()
    machine = Machine()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL "
        f"{trl.__version__}, 2 threads, float32; {machine.flops / 1e9:,.0f} GFLOP/s, copies "
        f"{machine.bytes / 1e9:,.1f} GB/s",
        flush=True,
    )

    def asked(name):
        return args.only in ("", name)

    if asked("steps"):
        # As in the embedded task: prompts of 30 tokens, responses of 14.
        lengths = [(20 + 27 * i // 32, 10 + i % 9, 10 + (i + 4) % 9) for i in range(32)]
        wide = GPTConfig(**{**vars(TOY), "n_positions": 512})
        hh = as_in_hh(32, 512)
        for kind in ("sft", "reward", "dpo"):
            bench_step(kind, "toy, 32 lines", TOY, toy, lengths, args.pairs, machine)
            # Ragged: both sides may cut the batch, ours into lines alike in length.
            shape = "toy, 32 lines as in HH-RLHF"
            bench_step(kind, shape, wide, toy, hh, args.pairs, machine, micro=8)
            if args.full:
                four = [(64 + 10 * i, 32 - 5 * i, 20) for i in range(4)]
                shape = "124M, 4 lines of 96 to 111"
                bench_step(kind, shape, GPT2, large, four, 3, machine, memory=True)
    if asked("sampling"):
        name = "sampling, toy, 256 x (32 + 32)"
        bench_sampling(name, TOY, 256, 32, 32, args.pairs, machine)
        name = "sampling, toy, 256 x (17 to 32 + 32), ragged"
        bench_sampling(name, TOY, 256, 32, 32, args.pairs, machine, ragged=True)
        name = "sampling, toy, 16 x (32 + 32)"
        bench_sampling(name, TOY, 16, 32, 32, args.pairs, machine)
        if args.full:
            name = "sampling, 124M, 16 x (32 + 32)"
            bench_sampling(name, GPT2, 16, 32, 32, 3, machine)
    if asked("ppo"):
        c = {"batch_size": 128, "minibatch_size": 32, "update_epochs": 2, "max_new_tokens": 32}
        c["steps"] = 4  # of which the first is not timed
        name = "PPO iteration, toy, 128 x (16 to 32 + 32), 2 epochs of 4 minibatches"
        bench_ppo(name, TOY, toy, 32, c, args.pairs, machine)
        if args.full:
            c |= {"batch_size": 16, "minibatch_size": 4, "max_new_tokens": 64, "steps": 3}
            name = "PPO iteration, 124M, 16 x (32 to 64 + 64), 2 epochs of 4 minibatches"
            bench_ppo(name, GPT2, large, 64, c, 3, machine)
    if args.only == "smollm2" or (args.full and not args.only):
        eight = [(40, 48, 48)] * 8
        bench_step("sft", "SmolLM2-135M, 8 lines of 88", SMOLLM2, large, eight, 3, machine)
        bench_memory(SMOLLM2, large, eight)
        name = "sampling, SmolLM2-135M, 16 x (32 + 64)"
        bench_sampling(name, SMOLLM2, 16, 32, 64, 5, machine)
    if args.only == "memory" or (args.full and not args.only):
        bench_kept(large)
    if asked("growth"):
        bench_growth(toy)
    if asked("ranks"):
        bench_ranks(TOY, toy, [(30 + i % 16, 10 + i % 9, 2) for i in range(512)], 3)
    return None


if __name__ == "__main__":
    main()
