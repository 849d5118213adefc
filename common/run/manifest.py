"""What a checkpoint consists of, written last: a checkpoint that is damaged or incomplete is told from a whole one."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from common.run.errors import UserError
from common.run.files import write_json
from common.run.reading import read_json

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(paths: Iterable[Path]) -> str:
    """One hash of the names and contents of several files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


def write_manifest(manifest: Path, files: Iterable[Path]) -> None:
    """Record size and sha256 of files, which lie beside the manifest or below, as the last step of a checkpoint."""
    entries = {
        path.relative_to(manifest.parent).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(files)
    }
    write_json(manifest, {"files": entries})


def damage(manifest: Path) -> str | None:
    """What is wrong with the checkpoint of a manifest, in words; None if all of its files are as they were written."""
    if not manifest.exists():
        return f"it has no {manifest.name}: it was not written to its end"
    try:
        entries = read_json(manifest).get("files")
        for name, entry in entries.items():
            path = manifest.parent / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} is not as it was written"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{manifest.name} is not as it was written"
    return None


def last_whole(manifests: Iterable[Path], restart: str) -> tuple[Path | None, list[str]]:
    """(the first manifest of a whole checkpoint, what is to be said of those passed over).

    Args:
        manifests: of the checkpoints of a run, the newest first; they need not exist.
        restart: the flag that starts the run again.

    Raises:
        UserError: there are checkpoints that were whole once, and none is now. Where none was ever complete there is
            nothing to lose, and a run starts from the beginning.
    """
    passed, lost = [], False
    for manifest in manifests:
        reason = damage(manifest)
        if reason is None:
            return manifest, passed
        lost = lost or manifest.exists()
        name = manifest.parent if manifest.name == MANIFEST else manifest
        passed.append(f"{name} is passed over: {reason}")
    if lost:
        raise UserError(f"--resume: no checkpoint is whole ({passed[0]}); start again with {restart}")
    return None, passed
