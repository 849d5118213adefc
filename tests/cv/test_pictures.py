"""People's own pictures: every kind of pixel by its rule; what of a folder is read, left out, followed and named."""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.run.errors import UserError
from cv.data import load_dataset
from cv.data.decode import decode_images
from cv.data.folders import _endings


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """(H, W, 3) of what is read of an image that was saved."""
    return decode_images([encoded(image, kind, **options)], str)[0].permute(1, 2, 0).numpy()


def refusal(image: Image.Image, kind: str) -> str:
    with pytest.raises(UserError) as caught:
        decoded(image, kind)
    return str(caught.value)


WORDS = np.array([[0, 257, 32768], [65535, 4112, 128]], dtype=np.uint16)
SCALED = np.array([[0, 1, 128], [255, 16, 0]])


def test_16_bit_grey_is_scaled():
    assert np.array_equal(decoded(Image.fromarray(WORDS))[..., 0], SCALED)


@pytest.mark.parametrize("kind", ["PPM", "TIFF"])
def test_whole_numbers_of_32_bits_are_scaled_as_16(kind):
    image = Image.fromarray(WORDS.astype(np.int32))
    assert image.mode == "I"
    assert np.array_equal(decoded(image, kind)[..., 2], SCALED)


@pytest.mark.parametrize("value", [-1, 65536])
def test_whole_numbers_beyond_16_bits_are_refused(value):
    image = Image.fromarray(np.array([[7, value]], dtype=np.int32))
    assert "0: not a readable image (whole-number pixels from" in refusal(image, "TIFF")


def test_floating_point_is_refused():
    image = Image.fromarray(np.ones((2, 2), dtype=np.float32))
    assert refusal(image, "TIFF").startswith("0: not a readable image (floating-point pixels, whose range is not known")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied(orientation):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {  # of the standard: where row 0 and column 0 of the stored image belong
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    assert np.array_equal(decoded(Image.fromarray(pixels), exif=exif), turned[orientation])


def test_damaged_exif_does_not_stop_the_run():
    pixels = np.full((8, 8, 3), 90, dtype=np.uint8)
    assert decoded(Image.fromarray(pixels), "JPEG", exif=b"Exif\0\0junk").shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    glyph = Image.new(mode, (3, 1), (0,) * len(mode))  # black on transparent black
    glyph.putpixel((1, 0), (0,) * (len(mode) - 1) + (255,))
    glyph.putpixel((2, 0), (0,) * (len(mode) - 1) + (51,))
    assert decoded(glyph)[0, :, 1].tolist() == [255, 0, 204]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    assert decoded(image, kind, transparency=0)[0].tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize(("mode", "nothing"), [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 1799)])
def test_a_transparent_value_is_white(mode, nothing):
    pixels = np.array([[7, 9]], dtype=np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
    assert decoded(image if mode == "I;16" else image.convert(mode), transparency=nothing)[0, :, 0].tolist() == [255, 9]


def test_cmyk_is_converted_without_a_profile():
    image = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
    assert decoded(image, "TIFF").tolist() == [[[0, 255, 255]]]


def test_one_bit_is_black_and_white():
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert decoded(image)[0, :, 0].tolist() == [255, 0]


def test_a_palette_gives_its_colours():
    image = Image.new("P", (1, 1))
    image.putpalette([1, 2, 3])
    assert decoded(image).tolist() == [[[1, 2, 3]]]


def test_grey_is_the_same_in_all_channels():
    assert decoded(Image.new("L", (1, 1), 77)).tolist() == [[[77] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert image.reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it passes over
def test_damaged_bytes_are_an_image_or_one_line(kind):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)), kind)
    rng = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 120), 3):
            broken[place] = rng.integers(256)
        with suppress(UserError):
            assert decode_images([bytes(broken)], str).shape[:2] == (1, 3)


# Folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """train/ and val/ with the classes ant and bee, two images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset("folder", folder)
    return str(caught.value)


def test_an_ordinary_folder_has_no_notes(folder):
    assert load_dataset("folder", folder).notes == ()


def test_names_that_begin_with_a_dot_are_skipped(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train" / ".ipynb_checkpoints" / "0.png")
    (folder / "train" / "ant" / "._001.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "train" / "ant" / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train" / "ant" / ".thumbnails" / "0.png")
    data = load_dataset("folder", folder)
    assert (data.classes, len(data.train)) == (["ant", "bee"], 4)


@pytest.mark.parametrize(("ending", "kind"), [(".jfif", "JPEG"), (".gif", "GIF"), (".JPG", "JPEG")])
def test_images_of_further_endings_are_read(folder, ending, kind):
    (folder / "train" / "ant" / f"more{ending}").write_bytes(encoded(Image.new("RGB", (8, 8)), kind))
    assert len(load_dataset("folder", folder).train) == 5


def test_an_image_that_pillow_may_read_is_read_where_it_does_and_counted_otherwise(folder, monkeypatch):
    (folder / "train" / "ant" / "photo.heic").write_bytes(b"heic")
    monkeypatch.setattr("cv.data.folders._endings", lambda: (*_endings(), ".heic"))
    assert "photo.heic: not a readable image" in refused(folder)
    monkeypatch.setattr("cv.data.folders._endings", lambda: (".png",))
    data = load_dataset("folder", folder)
    assert data.notes == (f"{folder / 'train'}: 1 files left out, no images that are read here: .heic 1",)


def test_avif_is_read_by_a_pillow_that_can(folder):
    from PIL import features

    assert (".avif" in _endings()) == bool(features.check("avif"))
    assert ".heic" not in _endings()


def test_left_out_files_are_counted_by_ending(folder):
    for name in ("a.txt", "b.TXT", "Thumbs.db", "README"):
        (folder / "train" / "bee" / name).write_text("")
    [note] = load_dataset("folder", folder).notes
    assert note == f"{folder / 'train'}: 4 files left out, no images that are read here: .txt 2, (no ending) 1, .db 1"


def test_a_class_without_test_images_is_named(folder):
    for path in (folder / "val" / "bee").iterdir():
        path.unlink()
    expected = f"{folder / 'val'}: no image of 1 of 2 classes: bee"
    assert load_dataset("folder", folder).notes == (expected,)
    (folder / "val" / "bee").rmdir()
    assert load_dataset("folder", folder).notes == (expected,)


def test_a_class_without_training_images_is_refused_with_what_is_in_it(folder):
    (folder / "train" / "cat").mkdir()
    (folder / "train" / "cat" / "1.xcf").write_text("")
    assert refused(folder).startswith(f"{folder / 'train'}: no image in class cat (left out there: .xcf 1); images end")


def test_a_link_that_leads_back_adds_no_image_and_is_reported(folder):
    (folder / "train" / "ant" / "back").symlink_to("..")
    (folder / "train" / "bee" / "self").symlink_to(".")
    data = load_dataset("folder", folder)
    assert len(data.train) == 4
    [note] = data.notes
    assert "2 links not followed, as they lead to a folder that is read already" in note


def test_a_link_to_another_folder_is_followed_and_reported(folder, tmp_path_factory):
    more = tmp_path_factory.mktemp("more")
    Image.new("RGB", (8, 8), "red").save(more / "9.png")
    (folder / "train" / "ant" / "more").symlink_to(more)
    (more / "again").symlink_to(folder / "train" / "ant")
    data = load_dataset("folder", folder)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.notes[0].endswith(f"1 links to folders followed: {folder / 'train' / 'ant' / 'more'}")
    assert "1 links not followed" in data.notes[1]


def test_a_broken_link_is_counted(folder):
    (folder / "train" / "ant" / "gone.png").symlink_to("nowhere.png")
    [note] = load_dataset("folder", folder).notes
    assert note.endswith("(broken link) 1")


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert refused(folder) == f"{folder / 'train' / 'bee'}: the folder cannot be read: Permission denied"


def test_images_come_in_the_order_of_torchvision(folder):
    from torchvision.datasets import ImageFolder

    for name in ("ant/z", "ant/a/b", "bee/0"):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "green").save(folder / "train" / name / "5.png")
    from cv.data.folders import _list_images

    ours, classes, _ = _list_images(folder / "train")
    theirs = ImageFolder(folder / "train")
    assert [(str(path), name) for path, name in ours] == [(path, classes[label]) for path, label in theirs.samples]


def test_images_larger_than_the_memory_are_refused_before_they_are_made(folder):
    with pytest.raises(UserError, match=r"^4 images of 40000000x40000000 pixels need .* GiB of memory, and this"):
        load_dataset("folder", folder, image_size=40_000_000)
    with pytest.raises(UserError, match=r"images of \d+x\d+ pixels need"):
        load_dataset("digits", "", image_size=10**30)


def test_a_broken_archive_is_called_broken(tmp_path, monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(b"half of it")
    with pytest.raises(UserError) as caught:
        load_dataset("cifar100", tmp_path)
    assert str(caught.value).startswith(f"{archive}: broken, as its checksum is not the official one (10 bytes")
    assert "not found" not in str(caught.value)
