"""Runs a script as if on a GPU: on the CPU build of torch, with a device as in device.cpp.

    python tests/pretend_cuda/pretend.py ppo.py --device cuda ...

WAITS=FILE: writes where a GPU would have been waited for, {"ppo.py:301 aten::copy_": how often}.
With `--compile` all that is compiled goes through the backend aot_eager: the same graphs, run one
operator at a time. Without it nothing is compiled, and flex_attention is the CPU's with a mask.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # the script will be that: here is the same as a module of its own
    import pretend

    pretend.main()
    sys.exit()

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def built():
    """The device as a library, compiled in some 15 seconds where it was not yet."""
    source, version = HERE / "device.cpp", importlib.metadata.version("torch")
    key = hashlib.sha256(source.read_bytes() + version.encode()).hexdigest()[:16]
    library = HERE / f"device-{key}.so"
    if not library.exists():
        torch_ = Path(importlib.util.find_spec("torch").origin).parent
        include, temporary = torch_ / "include", library.with_suffix(f".{os.getpid()}.tmp")
        includes = [f"-I{path}" for path in (include, include / "torch/csrc/api/include")]
        libraries = [f"-L{torch_}/lib", f"-Wl,-rpath,{torch_}/lib", "-lc10", "-ltorch_cpu"]
        how = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-w", *includes]
        subprocess.run([*how, "-o", temporary, source, *libraries], check=True)
        os.replace(temporary, library)
    return library


waits = collections.Counter()  # {"file:line operator": how often}


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def on_wait(operator):
    frame = sys._getframe(0).f_back
    while frame and Path(frame.f_code.co_filename).resolve().parent != ROOT:
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
    waits[f"{where} {operator.decode()}"] += 1


def loaded(library):
    """In silence, as it says that kernels are overridden."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


device = loaded(built())  # before torch, which looks for CUDA once
device.on_wait(on_wait)
device.record.restype = ctypes.c_void_p
device.replay.argtypes = device.forget.argtypes = [ctypes.c_void_p]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.attention import flex_attention as flex  # noqa: E402

compile_, attention = torch.compile, flex.flex_attention


def attend(q, k, v, block_mask, enable_gqa):
    if torch.compiler.is_compiling():
        return attention(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa)
    size = len(q), None, q.shape[2], k.shape[2]
    mask = flex.create_mask(block_mask.mask_mod, *size, device=q.device)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=enable_gqa)


class Graph:
    calls = None

    def replay(self):
        device.replay(self.calls)

    def __del__(self):
        device.forget(self.calls)


@contextlib.contextmanager
def recording(graph, capture_error_mode="global"):
    graph.calls = device.record()
    try:
        yield
    finally:
        device.stop()


def pretend():
    """What of torch.cuda the CPU build has not."""
    state = [torch.arange(16, dtype=torch.uint8)]  # a GPU's is of 16 bytes
    index = [0]

    def set_rng_state(new, device="cuda"):
        assert new.device.type == "cpu" and new.dtype == torch.uint8 and new.numel() == 16
        state[0] = new

    def set_device(new):
        index[0] = torch.device(new).index
        device.set_device(index[0])

    cuda, says = torch.cuda, {"is_available": True, "is_initialized": True, "_is_compiled": True}
    says |= {"device_count": 8, "max_memory_allocated": 0, "is_bf16_supported": True}
    says |= dict.fromkeys(("synchronize", "reset_peak_memory_stats", "manual_seed_all"))
    for name, value in says.items():
        setattr(cuda, name, lambda *args, value=value, **how: value)
    cuda._initialized, cuda._lazy_init = True, lambda: None
    cuda.set_device, cuda.current_device = set_device, lambda: index[0]
    cuda.get_rng_state, cuda.set_rng_state = lambda *_: state[0].clone(), set_rng_state
    cuda.CUDAGraph, cuda.graph = Graph, recording
    cuda.device = lambda *_: contextlib.nullcontext()
    torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream = lambda: index[0], lambda _: 0
    torch.compile = lambda f: compile_(f, backend="aot_eager") if "--compile" in sys.argv else f
    flex.flex_attention = attend
    begin = dist.init_process_group
    dist.init_process_group = lambda backend, **how: begin("cpu:gloo,cuda:gloo", **how)


def main():
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    pretend()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if "WAITS" in os.environ:
            Path(os.environ["WAITS"]).write_text(json.dumps(waits.most_common(), indent=1))
