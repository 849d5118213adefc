"""Several processes: what one of those that torchrun started says need not be said by all; cores to share."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

from common.run.errors import UserError
from common.run.stopping import Stopped


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def said_once(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, of whose errors of the user each is told by the first process that has it; how it ends stays the same."""

    def run() -> None:
        try:
            main()
        except UserError as error:
            if not _first_to_say(str(error)):
                sys.exit(2)
            raise
        except Stopped as stopped:
            if os.environ.get("RANK", "0") != "0":
                sys.exit(stopped.code)
            raise

    return run


def _first_to_say(message: str) -> bool:
    """Whether no other process has said it, as far as that can be found out: in the store of torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {message}", 1) == 1
    except Exception:  # rather twice than not at all
        return True
