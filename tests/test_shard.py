"""--shard: weights, gradients and Adam's numbers cut over the ranks, by FSDP, are DDP's."""

import json
import re

import pytest
import test_faults
from conftest import gradient, metrics, weights
from ranks import on_ranks
from test_faults import COMMANDS, QUICK, argv_of, at_step, code_of, module_of, same

from model import load_model

data = test_faults.data
KEEP = "run.shutil.rmtree = lambda *args, **kwargs: None\n"  # all checkpoints


def on(ranks, script, data, out, *more, fault=""):
    argv = argv_of(script, data, out, *more)
    return on_ranks(module_of(script), code_of(script, argv, fault), ranks)


def finished(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def one_step(ranks, script, data, out, *more):
    """The gradient of its first step, and what it logged."""
    steps = ["--rounds" if "online" in script else "--steps", "1"]
    few = [*steps, "--dtype", "float64", "--save_every", "1", "--micro_batch_size", "2"]
    finished(on(ranks, script, data, out, *few, *more, fault=KEEP))
    return gradient(out), metrics(out)


def numbers_in(lines):
    """All of a log's but shares of time, in their order."""
    lines = [{k: v for k, v in line.items() if not k.endswith("_share")} for line in lines]
    return [float(x) for x in re.findall(r"-?\d[\d.]*(?:e-?\d+)?", json.dumps(lines))]


@pytest.mark.parametrize(
    "script, ranks",
    [("sft", 2), ("ppo", 3)]
    + [
        pytest.param(script, ranks, marks=pytest.mark.faults)
        for script in COMMANDS
        for ranks in ((2,) if QUICK else (2, 3))
        if (script, ranks) not in (("sft", 2), ("ppo", 3))
    ],
)
def test_gradients_are_those_of_ddp(script, ranks, data, tmp_path):
    """To 1e-12 in float64, ranks having a line or a prompt less among them; and so is what is
    evaluated, and the model that is saved, which is whole."""
    plain, logged = one_step(ranks, script, data, tmp_path / "plain")
    cut, also = one_step(ranks, script, data, tmp_path / "cut", "--shard")
    assert (plain - cut).abs().max() <= 1e-12 * max(1, plain.abs().max())
    assert numbers_in(logged) == pytest.approx(numbers_in(also), rel=1e-9, abs=1e-9)
    model, other = load_model(tmp_path / "plain"), load_model(tmp_path / "cut")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize(
    "script",
    ["ppo"]
    + [pytest.param(x, marks=pytest.mark.faults) for x in COMMANDS if x != "ppo" and not QUICK],
)
def test_a_cut_run_goes_on(script, data, tmp_path):
    """After SIGTERM to one rank, to the same weights bit for bit; not on another number of ranks,
    which is said, and leaves what is there."""
    more = ["--shard", "--checkpoint_activations"]
    finished(on(2, script, data, tmp_path / "whole", *more))
    fault = at_step(4, "os.kill(os.getpid(), signal.SIGTERM)", rank=1)
    done = on(2, script, data, tmp_path / "run", *more, fault=fault)
    assert done.returncode != 0 and "stopped by SIGTERM" in done.stdout, done.stderr[-3000:]
    done = on(3, script, data, tmp_path / "run", *more, "--resume")
    assert done.returncode != 0 and "world: 2 -> 3" in done.stderr
    finished(on(2, script, data, tmp_path / "run", *more, "--resume"))
    assert same(tmp_path / "run", tmp_path / "whole")


def test_bfloat16_and_what_is_refused(data, tmp_path):
    """Half precision is FSDP's; one rank has nothing to cut; no float16, no adapters."""
    done = finished(on(2, "grpo", data, tmp_path / "half", "--shard", "--dtype", "bfloat16"))
    assert "torch.bfloat16, 2 rank(s)" in done.stdout
    for name, more in (("cut", ["--shard"]), ("plain", [])):
        finished(on(1, "grpo", data, tmp_path / name, *more, "--steps", "2"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "plain")
    for more, message in (
        (["--dtype", "float16"], "--shard: not in float16"),
        (["--lora_rank", "2"], "--shard: only without --lora_rank"),
    ):
        done = on(2, "grpo", data, tmp_path / "no", "--shard", *more)
        assert done.returncode != 0 and message in done.stderr
        assert not (tmp_path / "no").exists()
