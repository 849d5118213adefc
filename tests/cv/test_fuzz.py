"""Whatever is in an image or a parquet file, it gives pixels or one UserError that names the file."""

import io
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.run.errors import UserError
from cv.data.cifar import CIFAR10, read_parquet
from cv.data.decode import decode_images
from cv.data.folders import read_folder
from cv.export import load_model

FUZZ = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"),
    "PPM": ("1", "L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
}


def encoded(kind: str, mode: str, size: tuple[int, int], seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    width, height = size
    pixels = torch.randint(256, (height, width * 8), generator=generator, dtype=torch.uint8).numpy().tobytes()
    bits = {"1": (width + 7) // 8, "I": 4 * width, "F": 4 * width, "I;16": 2 * width}
    row = bits.get(mode, width * len(Image.new(mode, (1, 1)).getbands()))
    image = Image.frombytes(mode, size, pixels[: row * height])
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@st.composite
def images(draw) -> bytes:
    """A small image of any format and mode, whole, cut off, with some bytes changed, or with noise behind its head."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    content = bytearray(encoded(kind, draw(st.sampled_from(KINDS[kind])), size, draw(st.integers(0, 9))))
    how = draw(st.sampled_from(("whole", "cut off", "changed", "noise")))
    if how == "cut off":
        return bytes(content[: draw(st.integers(0, len(content)))])
    if how == "noise":
        return bytes(content[: draw(st.integers(0, 40))]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 6)) if how == "changed" else 0):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


def pixels_or_refusal(read, name: str):
    """What was read, or None where an error with the file's name says what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata and large sizes
        try:
            return read()
        except UserError as error:
            refusal = str(error)
    assert name in refusal
    return None


@FUZZ
@given(st.lists(st.binary(max_size=300) | images(), min_size=1, max_size=3), st.sampled_from([None, 1, 8]))
def test_images_are_pixels_of_one_size_or_one_error(sources, size):
    found = pixels_or_refusal(lambda: decode_images(sources, "image {}".format, size), "image")
    if found is not None:
        assert found.dtype == torch.uint8
        assert found.shape[:2] == (len(sources), 3)
        assert size is None or found.shape[2:] == (size, size)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in KINDS.items() for mode in modes])
def test_every_mode_is_read_whole_and_never_half(kind, mode):
    whole = encoded(kind, mode, (9, 7), 1)
    found = pixels_or_refusal(lambda: decode_images([whole], "image {}".format), "image 0: not a readable image")
    assert (found is None) == (mode in ("F", "I"))
    for end in range(0, len(whole) - 1, max(1, len(whole) // 25)):
        cut = whole[:end]
        pixels_or_refusal(lambda cut=cut: decode_images([cut], "image {}".format), "image 0: not a readable image")


@settings(FUZZ, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["train/a", "train/b", "val/a", "val/b", "val/c", "train", "val"]),
        st.lists(
            st.tuples(st.sampled_from([".png", ".JPG", ".txt", ""]), st.binary(max_size=50) | images()), max_size=2
        ),
    ),
    st.sampled_from([None, 4]),
)
def test_a_folder_is_a_data_set_or_one_error(tmp_path_factory, folders, size):
    root = tmp_path_factory.mktemp("root")
    for folder, files in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number, (ending, content) in enumerate(files):
            (root / folder / f"{number}{ending}").write_bytes(content)
    found = pixels_or_refusal(lambda: read_folder(root, size), str(root))
    if found is not None:
        train, test, classes, _ = found
        assert train.num_classes == test.num_classes == len(classes)
        assert len(train) > 0


@st.composite
def parquets(draw) -> bytes:
    """A parquet file of images and labels, or of something else, whole or with some bytes changed."""
    size = draw(st.integers(0, 3))
    column = draw(st.sampled_from(["img", "image", "x"]))
    cells = st.sampled_from([encoded("PNG", "RGB", (32, 32), 1), encoded("PNG", "L", (8, 8), 1), b"", None])
    labels = st.integers(-1, 10) | st.none()
    table = {column: draw(st.lists(cells, min_size=size, max_size=size))}
    table["label"] = draw(st.lists(labels | st.just("a"), min_size=size, max_size=size))
    try:
        table = pa.table(table)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # labels of two types
        table = pa.table({"label": [1.5]})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": draw(st.binary(max_size=20))}), buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([None, None, 7, len(content) // 2]))])


@FUZZ
@given(parquets() | st.binary(max_size=100))
def test_a_parquet_file_is_pixels_or_one_error(tmp_path, content):
    path = tmp_path / "train-0.parquet"
    path.write_bytes(content)
    pixels_or_refusal(lambda: read_parquet(CIFAR10, [path]), str(path))


@FUZZ
@given(st.binary(max_size=100), st.binary(max_size=100), st.sampled_from([b"", b'{"architecture": "resnet8", ']))
def test_a_saved_network_is_one_or_one_error(tmp_path, description, weights, begin):
    (tmp_path / "model.json").write_bytes(begin + description)
    (tmp_path / "model.safetensors").write_bytes(weights)
    pixels_or_refusal(lambda: load_model(tmp_path), str(tmp_path))
