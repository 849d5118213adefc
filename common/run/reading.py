"""Files of a user, read with bounds: whatever is wrong with one becomes a `UserError` with its name.

A damaged file can be cut off, of another type, nested thousands deep, or claim a size that no memory holds.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.run.errors import UserError

MOST_BYTES = 256 * 2**20  # of a text file that is read whole
LARGEST = 2**63  # numbers beyond are no size, count or score that this project knows


@contextmanager
def reading(path: Path | str, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault: a `UserError` with its name, and with what it should be."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{path} is nested too deeply or too large to be read") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is not {what or 'as it should be'}: {reason}") from error


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A text file in UTF-8; a UserError where it cannot be read, or is too large."""
    with reading(path, "text"):
        if path.stat().st_size > most:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {most:,} are read")
        return path.read_text(encoding="utf-8")


def parse_json(text: str, where: Path | str, kind: type = dict, *, finite: bool = True) -> Any:
    """A JSON text whose value is of a type; numbers are no larger than `LARGEST`, and finite unless a file may differ:
    Python writes NaN, the correlation with a constant, as such."""
    hooks = {"parse_float": _finite, "parse_constant": _no_number} if finite else {}
    with reading(where, "valid JSON"):
        value = json.loads(text, parse_int=_whole, **hooks)
        if not isinstance(value, kind):
            raise UserError(f"{where} holds a {type(value).__name__}, not a {kind.__name__}")
        return value


def read_json(path: Path, kind: type = dict, *, finite: bool = True) -> Any:
    """A JSON file; see `parse_json`."""
    return parse_json(read_text(path), path, kind, finite=finite)


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file; a last line that was cut off (no line end) is left out."""
    lines = read_text(path).split("\n")[:-1]
    return [parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def read_yaml(path: Path) -> Any:
    """A YAML file, as this project reads it (yaml_files)."""
    import yaml

    from common.run.yaml_files import UniqueKeyLoader

    with reading(path, "valid YAML"):
        return yaml.load(read_text(path, most=2**20), UniqueKeyLoader)


def read_tensors(path: Path) -> Any:
    """A file of torch.save, on the CPU; no code of it is run."""
    import torch

    with reading(path, "a file of torch.save, or is cut off"):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> dict:
    """Name -> tensor of a safetensors file."""
    from safetensors.torch import load_file

    with reading(path, "a safetensors file, or is cut off"):
        return load_file(path)


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"the number {text[:20]}{'...' if len(text) > 20 else ''} is too large")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")
