"""`torchrun --max-restarts`: processes that are started again find each other, and go on with the run."""

import os
import secrets
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store

_PATIENCE = 600  # seconds until a process that waits for the others ends with an error, and torchrun starts all again
_POLL = 0.05  # seconds; in between a signal is received


class Meeting(NamedTuple):
    """What the processes of one start agree on.

    name: of this start alone, the same in all processes.
    restarts: the largest number of restarts that an agent of torchrun counts; of two, each counts its own.
    """

    name: str
    restarts: int


def resumes_after_restart(folder: Path) -> bool:
    """Whether torchrun has started this process again, and there is a run in the folder to go on with.

    A run that is to replace an earlier one is not asked about: a restart replaces it once more, as the earlier run may
    still be there.
    """
    restarts = _met()[1].restarts if _shares_a_store() else int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts or not (folder / "config.json").exists():
        return False
    if os.environ.get("RANK", "0") == "0":
        print(f"note: started again by torchrun, the run in {folder} is resumed", flush=True)
    return True


def start_group() -> None:
    """Start the process group where torchrun may restart; elsewhere accelerate does it.

    The store of torchrun outlives a restart (torch 2.13). Processes that are started again and look there for each
    other's addresses may find those of the dead, and wait for ever or end with "Connection refused"; so the keys of
    every start get a prefix. https://github.com/pytorch/pytorch/issues/135712
    """
    import torch
    from torch import distributed as dist

    if not _shares_a_store() or dist.is_initialized():
        return
    store, meeting = _met()
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(meeting.name, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(minutes=30),  # transformers' own
    )


def meet(store: "Store", rank: int, size: int, restarts: int, patience: float = _PATIENCE) -> Meeting:
    """Wait for the other processes of this start, in a store that may hold what earlier starts have left.

    Process 0 names the meeting. The others sign up for what they read, which may be an earlier one, until process 0
    greets them by a name of their own: only one that is alive can know it.

    Raises:
        TimeoutError: they have not all come within `patience` seconds.
    """
    own, end = secrets.token_hex(8), time.monotonic() + patience
    if rank == 0:
        store.set("meeting", own)
        signed = [f"{own} {other}" for other in range(1, size)]
        while not store.check(signed):
            _pause(end)
        names, counts = zip((own, restarts), *(_parsed(store.get(key)) for key in signed), strict=True)
        for name in names:
            store.set(f"{own} {name}", str(max(counts)))
        return Meeting(own, max(counts))
    meeting = ""
    while not store.check([f"{meeting} {own}"]):
        if store.check(["meeting"]) and (read := store.get("meeting").decode()) != meeting:
            meeting = read
            store.set(f"{meeting} {rank}", f"{own} {restarts}")
        _pause(end)
    return Meeting(meeting, int(store.get(f"{meeting} {own}")))


def _parsed(value: bytes) -> tuple[str, int]:
    name, restarts = value.decode().split()
    return name, int(restarts)


def _pause(end: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError("the other processes that torchrun started have not come")
    time.sleep(_POLL)


def _shares_a_store() -> bool:
    """Whether torchrun may start several processes again that meet in a store of its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return several and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@cache
def _met() -> tuple["Store", Meeting]:
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return store, meet(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), restarts)
