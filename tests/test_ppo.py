"""ppo.py: its mathematics against vectors, double loops and exact enumeration; the whole script."""

import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CANNED, Hand, at_call, can_the_rollout, distance_to_the_optimum, gradient, metrics, read_lines,
    rl_flags, run_script, same_parameters, same_run, terminate_at, words_of, write_jsonl,
)  # fmt: skip
from ranks import on_ranks
from safetensors.torch import load_file

import feedback
import ppo
from model import load_model


def run(monkeypatch, *args):
    return run_script(ppo, monkeypatch, *args)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- the vectors of methods.md, card C1, C2, C3 ---------------------------------------------------

LOGPROBS, REF, MASK = tensor([-1, -0.5, -2]), tensor([-1.2, -0.9, -1.5]), torch.ones(1, 3).bool()
VALUES = tensor([0.3, 0.6, 0.9])


def test_advantage_and_loss_vectors():
    rewards = ppo.token_rewards(tensor(1.5), LOGPROBS, REF, MASK, 0.1)
    advantages, returns = ppo.gae(rewards, VALUES, MASK, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([1.113625, 0.8775, 0.65])
    assert returns[0].tolist() == pytest.approx([1.413625, 1.4775, 1.55])
    new = tensor([-0.7, -0.9, -1.9])
    losses = ppo.policy_loss(new, LOGPROBS, advantages, 0.2)
    assert losses[0].tolist() == pytest.approx([-1.336350, -0.588206, -0.718361], abs=1e-6)
    value = ppo.value_loss(tensor([0.1, 0.9, 1.4]), VALUES, returns, 0.2)
    assert value.mean().item() == pytest.approx(0.397853, abs=1e-6)
    unclipped = ppo.value_loss(tensor([0.1, 0.9, 1.4]), VALUES, returns, 1e9)
    assert unclipped.mean().item() == pytest.approx(0.346936, abs=1e-6)


def test_steered_prices():
    beta = 0.15
    for kl, expected in [(9, 0.15153600), (6.5, 0.15218255), (2, 0.15062420)]:
        beta = ppo.adaptive_beta(beta, kl, 6, 512, 10000)
        assert beta == pytest.approx(expected, abs=1e-8)
    coef = 1.0
    for kl, expected in [(0.02, 2), (0.012, 2), (0.004, 1), (0.0066, 0.5), (0.0067, 0.5)]:
        coef = ppo.adaptive_coefficient(coef, kl, 0.01)
        assert coef == expected


def test_the_kl_penalty_is_the_kl():
    """J^KL over all three tokens that could have been drawn, weighted by the old policy: the
    penalty and its gradient are those of the exact KL, and card C3's numbers come out."""
    old, new = tensor(0.7, 0.2, 0.1).log(), tensor(0.5, 0.4, 0.1).log().requires_grad_()
    none = torch.zeros(3)
    weighted = (old.exp() * ppo.kl_penalty_loss(new.log_softmax(-1), old, none, 1.0)).sum()
    exact = (old.exp() * (old - new.log_softmax(-1))).sum()
    assert weighted.item() == pytest.approx(0.096901, abs=1e-6) == exact.item()
    ours, theirs = torch.autograd.grad(weighted, new)[0], torch.autograd.grad(exact, new)[0]
    assert torch.allclose(ours, theirs, atol=1e-12)
    advantages = tensor([1.113625, 0.8775, 0.65])
    later = tensor([-0.7, -0.9, -1.9])
    gain = ppo.kl_penalty_loss(later, LOGPROBS, advantages, 0.0).mean()
    assert -gain.item() - weighted.item() == pytest.approx(0.839700, abs=1e-6)


def test_expected_gradients_lead_to_the_exact_optimum():
    """The bandit of methods.md section 0 under J^KL, every response weighted by its probability in
    the place of samples: within 1e-3 of pi_ref exp(r / beta) / Z."""
    rewards, ref, beta = tensor(0, 1, 2), tensor(0.5, 0.3, 0.2), 0.5
    logits, baseline = ref.log().requires_grad_(), 0.0
    for _ in range(1500):
        old = logits.detach().log_softmax(-1)
        returns = rewards - beta * (old - ref.log())
        losses = ppo.kl_penalty_loss(logits.log_softmax(-1), old, returns - baseline, 1.0)
        baseline += 0.1 * ((old.exp() * returns).sum().item() - baseline)
        (gradient,) = torch.autograd.grad((old.exp() * losses).sum(), logits)
        with torch.no_grad():
            logits -= 0.5 * gradient
    optimum = tensor(0.036667, 0.162559, 0.800774)
    assert 0.5 * (logits.softmax(-1) - optimum).abs().sum().item() < 1e-3


# --- slow loops -----------------------------------------------------------------------------------


def ragged(rows=6, T=11, seed=0):
    """Masks of different beginnings and lengths, and garbage everywhere else."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(rows, T, dtype=torch.bool)
    for row in mask:
        begin = rng.integers(1, 4)
        row[begin : begin + rng.integers(1, T - begin + 1)] = True
    return mask, *(torch.tensor(rng.normal(size=(rows, T))) for _ in range(4))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, by two loops over the response's own tokens; values in
    the pads and the prompt, garbage here, make no difference."""
    mask, rewards, values, *_ = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, inside in enumerate(mask):
        at = inside.nonzero().flatten().tolist()
        for n, t in enumerate(at):
            total = 0.0
            for power, k in enumerate(range(n, len(at))):
                following = values[b, at[k + 1]].item() if k + 1 < len(at) else 0.0
                delta = rewards[b, at[k]].item() + gamma * following - values[b, at[k]].item()
                total += (gamma * lam) ** power * delta
            assert advantages[b, t].item() == pytest.approx(total, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(total + values[b, t].item(), abs=1e-12)
        assert not advantages[b, ~inside].any() and not returns[b, ~inside].any()


def test_policy_loss_by_cases():
    """Where the ratio has moved the way the advantage wants by more than the clip there is no
    gradient; everywhere else it is -A ratio."""
    logprobs = torch.zeros(1, 6, dtype=torch.float64)
    ratio = tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    advantages = tensor([1, -1, 1, -1, 1, -1])
    new = ratio.log().requires_grad_()
    losses = ppo.policy_loss(new, logprobs, advantages, 0.2)
    (found,) = torch.autograd.grad(losses.sum(), new)
    assert losses[0].tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1, 0.9])
    assert found[0].tolist() == pytest.approx([0, 1.5, -0.5, 0, -1.1, 0.9])


def test_which_loss_a_token_has():
    """By --surrogate, and the KL to the reference by --kl_in_loss at beta's price."""
    _, new, logprobs, ref, advantages = ragged()
    old = SimpleNamespace(logprobs=logprobs, ref_logprobs=ref, advantages=advantages)
    now = SimpleNamespace(beta=0.3, step_coef=0.7)
    clipped = ppo.policy_loss(new, logprobs, advantages, 0.1)
    penalised = ppo.kl_penalty_loss(new, logprobs, advantages, 0.7)
    kl = 0.3 * ppo.kl_estimate(new, ref, "k2")
    for expected, settings in [
        (clipped, {"clip": 0.1}),
        (penalised, {"surrogate": "kl"}),
        (clipped + kl, {"clip": 0.1, "kl_in_loss": True}),
        (penalised + kl, {"surrogate": "kl", "kl_in_loss": True, "kl_estimator": "k2"}),
    ]:
        assert torch.equal(ppo.policy_losses(new, old, now, ppo.Config(**settings)), expected)


# --- what the models say --------------------------------------------------------------------------


def test_what_is_frozen(small_gpt, capsys):
    policy = small_gpt()
    ppo.freeze(policy, 0)
    assert all(p.requires_grad for p in policy.parameters())
    ppo.freeze(policy, 1)
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in policy.named_parameters() if n.startswith(("h.1.", "ln_f."))}
    with pytest.raises(SystemExit) as ended:
        ppo.freeze(policy, 3)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "--trainable_layers: --init has 2\n"


def test_values_are_of_the_state_before_the_token(small_gpt):
    """Column t of the values has read the tokens before t, and no more; on the scores' scale."""
    model = small_gpt(scalar_head=True, dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    mask = torch.tensor([[False, False, True, True, True]])
    statistics = {"reward_mean": 0.5, "reward_std": 2.0, "score_transform": "identity"}
    with torch.no_grad():
        values = ppo.values_of(tokens, mask, model, statistics)
        for t in (2, 3, 4):
            alone = (model(tokens[:, :t])[0, -1].item() - 0.5) / 2
            assert values[0, t].item() == pytest.approx(alone)
        assert not values[0, :2].any()


def test_where_the_value_network_starts(rl_data):
    """The reward model that is named, or the first; the policy's trunk or none's, worth 0; the same
    draws whatever the default generator has drawn before."""
    cfg = ppo.Config(device="cpu", dtype="float64", reward=(str(rl_data / "reward"),))
    process = ppo.Run(cfg)
    policy, tokenizer = ppo.load_policy(str(rl_data / "policy"), process)
    rewards = ppo.Rewards(cfg, tokenizer, process)

    def started(value_init, rewards=rewards, **more):
        torch.rand(3)
        named = dataclasses.replace(cfg, value_init=value_init, **more)
        model, scale = ppo.value_network(named, policy, rewards, tokenizer, process)
        assert all(p.requires_grad for p in model.parameters()) and not model.training
        return model.state_dict(), scale

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    first, scale = started("")
    expected = rewards.all[0].model.state_dict()
    assert same(first, expected) and scale["reward_std"] == 1.2
    assert first["wte.weight"].data_ptr() != expected["wte.weight"].data_ptr()
    other, scale = started(str(rl_data / "other"))
    assert torch.allclose(other["score.weight"], -0.5 * first["score.weight"])
    assert scale["reward_std"] == 0.7
    trunk, scale = started("policy")
    assert scale == feedback.RAW and not trunk["score.weight"].any()
    assert same(policy.state_dict(), trunk)
    scratch, scale = started("random")
    assert scale == feedback.RAW and not scratch["score.weight"].any()
    assert not torch.equal(scratch["wte.weight"], trunk["wte.weight"])
    assert same(scratch, started("random")[0])
    # Without a reward model among the rewards it starts as under policy.
    files = SimpleNamespace(all=[SimpleNamespace(model=None, name="x.py")])
    assert same(started("", files)[0], trunk)
    # Under Llama 2's combination scores are raw, and values too.
    for name in ("", str(rl_data / "other")):
        assert started(name, combine="llama2")[1] == feedback.RAW


# --- the whole script -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [["--value_init", "policy"], ["--surrogate", "kl"]], ids=["clip", "kl"]
)
def test_the_bandit_reaches_the_exact_optimum(tmp_path, tokenizer, more):
    """PPO, advantages not whitened, lands within 0.02 of it in total variation."""
    more = [*more, "--value_lr", 0.03]
    assert distance_to_the_optimum(ppo, tmp_path, tokenizer, *more) < 0.02


def iterations_by_hand(data, tokenizer, c):
    """c's number of iterations with the canned rollout, one sequence at a time. -> the Hand that
    holds the models, and what is carried from one iteration to the next."""
    hand, beta, coef = Hand(data, tokenizer, c), c.beta, 1.0
    fixed = ["wte", "wpe"] if c.trainable_layers else []  # the policy has one block
    learning = [p for n, p in hand.policy.named_parameters() if n.split(".")[0] not in fixed]
    learning = [(learning, c.lr), (list(hand.value_model.parameters()), c.value_lr)]
    for step in range(c.steps):
        episodes = hand.episodes(step, 0.0 if c.kl_in_loss else beta)
        for e in episodes:
            n = len(e["response"])
            with torch.no_grad():
                v = [hand.value(e["prompt"] + e["response"][:t]) for t in range(n)] + [0.0]
            deltas = [e["rewards"][t] + c.gamma * v[t + 1] - v[t] for t in range(n)]
            e["values"] = v
            e["advantages"] = [
                sum((c.gamma * c.lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)
            ]
            e["returns"] = [a + value for a, value in zip(e["advantages"], v, strict=False)]
        hand.whitened(episodes)
        for epoch in range(c.update_epochs):
            away, clipped = [], 0
            for minibatch in hand.minibatches(episodes, step, epoch):
                loss, count = 0.0, 0
                for e in minibatch:
                    new, entropies = hand.logprobs(hand.policy, e["prompt"], e["response"])
                    for t in range(len(e["response"])):
                        ratio, advantage = (new[t] - e["old"][t]).exp(), e["advantages"][t]
                        away.append(ratio.item() - 1 - math.log(ratio.item()))
                        clipped += abs(ratio.item() - 1) > c.clip
                        gain = hand.clipped_gain(ratio, advantage)
                        if c.surrogate == "kl":
                            gain = ratio * advantage - coef * (ratio - 1 - ratio.log())
                        if c.kl_in_loss:
                            gain = gain - beta * hand.kl(new[t], e["ref"][t])
                        value = hand.value(e["prompt"] + e["response"][:t])
                        change = (value - e["values"][t]).clamp(-c.value_clip, c.value_clip)
                        near = e["values"][t] + change
                        errors = [(x - e["returns"][t]) ** 2 for x in (value, near)]
                        loss = loss - gain + max(errors) / 2 - c.entropy_coef * entropies[t]
                        count += 1
                hand.adam(loss / count + hand.demonstrations(), step, learning)
        assert clipped or c.surrogate == "kl"  # the clip has something to clip
        if c.surrogate == "kl":
            assert np.mean(away) != 0  # of the last epoch
            coef *= 0.5 if np.mean(away) < 0.01 / 1.5 else 2 if np.mean(away) > 0.015 else 1
        if c.kl_target:
            error = np.mean([e["kl"] for e in episodes]) / c.kl_target - 1
            beta = beta * (1 + min(max(error, -0.2), 0.2) * c.batch_size / c.kl_horizon)
    return hand, {"beta": beta, "step_coef": coef}


VARIANTS = {
    "clip": {"whiten_rewards": True, "kl_target": 0.3, "kl_horizon": 20, "shaping": "par"},
    "kl": {
        "surrogate": "kl",
        "shaping": "whiten",
        "whiten_advantages": False,
        "kl_in_loss": True,
        "kl_estimator": "k3",
        "clip": 0.2,
    },
    "ptx": {
        "ptx_coef": 0.7,
        "ptx_batch_size": 3,
        "trainable_layers": 1,
        "shaping": "clip",
        "score_clip": 0.3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_iterations_against_ones_by_hand(rl_data, tmp_path, tokenizer, variant):
    """Everything between a rollout and the new weights: both networks equal to 1e-9."""
    settings = {"steps": 2, "batch_size": 7, "minibatch_size": 3, "micro_batch_size": 2}
    settings |= {"update_epochs": 2, "temperature": 0.8, "gamma": 0.98, "lam": 0.9, "beta": 0.3}
    settings |= {"clip": 0.05, "value_clip": 0.05, "entropy_coef": 0.02, "weight_decay": 0.1}
    settings |= {"clip_norm": 0.5, "lr": 0.01, "value_lr": 0.02, "warmup": 2, "dtype": "float64"}
    settings |= {"value_init": str(rl_data / "other")} | VARIANTS[variant]
    if variant == "ptx":
        settings["ptx_data"] = str(rl_data / "demonstrations.jsonl")
    c = ppo.Config(**settings)
    args = rl_flags(rl_data, tmp_path / "run", "--validation", "", *words_of(c))
    with can_the_rollout(ppo) as patch:
        assert run(patch, *args) == 0
    hand, carried = iterations_by_hand(rl_data, tokenizer, c)
    same_parameters(
        tmp_path / "run/checkpoint-2", {"policy": hand.policy, "value": hand.value_model}
    )
    state = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())["state"]
    assert state["beta"] == pytest.approx(carried["beta"], rel=1e-9)
    assert state["step_coef"] == carried["step_coef"]
    assert (abs(carried["beta"] / c.beta - 1) > 0.001) == bool(c.kl_target)
    assert (carried["step_coef"] != 1) == (variant == "kl")


def test_ranks_and_accumulation_take_the_same_update(rl_data, tmp_path):
    """15 episodes of different lengths, some not ended, on 1 rank, 2 ranks and in micro-batches:
    the gradients of policy and value network equal to 1e-12 relative in float64."""
    args = ["--steps", 1, "--batch_size", 15, "--minibatch_size", 15, "--update_epochs", 1]
    args += ["--dtype", "float64", "--clip_norm", 1e9, "--entropy_coef", 0.01, "--validation", ""]
    args += ["--whiten_rewards", "--max_new_tokens", 6]
    for name, ranks, more in [
        ("one", 1, []),
        ("accumulated", 1, ["--micro_batch_size", 4]),
        ("both", 2, ["--micro_batch_size", 3]),
    ]:
        argv = rl_flags(rl_data, tmp_path / name, *args, *more)
        if ranks == 1:
            with can_the_rollout(ppo) as patch:
                assert run(patch, *argv) == 0
            continue
        code = f"{CANNED.format(script='ppo')}sys.argv = {['ppo.py', *argv]!r}\n"
        done = on_ranks("ppo", f"{code}ppo.guarded(ppo.main)\n", ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("score", "kl", "policy_loss", "value_loss", "explained_variance", "eos"):
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (name, key)


LONG = ["--steps", 5, "--batch_size", 8, "--minibatch_size", 3, "--save_every", 2]
LONG += ["--eval_every", 3, "--kl_target", 0.5, "--kl_horizon", 100, "--surrogate", "kl"]
LONG += ["--trainable_layers", 1, "--step_kl_target", 1e-6]  # so that its price rises


@pytest.fixture(scope="module")
def uninterrupted(rl_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *rl_flags(rl_data, out, *LONG)) == 0
    return out


def test_what_is_logged(uninterrupted):
    """Means of each iteration; of held-out prompts means by task and one win rate; a report."""
    lines = [line for line in metrics(uninterrupted) if "score" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    names = "score kl eos empty tokens objective beta policy_loss value_loss clip_fraction lr"
    names += " entropy update_kl policy_norm value_norm updates explained_variance step_coef"
    names += " rollout_share scoring_share update_share"
    assert set(names.split()) <= set(lines[0]) and lines[0]["updates"] == 6
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[0]["beta"] == 0.1
    assert [line["step_coef"] for line in lines] == [1, 2, 4, 8, 16]
    assert len({line["beta"] for line in lines}) == 5
    held = [line for line in metrics(uninterrupted) if "eval_proxy" in line]
    assert [line["step"] for line in held] == [0, 3, 5]
    for name in ("kl", "words", "win_rate", "distinct_2", "summary_proxy"):
        assert all(f"eval_{name}" in line for line in held), name
    report = json.loads((uninterrupted / "report.json").read_text())
    assert report["episodes"] == 40 and report["step"] == 5 and 0 <= report["win_rate"] <= 1
    assert all(isinstance(value, int | float) for value in report.values())


def test_kill_and_resume(rl_data, tmp_path, monkeypatch, uninterrupted):
    """kill -9 in an update of an iteration: the end is bit-identical."""
    args = rl_flags(rl_data, tmp_path / "run", *LONG, "--resume")
    kill = at_call("ppo", "gae", 4, "os.kill(os.getpid(), 9)")
    first = on_ranks("ppo", f"{kill}sys.argv = {['ppo.py', *args]!r}\nppo.main()\n", 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)


def test_adapters_learn_and_go_on(rl_data, tmp_path, monkeypatch, capsys):
    """With --lora_rank: a checkpoint has the adapters and the value's head alone; a run that was
    killed ends bit for bit as another, and is a plain directory; the wide weights are --init's."""
    more = [*LONG, "--lora_rank", 2, "--value_init", "policy", "--trainable_layers", 0]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "whole", *more)) == 0
    args = rl_flags(rl_data, tmp_path / "run", *more, "--resume")
    kill = at_call("ppo", "gae", 4, "os.kill(os.getpid(), 9)")
    first = on_ranks("ppo", f"{kill}sys.argv = {['ppo.py', *args]!r}\nppo.main()\n", 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    kept = {name for name in load_file(checkpoint / "tensors.safetensors") if "adam" not in name}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"A", "B", "weight"}
    assert [name for name in kept if name.endswith("weight")] == ["value.score.weight"]
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    begun, ended = load_model(rl_data / "policy"), load_model(tmp_path / "run")
    assert torch.equal(begun.wte.weight, ended.wte.weight)
    gap = ended.h[0].attn.c_attn.weight - begun.h[0].attn.c_attn.weight
    assert 0 < torch.linalg.matrix_rank(gap, rtol=1e-4) <= 2
    assert run(monkeypatch, *args, "--trainable_layers", 1) == 2
    assert "--lora_rank: all blocks learn by adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where, call", [("sample_step", 4), ("gae", 3), ("respond", 3), ("respond", 6)]
)
def test_sigterm_saves_and_resumes(rl_data, tmp_path, monkeypatch, uninterrupted, where, call):
    """SIGTERM in a rollout (after an evaluation), an update, an evaluation and the last one."""
    args, taken = rl_flags(rl_data, tmp_path / "run", *LONG, "--resume"), []
    real = ppo.value_loss
    monkeypatch.setattr(ppo, "value_loss", lambda *args: taken.append(1) or real(*args))
    with monkeypatch.context() as patch:
        terminate_at(patch, ppo, where, call)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    assert len(taken) == 5 * 6  # no update is made twice
    same_run(tmp_path / "run", uninterrupted)


def test_fewer_episodes_than_ranks(rl_data, tmp_path):
    """One rank has an episode and the other none: it ends, and both hold the same weights."""
    argv = ["ppo.py", *rl_flags(rl_data, tmp_path / "run", "--steps", 2, "--batch_size", 1)]
    argv += ["--minibatch_size", "2", "--micro_batch_size", "1", "--timeout_s", "60"]
    code = (
        "real = ppo.Run.save_model\n"
        "def told(run, policy, *args, **kwargs):\n"
        "    total = sum(p.double().sum().item() for p in policy.parameters())\n"
        "    os.write(1, f'total {total!r}\\n'.encode())\n"
        "    return real(run, policy, *args, **kwargs)\n"
        f"ppo.Run.save_model = told\nsys.argv = {argv!r}\nppo.guarded(ppo.main)\n"
    )
    done = on_ranks("ppo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    totals = [line for line in done.stdout.splitlines() if line.startswith("total ")]
    assert len(totals) == 2 and totals[0] == totals[1]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["episodes"] == 2 and report["step"] == 2


def test_it_learns_a_reward_of_ones_own(rl_data, tmp_path, monkeypatch, capsys):
    """A Python file that pays for short responses: they get shorter, and win by it; KL is paid; in
    float16, and with what it forgets of demonstrations told."""
    (tmp_path / "short.py").write_text(
        "def score(prompt, response, *, task, **fields): return -len(response.split())\n"
    )
    more = ["--reward", tmp_path / "short.py", "--gold", tmp_path / "short.py", "--steps", 12]
    more += ["--batch_size", 32, "--minibatch_size", 16, "--lr", 3e-3, "--beta", 0.01]
    more += ["--ptx_validation", rl_data / "demonstrations.jsonl", "--dtype", "float16"]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["win_rate"] > 0.6 and report["gold"] == report["proxy"] == -report["words"]
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert lines[-1]["score"] > lines[0]["score"] + 0.3 and lines[-1]["kl"] > 0.05
    held = [line for line in metrics(tmp_path / "run") if "eval_gold" in line]
    assert [line["step"] for line in held] == [0, 10, 12]
    assert len({line["eval_nll"] for line in held}) == 3  # what it forgets, in the same line
    assert "win_rate 0." in capsys.readouterr().out


def test_a_policy_that_did_not_learn_wins_half(rl_data, tmp_path, monkeypatch):
    """Its samples are other draws than the reference's, from the same law."""
    held = write_jsonl(tmp_path / "held.jsonl", 20 * read_lines(rl_data / "held.jsonl"))
    more = ["--steps", 1, "--batch_size", 2, "--lr", 0, "--value_lr", 0]
    more += ["--validation", held, "--num_prompts", 180]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert 0.4 < report["win_rate"] < 0.6 and report["win_rate"] != 0.5
    assert report["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("what", ["temperature", "dropout"])
def test_the_self_check_finds_another_forward(rl_data, tmp_path, monkeypatch, capsys, what):
    """Log-probabilities of another temperature than the update's; dropout in the update alone."""
    real = ppo.logprobs_of

    def wrong(tokens, mask, model, temperature):
        return real(tokens, mask, model, 0.9)

    def trains(*args):
        found = real(*args)
        args[2].train()
        return found

    monkeypatch.setattr(ppo, "logprobs_of", wrong if what == "temperature" else trains)
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *LONG)) == 2
    assert "self-check: the " in capsys.readouterr().err


def test_stop_kl_ends_the_epochs_of_all_ranks(rl_data, tmp_path, monkeypatch):
    """Of one process; and where one rank's policy has moved, the other's has not: both stop, and
    none waits for the other."""
    more = ["--steps", 1, "--batch_size", 8, "--minibatch_size", 8, "--update_epochs", 6]
    more += ["--lr", 1e-2, "--warmup", 0, "--validation", "", "--timeout_s", 30]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "all", *more)) == 0
    more += ["--stop_kl", 1e-6]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "few", *more)) == 0
    assert metrics(tmp_path / "all")[0]["updates"] == 6
    assert 1 < metrics(tmp_path / "few")[0]["updates"] < 6
    argv = ["ppo.py", *rl_flags(rl_data, tmp_path / "run", *more)]
    code = (  # the second rank's sums say that nothing has moved
        "stack = torch.stack\n"
        "def still(parts, *rest):\n"
        "    found = stack(parts, *rest)\n"
        "    if os.environ['RANK'] == '1' and found.dtype == torch.float64 and len(parts) == 6:\n"
        "        found[ppo.SUMMED.index('update_kl')] = 0\n"
        "    return found\n"
        f"ppo.torch.stack = still\nsys.argv = {argv!r}\nppo.guarded(ppo.main)\n"
    )
    done = on_ranks("ppo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1 < metrics(tmp_path / "run")[0]["updates"] < 6


def test_nan_stops_before_the_update(rl_data, tmp_path, monkeypatch, capsys):
    """In the first update of the third iteration, of the value network alone: nothing steps, and
    the checkpoint of the second is as it was."""
    real, calls, steps = ppo.value_loss, [], []

    def broken(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 8 else 1)

    step_of = torch.optim.AdamW.step
    monkeypatch.setattr(ppo, "value_loss", broken)
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step_of(self, *args)
    )
    more = ["--steps", 4, "--batch_size", 8, "--minibatch_size", 4, "--save_every", 2]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more, "--validation", "")) == 1
    error = capsys.readouterr().err
    assert "step 2: the gradient's norm is nan; stopped before the update" in error
    assert (tmp_path / "run/checkpoint-2/state.json").exists() and len(steps) == 2 * 4 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_precisions(rl_data, tmp_path, monkeypatch, dtype):
    more = ["--steps", 2, "--batch_size", 8, "--dtype", dtype]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert all(math.isfinite(line[name]) for line in lines for name in ("score", "value_loss"))


def test_a_variety_of_settings(rl_data, tmp_path, monkeypatch):
    """Two rewards by weight, a value network from scratch, another discount, several responses to a
    prompt: it runs, its value network foresees nothing at first, and then something else than
    under --value_init policy."""
    (tmp_path / "words.py").write_text(
        "def score(prompt, response, **fields): return -len(response.split())\n"
    )
    both = ["--reward", f"{rl_data / 'reward'},{tmp_path / 'words.py'}", "--reward_weights", "3,1"]
    both += ["--gamma", 0.99, "--lam", 0.9, "--num_samples", 4, "--batch_size", 8, "--steps", 2]
    logs = []
    for how in ("policy", "random"):
        more = [*both, "--value_init", how, "--validation", ""]
        assert run(monkeypatch, *rl_flags(rl_data, tmp_path / how, *more)) == 0
        logs.append([(x["explained_variance"], x["value_loss"]) for x in metrics(tmp_path / how)])
    assert logs[0] != logs[1] and logs[0][0][0] == logs[1][0][0] == 0.0


# --- settings and input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--advantage", "rloo"],
            "--advantage rloo: ppo.py has gae; reinforce, rloo and grpo are in",
        ),
        (["--kl_estimator", "k3"], "--kl_estimator: only with --kl_in_loss"),
        (["--kl_target", "1", "--beta", "0"], "--kl_target: beta is steered by factors, 0 stays 0"),
        (["--kl_target", "1", "--kl_horizon", "9"], "--kl_horizon: expected --batch_size at"),
        (["--value_init", "x.py"], "--value_init: a reward model, policy or random"),
        (["--combine", "llama2"], "--combine llama2: two, helpful,safe"),
        (["--combine", "min", "--reward_weights", "1"], "--reward_weights: only with --combine m"),
        (["--clip", "0.1", "--surrogate", "kl"], "--clip: only with --surrogate clip"),
        (["--step_kl_target", "1"], "--step_kl_target: only with --surrogate kl"),
        (["--gold", "x.py", "--validation", ""], "--gold: only with --validation"),
        (["--score_clip", "2"], "--score_clip: only with --shaping clip"),
        (["--gamma", "1.1"], "--gamma: expected a number in [0, 1], got 1.1"),
        (["--temperature", "0"], "--temperature: expected a number in (0, inf), got 0"),
        (["--minibatch_size", "0"], "--minibatch_size: expected a number in [1, inf)"),
        (["--missing_eos_score", "low"], "--missing_eos_score: invalid number_or_none value"),
        (["--ptx_coef", "1", "--ptx_data", "none.jsonl"], "none.jsonl:0: file: can't be read"),
        (["--trainable_layers", "2"], "--trainable_layers: --init"),
        (["--value_init", "nowhere"], "nowhere: not a model directory"),
        (["--reward", "nowhere"], "nowhere: not a model directory"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--max_new_tokens", "96"], "--max_new_tokens: leaves a prompt no room"),
        (["--top_p", "0.9"], "unrecognized arguments"),
    ],
)
def test_bad_settings(rl_data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_prompts_without_what_a_score_needs(rl_data, tmp_path, monkeypatch, capsys):
    lines = read_lines(rl_data / "prompts.jsonl")
    both = f"{rl_data / 'reward'},{rl_data / 'other'}"
    for name, value, more, message in [
        ("reference", None, ["--shaping", "par"], "reference: expected a string, got none"),
        (
            *("unsafe", "no", ["--combine", "llama2", "--reward", both]),
            'unsafe: expected true or false, got "no"',
        ),
    ]:
        line = {k: v for k, v in lines[1].items() if k != name} | ({name: value} if value else {})
        write_jsonl(tmp_path / "prompts.jsonl", [lines[0], line])
        more += ["--prompts", tmp_path / "prompts.jsonl"]
        assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 2
        assert f"{tmp_path / 'prompts.jsonl'}:2: {message}" in capsys.readouterr().err
