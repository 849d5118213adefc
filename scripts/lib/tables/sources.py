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
        script: a program, which depends on its folder, or another script, which depends on itself and on examples/;
            both depend on common/ and dskd/.
        revision: of git.

    Returns:
        "" where that cannot be told: a tree with changes, an unknown revision, a script that is not in this tree.
    """
    if not script.is_relative_to(ROOT):
        return ""
    inside = script.relative_to(ROOT)
    own = [inside.parts[0]] if inside.parts[0] in PROGRAMS else [inside.as_posix(), "examples"]
    listing = ["git", "-C", str(ROOT), "ls-tree", revision, "--", *own, "common", "dskd"]
    try:
        found = subprocess.run(listing, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return hashlib.sha256(found).hexdigest()[:12]
