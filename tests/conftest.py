"""Before anything imports Triton or a Hub library: without a GPU kernels run in the interpreter, and no test touches a
network. Nothing else sets TRITON_INTERPRET, and a test that is marked gpu fails where a kernel runs interpreted."""

import atexit
import gc
import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreted import interpreted_kernels, mend_the_interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    mend_the_interpreter()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the cores are taken by the other workers
# For this process and the ones that tests start.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


gc.disable()  # while all is imported: looking through it again and again takes a quarter of the time


def pytest_collection_finish():
    """What the imports made lives until the end: accelerate's many gc.collect() need not look through it, each time for
    a third of a second."""
    gc.enable()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    # accelerate collects garbage before and after every run: with all that lives here, a tenth of a second each time.
    if "accelerate" in sys.modules:
        sys.modules["accelerate.utils.memory"].gc = SimpleNamespace(collect=lambda: 0)
    if "children" in sys.modules and not torch.cuda.is_available():
        sys.modules["children"].fork_from_here()


# Or Triton's bindings report what they find at the end as leaks; pytest looks through all that lives before.
atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="session")
def no_flush_to_disk():
    """Kills, which are all that tests can do, leave what was written; a crash of the machine would not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def layouts_are_chosen_once():
    """But in their own tests, which change what a class does."""
    from layouts import chosen_once

    from amopo_fast.models import check

    unchanged = tuple(f"tests/models/test_{name}.py" for name in ("families", "kinds", "real_logits", "text_part"))
    choose = check.choose_layout

    def chosen(model, requested="auto"):
        test = os.environ["PYTEST_CURRENT_TEST"]
        return (choose if "tests/models/" in test and not test.startswith(unchanged) else chosen_once)(model, requested)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "choose_layout", chosen)
        yield


@pytest.fixture(autouse=True)
def compiled_on_a_gpu(request):
    """A GPU test whose kernels were interpreted would prove nothing."""
    yield
    if request.node.get_closest_marker("gpu"):
        assert torch.cuda.is_available(), "a test that is marked gpu needs a skipif without CUDA"
        assert not interpreted_kernels()


_LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::")
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _check(host) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host or "127.0.0.1")
    if not (name.startswith(_LOCAL) or name == socket.gethostname()):
        raise AssertionError(f"a test asked for {name}: no test touches a network")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Loopback and Unix sockets alone."""

    def guarded(function):
        def connect(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _check(address[0])
            return function(self, address)

        return connect

    def getaddrinfo(host, *args, **kwargs):
        _check(host)
        return _getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(_connect))
        patch.setattr(socket.socket, "connect_ex", guarded(_connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield
