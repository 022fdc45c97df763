"""What every test gets: a seed, torch's own noise silenced, a check that torch is left as found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # torch says this once per process about its own kernels, for a float32 LSTM with proj_size
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
    )
    if hasattr(config, "workerinput"):  # one of several processes: each has a core of its own
        torch.set_num_threads(1)


# torch's fused LSTM takes bfloat16 only where the processor has AVX-512 for it, and raises elsewhere
BFLOAT16_LSTM = torch.ops.mkldnn._is_mkldnn_bf16_supported()
FUSED = [
    f"{cell}{end}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for end in ("", "_cell")
]
FOUND = {name: getattr(torch._VF, name) for name in FUSED}
FOUND_ALIASES = {name: getattr(torch, name) for name in FUSED}
FOUND_BACKWARD = torch.autograd._engine_run_backward
FOUND_FORWARD = torch.nn.Sequential.forward
FOUND_VF_NAMES = set(vars(torch._VF))


def torch_is_as_found() -> bool:
    """Whether torch's fused functions are the ones that were there before any test ran."""
    return (
        all(getattr(torch._VF, name) is FOUND[name] for name in FUSED)
        and all(getattr(torch, name) is FOUND_ALIASES[name] for name in FUSED)
        and set(vars(torch._VF)) == FOUND_VF_NAMES
        and torch.autograd._engine_run_backward is FOUND_BACKWARD
        and torch.nn.Sequential.forward is FOUND_FORWARD
        and not torch.nn.modules.module._global_forward_hooks
        and not torch.nn.modules.module._global_forward_pre_hooks
    )


@pytest.fixture(autouse=True)
def _seeded_and_left_as_found() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch_is_as_found(), "a test (or gradflow) left torch._VF, torch or global hooks changed"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> str:
    """A browser on this machine, in which the pages are checked."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    words = f"the page is checked in a browser, and none of {', '.join(BROWSERS)} was found"
    if os.environ.get("GRADFLOW_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{words}; install one, or unset GRADFLOW_REQUIRE_BROWSER")
    pytest.skip(words)
