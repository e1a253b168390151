"""Runs code on several ranks as torchrun does, in two seconds rather than seven: the ranks are
forked from a process that has imported torch and the scripts.

    on_ranks("sft", "sys.argv = [...]\\nsft.main()\\n")

With gpu=True the ranks find the devices of tests/pretend_cuda.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 30  # what torchrun gives the ranks that are left when one has failed
parents = {}  # {gpu: the process that forks, once there is one}


def on_ranks(script, code, ranks=2, timeout=300, gpu=False):
    """Runs `code`, which has the script's module, `sys`, `os` and `torch`; with one rank, without a
    world. -> returncode (1 if a rank failed; one rank's own), stdout and stderr of all ranks."""
    from torch.distributed import TCPStore  # the ranks meet there; not in the process that forks

    if gpu not in parents:
        command = [sys.executable, __file__, *["gpu"] * gpu]
        parents[gpu] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    parent, store = parents[gpu], None
    with tempfile.TemporaryDirectory() as folder:
        job = {"code": f"import os, sys, torch\nimport {script}\n{code}", "ranks": ranks}
        job |= {"timeout": timeout, "folder": folder, "environment": dict(os.environ)}
        if ranks > 1:
            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            job["environment"] |= {
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(ranks),
            }
        print(json.dumps(job), file=parent.stdin, flush=True)
        codes = json.loads(parent.stdout.readline())
        texts = {
            name: "".join(Path(folder, f"{name}-{rank}").read_text() for rank in range(ranks))
            for name in ("stdout", "stderr")
        }
    return SimpleNamespace(returncode=codes[0] if ranks == 1 else int(any(codes)), **texts)


def begin_rank(job, rank):
    """What makes a forked process a rank."""
    os.environ.clear()
    os.environ |= job["environment"]
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.modules["torch"].set_num_threads(1)
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        path = os.devnull if name == "stdin" else f"{job['folder']}/{name}-{rank}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)


def wait_for(pids, timeout):
    """The exit statuses of ranks' processes, or minus a signal's number. When one fails, the others
    are told to end; when time is up they are killed."""
    left, codes = set(pids), {}

    def kill(*_):
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(timeout)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and left:
            for other in left:
                os.kill(other, signal.SIGTERM)
            signal.alarm(GRACE_S)
    signal.alarm(0)
    return [codes[pid] for pid in pids]


def serve():
    """Forks the ranks of each job, a line of stdin; answers with their exit statuses. In a rank,
    returns its code."""
    for line in iter(sys.stdin.readline, ""):
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                begin_rank(job, rank)
                return job["code"]
            pids.append(pid)
        print(json.dumps(wait_for(pids, job["timeout"])), flush=True)
    return ""


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # no threads here, which a fork would lose
    sys.path[:0] = [str(ROOT), str(ROOT / "data")]
    if sys.argv[1:] == ["gpu"]:
        sys.path.append(str(ROOT / "tests/pretend_cuda"))
        __import__("pretend").pretend()
    for script in sorted(ROOT.glob("*.py")):
        __import__(script.stem)
    __import__("torch._dynamo")  # optimisers and DDP import it at first use, two seconds a rank
    gc.freeze()  # else each rank's end looks through all that was imported, and so copies it
    # A rank ends as any script does: what it leaves to the interpreter's end is tested too.
    exec(compile(serve(), "driver.py", "exec"), {"__name__": "driver"})
