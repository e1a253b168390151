"""collapse.py: its loss, utilities and optimal rewards against vectors, brute force and closed
forms; the whole script."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    gradient, metrics, read_lines, run_script, same_run, terminate_at, write_jsonl,
)  # fmt: skip
from ranks import on_ranks

import collapse
import reward
import run as runs
from collapse import distance_to_limit, limit_law, optimal_rewards, utility, wasserstein
from feedback import grouped_batches, row_lengths
from model import load_config, load_model
from tokens import load_tokenizer, text_of

SMOOTH = {"log": 0.1, "inverse_power": 0.1, "power": 0.1, "linear": 0.0, "log_sigmoid": 0.0}


def run(monkeypatch, *args):
    return run_script(collapse, monkeypatch, *args)


def report_of(out):
    return json.loads((out / "report.json").read_text())


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def total(rewards, U):
    """S, pair by pair."""
    r = rewards.tolist()
    return sum(U(tensor(a - b)).item() for a, b in itertools.combinations(r, 2))


# --- utilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameter, loss, slopes",
    [
        ("log", None, -1.691725, [-1.25, 0.166667, 1.083333]),
        ("inverse_power", None, 1.916667, [-2.604167, 0.75, 1.854167]),
        ("linear", None, -0.466667, [-0.666667, 0.0, 0.666667]),
        ("log_sigmoid", 0.25, 0.168739, [-0.385066, 0.084658, 0.300408]),
    ],
)
def test_loss_vectors(name, parameter, loss, slopes):
    """methods.md H: the authors' smoothed utilities at rewards .9, .6, .2."""
    rewards = tensor(0.9, 0.6, 0.2)[None].requires_grad_()
    U = utility(name, parameter, SMOOTH[name])
    wrong = utility("linear" if name == "log" else "log", None, 0.1)  # no row is of its kind
    found = collapse.prompt_aware_loss(rewards, torch.tensor([False]), {"open": U, "closed": wrong})
    assert found.item() == pytest.approx(loss, abs=1e-6)
    found.sum().backward()
    assert rewards.grad[0].tolist() == pytest.approx(slopes, abs=1e-6)


def test_each_row_has_its_kinds_utility():
    """A batch of both kinds is as its rows alone; a closed row's gradient knows nothing of the open
    utility."""
    utilities = {"open": utility("inverse_power", None, 0.1), "closed": utility("linear")}
    torch.manual_seed(0)
    rewards = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    closed = torch.tensor([True, False, False, True, True, False])
    found = collapse.prompt_aware_loss(rewards, closed, utilities)
    (slopes,) = torch.autograd.grad(found.sum(), rewards)
    for row, is_closed, loss, slope in zip(rewards, closed, found, slopes, strict=True):
        U = utilities["closed" if is_closed else "open"]
        alone = -total(row, U) / 10
        assert loss.item() == pytest.approx(alone, rel=1e-12)
        x = row.detach().clone().requires_grad_()
        pairs = [U(x[i] - x[j]) for i, j in itertools.combinations(range(5), 2)]
        (expected,) = torch.autograd.grad(-sum(pairs) / 10, x)
        assert (slope - expected).abs().max() < 1e-12


def test_straight_below_zero():
    """methods.md H: U(-.2), and slopes of 10 and 100 there."""
    for name, value, slope in (("log", -2, 10), ("inverse_power", -30, 100)):
        x = tensor(-0.2).requires_grad_()
        found = utility(name, None, 0.1)(x)
        assert found.item() == pytest.approx(value, abs=1e-9)
        found.backward()
        assert x.grad.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(
    "name, parameter", [(name, None) for name in SMOOTH] + [("power", 0.9), ("inverse_power", 3.0)]
)
@pytest.mark.parametrize("smooth", [True, False])
def test_utilities_increase_and_are_concave(name, parameter, smooth):
    U = utility(name, parameter, 0.1 if smooth else 0.0)
    x = torch.linspace(-1 if smooth else 1e-3, 1, 4001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(U(x).sum(), x)
    assert (slope > 0).all() and (slope.diff() <= 1e-9).all()
    if smooth:  # and continuous, with its slope, where the straight line begins
        h = 1e-7
        below, at, above = U(tensor(-h, 0.0, h))
        assert (above - at).item() == pytest.approx((at - below).item(), rel=1e-4)


def test_slopes_keep_their_digits():
    """In float32, with a line of slope 1e8 below 0."""
    x = torch.tensor([0.5, 0.9, 1e-3, -0.1], requires_grad=True)
    (slope,) = torch.autograd.grad(utility("inverse_power", None, 1e-4)(x).sum(), x)
    expected = [(value + 1e-4) ** -2 for value in (0.5, 0.9, 1e-3)] + [1e8]
    assert slope.tolist() == pytest.approx(expected, rel=1e-4)


def test_smoothing():
    """p U(x) + (1 - p) U(-x); the optimum where U falls at large differences: by brute force."""
    U = utility("inverse_power", None, 0.1)
    smooth = collapse.with_smoothing(U, 0.1)
    assert smooth(tensor(0.3)).item() == pytest.approx(0.9 * -2.5 + 0.1 * (-10 - 30))
    assert collapse.with_smoothing(U, 0) is U
    found = optimal_rewards(3, smooth)
    grid = torch.linspace(0, 0.5, 50001, dtype=torch.float64)
    value = 2 * smooth(0.5 - grid) + smooth(1 - 2 * grid)
    assert found[2].item() == pytest.approx(grid[value.argmax()].item(), abs=2e-5)
    assert found[2] > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cubic",), "expected linear, log, power, inverse_power or log_sigmoid"),
        (("power", 1.0), "power: below 1 too"),
        (("inverse_power", 0.0), "expected a parameter above 0"),
        (("log_sigmoid", -1.0), "expected a parameter above 0"),
        (("log_sigmoid", math.nan), "expected a parameter above 0"),
        (("linear", 2.0), "has no parameter"),
        (("log", None, -0.1), "epsilon: expected at least 0"),
    ],
)
def test_bad_utilities(arguments, message):
    with pytest.raises(ValueError, match=message):
        utility(*arguments)


# --- optimal rewards ------------------------------------------------------------------------------

# methods.md H: the first half, S; n = 4, 8, 10.
OPTIMA = [
    ("log", None, [1, 0.723607], -4.023595),
    ("log", None, [1, 0.935870, 0.795850, 0.604650], -27.484918),
    ("log", None, [1, 0.959767, 0.869387, 0.738962, 0.582639], -47.132223),
    ("power", 0.5, [1, 0.819705], 4.459606),
    ("power", 0.5, [1, 0.988854, 0.902483, 0.664678], 18.686144),
    ("power", 0.5, [1, 0.995488, 0.959342, 0.845910, 0.631851], 29.410213),
    ("power", 0.9, [1, 0.999025], 4.000390),
    ("inverse_power", 0.5, [1, 0.693376], -8.621667),
    ("inverse_power", 0.5, [1, 0.898791, 0.752625, 0.586247], -48.875859),
    ("inverse_power", 0.5, [1, 0.927985, 0.822451, 0.699516, 0.567463], -82.205146),
    ("inverse_power", None, [1, 0.680740], -12.968871),
    ("inverse_power", None, [1, 0.879241, 0.733439, 0.578651], -95.419246),
    ("inverse_power", None, [1, 0.909746, 0.800065, 0.682488, 0.561201], -171.984204),
    ("log_sigmoid", None, [1, 1], -2.639341),
    ("log_sigmoid", None, [1, 1, 1, 0.764270], -13.228799),
    ("log_sigmoid", None, [1, 1, 1, 1, 0.711237], -21.503003),
    ("log_sigmoid", 0.25, [1, 0.696996], -0.846607),
    ("log_sigmoid", 0.25, [1, 1, 0.804833, 0.599959], -5.753621),
    ("log_sigmoid", 0.25, [1, 1, 0.911083, 0.740051, 0.579231], -9.785830),
    ("log_sigmoid", 0.5, [1, 1, 0.963823, 0.649268], None),
    ("log_sigmoid", 0.1, [1, 0.881784, 0.727930, 0.575966], None),
    ("linear", None, [1, 1, 1, 1], 16),
]


@pytest.mark.parametrize("name, parameter, half, value", OPTIMA)
def test_optimum_vectors(name, parameter, half, value):
    n, U = 2 * len(half), utility(name, parameter)
    found = optimal_rewards(n, U)
    assert found[: n // 2].tolist() == pytest.approx(half, abs=1e-6)
    assert (found + found.flip(0)).tolist() == pytest.approx([1.0] * n, abs=1e-12)
    if value is not None:
        assert total(found, U) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "name, half",
    [
        ("log", [1, 0.749072]),
        ("log", [1, 1, 0.853696, 0.627212]),
        ("log", [1, 1, 0.934852, 0.788211, 0.600766]),
        ("inverse_power", [1, 0.689910]),
        ("inverse_power", [1, 0.910867, 0.758740, 0.587972]),
        ("inverse_power", [1, 0.947634, 0.836669, 0.707587, 0.570039]),
    ],
)
def test_optimum_vectors_of_smoothed_utilities(name, half):
    found = optimal_rewards(2 * len(half), utility(name, None, 0.1))
    assert found[: len(half)].tolist() == pytest.approx(half, abs=1e-6)


def test_larger_optimum_vectors():
    """methods.md H at n = 50: S and the variance; the share at the end points at n = 200."""
    for name, parameter, value, variance in [
        ("log", None, -1582.597182, 0.126289),
        ("power", 0.5, 747.613029, 0.166849),
        ("inverse_power", 0.5, -2737.909071, 0.104836),
        ("inverse_power", None, -8481.472691, 0.094280),
        ("log_sigmoid", None, -606.028768, None),
    ]:
        found, U = optimal_rewards(50, utility(name, parameter)), utility(name, parameter)
        assert total(found, U) == pytest.approx(value, abs=1e-5)
        if variance:
            assert found.var(correction=0).item() == pytest.approx(variance, abs=1e-6)
    for scale, share in ((1, 0.385), (0.5, 0.3), (0.25, 0.205), (0.1, 0.105)):
        found = optimal_rewards(200, utility("log_sigmoid", scale))
        assert (found == 1).double().mean().item() == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(
    "name, parameter, epsilon",
    [
        ("log", None, 0.0),
        ("power", 0.5, 0.0),
        ("inverse_power", None, 0.0),
        ("log_sigmoid", 0.25, 0.0),
        ("inverse_power", 2.0, 0.1),
    ],
)
def test_optimum_equals_brute_force(n, name, parameter, epsilon):
    """Grids of all ordered rewards, the ends free too, each 20 times finer than the one before."""
    U, low, high = utility(name, parameter, epsilon), torch.zeros(n), torch.ones(n)
    for _ in range(6):
        axes = [torch.linspace(a, b, 11) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        grid = torch.cartesian_prod(*axes).double().view(-1, n)
        grid = grid[(grid[:, :-1] >= grid[:, 1:]).all(1)]
        i, j = torch.triu_indices(n, n, 1)
        best = grid[U(grid[:, i] - grid[:, j]).sum(1).nan_to_num(-math.inf).argmax()]
        width = (high - low) / 6
        low, high = (best - width).clamp(0, 1), (best + width).clamp(0, 1)
    assert optimal_rewards(n, U).tolist() == pytest.approx(best.tolist(), abs=2e-3)


@pytest.mark.parametrize("n", [3, 5, 8, 13, 50])
def test_log_has_gauss_lobatto_points(n):
    """Its optima are 1, -1 and the zeros of the derivative of Legendre's polynomial, on [0, 1]."""
    zeros = np.polynomial.legendre.Legendre.basis(n - 1).deriv().roots()
    points = (1 + np.sort(np.concatenate([[-1, 1], zeros.real]))[::-1]) / 2
    found = optimal_rewards(n, utility("log"))
    assert found.tolist() == pytest.approx(points.tolist(), abs=1e-8)
    assert found.var(correction=0).item() == pytest.approx((n - 1) / (4 * (2 * n - 3)), abs=1e-9)


def test_newton_step_is_nothing_at_a_thousand():
    """From all rewards, not by symmetry: gradient and Hessian of S over r_2 .. r_999."""
    n = 1000
    for name, first, second in [
        ("log", lambda x: 1 / x, lambda x: -1 / x**2),
        ("inverse_power", lambda x: 1 / x**2, lambda x: -2 / x**3),
    ]:
        r = optimal_rewards(n, utility(name)).numpy()
        gap = np.abs(r[:, None] - r) + np.eye(n)
        gradient = (first(gap) * np.sign(np.arange(n) - np.arange(n)[:, None])).sum(1)
        curve = second(gap) * (1 - np.eye(n))
        hessian = np.diag(curve.sum(1)) - curve
        step = np.linalg.solve(hessian[1:-1, 1:-1], gradient[1:-1])
        assert np.abs(step).max() < 1e-10, name
        assert gradient[0] > 0 > gradient[-1]  # held at their bounds
    found = optimal_rewards(3000, utility("log"))
    assert found.var(correction=0).item() == pytest.approx(2999 / (4 * 5997), abs=1e-10)


def test_a_utility_that_is_not_concave():
    with pytest.raises(RuntimeError, match="not concave"):
        optimal_rewards(6, lambda x: x**3)
    with pytest.raises(RuntimeError, match="too steep"):
        optimal_rewards(50, utility("power", 0.999))
    steep = optimal_rewards(8, utility("inverse_power", 40.0, 0.1))  # nearly evenly spaced
    assert steep.tolist() == pytest.approx([k / 7 for k in reversed(range(8))], abs=0.03)
    with pytest.raises(ValueError, match="n of at least 2"):
        optimal_rewards(1, utility("linear"))
    assert optimal_rewards(7, utility("linear")).tolist() == [1, 1, 1, 0.5, 0, 0, 0]


@pytest.mark.parametrize(
    "name, parameter, distances",
    [
        ("log", None, [0.07114, 0.02675, 0.00525, 0.00131]),
        ("power", 0.5, [0.0633, 0.0251, 0.0050, 0.00125]),
        ("inverse_power", 0.5, [0.0854, 0.0330, 0.0085, 0.0034]),
        ("inverse_power", None, [0.1000, 0.0443, 0.0183, 0.0117]),
    ],
)
def test_distances_to_the_limit_laws(name, parameter, distances):
    """methods.md H: n = 4, 10, 50, 200."""
    a = limit_law(name, parameter)
    for n, expected in zip((4, 10, 50, 200), distances, strict=True):
        found = distance_to_limit(optimal_rewards(n, utility(name, parameter)), a)
        assert found == pytest.approx(expected, abs=1e-4 if expected > 0.02 else 5e-5), n


def test_limit_laws():
    assert [limit_law("power", 0.5), limit_law("log"), limit_law("inverse_power")] == [0.25, 0.5, 1]
    assert limit_law("linear") == 0 and limit_law("log_sigmoid") is None
    assert limit_law("inverse_power", 2.0) is None
    assert distance_to_limit(optimal_rewards(40, utility("linear")), 0) == 0
    for a in (0.25, 0.5, 1.0, 0.75):  # the variance of Beta(a, a); the arcsine law's quantiles
        found = collapse.beta_quantiles(a, 100_000)
        assert found.var(correction=0).item() == pytest.approx(1 / (4 * (2 * a + 1)), abs=1e-5)
        assert (found.diff() >= 0).all() and (found + found.flip(0) - 1).abs().max() < 1e-9
        law = collapse.law_density(a)
        assert law.mean() == pytest.approx(1, abs=1e-9) and law[3] == pytest.approx(law[16])
        assert law == pytest.approx(np.histogram(found, 20, (0, 1), density=True)[0], abs=2e-3)
    levels = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    arcsine = torch.sin(math.pi * levels / 2) ** 2
    assert (collapse.beta_quantiles(0.5, 1000) - arcsine).abs().max() < 1e-6


def test_reference_distances():
    """methods.md H at n = 8, between optima; what the prompt-aware loss should reach."""
    found = {
        (name, e): optimal_rewards(8, utility(name, None, e))
        for name, e in [("log", 0), ("log", 0.1), ("inverse_power", 0), ("inverse_power", 0.1)]
    }
    step, even = optimal_rewards(8, utility("linear")), torch.linspace(1, 0, 8).double()
    for a, b, expected in [
        (found["log", 0], found["log", 0.1], 0.036135),
        (found["inverse_power", 0], found["inverse_power", 0.1], 0.016562),
        (found["log", 0], found["inverse_power", 0], 0.036260),
        (even, found["inverse_power", 0.1], 0.028680),
        (step, found["inverse_power", 0.1], 0.1856),
        (step, found["inverse_power", 0], 0.202167),
    ]:
        assert wasserstein(a, b) == pytest.approx(expected, abs=5e-5)


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tmp_path_factory):
    """A folder with 21 rankings of 4 responses, 8 held out, 100 prompts, and the policy."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("rankings.jsonl", "rankings_kinds.jsonl", 21),
        ("held.jsonl", "rankings_kinds_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_validation.jsonl", 100),
    ]:
        lines = read_lines(toy_data / source)[:count]
        for line in lines if "rankings" in source else ():
            line["responses"] = line["responses"][::2]
        write_jsonl(folder / name, lines)
    shutil.copytree(policy_run, folder / "policy")
    return folder


def flags(data, out, *more):
    files = ["--data", data / "rankings.jsonl", "--validation", data / "held.jsonl"]
    files += ["--prompts", data / "prompts.jsonl", "--init", data / "policy"]
    files += ["--num_prompts", 64, "--max_new_tokens", 8, "--device", "cpu", "--out_dir", out]
    return list(map(str, [*files, *more]))


LONG = ["--epochs", 2, "--batch_size", 6, "--save_every", 3, "--eval_every", 3, "--log_every", 2]
KEEP = "import run\nrun.shutil.rmtree = lambda *args, **kwargs: None\n"


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *LONG)) == 0
    return out


def test_ranks_and_accumulation_take_the_same_gradient(data, tmp_path, monkeypatch):
    """Both kinds, ragged lengths, 13 lines on 2 ranks, one of which has a micro-batch without any,
    smoothing: equal to 1e-12 relative."""
    args = ["--steps", 1, "--batch_size", 13, "--dtype", "float64", "--clip_norm", 1e9]
    args += ["--label_smoothing", 0.1, "--adam_beta2", 0.95, "--eval_every", 0]
    args += ["--data", tmp_path / "thirteen.jsonl"]
    write_jsonl(tmp_path / "thirteen.jsonl", read_lines(data / "rankings.jsonl")[:13])
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(patch, *flags(data, tmp_path / "one", *args)) == 0
        more = ["--micro_batch_size", 4]
        assert run(patch, *flags(data, tmp_path / "accumulated", *args, *more)) == 0
    argv = ["collapse.py", *flags(data, tmp_path / "both", *args, "--micro_batch_size", 3)]
    done = on_ranks("collapse", f"{KEEP}sys.argv = {argv!r}\ncollapse.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "train_w1", "eval_w1", "eval_open_accuracy"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9), (name, key)


def test_the_loss_is_the_formula(data, tmp_path, monkeypatch):
    """One batch of all lines: the logged loss, pair by pair from the head's outputs; half of the
    penalty, as of the learning rate, at the first of two steps of warm-up."""
    seen = []
    real = collapse.prompt_aware_loss

    def spy(rewards, closed, utilities):
        seen.append(rewards.detach().double())
        return real(rewards, closed, utilities)

    monkeypatch.setattr(collapse, "prompt_aware_loss", spy)
    args = ["--steps", 1, "--batch_size", 21, "--normalise_with", "none", "--eval_every", 0]
    args += ["--label_smoothing", 0.1, "--logit_penalty", 0.04, "--warmup", 2]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    rewards = seen[0]  # (B, n)
    tokenizer = load_tokenizer(data / "policy")
    examples = collapse.read_rankings(data / "rankings.jsonl", tokenizer, 96)
    lengths = row_lengths(examples, load_model(data / "policy").config.n_embd)
    order = grouped_batches(lengths, 21, [0, 0])[0]
    losses = []
    for row, i in zip(rewards.tolist(), order, strict=True):
        pairs = [a - b for a, b in itertools.combinations(row, 2)]
        height = 10 - 1 / 1.1  # of U from 0 to 1
        U = lambda x: (-1 / (x + 0.1) if x > 0 else 100 * x - 10) / height  # noqa: E731, B023
        if examples[i]["kind"] == "closed":
            U = lambda x: x  # noqa: E731
        losses.append(-sum(0.9 * U(x) + 0.1 * U(-x) for x in pairs) / 6)
        losses[-1] += 0.02 * sum(math.log(r / (1 - r)) ** 2 for r in row) / 4
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / 21, rel=1e-5)


def test_two_lines_are_interpolated(data, tmp_path, monkeypatch):
    """Both end at the optimum of their kind; a run that was stopped remembers when it got there."""
    write_jsonl(tmp_path / "two.jsonl", read_lines(data / "rankings.jsonl")[:2])
    args = ["--data", tmp_path / "two.jsonl", "--steps", 150, "--lr", 0.02, "--eval_every", 10]
    args += ["--validation", "", "--closed_utility", "log", "--save_every", 50]
    args += ["--logit_penalty", 1e-4]
    assert run(monkeypatch, *flags(data, tmp_path / "whole", *args)) == 0
    report = report_of(tmp_path / "whole")
    assert 0 < report["interpolated_at"] < 100
    assert not any(name.startswith("eval") for name in report)
    for kind in collapse.KINDS:
        assert report[f"train_{kind}_deviation"] < 0.02
    stopped = flags(data, tmp_path / "run", *args, "--resume")
    with monkeypatch.context() as patch:
        terminate_at(patch, collapse, "schedule", 121)
        assert run(patch, *stopped) == 143
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *stopped) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    again = report_of(tmp_path / "run")
    assert again["interpolated_at"] == report["interpolated_at"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(data, tmp_path, monkeypatch, dtype, uninterrupted):
    assert run(monkeypatch, *flags(data, tmp_path / "run", *LONG, "--dtype", dtype)) == 0
    found, expected = report_of(tmp_path / "run"), report_of(uninterrupted)
    tolerance = 1e-4 if dtype == "float64" else 0.05
    for kind in collapse.KINDS:
        assert found[f"train_{kind}"] == pytest.approx(expected[f"train_{kind}"], abs=tolerance)
    before = metrics(tmp_path / "run")[0]
    assert before["step"] == 0 and found["train_open"] != before["train_open"]


def test_a_run_is_a_reward_model(data, uninterrupted, monkeypatch, tmp_path):
    """Its statistics are of sigmoids, and reward.py scores with it. The report is what the last
    evaluation logged, and the optima."""
    config = load_config(uninterrupted)
    assert config["score_transform"] == "sigmoid" and config["stage"] == "reward"
    assert 0 < config["reward_mean"] < 1
    report = report_of(uninterrupted)
    *_, train, held = metrics(uninterrupted)
    assert train.items() <= report.items() and held.items() <= report.items()
    assert "train_w1" in train and "eval_w1" in held and report["step"] == 8
    assert sum(report["train_open_histogram"]) == 4 * report["train_open_prompts"] == 4 * 11
    U = collapse.scaled(utility("inverse_power", None, 0.1))
    assert report["open_optimum"] == optimal_rewards(4, U).tolist()
    assert report["closed_optimum"] == [1, 1, 0, 0]
    gaps = np.abs(np.subtract(report["eval_open"], report["open_optimum"]))
    assert report["eval_open_deviation"] == pytest.approx(gaps.max())
    out = tmp_path / "scored.jsonl"
    args = ["score", "--init", uninterrupted, "--data", data / "held.jsonl", "--out", out]
    assert run_script(reward, monkeypatch, *args, "--device", "cpu") == 0
    mean, std = config["reward_mean"], config["reward_std"]
    rewards = np.array([line["scores"] for line in read_lines(out)]) * std + mean
    held = read_lines(data / "held.jsonl")
    for kind in collapse.KINDS:
        rows = [r for r, line in zip(rewards, held, strict=True) if line["kind"] == kind]
        assert np.mean(rows, 0).tolist() == pytest.approx(report[f"eval_{kind}"], abs=1e-4)


def test_describe():
    """Two prompts a kind by hand."""
    examples = [{"kind": kind} for kind in ("open", "closed", "open", "closed")]
    rewards = [[0.9, 0.5, 0.2], [1.0, 1.0, 0.0], [0.7, 0.8, 0.0], [1.0, 0.0, 0.0]]
    optima = {"open": [1.0, 0.5, 0.0], "closed": [1.0, 0.5, 0.0]}
    found = collapse.describe_rewards(examples, rewards, optima)
    assert found["open"] == pytest.approx([0.8, 0.65, 0.1])
    assert found["open_std"] == pytest.approx([0.1, 0.15, 0.1])
    assert found["open_accuracy"] == pytest.approx(5 / 6)
    assert found["closed_accuracy"] == pytest.approx(5 / 6)  # two ties
    assert found["open_deviation"] == pytest.approx(0.2) and found["open_prompts"] == 2
    assert found["w1"] == pytest.approx((0.2 + 0.15 + 0.1) / 3)
    assert found["closed_histogram"] == [3, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    alone = collapse.describe_rewards(examples[:1], rewards[:1], optima)
    assert "w1" not in alone and "closed" not in alone


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "both"}, ":2: kind: expected open or closed, got 'both'"),
        ({"kind": None}, ":2: kind: expected open or closed, got None"),
        ({"responses": [" a", ""]}, ":2: responses"),
        ({"responses": 3}, ":2: responses"),
    ],
)
def test_bad_lines(data, tmp_path, monkeypatch, capsys, change, message):
    lines = read_lines(data / "rankings.jsonl")[:3]
    lines[1] |= change
    bad = write_jsonl(tmp_path / "bad.jsonl", lines)
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--data", bad)) == 2
    assert f"{bad}{message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_which_lines_are_read(data, tmp_path, capsys):
    """Thinned, dropped, cut: each counted."""
    tokenizer, said = load_tokenizer(data / "policy"), []
    line = {"prompt": "How do I make tea?", "kind": "open"}
    words = [" a", " bb", " cc", " d", " e", " f"]
    lines = [
        line | {"responses": words[:4]},
        line | {"responses": words},
        line | {"responses": words[:3]},
        line | {"responses": [" a", " b", " a", " c"]},
        line | {"responses": [" a", " b", " tea" * 40, " c"]},
        line | {"prompt": "My cousin sold my lamp. " * 20, "responses": words[:4]},
    ]
    path = write_jsonl(tmp_path / "some.jsonl", lines)
    found = collapse.read_rankings(path, tokenizer, 32, say=said.append)
    counts = "1 texts cut, 1 lines with fewer, 1 with one too long, 1 with equal ones"
    assert said == [f"{path}: 3 lines of 4 responses; {counts}"]
    thin = [text_of(tokenizer, list(ids)[:-1]) for ids in found[1]["responses"]]
    assert thin == [" a", " bb", " d", " f"]
    longest = max(map(len, found[2]["responses"]))
    assert len(found[2]["prompt"]) + longest == 32
    found = collapse.read_rankings(path, tokenizer, 32, "cut", 4, said.append)
    assert len(found) == 4 and "; 3 texts cut, " in said[1]  # a response, and its prompt
    assert max(map(len, found[2]["responses"])) == 31 and len(found[2]["prompt"]) == 1
    with pytest.raises(SystemExit):
        collapse.read_rankings(path, tokenizer, 32, "drop", 7)
    assert "none of its 6 lines can be learnt from (0 texts cut, 6" in capsys.readouterr().err
    assert collapse.read_rankings("", tokenizer, 32) == []


def test_other_ways_to_train(data, tmp_path, monkeypatch, capsys):
    """Noise, cut responses, few lines evaluated, another n, a reward model that goes on."""
    more = ["--label_noise", 0.5, "--overlong", "cut", "--max_length", 24, "--eval_lines", 4]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *LONG, *more)) == 0
    report = report_of(tmp_path / "run")
    assert sum(report[f"train_{kind}_prompts"] for kind in collapse.KINDS) == 4
    again = ["--init", tmp_path / "run", "--num_responses", 3]
    assert run(monkeypatch, *flags(data, tmp_path / "on", *LONG, *again)) == 2
    assert "--normalise_with must name a policy, or none" in capsys.readouterr().err
    again += ["--normalise_with", data / "policy"]
    assert run(monkeypatch, *flags(data, tmp_path / "on", *LONG, *again)) == 0
    report = report_of(tmp_path / "on")
    assert len(report["train_open"]) == 3 == len(report["open_optimum"])
    two = f"{data / 'rankings.jsonl'},{data / 'held.jsonl'}"  # eight responses, thinned to four
    more = ["--data", two, "--validation", "", "--steps", 1, "--normalise_with", "none"]
    assert run(monkeypatch, *flags(data, tmp_path / "two", *more)) == 0
    report = report_of(tmp_path / "two")
    assert report["train_open_prompts"] + report["train_closed_prompts"] == 21 + 8
    assert "reward_mean" not in report and "reward_mean" not in load_config(tmp_path / "two")


def test_noise():
    """A share of the lines, always the same, are in another order; no response is lost."""
    examples = [{"kind": "open", "responses": list(range(8)), "n": i} for i in range(40)]
    found = collapse.with_noise(examples, 0.25, 3)
    other = [i for i, e in enumerate(found) if e["responses"] != list(range(8))]
    assert len(other) == 10 and found == collapse.with_noise(examples, 0.25, 3)
    assert all(
        sorted(e["responses"]) == list(range(8)) and e["n"] == i for i, e in enumerate(found)
    )
    assert collapse.with_noise(examples, 0, 3) == examples
    assert found != collapse.with_noise(examples, 0.25, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--open_utility", "cubic"], "--open_utility cubic: expected linear, log"),
        (["--closed_utility", "power:2"], "--closed_utility power:2: expected a parameter"),
        (["--closed_utility", "power:x"], "--closed_utility power:x: "),
        (["--epsilon", "0"], "--epsilon: expected a number in (0, inf)"),
        (["--lr", "0"], "--lr: expected a number in (0, inf)"),
        (["--data", ""], "--data: expected a file"),
        (["--init", "nowhere"], "nowhere"),
        (["--open_utility", "inverse_power:400"], "--open_utility inverse_power:400: "),
        (["--num_responses", "1"], "--num_responses: 0, or 2 or more"),
        (["--num_responses", "5"], "can be learnt from"),
        (["--label_noise", "1.1"], "--label_noise: expected a number in [0, 1]"),
    ],
)
def test_bad_flags(data, tmp_path, monkeypatch, capsys, args, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_optimum_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures/optima"
    args = ["--utilities", "linear,log,log_sigmoid:0.25", "--sizes", "4,50", "--out", out]
    assert run(monkeypatch, "optimum", *args) == 0
    rows = json.loads((tmp_path / "figures/optima.json").read_text())["optima"]
    assert [(row["utility"], row["n"]) for row in rows[:3]] == [
        ("linear", 4),
        ("linear", 50),
        ("log", 4),
    ]
    assert rows[2]["rewards"][1] == pytest.approx(0.723607, abs=1e-6)
    assert rows[2]["limit"] == "Beta(0.5, 0.5)" and rows[5]["limit"] is None
    assert rows[0]["law"] is None and len(rows[2]["law"]) == 20
    assert "| log | 4 | 0.1500 | 0.2500 |" in (tmp_path / "figures/optima.md").read_text()
    assert run(monkeypatch, "optimum", "--sizes", "4,x", "--out", out) == 2
    assert run(monkeypatch, "optimum", "--utilities", "cubic", "--out", out) == 2
    capsys.readouterr()
    assert run(monkeypatch, "optimum", "--utilities", "power:0.999", "--out", out) == 2
    assert "--utilities power:0.999: n = 8: the utility is not" in capsys.readouterr().err
