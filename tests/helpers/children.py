"""The processes that tests start.

`run` and `Child` are for programs that import torch and transformers, which is most of what they would do: they are
forked from a process that has imported both. What an import itself does is tested in a fresh interpreter.
"""

import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver, util
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PRELOAD = ["torch", "numpy", "safetensors.torch", "transformers.trainer", "peft", "accelerate", "datasets",
           "amopo_fast.training.trainer", "amopo_fast.cli.train"]  # fmt: skip
# Else asking whether there is a GPU initialises CUDA, which no forked process can use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PRELOAD)


def fork_from_here() -> None:
    """Makes multiprocessing's fork server a fork of this process, which has imported all that is needed.

    To be called when nothing has run yet; not with a GPU, where anything may have initialised CUDA."""
    address = connection.arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        alive, held = os.pipe()  # the server ends when nobody holds the other end
        pid = os.fork()
        if not pid:
            try:
                os.close(held)
                forkserver.main(listener.fileno(), alive, PRELOAD)  # as a rule imported already
            finally:
                util._exit_function()
                os._exit(0)
    os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, held, pid


def child_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's, with this checkout and the folders first on PYTHONPATH, and the variables."""
    path = [*map(str, (ROOT, ROOT / "kernels", *folders)), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}


class Child:
    """What `python *command` would be, as a subprocess.Popen: with one thread, and its output in files."""

    def __init__(self, *command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None):
        self.files = [tempfile.NamedTemporaryFile("r") for _ in ("output", "errors")]
        names = [file.name for file in self.files]
        environment = environment or child_environment()
        self.process = _processes.Process(target=_become, args=(command, str(cwd), environment, *names))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.files[0].name).read_text()

    def wait(self, timeout: float | None = None) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"it still ran after {timeout} s")
        output, errors = (Path(file.name).read_text() for file in self.files)
        return subprocess.CompletedProcess(self.pid, self.process.exitcode, output, errors)


def run(*command: str, timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    return Child(*command, **options).wait(timeout)


def start_processes(function, arguments: tuple, **options):
    """torch.multiprocessing.start_processes, forked likewise."""
    return torch.multiprocessing.start_processes(function, arguments, start_method="forkserver", **options)


def until(condition, child: Child, seconds: float = 120) -> None:
    """Waits for what a running child is to bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < deadline, child.output()
        time.sleep(0.02)


def _become(command: tuple[str, ...], cwd: str, environment: dict[str, str], output: str, errors: str) -> None:
    import torch._dynamo

    for number, name in ((1, output), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            # Made when the libraries were imported. One without a stream, torch's, would close what it is given.
            if isinstance(handler, logging.StreamHandler) and handler.stream is not None:
                handler.setStream(sys.stderr)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    torch._dynamo.config.disable |= environment.get("TORCHDYNAMO_DISABLE") == "1"  # read when torch was imported
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")
