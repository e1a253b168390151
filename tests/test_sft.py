"""sft.py: its loss against oracles, and the whole script on small data."""

import base64
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT, SMALL, gradient, metrics, read_lines, run_script, sft_flags, weights, write_jsonl,
)  # fmt: skip
from ranks import on_ranks

import run as run_file
import sft
from feedback import packed
from model import GPT, GPTConfig, generate, load_model, save_model
from tokens import Conversation, encode, load_tokenizer, read_json, response_of, write_json


def run(monkeypatch, *args):
    return run_script(sft, monkeypatch, *args)


# --- the loss -------------------------------------------------------------------------------------


class FixedLogits(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, at, segments):
        return self.logits.expand(len(tokens), -1, -1)[at]


def test_response_only_loss_vector():
    """Four positions, three tokens, a prompt of two: 1.304774 on the response, .950287 on all."""
    logits = torch.tensor([[[0.5, -1, 2], [1, 0, -1], [0.2, 0.3, 0.1], [2, -2, 0]]])
    tokens, mask, segments = packed([([0, 2], [1, 2])])
    for weight, expected in [(0.0, 1.304774), (1.0, 0.950287)]:
        w = sft.loss_weights(mask, segments, weight)
        total = sft.weighted_nll(FixedLogits(logits), tokens, w, segments)
        assert total.item() / w.sum().item() == pytest.approx(expected, abs=1e-6)
    w = sft.loss_weights(mask, segments, 0.5)
    total = sft.weighted_nll(FixedLogits(logits), tokens, w, segments)
    assert total.item() == pytest.approx(2.609549 + 0.5 * 0.241311, abs=1e-5)


def test_loss_weights():
    """Of each token; and of a line altogether, by its lengths alone."""
    examples = [([5, 5, 5], [6, 7]), ([5], [6, 7, 8]), ([5, 5], [6]), ([5], [6])]
    _, mask, segments = packed(examples)
    weights = sft.loss_weights(mask, segments, 0.25)
    of_each = [0, 0.25, 0.25, 1, 1], [0, 1, 1, 1], [0, 0.25, 1], [0, 1]
    assert weights.tolist() == [of_each[0], [*of_each[1], 0], of_each[2] + of_each[3]]
    for (prompt, response), expected in zip(examples, of_each, strict=True):
        assert sft.weight_of(prompt, response, 0.25) == sum(expected)


def test_held_out_loss(small_gpt, tmp_path):
    """The mean over response tokens, however many lines a forward has; nothing of no lines."""
    model = small_gpt(dtype=torch.float64)
    examples = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [10, 11, 12])]
    total, count = 0.0, 0
    for prompt, response in examples:
        laws = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= sum(law[token].item() for law, token in zip(laws, response, strict=True))
        count += len(response)
    process = run_file.Run(sft.Config(device="cpu", dtype="float64", out_dir=str(tmp_path)))
    for size in (1, 2, 9):
        found = sft.held_out_loss(model.train(), examples, size, process)
        assert found == pytest.approx(
            {"loss": total / count, "perplexity": math.exp(total / count)}
        )
    assert sft.held_out_loss(model, [], 2, process) == {}


# --- the whole script -----------------------------------------------------------------------------


def test_eos_is_trained_and_an_overfitted_model_stops(sft_data, tmp_path, monkeypatch):
    """One line, learnt by heart, is said word for word and ends there; the empty prompt of another,
    plain text, is one EOS."""
    lines = [{"prompt": "How do I fix a bike?", "response": " To fix a bike, you need oil."}]
    lines += [{"prompt": "", "response": "My cousin sold my lamp."}]
    path = write_jsonl(tmp_path / "two.jsonl", lines)
    args = sft_flags(
        sft_data, tmp_path / "run", "--data", path, "--validation", path, "--steps", 120
    )
    assert run(monkeypatch, *args, "--lr", 1e-2, "--prompts", "", "--max_new_tokens", 16) == 0
    policy, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    eos = tokenizer.eot_token
    for line in lines:
        prompt = tokenizer.encode_ordinary(line["prompt"]) or [eos]
        (response,) = generate(policy, [prompt], 20, temperature=0, eos=eos)
        assert tokenizer.decode(response[:-1]) == line["response"] and response[-1] == eos
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["loss"] < 0.05 and report["perplexity"] < 1.06 and "words" not in report


def test_ranks_and_accumulation_take_the_same_gradient(sft_data, tmp_path, monkeypatch):
    """1 rank, 2 ranks and accumulation; ragged lengths, 15 lines (one rank has one less), some
    weight on the prompt: equal to 1e-12 relative in float64."""
    args = ["--steps", 1, "--batch_size", 15, "--dtype", "float64", "--clip_norm", 1e9]
    args += ["--prompt_loss_weight", 0.3]
    with monkeypatch.context() as patch:
        patch.setattr(run_file.shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(patch, *sft_flags(sft_data, tmp_path / "one", *args)) == 0
        more = ["--micro_batch_size", 4]
        assert run(patch, *sft_flags(sft_data, tmp_path / "accumulated", *args, *more)) == 0
    for name, more in (("two", []), ("both", ["--micro_batch_size", 3])):
        argv = ["sft.py", *sft_flags(sft_data, tmp_path / name, *args, *more)]
        keep = "import run\nrun.shutil.rmtree = lambda *args, **kwargs: None\n"
        done = on_ranks("sft", f"{keep}sys.argv = {argv!r}\nsft.guarded(sft.main)\n")
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "eval_loss"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9)


@pytest.mark.parametrize("n, forwards", [(1, 1), (3, 2), (9, 5)])
def test_few_lines_on_two_ranks(sft_data, tmp_path, n, forwards):
    """Fewer lines than ranks, and a last batch of one: it ends, and every line is trained on; each
    rank drops others."""
    path = write_jsonl(tmp_path / "few.jsonl", read_lines(sft_data / "train.jsonl")[:n])
    argv = ["sft.py", *sft_flags(sft_data, tmp_path / "run", "--data", path, "--validation", path)]
    argv += ["--batch_size", "4", "--micro_batch_size", "1"]
    code = (
        "seen, real = [], sft.weighted_nll\n"
        "def spy(model, *args):\n"
        "    seen.extend([torch.initial_seed()] * model.training)\n"
        "    return real(model, *args)\n"
        f"sft.weighted_nll, sys.argv = spy, {argv!r}\nsft.guarded(sft.main)\n"
        "os.write(1, b'forwards %d seed %d\\n' % (len(seen), seen[0]))\n"
    )
    done = on_ranks("sft", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"forwards {forwards} seed 0\n" in done.stdout
    assert f"forwards {forwards} seed 1\n" in done.stdout
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["step"] == math.ceil(n / 4) and report["loss"] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(sft_data, tmp_path, monkeypatch, dtype):
    """Every type trains to about the loss of float32."""
    long = ["--epochs", 2, "--batch_size", 8, "--prompts", ""]
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "run", *long, "--dtype", dtype)) == 0
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "float32", *long)) == 0
    found, expected = metrics(tmp_path / "run")[-1], metrics(tmp_path / "float32")[-1]
    tolerance = 1e-5 if dtype == "float64" else 0.03
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=tolerance)
    assert found["eval_loss"] != expected["eval_loss"]


def test_the_loss_falls_and_gold_is_told(sft_data, tmp_path, monkeypatch, capsys):
    """Held-out loss; samples judged by a file of one's own; at the end means by task."""
    gold = tmp_path / "gold.py"
    gold.write_text(
        "def score(prompt, response, *, reference, **fields):\n"
        "    return len(response) / 100\n"
        "def explain(prompt, response, **fields):\n"
        "    return {'length': len(response), 'task_' + fields['task']: True}\n"
    )
    args = sft_flags(sft_data, tmp_path / "run", "--epochs", 20, "--gold", gold, "--num_prompts", 5)
    args += ["--warmup", "5", "--lr", "1e-2", "--eval_every", "10"]
    assert run(monkeypatch, *args) == 0
    lines = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 1
    assert lines[0]["eval_perplexity"] == pytest.approx(math.exp(lines[0]["eval_loss"]))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["gold"] == pytest.approx(report["length"] / 100)
    assert report["loss"] == lines[-1]["eval_loss"] and 0 <= report["eos"] <= 1
    assert report["summary_task_summary"] == 1 and 0 < report["distinct_2"] <= 1
    assert all(isinstance(value, int | float) for value in report.values())
    tasks = {line["task"] for line in read_lines(sft_data / "prompts.jsonl")}
    samples = read_lines(tmp_path / "run/samples.jsonl")
    assert len(samples) == 5 * len(tasks) and {s["task"] for s in samples} == tasks
    assert {s["step"] for s in samples} == {0, 10, 20, 30, 40} and "gold" in samples[0]["parts"]
    assert "gold 0." in capsys.readouterr().out


def test_prompts_without_a_task_and_without_number(sft_data, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "My car."}, {"prompt": "", "x": 7}])
    more = ["--prompts", path, "--steps", 1, "--validation", ""]
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {"words", "eos", "distinct_2"} <= set(report) and "loss" not in report
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "none", *more, "--num_prompts", 0)) == 0
    assert "eos" not in json.loads((tmp_path / "none/report.json").read_text())


def test_init_continues_a_run(sft_data, tmp_path, monkeypatch, capsys, policy_run):
    """Its weights, sizes and tokenizer; with dropout as it is told, whatever the checkpoint's."""
    args = sft_flags(sft_data, tmp_path / "more")
    for name in ("n_layer", "n_embd", "n_head", "n_positions"):
        at = args.index(f"--{name}")
        del args[at : at + 2]
    del args[(at := args.index("--tokenizer")) : at + 2]
    args += ["--init", str(policy_run), "--lr", "0", "--steps", "1", "--dropout", "0.2"]
    assert run(monkeypatch, *args) == 0
    assert weights(tmp_path / "more") == weights(policy_run)
    config = json.loads((tmp_path / "more/config.json").read_text())
    assert config["n_positions"] == 96 and config["resid_pdrop"] == 0.2
    inputs = json.loads((tmp_path / "more/args.json").read_text())["inputs"]
    assert str(policy_run / "model.safetensors") in inputs[str(policy_run)]
    single = {bytes([byte]): byte for byte in range(256)}
    lines = [f"{base64.b64encode(token).decode()} {i}" for token, i in single.items()]
    (tmp_path / "bytes.tiktoken").write_text("\n".join(lines))
    args = [*args, "--tokenizer", tmp_path / "bytes.tiktoken", "--out_dir", tmp_path / "other"]
    assert run(monkeypatch, *args) == 2
    assert "was trained with the tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_saved_is_refused_at_once(
    sft_data, tmp_path, monkeypatch, capsys
):
    """The 256 bytes and a word that no merges lead to."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"hello"]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "odd.tiktoken").write_text("\n".join(lines))
    args = sft_flags(sft_data, tmp_path / "run", "--tokenizer", tmp_path / "odd.tiktoken")
    assert run(monkeypatch, *args) == 2
    assert "can't be reached by merging two others" in capsys.readouterr().err


def test_overlong_lines(sft_data, tmp_path, monkeypatch, capsys):
    """--max_length and --overlong, of training and held-out lines; a line that is dropped is none
    of an epoch's."""
    more = ["--epochs", 1, "--batch_size", 1, "--prompts", "", "--log_every", 1]
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "drop", *more, "--max_length", 20)) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = int(printed[0].split(": ")[1].split()[0])
    assert "train.jsonl: " in printed[0] and printed[0].endswith(f"{44 - lines} dropped")
    assert "held.jsonl: " in printed[1] and 0 < lines < 44
    assert json.loads((tmp_path / "drop/report.json").read_text())["step"] == lines
    more += ["--max_length", 6, "--overlong", "cut", "--steps", 1]
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "cut", *more)) == 0
    assert "44 lines, 264 tokens; 44 cut, 0 dropped" in capsys.readouterr().out
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "none", "--max_length", 3)) == 2
    assert "no response fits into 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--overlong", "keep"], "--overlong: invalid choice: 'keep'"),
        (["--dropout", "1"], "--dropout: expected a number in [0, 1), got 1"),
        (["--max_length", "1"], "--max_length: expected 2 or more"),
        (["--n_head", "3"], "n_embd 16 is not a multiple of n_head 3"),
        (["--n_layer", "0"], "n_layer: expected an integer of at least 1"),
        (["--init", "nowhere"], "--n_layer: only without --init"),
        (["--tokenizer", "nowhere.tiktoken"], "nowhere.tiktoken"),
        (["--max_new_tokens", "64"], "--max_new_tokens: leaves a prompt no room"),
        (["--gold", "none.py"], "none.py: not a Python file"),
        (["--data", "none.jsonl"], "none.jsonl:0: file: can't be read: No such file"),
        (["--device", "gpu"], "--device gpu: expected cpu, cuda or mps"),
        (["--lora_rank", "2"], "--lora_rank: only with --init"),
    ],
)
def test_bad_settings(sft_data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *sft_flags(sft_data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_init_that_is_no_policy(rl_data, tmp_path, monkeypatch, capsys):
    for name, message in [("nowhere", "not a model directory"), ("reward", "has a scalar head")]:
        args = ["--init", rl_data / name, "--out_dir", tmp_path / "run", "--device", "cpu"]
        assert run(monkeypatch, *args) == 2
        assert message in capsys.readouterr().err


def test_alpaca_on_gpt2s_tokenizer(shared, gpt2_tokenizer, tmp_path, monkeypatch):
    """Real text, real vocabulary, a small network: the loss falls."""
    target = tmp_path / "alpaca.jsonl"
    subprocess.run(
        [sys.executable, "data/convert.py", "alpaca", shared / "data/alpaca-805.json", target],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    args = ["--data", target, "--validation", "", "--prompts", ""]
    args += ["--tokenizer", "gpt2", "--out_dir", tmp_path / "run", *SMALL.split()]
    args += ["--max_length", 32, "--overlong", "cut", "--steps", 20, "--lr", 2e-2, "--warmup", 5]
    args += ["--batch_size", 4, "--log_every", 5, "--n_embd", 8]
    assert run(monkeypatch, *args) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1


@pytest.fixture
def talker(tokenizer, tmp_path):
    """A small Llama of random weights that reads ChatML."""
    folder = tmp_path / "talker"
    save_model(folder, GPT(GPTConfig(1024, 96, 32, 2, 2)), tokenizer)
    whole = read_json(folder / "tokenizer.json")
    marks = ("<|im_start|>", "<|im_end|>")
    whole["added_tokens"] += [{"content": x, "id": 1024 + i} for i, x in enumerate(marks)]
    write_json(folder / "tokenizer.json", whole)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {n: x for n, x in config.items() if n != "template"})
    torch.manual_seed(0)
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    sizes = {"n_kv_head": 2, "n_inner": 48, "tie_word_embeddings": False}
    llama = GPT(GPTConfig(1026, 8192, 32, 2, 4, model_type="llama", rope=rope, **sizes))
    save_model(folder, llama, load_tokenizer(folder))
    return folder


def test_conversations_with_a_llama(talker, tmp_path, monkeypatch, capsys):
    """All turns of the assistant's are trained, or the last; the run keeps template and positions,
    and its samples end where a turn does."""
    turns = [
        {"role": "user", "content": "My car is old."},
        {"role": "assistant", "content": "I feel sad."},
        {"role": "user", "content": "My boat."},
    ]
    lines = [{"prompt": turns, "response": "My cousin sold it."}]
    lines.append({"prompt": "My car.", "response": "My boat."})
    data = write_jsonl(tmp_path / "turns.jsonl", lines)
    flags = ["--init", talker, "--data", data, "--validation", data, "--prompts", data]
    flags += ["--steps", 60, "--batch_size", 3, "--warmup", 2, "--lr", 1e-2, "--max_length", 90]
    flags += ["--device", "cpu", "--num_prompts", 2, "--max_new_tokens", 12]
    assert run(monkeypatch, *flags, "--out_dir", tmp_path / "run") == 0
    assert "turns.jsonl: 3 lines" in capsys.readouterr().out
    tokenizer, fields = load_tokenizer(tmp_path / "run"), read_json(tmp_path / "run/config.json")
    assert tokenizer.template == "chatml" and tokenizer.ends == (1025, 1023)
    assert fields["model_type"] == "llama" and fields["max_position_embeddings"] == 90
    assert fields["architectures"] == ["LlamaForCausalLM"]
    model = load_model(tmp_path / "run")
    asked = [(Conversation(turns), "My cousin sold it."), (Conversation(turns[:1]), "I feel sad.")]
    for prompt, response in [*asked, ("My car.", "My boat.")]:
        ids = encode(tokenizer, prompt, None, 90)[0]
        (ids,) = generate(model, [ids], 12, temperature=0, eos=tokenizer.ends)
        assert response_of(tokenizer, ids) == (response, True)
    (shown, *_) = read_lines(tmp_path / "run/samples.jsonl")
    assert shown["prompt"] == turns
    flags += ["--turns", "last", "--template", "none", "--steps", 1]
    assert run(monkeypatch, *flags, "--out_dir", tmp_path / "plain") == 0
    assert "turns.jsonl: 2 lines" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "plain").template is None
    assert run(monkeypatch, *flags, "--template", "llama3", "--out_dir", tmp_path / "no") == 2
    assert "--template llama3" in capsys.readouterr().err
