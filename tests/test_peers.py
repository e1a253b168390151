"""Parity with Hugging Face's transformers and TRL: run by `make test-peers`."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import reward
from feedback import load_reward_model
from model import GPT, GPTConfig, generate, load_model, pad, save_model
from tokens import load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers
os.environ["HF_HUB_OFFLINE"] = "1"


def theirs(seed=0, **settings):
    """A GPT-2 of theirs with random weights, biases and LayerNorms included; 124M by default."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(attn_implementation="eager", **settings)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pair_124m(tmp_path_factory):
    """The 124M shape with random weights: theirs, and ours from their files."""
    directory = tmp_path_factory.mktemp("gpt2")
    model = theirs()
    model.save_pretrained(directory)
    return model, load_model(directory)


def test_logits_equal_theirs_at_124m(pair_124m):
    other, ours = pair_124m
    tokens = torch.randint(0, 50257, (3, 40))
    with torch.no_grad():
        difference = (other(tokens).logits - ours(tokens)).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}")
    assert difference < 1e-4


def test_our_files_open_there_at_124m(pair_124m, tmp_path, tokenizer):
    other, ours = pair_124m
    save_model(tmp_path, ours, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 50257, (2, 30))
    with torch.no_grad():
        difference = (again(tokens).logits - ours(tokens)).abs().max().item()
    assert difference < 1e-4
    for name, tensor in other.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_greedy_generation_equals_theirs(pair_124m):
    """64 tokens, ragged prompts; one prompt at a time there, since they pad on the left."""
    other, ours = pair_124m
    prompts = [[15496, 995, 11], [464], [40, 588, 284, 711, 19270, 351]]
    responses = generate(ours, prompts, 64, temperature=0)
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            expected = other.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert response == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("form", ["float16", "bfloat16", "sharded", "no prefix"])
def test_their_layouts_open(tmp_path, form):
    model = theirs(n_embd=64, n_layer=3, n_head=4, vocab_size=300, n_positions=48)
    if form in ("float16", "bfloat16"):
        model = model.to(getattr(torch, form))
    if form == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "no prefix":
        model.transformer.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
        assert not any(name.startswith("transformer.") for name in names)
    else:
        model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), model.float()(tokens).logits, atol=1e-4)


def test_scalar_heads_both_ways(tmp_path, tokenizer):
    """GPT2ForSequenceClassification with one label scores a sequence at its last token too."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=1024, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    ours = GPT(config, scalar_head=True).eval()
    save_model(tmp_path / "ours", ours, tokenizer)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    tokens = torch.tensor([[*tokenizer.encode_ordinary("My car."), tokenizer.eot_token]])
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits[0], ours(tokens)[0, -1:], atol=1e-5)
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 48}
    other = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(num_labels=1, **small)
    ).eval()
    other.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    tokens = torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        assert torch.allclose(other(tokens).logits[0], loaded(tokens)[0, -1:], atol=1e-5)


def test_gradients_equal_theirs(tmp_path):
    """The loss of a padded batch: labels of -100 there, a mask here."""
    from model import predicts, token_logprobs

    other = theirs(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=48)
    other.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens, mask = pad([[1, 2, 3], [4]], [[5, 6, 7, 8], [9, 10]])
    loss = -token_logprobs(ours(tokens, predicts(mask)), tokens, mask).sum() / mask.sum()
    expected = other(tokens, labels=tokens.masked_fill(~mask, -100)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradient = other.transformer.h[1].mlp.c_fc.weight.grad.t()
    assert torch.allclose(ours.h[1].mlp.c_fc.weight.grad, gradient, atol=1e-6)


TEXTS = [
    "don't",
    " naïve café",
    "日本語 テキスト",
    "😀😀",
    "\n\n  \t x",
    "a" * 200,
    "3.14159",
    "<|endoftext|>",
]


def texts(toy_data):
    import json

    lines = (toy_data / "demonstrations.jsonl").read_text().splitlines()[:992]
    return TEXTS + [json.loads(line)["prompt"] + json.loads(line)["response"] for line in lines]


def test_tokenizers_agree_on_the_embedded_task(tmp_path, tokenizer, toy_data):
    config = GPTConfig(vocab_size=1024, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save_model(tmp_path, GPT(config), tokenizer)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other.eos_token_id == tokenizer.eot_token and len(other) == 1024
    for text in texts(toy_data):
        if text != "<|endoftext|>":  # they read it as the special token, we as text
            ids = tokenizer.encode_ordinary(text)
            assert other(text)["input_ids"] == ids and other.decode(ids) == tokenizer.decode(ids)


def test_tokenizers_agree_on_gpt2(tmp_path, gpt2_tokenizer, shared, toy_data):
    """1,000 real texts: our files read by them, their files read by us, and tiktoken's own."""
    import json

    config = GPTConfig(vocab_size=50257, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save_model(tmp_path / "ours", GPT(config), gpt2_tokenizer)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    again = load_tokenizer(tmp_path / "theirs")
    records = json.loads((shared / "data/alpaca-805.json").read_text())
    seeds = (shared / "data/alpaca-seed-tasks.jsonl").read_text().splitlines()
    real = [record["instruction"] + "\n" + record["output"] for record in records]
    real += [json.loads(line)["instruction"] for line in seeds]
    real = (TEXTS[:-1] + real + texts(toy_data)[8:])[:1000]
    assert len(real) == 1000
    for text in real:
        ids = gpt2_tokenizer.encode_ordinary(text)
        assert other(text)["input_ids"] == ids == again.encode_ordinary(text)


def test_a_run_of_sft_opens_there(tmp_path, toy_data, monkeypatch):
    import sys

    import sft

    flags = f"--data {toy_data}/demonstrations.jsonl --validation= --prompts= --device cpu"
    flags += f" --tokenizer {toy_data}/bpe.tiktoken --out_dir {tmp_path}/run --steps 2"
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags.split()])
    sft.main()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer("How do I fix a bike?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=0)
    prompt = inputs["input_ids"][0].tolist()
    eos = tokenizer.eos_token_id
    (response,) = generate(load_model(tmp_path / "run"), [prompt], 10, temperature=0, eos=eos)
    assert response == expected[0, len(prompt) :][: len(response)].tolist()


def test_half_precision_files_of_theirs_keep_their_values(tmp_path):
    """save_file in bfloat16, as many published checkpoints are: float32 here, the same numbers."""
    model = theirs(n_embd=64, n_layer=1, n_head=4, vocab_size=300, n_positions=48)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    weight = load_model(tmp_path).wpe.weight
    assert torch.equal(weight, model.transformer.wpe.weight.bfloat16().float())


@pytest.mark.parametrize("margin", [False, True])
def test_reward_loss_equals_trls(margin):
    """RewardTrainer.compute_loss on a model whose logits are our scores: loss and gradient."""
    from collections import defaultdict
    from types import SimpleNamespace

    accelerate, trl = pytest.importorskip("accelerate"), pytest.importorskip("trl")
    torch.manual_seed(0)
    ours = torch.randn(12, dtype=torch.float64, requires_grad=True)  # six chosen, six rejected
    logits = ours.detach().clone().requires_grad_()
    margins = torch.rand(6, dtype=torch.float64)
    trainer = trl.RewardTrainer.__new__(trl.RewardTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.args = SimpleNamespace(center_rewards_coefficient=None)
    trainer.accelerator = accelerate.Accelerator(cpu=True)
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    inputs = {"attention_mask": torch.ones(12, 3)} | ({"margin": margins} if margin else {})
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits[:, None]), inputs)
    pairs = reward.pairwise_loss(ours[:6], ours[6:], margins if margin else 0.0)
    assert pairs.mean().item() == pytest.approx(theirs.item(), rel=1e-12)
    theirs.backward()
    pairs.mean().backward()
    assert (ours.grad - logits.grad).abs().max() < 1e-15
    accuracy = sum(reward.hit(d) for d in (ours[:6] - ours[6:]).tolist()) / 6
    assert accuracy == pytest.approx(trainer._metrics["train"]["accuracy"][0])


def test_reward_scores_equal_theirs(tmp_path, tokenizer, small_gpt):
    """A saved reward model opens as GPT2ForSequenceClassification and gives the same raw scores."""
    ours = small_gpt(scalar_head=True, vocab_size=tokenizer.n_vocab)
    statistics = {"reward_mean": 0.5, "reward_std": 2.0, "score_transform": "identity"}
    save_model(tmp_path, ours, tokenizer, {"stage": "reward"} | statistics)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model, same, read = load_reward_model(tmp_path)
    assert read == statistics
    for text in (" My cousin sold my lamp.", " no"):
        ids = [*same.encode_ordinary("What?" + text), same.eot_token]
        with torch.no_grad():
            theirs = again(torch.tensor([ids])).logits.item()
            found = model(torch.tensor([ids]))[0, -1].item()
        assert found == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("loss, smoothing", [("dpo", 0.0), ("hinge", 0.0), ("robust", 0.2)])
def test_dpo_loss_equals_trls(loss, smoothing):
    """DPOTrainer's loss on models whose logits are given: from logits to loss and gradient, ragged
    responses, accuracies and margins too. (Their ipo averages over tokens; ours is the paper's.)"""
    from collections import defaultdict
    from contextlib import nullcontext
    from types import SimpleNamespace

    import dpo
    from model import predicts, token_logprobs

    accelerate, trl = pytest.importorskip("accelerate"), pytest.importorskip("trl")
    module = sys.modules[trl.DPOTrainer.__module__]
    torch.manual_seed(0)
    B, T, V = 5, 9, 30
    tokens = torch.randint(0, V, (2 * B, T))
    begin, end = torch.randint(1, 5, (2 * B, 1)), torch.randint(5, T + 1, (2 * B, 1))
    mask = (torch.arange(T) >= begin) & (torch.arange(T) < end)
    logits = torch.randn(2 * B, T, V, dtype=torch.float64, requires_grad=True)
    reference = logits.detach() + torch.randn(2 * B, T, V, dtype=torch.float64)
    copied = logits.detach().clone().requires_grad_()
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.ref_model = lambda **_: SimpleNamespace(logits=reference)
    trainer.accelerator = accelerate.Accelerator(cpu=True)
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer.ld_alpha, trainer.precompute_ref_logps, trainer.aux_loss_enabled = None, False, False
    trainer.f_divergence_type, trainer.use_weighting, trainer.beta = "reverse_kl", False, 0.3
    trainer.loss_types, trainer.loss_weights = [{"dpo": "sigmoid"}.get(loss, loss)], [1.0]
    trainer.label_smoothing = smoothing
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    inputs = {"input_ids": tokens, "attention_mask": torch.ones(2 * B, T), "completion_mask": mask}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "disable_gradient_checkpointing", lambda *_: nullcontext())
        patch.setattr(module, "is_peft_model", lambda _: False)
        model = lambda **_: SimpleNamespace(logits=copied)  # noqa: E731
        theirs = trainer._compute_loss(model, inputs, return_outputs=False)
    theirs.backward()

    at = predicts(mask)
    ours = token_logprobs(logits[at], tokens, mask).sum(1)
    refs = token_logprobs(reference[at], tokens, mask).sum(1)
    losses = dpo.dpo_loss(ours[:B], ours[B:], refs[:B], refs[B:], 0.3, loss, smoothing)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-12)
    assert (logits.grad - copied.grad).abs().max() < 1e-14
    pairs = torch.stack([ours[:B], ours[B:]], 1), torch.stack([refs[:B], refs[B:]], 1)
    every = torch.ones(B, 1, dtype=torch.bool)
    found = dpo.pair_numbers(*pairs, every, every.double(), dpo.Config(beta=0.3))
    logged = trainer._metrics["train"]
    for name, theirs in [("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")]:
        assert found[name] / B == pytest.approx(logged[theirs][0])
    assert found["chosen"] / B == pytest.approx(logged["logps/chosen"][0])
