"""What state of the code a run was made by, so that rows of two states are told apart."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from common import ROOT

PROGRAMS = ("cv", "nlp")


@cache
def sources(script: Path, revision: str) -> str:
    """12 digits that change with the files that a script's runs depend on.

    Args:
        script: a program, which depends on its folder; another script of this tree depends on itself, as it is now, and
            on examples/; all of these on common/ and dskd/. A script that lies elsewhere depends on itself alone.
        revision: of git.

    Returns:
        "" where that cannot be told: a tree with changes, an unknown revision.
    """
    inside = script.relative_to(ROOT) if script.is_relative_to(ROOT) else None
    if inside is None:
        return hashlib.sha256(script.read_bytes()).hexdigest()[:12] if script.is_file() else ""
    program = inside.parts[0] in PROGRAMS
    own = [inside.parts[0]] if program else ["examples"]
    listing = ["git", "-C", str(ROOT), "ls-tree", revision, "--", *own, "common", "dskd"]
    try:
        found = subprocess.run(listing, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return hashlib.sha256(found + (b"" if program else script.read_bytes())).hexdigest()[:12]
