"""Shared by the tests: a small vocabulary, small models, real public data where it is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from model import GPT, GPTConfig, load_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """The embedded task's files for seed 0."""
    out = tmp_path_factory.mktemp("toy")
    command = [sys.executable, str(ROOT / "data/toy.py"), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def tokenizer(toy_data):
    return load_tokenizer(toy_data / "bpe.tiktoken")


@pytest.fixture
def small_gpt():
    """A GPT of 2 layers with weights large enough that nothing is nearly uniform."""

    def make(scalar_head=False, dtype=torch.float32, seed=0, **settings):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = GPTConfig(**sizes | {"initializer_range": 0.3} | settings)
        return GPT(config, scalar_head).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def shared():
    """The folder that PLAINRLHF_SHARED names: public data and GPT-2's vocabulary."""
    folder = os.environ.get("PLAINRLHF_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PLAINRLHF_SHARED names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken-cache"))
    return load_tokenizer("gpt2")
