"""Sets that are larger than memory: decoded once into a file that is mapped, with the same training bit for bit."""

import errno
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cv_fixtures import column, same_tensors, short_config, short_run
from PIL import Image

from common import ROOT
from common.run.errors import UserError
from common.run.lock import alone_in
from cv.checkpoint import fingerprint
from cv.data import EpochLoader, cache, load_dataset, memory
from cv.data.decode import Decoder
from cv.trainer import train

IMAGES = 24  # a split


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two classes of 12x12 pixels."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(IMAGES):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, "memory_size", lambda: IMAGES * 3 * 12 * 12 - 1)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def on(pictures: Path, more: str = "") -> str:
    settings = "DISTILLER.TYPE vanilla DATASET.SUBSET 0 SOLVER.BATCH_SIZE 8 SOLVER.EPOCHS 2 DATASET.CROP resized"
    return f"DATASET.NAME folder DATASET.ROOT '{pictures}' {settings} {more}"


@pytest.mark.parametrize("more", ["", "DATASET.SUBSET 16", "DATASET.HELD_OUT 6"])
def test_a_run_from_the_file_is_one_from_memory_bit_for_bit(tmp_path, pictures, monkeypatch, more):
    whole = short_run(tmp_path / "a" / "run", None, on(pictures, more))
    monkeypatch.setattr(memory, "memory_size", lambda: IMAGES * 3 * 12 * 12 - 1)
    mapped = short_run(tmp_path / "b" / "run", None, on(pictures, more))
    assert len(files(tmp_path / "b" / "decoded_images")) == 2  # train and val
    assert not (tmp_path / "a" / "decoded_images").exists()
    assert column(mapped, "loss") == column(whole, "loss")
    assert same_tensors(mapped.weights, whole.weights)
    assert mapped.result["last"] == whole.result["last"]
    assert mapped.checkpoint["data_sha256"] == whole.checkpoint["data_sha256"]


@pytest.mark.usefixtures("little_memory")
def test_nothing_of_the_file_is_brought_to_the_device_but_the_batches(tmp_path, pictures):
    data = load_dataset("folder", pictures, cache=tmp_path / "c").train
    loader = EpochLoader(
        data, 5, augment=None, mean=(0,) * 3, std=(1,) * 3, device="meta", seed=0, shuffle=False
    )  # fmt: skip
    assert loader.image_set.images.device.type == "cpu"
    assert loader.image_set.images.data_ptr() == data.images.data_ptr()
    assert loader.image_set.labels.device.type == "meta"


def test_the_images_of_a_set_have_one_hash_wherever_they_lie(tmp_path, pictures, monkeypatch):
    in_memory = load_dataset("folder", pictures, subset=10).train
    monkeypatch.setattr(memory, "memory_size", lambda: IMAGES * 3 * 12 * 12 - 1)
    mapped = load_dataset("folder", pictures, subset=10, cache=tmp_path / "c").train
    assert len(mapped.images) == IMAGES
    assert fingerprint(mapped) == fingerprint(in_memory) == fingerprint([in_memory.images, in_memory.labels])


@pytest.mark.usefixtures("little_memory")
def test_the_file_is_made_once_and_used_again(tmp_path, pictures, monkeypatch):
    first = load_dataset("folder", pictures, cache=tmp_path / "c")
    monkeypatch.setattr(Decoder, "chunks", None)
    again = load_dataset("folder", pictures, cache=tmp_path / "c")
    assert torch.equal(again.train.images, first.train.images)
    assert first.notes[0].startswith(f"{IMAGES} images are larger than memory and are decoded into {tmp_path / 'c'}")
    assert "were decoded before into" in again.notes[0]


DAMAGES = {
    "cut off": lambda path: os.truncate(path, 100),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"1"),
    "another byte": lambda path: path.write_bytes(b"%c" % (path.read_bytes()[0] ^ 1) + path.read_bytes()[1:]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew(tmp_path, pictures, damage):
    expected = load_dataset("folder", pictures, cache=tmp_path / "c").train.images.clone()
    for path in files(tmp_path / "c"):
        damage(path)
    assert torch.equal(load_dataset("folder", pictures, cache=tmp_path / "c").train.images, expected)


def replaced(pictures: Path) -> None:
    path = pictures / "train" / "a" / "0.png"
    time.sleep(0.01)
    Image.new("RGB", (12, 12), "red").save(path)


CHANGES = {
    "an image": replaced,
    "one more": lambda pictures: shutil.copy(pictures / "train/a/0.png", pictures / "train/a/00.png"),
    "a name": lambda pictures: (pictures / "train/a/0.png").rename(pictures / "train/a/x.png"),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_images_are_decoded_into_another_file(tmp_path, pictures, change):
    load_dataset("folder", pictures, cache=tmp_path / "c")
    change(pictures)
    found = load_dataset("folder", pictures, cache=tmp_path / "c").train
    assert torch.equal(found.images, load_dataset_in_memory(pictures).images)
    assert len(files(tmp_path / "c")) == 3


def load_dataset_in_memory(pictures: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "memory_size", lambda: 2**40)
        return load_dataset("folder", pictures).train


@pytest.mark.usefixtures("little_memory")
def test_another_size_is_another_file(tmp_path, pictures):
    for size in (12, 13):
        load_dataset("folder", pictures, image_size=size, cache=tmp_path / "c")
    assert len(files(tmp_path / "c")) == 4


@pytest.mark.usefixtures("little_memory")
def test_a_disk_without_room_is_one_line_before_anything_is_written(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(UserError, match=r"has 10 bytes free of the 10\.4 kB that they take; set a smaller DATASET"):
        train(short_config(tmp_path / "run", None, on(pictures)))
    assert files(tmp_path / "decoded_images") == []


FULL = """
import cv.data.cache, cv.data.memory, sys
cv.data.memory.memory_size = lambda: 10_000
def full(path, decoder):
    path.write_bytes(b"1")
    raise OSError({}, "No space left on device")
cv.data.cache._write = full
sys.argv = ["cv/train_svd.py", *sys.argv[1:]]
from common.run.errors import run_cli
from cv.train_svd import main
run_cli(main)
"""


def test_a_disk_that_fills_up_is_one_line(tmp_path, pictures):
    words = f"--cfg configs/demo/base.yaml OUTPUT_DIR {tmp_path / 'run'} DISTILLER.STUDENT resnet8 DATASET.NAME folder "
    command = [sys.executable, "-c", FULL.format(errno.ENOSPC), *words.split(), "DATASET.ROOT", str(pictures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "decoded_images" in done.stderr.splitlines()[-1]
    assert files(tmp_path / "decoded_images") == []  # not what was being written either


@pytest.mark.usefixtures("little_memory")
def test_an_unreadable_image_leaves_no_file(tmp_path, pictures):
    (pictures / "train" / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png: not a readable image"):
        load_dataset("folder", pictures, cache=tmp_path / "c")
    assert files(tmp_path / "c") == []


@pytest.mark.usefixtures("little_memory")
def test_what_a_killed_run_was_writing_is_removed(tmp_path, pictures):
    (tmp_path / "c").mkdir()
    left = tmp_path / "c" / ".x.uint8.123.tmp"
    left.write_bytes(b"1")
    load_dataset("folder", pictures, cache=tmp_path / "c")
    assert not left.exists()


@pytest.mark.usefixtures("little_memory")
def test_a_run_waits_while_another_decodes(tmp_path, pictures):
    with ThreadPoolExecutor(1) as pool:
        with alone_in(tmp_path / "c"):
            reading = pool.submit(load_dataset, "folder", pictures, cache=tmp_path / "c")
            time.sleep(0.5)
            waited = not reading.done()
        assert len(reading.result().train) == IMAGES
    assert waited


def test_large_images_come_in_their_order_from_threads_too(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(150)]
    for number, path in enumerate(paths):
        Image.new("RGB", (140, 140), (number, 0, 0)).save(path)
    chunks = list(Decoder(paths, str, 4).chunks())
    assert np.concatenate(chunks)[:, 0, 0, 0].tolist() == list(range(150))
    assert max(map(len, chunks)) == 64
