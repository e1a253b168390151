"""Every script on the devices of tests/pretend_cuda, which are CUDA's but for their kernels.

What CUDA would refuse ends the script; where Python would wait for a GPU is counted. Compiled by
g++ at the first call, for the CPU build of torch; without them these tests are skipped.
"""

import itertools
import json
import shutil

import pytest
import test_faults
import torch
from conftest import weights
from ranks import on_ranks
from test_faults import COMMANDS, QUICK, argv_of, at_step, code_of, module_of, same

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or torch.version.cuda is not None,
    reason="the device is compiled by g++, for a torch without CUDA",
)
SCRIPTS, data = list(COMMANDS), test_faults.data
QUIET = "--eval_every 0 --save_every 0 --log_every 1000".split()


def on_gpu(script, data, out, *more, ranks=1, fault=""):
    argv = argv_of(script, data, out, "--device", "cuda", *more)
    return on_ranks(module_of(script), code_of(script, argv, fault), ranks, gpu=True)


def finished(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# --- the device -----------------------------------------------------------------------------------

REFUSED = """
import pretend
gpu = torch.device("cuda")
x, here = torch.randn(3, 4, device=gpu), torch.ones(3, 4)
for text in (
    "torch.where(x > 0, x, here)",
    "torch.stack([x, here])",
    "x.addmm(x, torch.ones(4, 4))",
    "here[torch.tensor([0], device=gpu)]",
    "torch.rand(3, generator=torch.Generator(), device=gpu)",
    "torch.rand(3, generator=torch.Generator(gpu))",
    "x.numpy()",
    "torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8, device=gpu))",
    "recorded(lambda: x.sum().item())",
):
    try:
        eval(text)
        print("let through:", text)
    except (RuntimeError, TypeError, AssertionError):
        pass
for text, waits in (
    ("x + torch.tensor(1.0)", 0), ("x.sum().item()", 1), ("x[x > 0]", 1), ("x[:, 1:].cpu()", 1),
    ("here.to(gpu)", 1), ("here.to(gpu, non_blocking=True)", 1), ("x[[0, 1]]", 1),
    ("here.pin_memory().to(gpu, non_blocking=True)", 0), ("x.masked_fill(x > 0, 1.0)", 0),
):
    pretend.waits.clear()
    eval(text)
    found = pretend.waits.total()
    print(f"{found}, not {waits}: {text}" * (found != waits), end="")
y = x.clone()
again = recorded(lambda: y.add_(1))
y.zero_()
again(), again()
assert (y == 2).all()
"""


def test_the_device_itself():
    """What it refuses, where it waits, and that what was recorded is done again."""
    done = finished(on_ranks("model", "from model import recorded\n" + REFUSED, 1, gpu=True))
    assert done.stdout == ""


# --- scripts --------------------------------------------------------------------------------------


RESUMED = ("sft", "ppo", "dpo --online")


@pytest.mark.parametrize(
    "script",
    [*RESUMED, *(pytest.param(x, marks=pytest.mark.faults) for x in SCRIPTS if x not in RESUMED)],
)
def test_bfloat16_stops_and_goes_on(script, data, tmp_path):
    """As on the CPU: a run that SIGTERM stopped ends with the weights of one that nothing did."""
    finished(on_gpu(script, data, tmp_path / "whole"))
    fault = at_step(3, "os.kill(os.getpid(), signal.SIGTERM)")
    done = on_gpu(script, data, tmp_path / "run", fault=fault)
    assert done.returncode == 143 and "stopped by SIGTERM" in done.stdout, done.stderr[-3000:]
    done = finished(on_gpu(script, data, tmp_path / "run", "--resume"))
    assert "cuda:0, torch.bfloat16" in done.stdout and "resumed at step" in done.stdout
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_float16_and_adapters(script, data, tmp_path):
    """GradScaler's steps; adapters where the script starts from a model."""
    more = [] if script == "sft" else ["--lora_rank", "2"]
    done = finished(on_gpu(script, data, tmp_path / "run", "--dtype", "float16", *more, *QUIET))
    assert "torch.float16" in done.stdout


@pytest.mark.faults
@pytest.mark.parametrize("dtype", ["bfloat16"] if QUICK else ["bfloat16", "float16"])
@pytest.mark.parametrize("script", RESUMED if QUICK else SCRIPTS)
def test_compiled(script, dtype, data, tmp_path):
    """The self-checks let it begin: the reference goes through what the policy goes through."""
    more = ["--compile", "--dtype", dtype, "--checkpoint_activations", *QUIET]
    finished(on_gpu(script, data, tmp_path / "run", *more))


@pytest.mark.faults
@pytest.mark.parametrize("script", RESUMED if QUICK else SCRIPTS)
def test_two_ranks(script, data, tmp_path):
    """Under DDP, gloo in the place of NCCL: on `cpu:gloo,cuda:gloo`."""
    for dtype in ("bfloat16", "float16"):
        out = tmp_path / dtype
        finished(on_gpu(script, data, out, "--dtype", dtype, *QUIET, ranks=2))
        assert weights(out)


# --- waits, and kernels ---------------------------------------------------------------------------

COUNTED = """
import json, pretend
real_rate, seen = SCRIPT.schedule, []
def rate(*args):
    seen.append(pretend.waits.total())
    return real_rate(*args)
SCRIPT.schedule = rate
real_finish = run.Run.finish
def finish(self, *args):
    os.write(1, b"waits " + json.dumps(seen).encode() + b"\\n")
    os.write(1, b"places " + json.dumps(pretend.waits.most_common(60)).encode() + b"\\n")
run.Run.finish = finish
"""
# Of a step of one micro-batch, in which is waited for where the losses are (nonzero, in the trunk
# and for each thing that is spread over (B, T) or summed over responses) and for the gradient's
# norm; of an iteration of PPO or GRPO with four updates, which wait 6 and 3 times, and of rlaif's
# with one.
WAITS = {
    "sft": 3, "reward": 2, "ppo": 57, "grpo": 41, "dpo": 6, "dpo --online": 6, "rlaif direct": 30,
    "collapse": 2,
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_waits_of_a_step(script, data, tmp_path):
    done = finished(on_gpu(script, data, tmp_path / "run", *QUIET, fault=COUNTED))
    lines = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("waits")
    )
    steps = [b - a for a, b in itertools.pairwise(json.loads(lines["waits"])) if b > a]
    assert min(steps) == WAITS[script], (steps, done.stdout[-2000:])


DECODED = """
import json, pretend
from model import GPT, GPTConfig, generate
torch.manual_seed(0)
config = GPTConfig(vocab_size=999, n_positions=600, n_embd=32, n_layer=2, n_head=2)
model, prompts = GPT(config).eval(), [[1, 2, 3], [4], [5, 6]]
def drawn(device, n, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(1)
    return generate(model.to(device, dtype), prompts, n, eos=998, generator=generator)
on_cpu = drawn("cpu", 500)
same = drawn("cuda", 500) == on_cpu
counts = []
for n in (16, 16, 24):
    before = pretend.waits.total(), pretend.device.count_kernels()
    drawn("cuda", n, torch.bfloat16)
    counts.append((pretend.waits.total() - before[0], pretend.device.count_kernels() - before[1]))
waits, kernels = (b - a for a, b in zip(counts[1], counts[2]))
print(json.dumps([same, max(map(len, on_cpu)), waits, kernels]))
"""


def test_a_decoded_token():
    """Tokens that a GPU draws by kernels that were recorded, over two sizes of the cache, are the
    CPU's. Nothing waits but the question, each eighth token, which rows have ended; and of a
    token's kernels Python starts 31: the model's all at once."""
    done = finished(on_ranks("model", DECODED, 1, gpu=True))
    same, longest, waits, kernels = json.loads(done.stdout)
    assert same and longest > 300
    assert (waits, kernels // 8) == (1, 31)
