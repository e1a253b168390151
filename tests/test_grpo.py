"""grpo.py: its advantages against vectors and exact enumeration; the whole script."""

import itertools
import json
import math
import signal
import typing

import numpy as np
import pytest
import torch
from conftest import (
    CANNED, Hand, at_call, can_the_rollout, distance_to_the_optimum, gradient, metrics, rl_flags,
    run_script, same_parameters, same_run, words_of,
)  # fmt: skip
from ranks import on_ranks

import grpo


def run(monkeypatch, *args):
    return run_script(grpo, monkeypatch, *args)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- mathematics ----------------------------------------------------------------------------------


def test_advantage_vectors():
    """Card C6: what a response is compared with."""
    returns = tensor(1, 0, 0.5, 2)
    found = grpo.rloo_advantages(returns, 4).tolist()
    assert found == pytest.approx([1 / 6, -7 / 6, -0.5, 1.5])
    found = grpo.grpo_advantages(returns, 4).tolist()
    assert found == pytest.approx([0.169031, -1.183216, -0.507093, 1.521278], abs=1e-6)
    found = grpo.grpo_advantages(returns, 4, divide_by_std=False).tolist()
    assert found == pytest.approx([0.125, -0.875, -0.375, 1.125])
    later = returns.repeat(2) + tensor(0, 0, 0, 0, 5, 5, 5, 5)
    for advantages in (grpo.grpo_advantages, grpo.rloo_advantages):
        two = advantages(later, 4)
        assert two[:4].tolist() == pytest.approx(two[4:].tolist())  # a prompt's own mean
    alike = returns.new_full((4,), 0.3) + tensor(0, 1e-7, 0, -1e-7)  # rounding is no reward
    assert grpo.grpo_advantages(alike, 4).abs().max() < 1e-2
    assert grpo.reinforce_advantages(returns, 0.5).tolist() == [0.5, -0.5, 0, 1.5]
    logprobs, bleu = tensor(-3.2, -4.1), tensor(0.35, 0.1)
    loss = -(grpo.reinforce_advantages(bleu, 0.2) * logprobs).mean()
    assert loss.item() == pytest.approx(0.035)
    assert loss.item() + 0.017 * 2.5 == pytest.approx(0.0775)


def test_which_advantage_is_taken():
    returns = tensor(1, 0, 0.5, 2)
    for settings, expected in [
        ({"advantage": "reinforce"}, grpo.reinforce_advantages(returns, 0.7)),
        ({"advantage": "rloo", "num_samples": 2}, grpo.rloo_advantages(returns, 2)),
        ({"advantage": "grpo", "num_samples": 2}, grpo.grpo_advantages(returns, 2)),
        (
            {"advantage": "grpo", "num_samples": 4, "group_std": False},
            grpo.grpo_advantages(returns, 4, False),
        ),
    ]:
        c = grpo.Config(**settings)
        assert torch.equal(grpo.ADVANTAGES[c.advantage](returns, 0.7, c), expected)
    # A name that no function has is refused, and falls through to none.
    assert typing.get_args(grpo.Config.__annotations__["advantage"].__origin__) == tuple(
        grpo.ADVANTAGES
    )


def test_clipped_loss_by_cases():
    """Where the ratio has moved the way the advantage wants by more than the clip there is no
    gradient; everywhere else it is -A ratio; at a ratio of 1 that of REINFORCE."""
    logprobs = torch.zeros(1, 7, dtype=torch.float64)
    ratio = tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 1.0])
    advantages = tensor([1, -1, 1, -1, 1, -1, 3])
    new = ratio.log().requires_grad_()
    losses = grpo.clipped_loss(new, logprobs, advantages, 0.2)
    (found,) = torch.autograd.grad(losses.sum(), new)
    assert losses[0].tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1, 0.9, -3])
    assert found[0].tolist() == pytest.approx([0, 1.5, -0.5, 0, -1.1, 0.9, -3])


@pytest.mark.parametrize("advantage", ["reinforce", "rloo", "grpo"])
def test_expected_gradients_lead_to_the_exact_optimum(advantage):
    """The bandit of methods.md section 0, with every pair of two responses to the prompt weighted
    by its probability in the place of samples: within 1e-3 of pi_ref exp(r / beta) / Z. Not so with
    GRPO's division by the standard deviation."""
    rewards, ref, beta = tensor(0, 1, 2), tensor(0.5, 0.3, 0.2), 0.5
    optimum = tensor(0.036667, 0.162559, 0.800774)
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)

    def solve(divide=False):
        logits, baseline = ref.log().requires_grad_(), 0.0
        for _ in range(1500):
            old = logits.detach().log_softmax(-1)
            returns = (rewards - beta * (old - ref.log()))[pairs.flatten()]
            if advantage == "reinforce":
                gains = grpo.reinforce_advantages(returns, baseline)
                baseline += 0.1 * (
                    (old.exp()[pairs.flatten()] * returns).sum().item() / 6 - baseline
                )
            elif advantage == "rloo":
                gains = grpo.rloo_advantages(returns, 2)
            else:
                gains = grpo.grpo_advantages(returns, 2, divide)
            new, chances = logits.log_softmax(-1), old.exp()[pairs].prod(1, keepdim=True)
            losses = grpo.clipped_loss(new[pairs], old[pairs], gains.view(9, 2), 0.2)
            (gradient,) = torch.autograd.grad((chances * losses).sum() / 2, logits)
            with torch.no_grad():
                logits -= 0.5 * gradient
        return 0.5 * (logits.softmax(-1) - optimum).abs().sum().item()

    assert solve() < 1e-3
    assert advantage != "grpo" or solve(divide=True) > 0.01


# --- the whole script -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ["--advantage", "reinforce", "--baseline_decay", 0.5],
        ["--advantage", "rloo", "--num_samples", 8],
        ["--num_samples", 8, "--no-group_std"],
        ["--advantage=rloo", "--num_samples=8", "--kl_in_loss"],
    ],
    ids=["reinforce", "rloo", "grpo", "kl_in_loss"],
)
def test_the_bandit_reaches_the_exact_optimum(tmp_path, tokenizer, more):
    """Within 0.02 of it in total variation."""
    assert distance_to_the_optimum(grpo, tmp_path, tokenizer, *more) < 0.02


def iterations_by_hand(data, tokenizer, c):
    """c's number of iterations with the canned rollout, one sequence at a time. -> the Hand that
    holds the policy, and the baseline."""
    hand, K = Hand(data, tokenizer, c), c.num_samples
    learning, baseline = [(list(hand.policy.parameters()), c.lr)], 0.0
    for step in range(c.steps):
        episodes = hand.episodes(step, 0.0 if c.kl_in_loss else c.beta, K)
        wholes = [sum(e["rewards"]).item() for e in episodes]
        for j, e in enumerate(episodes):
            group = wholes[j // K * K : j // K * K + K]
            others = [x for k, x in enumerate(group) if k != j % K]
            worth = {
                "reinforce": lambda: wholes[j] - baseline,  # noqa: B023
                "rloo": lambda: wholes[j] - np.mean(others),  # noqa: B023
                "grpo": lambda: (wholes[j] - np.mean(group)) / max(np.std(group), 1e-4),  # noqa: B023
            }[c.advantage]()
            e["advantages"] = [worth] * len(e["response"])
        baseline = np.mean(wholes) if step == 0 else 0.9 * baseline + 0.1 * np.mean(wholes)
        hand.whitened(episodes)
        for epoch in range(c.update_epochs):
            clipped = 0
            for minibatch in hand.minibatches(episodes, step, epoch):
                loss, count = 0.0, 0
                for e in minibatch:
                    new, entropies = hand.logprobs(hand.policy, e["prompt"], e["response"])
                    for t in range(len(e["response"])):
                        ratio = (new[t] - e["old"][t]).exp()
                        clipped += abs(ratio.item() - 1) > c.clip
                        gain = hand.clipped_gain(ratio, e["advantages"][t])
                        if c.kl_in_loss:
                            gain = gain - c.beta * hand.kl(new[t], e["ref"][t])
                        loss = loss - gain - c.entropy_coef * entropies[t]
                        count += 1
                hand.adam(loss / count + hand.demonstrations(), step, learning)
        assert clipped  # the clip has something to clip
    return hand, baseline


VARIANTS = {
    "reinforce": {
        "advantage": "reinforce",
        "num_samples": 1,
        "batch_size": 7,
        "ptx_coef": 0.7,
        "ptx_batch_size": 3,
        "shaping": "clip",
        "score_clip": 0.3,
        "whiten_rewards": True,
    },
    "rloo": {"advantage": "rloo", "shaping": "par", "whiten_advantages": True},
    "grpo": {"kl_in_loss": True, "kl_estimator": "k2", "shaping": "whiten"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_iterations_against_ones_by_hand(rl_data, tmp_path, tokenizer, variant):
    """Everything between a rollout and the new weights: the policy equal to 1e-9."""
    settings = {"steps": 2, "batch_size": 6, "num_samples": 3, "minibatch_size": 3}
    settings |= {"micro_batch_size": 2, "update_epochs": 2, "temperature": 0.8, "beta": 0.3}
    settings |= {"clip": 0.05, "entropy_coef": 0.02, "weight_decay": 0.1, "clip_norm": 0.5}
    settings |= {"lr": 0.01, "warmup": 2, "dtype": "float64"} | VARIANTS[variant]
    if "ptx_coef" in settings:
        settings["ptx_data"] = str(rl_data / "demonstrations.jsonl")
    c = grpo.Config(**settings)
    args = rl_flags(rl_data, tmp_path / "run", "--validation", "", *words_of(c))
    with can_the_rollout(grpo) as patch:
        assert run(patch, *args) == 0
    hand, baseline = iterations_by_hand(rl_data, tokenizer, c)
    same_parameters(tmp_path / "run/checkpoint-2", {"policy": hand.policy})
    state = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())["state"]
    if variant == "reinforce":
        assert state["baseline"] == pytest.approx(baseline, rel=1e-9)


def test_ranks_and_accumulation_take_the_same_update(rl_data, tmp_path):
    """15 episodes, three to a prompt, some not ended, on 1 rank, 2 ranks and in micro-batches: the
    gradient equal to 1e-12 relative in float64; with demonstrations beside the reward and their
    held-out loss, scores and rewards whitened over all ranks, and the KL in the loss."""
    args = ["--steps", 1, "--batch_size", 15, "--minibatch_size", 15, "--update_epochs", 1]
    args += ["--dtype", "float64", "--clip_norm", 1e9, "--entropy_coef", 0.01, "--validation", ""]
    args += ["--whiten_rewards", "--whiten_advantages", "--max_new_tokens", 6, "--ptx_coef", 0.5]
    args += ["--advantage", "rloo", "--num_samples", 3, "--kl_in_loss", "--kl_estimator", "k3"]
    args += ["--shaping", "whiten", "--ptx_batch_size", 5]
    args += ["--ptx_data", rl_data / "demonstrations.jsonl"]
    args += ["--ptx_validation", rl_data / "demonstrations.jsonl"]
    for name, ranks, more in [
        ("one", 1, []),
        ("accumulated", 1, ["--micro_batch_size", 4]),
        ("two", 2, []),
    ]:
        argv = rl_flags(rl_data, tmp_path / name, *args, *more)
        if ranks == 1:
            with can_the_rollout(grpo) as patch:
                assert run(patch, *argv) == 0
            continue
        code = f"{CANNED.format(script='grpo')}sys.argv = {['grpo.py', *argv]!r}\n"
        done = on_ranks("grpo", f"{code}grpo.guarded(grpo.main)\n", ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        keys = ("score", "kl", "policy_loss", "entropy", "eos", "ptx_loss", "eval_nll")
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in (key for key in keys if key in a or key in b):
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (name, key)
    # The loss before the update, of all demonstrations: that of the first.
    assert logged[0]["eval_nll"] == pytest.approx(logged[1]["ptx_loss"], rel=1e-6)


def test_kill_and_resume(rl_data, tmp_path, monkeypatch):
    """REINFORCE's baseline and the order of demonstrations go on where a killed run stood."""
    args = ["--advantage", "reinforce", "--num_samples", 1, "--ptx_coef", 0.1, "--steps", 4]
    args += ["--ptx_data", rl_data / "demonstrations.jsonl", "--ptx_batch_size", 2]
    args += ["--save_every", 2, "--batch_size", 4, "--minibatch_size", 2, "--eval_every", 3]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "whole", *args)) == 0
    argv = ["grpo.py", *rl_flags(rl_data, tmp_path / "run", *args, "--resume")]
    kill = at_call("grpo", "reinforce_advantages", 4, "os.kill(os.getpid(), 9)")
    first = on_ranks("grpo", f"{kill}sys.argv = {argv!r}\ngrpo.main()\n", 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert (tmp_path / "run/checkpoint-2").exists()
    assert run(monkeypatch, *argv[1:]) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert len({line["baseline"] for line in lines}) == 4 and "ptx_loss" in lines[0]
    names = "score kl eos empty tokens objective beta policy_loss clip_fraction update_kl entropy"
    names += " policy_norm lr updates rollout_share scoring_share update_share"
    assert set(names.split()) <= set(lines[0]) and lines[0]["updates"] == 4
    held = [line for line in metrics(tmp_path / "run") if "eval_proxy" in line]
    assert [line["step"] for line in held] == [0, 3, 4]
    assert all("eval_win_rate" in line and "eval_summary_kl" in line for line in held)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["episodes"] == 16 and 0 <= report["win_rate"] <= 1
    assert all(isinstance(value, int | float) for value in report.values())


def test_it_learns_a_reward_of_ones_own(rl_data, tmp_path, monkeypatch):
    """A Python file that pays for short responses: they get shorter, and win by it; in float16."""
    (tmp_path / "short.py").write_text(
        "def score(prompt, response, *, task, **fields): return -len(response.split())\n"
    )
    more = ["--reward", tmp_path / "short.py", "--gold", tmp_path / "short.py", "--steps", 10]
    more += ["--batch_size", 32, "--minibatch_size", 16, "--lr", 3e-3, "--beta", 0.01]
    more += ["--dtype", "float16"]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["win_rate"] > 0.6 and report["gold"] == report["proxy"] == -report["words"]
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert lines[-1]["score"] > lines[0]["score"] + 0.3 and lines[-1]["kl"] > 0.05
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("what", ["temperature", "dropout"])
def test_the_self_check_finds_another_forward(rl_data, tmp_path, monkeypatch, capsys, what):
    """Log-probabilities of another temperature than the update's; dropout in the update alone."""
    real = grpo.logprobs_of

    def wrong(tokens, mask, model, temperature):
        return real(tokens, mask, model, 0.9)

    def trains(*args):
        found = real(*args)
        args[2].train()
        return found

    monkeypatch.setattr(grpo, "logprobs_of", wrong if what == "temperature" else trains)
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", "--batch_size", 8)) == 2
    assert "self-check: the " in capsys.readouterr().err


def test_stop_kl_ends_the_epochs_of_all_ranks(rl_data, tmp_path, monkeypatch):
    """Of one process; and where one rank's policy has moved, the other's has not: both stop."""
    more = ["--steps", 1, "--batch_size", 8, "--minibatch_size", 8, "--update_epochs", 6]
    more += ["--lr", 1e-2, "--warmup", 0, "--validation", "", "--timeout_s", 30]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "all", *more)) == 0
    more += ["--stop_kl", 1e-6]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "few", *more)) == 0
    assert metrics(tmp_path / "all")[0]["updates"] == 6
    assert 1 < metrics(tmp_path / "few")[0]["updates"] < 6
    argv = ["grpo.py", *rl_flags(rl_data, tmp_path / "run", *more)]
    code = (  # the second rank's sums say that nothing has moved
        "stack = torch.stack\n"
        "def still(parts, *rest):\n"
        "    found = stack(parts, *rest)\n"
        "    if os.environ['RANK'] == '1' and found.dtype == torch.float64 and len(parts) == 5:\n"
        "        found[grpo.SUMMED.index('update_kl')] = 0\n"
        "    return found\n"
        f"grpo.torch.stack = still\nsys.argv = {argv!r}\ngrpo.guarded(grpo.main)\n"
    )
    done = on_ranks("grpo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1 < metrics(tmp_path / "run")[0]["updates"] < 6


def test_fewer_prompts_than_ranks(rl_data, tmp_path):
    """One rank has the responses to a prompt, the other none: it ends, with the same weights."""
    argv = ["grpo.py", *rl_flags(rl_data, tmp_path / "run", "--steps", 2, "--batch_size", 2)]
    argv += ["--num_samples", "2", "--micro_batch_size", "1", "--timeout_s", "60"]
    code = (
        "real = grpo.Run.save_model\n"
        "def told(run, policy, *args, **kwargs):\n"
        "    total = sum(p.double().sum().item() for p in policy.parameters())\n"
        "    os.write(1, f'total {total!r}\\n'.encode())\n"
        "    return real(run, policy, *args, **kwargs)\n"
        f"grpo.Run.save_model = told\nsys.argv = {argv!r}\ngrpo.guarded(grpo.main)\n"
    )
    done = on_ranks("grpo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    totals = [line for line in done.stdout.splitlines() if line.startswith("total ")]
    assert len(totals) == 2 and totals[0] == totals[1]
    assert json.loads((tmp_path / "run/report.json").read_text())["episodes"] == 4


def test_nan_stops_before_the_update(rl_data, tmp_path, monkeypatch, capsys):
    """In the first update of the third iteration: the checkpoint of the second is as it was."""
    real, calls = grpo.clipped_loss, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(grpo, "clipped_loss", broken)
    more = ["--steps", 4, "--batch_size", 8, "--minibatch_size", 4, "--save_every", 2]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more, "--validation", "")) == 1
    error = capsys.readouterr().err
    assert "step 2: the gradient's norm is nan; stopped before the update" in error
    assert (tmp_path / "run/checkpoint-2/state.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_precisions(rl_data, tmp_path, monkeypatch, dtype):
    more = ["--steps", 2, "--batch_size", 8, "--dtype", dtype]
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run", *more)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert all(math.isfinite(line["score"]) for line in lines)


# --- settings and input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--advantage", "gae"], "--advantage: invalid choice: 'gae'"),
        (["--num_samples", "1"], "--advantage grpo: compares a prompt's responses: --num_samples"),
        (["--advantage", "rloo", "--num_samples", "1"], "--advantage rloo: compares a prompt's"),
        (["--num_samples", "3"], "--num_samples: --batch_size is no whole groups of it"),
        (["--baseline_decay", "0.5"], "--baseline_decay: only with --advantage reinforce"),
        (["--advantage", "reinforce", "--baseline_decay", "1"], "a number in [0, 1), got 1"),
        (["--no-group_std", "--advantage", "rloo"], "--group_std: only with --advantage grpo"),
        (["--kl_estimator", "k3"], "--kl_estimator: only with --kl_in_loss"),
        (["--kl_in_loss", "--kl_estimator", "k1"], "--kl_estimator: invalid choice: 'k1'"),
        (
            ["--advantage", "reinforce", "--whiten_advantages"],
            "--whiten_advantages: subtracts a mean, so that reinforce's baseline does nothing",
        ),
        (["--ptx_data", "x.jsonl"], "--ptx_coef, --ptx_data: only together"),
        (["--reward", "nowhere.py"], "nowhere.py: not a Python file"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--max_new_tokens", "96"], "--max_new_tokens: leaves a prompt no room"),
        (["--value_lr", "1"], "unrecognized arguments"),
    ],
)
def test_bad_settings(rl_data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *rl_flags(rl_data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
