"""The programs in several processes that torchrun starts, one of which may be killed in the midst of a step."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from common import ROOT

GLUE = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
VISION = ROOT / "cv" / "train_svd.py"

# The command line of a program; in the first start, process 1 is killed when it comes to the given step.
KILLED = """
import os, runpy, signal, sys
program, step = sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[1:2] + sys.argv[3:]
sys.path[:0] = [{root!r}, os.path.dirname(program)]
from common.torchvision_repair import repair_torchvision
repair_torchvision()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    from torch.optim import Optimizer
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(count)
runpy.run_path(program, run_name="__main__")
"""


def environment() -> dict[str, str]:
    """One thread a process, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, words)]


def launch(program: Path, words: list[str], *how: str, seconds: int = 240) -> subprocess.CompletedProcess:
    """The program in two processes, `how` more flags of torchrun."""
    command = torchrun("--standalone", "--nproc_per_node=2", *how, program, *words)
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=seconds)


def launch_killed(program: Path, words: list[str], step: int, script: Path) -> subprocess.CompletedProcess:
    """The same with a restart, after process 1 was killed at a step; `script`: where to write the wrapper."""
    script.write_text(KILLED.format(root=str(ROOT)))
    return launch(script, [str(program), str(step), *words], "--max-restarts=1")


def launch_two_agents(program: Path, words: list[str], seconds: int = 300) -> list[str]:
    """The output of two agents with a process each, that meet on the loopback as two machines would."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    how = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    how += ["--rdzv-id=test", "--local-addr=127.0.0.1"]
    command = torchrun(*how, program, *words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) for _ in range(2)]
    try:
        said = [agent.communicate(timeout=seconds) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
    assert [agent.returncode for agent in agents] == [0, 0], "".join(errors[-2000:] for _, errors in said)
    return [printed for printed, _ in said]
