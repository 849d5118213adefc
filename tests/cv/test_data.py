"""Image data: every layout, the augmentation's distribution against torchvision, epochs as functions of the seed."""

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from scipy.stats import chisquare
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as TF

from common.run.errors import UserError
from cv.data import Augment, EpochLoader, ImageSet, cifar, load_dataset, normalize
from cv.data.cifar import CIFAR100, read_parquet
from cv.data.image_set import balanced_subset, channel_statistics, choose_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random_images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_parquet(path: Path, images, labels, image_column="img", label_column="fine_label", names=None) -> None:
    rows = [image if isinstance(image, bytes) else png(image) for image in images]
    table = pa.table(
        {image_column: [{"bytes": row, "path": None} for row in rows], label_column: pa.array(labels, pa.int64())}
    )
    if names is not None:
        features = {"info": {"features": {label_column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


# ---------------------------------------------------------------- augmentation


def crop_and_flip_outcomes(image: torch.Tensor, padding: int) -> list[bytes]:
    """All equally likely results of torchvision's RandomCrop(size, padding) and RandomHorizontalFlip."""
    padded = TF.pad(image, [padding])
    outcomes = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = TF.crop(padded, top, left, *image.shape[-2:])
            outcomes += [crop.numpy().tobytes(), TF.hflip(crop).numpy().tobytes()]
    return outcomes


@pytest.mark.parametrize(("height", "width", "padding"), [(4, 4, 2), (3, 5, 1)])
def test_augment_has_the_distribution_of_torchvisions_crop_and_flip(height, width, padding):
    image = torch.arange(1, 2 * height * width + 1, dtype=torch.uint8).view(2, height, width)
    expected = crop_and_flip_outcomes(image, padding)
    assert len(set(expected)) == 2 * (2 * padding + 1) ** 2
    augment = Augment(padding, flip=True)
    count = 400 * len(expected)
    draws = augment.draw(count, torch.Generator().manual_seed(1))
    seen = Counter(row.tobytes() for row in augment(image.expand(count, -1, -1, -1), draws).numpy())
    assert set(seen) == set(expected)
    assert chisquare([seen[outcome] for outcome in expected]).pvalue > 1e-3


def test_augment_draws_neighbouring_images_independently():
    draws = Augment(1, flip=True).draw(40000, torch.Generator().manual_seed(2))
    outcome = draws[:, 0] * 6 + draws[:, 1] * 2 + draws[:, 2]
    pairs = torch.bincount(outcome[0::2] * 18 + outcome[1::2], minlength=18 * 18)
    assert chisquare(pairs.numpy()).pvalue > 1e-3


def test_augment_of_a_batch_equals_torchvision_image_by_image():
    images = to_tensor(random_images(6, 8))
    draws = torch.tensor([[0, 0, 0], [6, 6, 1], [3, 3, 0], [3, 3, 1], [1, 5, 1], [4, 0, 0]])
    for image, (top, left, flip), result in zip(
        images, draws.tolist(), Augment(3, flip=True)(images, draws), strict=True
    ):
        crop = TF.crop(TF.pad(image, [3]), top, left, 8, 8)
        assert torch.equal(result, TF.hflip(crop) if flip else crop)


def test_augment_without_flip_never_mirrors():
    draws = Augment(2, flip=False).draw(1000, torch.Generator().manual_seed(0))
    assert draws[:, 2].eq(0).all()
    assert draws[:, :2].unique().tolist() == [0, 1, 2, 3, 4]


def test_augment_without_padding_and_flip_changes_nothing():
    images = to_tensor(random_images(5, 8))
    augment = Augment(0, flip=False)
    assert torch.equal(augment(images, augment.draw(5, torch.Generator())), images)


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize_is_bitwise_totensor_and_normalize(channels_last):
    images = random_images(4)
    reference = Compose([ToTensor(), Normalize(MEAN, STD)])
    result = normalize(to_tensor(images), MEAN, STD, channels_last=channels_last)
    assert torch.equal(result, torch.stack([reference(image) for image in images]))
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ---------------------------------------------------------------- epochs


def image_set(count: int = 23) -> ImageSet:
    return ImageSet(to_tensor(random_images(count, 8)), torch.arange(count) % 5, 5)


def loader(data: ImageSet, batch_size: int = 4, **options) -> EpochLoader:
    options = {"augment": Augment(2, True), "mean": MEAN, "std": STD, "seed": 3, "shuffle": True} | options
    return EpochLoader(data, batch_size, device="cpu", **options)


def assert_same_batches(left, right) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def indices_of(batches) -> list[int]:
    return torch.cat([indices for _, _, indices in batches]).tolist()


def test_an_epoch_repeats_bit_for_bit_in_a_new_loader():
    first = loader(image_set())
    list(first.epoch(0))
    assert_same_batches(first.epoch(7), loader(image_set()).epoch(7))


def test_epochs_and_seeds_give_different_orders():
    orders = [indices_of(loader(image_set(), seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_an_epoch_shows_every_image_once_with_its_label():
    data = image_set()
    batches = list(loader(data).epoch(0))
    assert sorted(indices_of(batches)) == list(range(23))
    assert all(torch.equal(labels, data.labels[indices]) for _, labels, indices in batches)


def test_without_shuffling_and_augmentation_the_images_come_normalised_in_order():
    data = image_set()
    batches = list(loader(data, augment=None, shuffle=False).epoch(4))
    assert indices_of(batches) == list(range(23))
    assert torch.equal(torch.cat([images for images, _, _ in batches]), normalize(data.images, MEAN, STD))


def test_every_image_is_augmented_by_a_crop_of_itself():
    data = image_set(6)
    for images, _, indices in loader(data).epoch(0):
        for image, index in zip(images, indices, strict=True):
            outcomes = [
                torch.frombuffer(bytearray(outcome), dtype=torch.uint8).view(3, 8, 8)
                for outcome in crop_and_flip_outcomes(data.images[index], 2)
            ]
            assert any(torch.equal(image, normalize(outcome[None], MEAN, STD)[0]) for outcome in outcomes)


def test_drop_last_leaves_out_the_incomplete_batch():
    assert [len(labels) for _, labels, _ in loader(image_set(), drop_last=True).epoch(0)] == [4, 4, 4, 4, 4]
    assert [len(labels) for _, labels, _ in loader(image_set()).epoch(0)] == [4, 4, 4, 4, 4, 3]
    assert len(loader(image_set(), drop_last=True)) == 5
    assert len(loader(image_set())) == 6


def test_the_memory_format_reaches_the_batches():
    images, _, _ = next(loader(image_set(), channels_last=True).epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_processes_share_out_all_images_without_overlap():
    shares = [indices_of(loader(image_set(24), process=process, processes=3).epoch(1)) for process in range(3)]
    assert [len(share) for share in shares] == [8, 8, 8]
    assert sorted(index for share in shares for index in share) == list(range(24))


@pytest.mark.parametrize(("count", "processes"), [(23, 3), (23, 4), (2, 5)])
def test_uneven_shares_are_filled_like_distributed_sampler(count, processes):
    data = image_set(count)
    options = {"shuffle": False, "processes": processes}
    for process in range(processes):
        sampler = torch.utils.data.DistributedSampler(range(count), processes, process, shuffle=False)
        assert indices_of(loader(data, process=process, **options).epoch(0)) == list(sampler)


def test_the_augmentation_of_an_image_does_not_depend_on_processes_or_batch_size():
    data = image_set(24)
    alone = {int(i): x for images, _, indices in loader(data).epoch(3) for i, x in zip(indices, images, strict=True)}
    for process in range(2):
        for images, _, indices in loader(data, 5, process=process, processes=2).epoch(3):
            assert all(torch.equal(x, alone[int(i)]) for i, x in zip(indices, images, strict=True))


def test_a_process_outside_of_their_number_is_refused():
    with pytest.raises(ValueError, match="process 2"):
        loader(image_set(), process=2, processes=2)


def test_a_batch_larger_than_the_set_is_an_error_with_drop_last():
    with pytest.raises(UserError, match="no full batch in the 23"):
        loader(image_set(), 24, drop_last=True)


def test_a_batch_size_of_zero_is_an_error():
    with pytest.raises(UserError, match="batch size 0"):
        loader(image_set(), 0)


# ---------------------------------------------------------------- sets, statistics, subsets


def test_an_image_set_refuses_floats_and_mismatched_labels():
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="labels"):
        ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 1)


def test_channel_statistics_equal_numpys():
    images = random_images(20, 9)
    mean, std = channel_statistics(to_tensor(images))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_is_an_error():
    images = to_tensor(random_images(2, 4))
    images[:, 1] = 7
    with pytest.raises(UserError, match="channel 1 has the value 7"):
        channel_statistics(images)


@pytest.mark.parametrize("size", [1, 7, 10, 33, 60])
def test_a_subset_is_balanced_to_one_image(size):
    labels = torch.arange(10).repeat(6)
    chosen = balanced_subset(labels, size)
    counts = torch.bincount(labels[chosen], minlength=10)
    assert len(chosen.unique()) == size
    assert counts.max() - counts.min() <= 1


def test_a_subset_is_fixed_and_contained_in_larger_ones():
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    small, large = balanced_subset(labels, 30), balanced_subset(labels, 90)
    torch.manual_seed(123)
    assert torch.equal(small, balanced_subset(labels, 30))
    assert set(small.tolist()) < set(large.tolist())


def test_another_seed_draws_another_subset_that_is_balanced_too():
    labels = torch.arange(10).repeat(60)
    first, second = balanced_subset(labels, 30), balanced_subset(labels, 30, seed=1)
    assert not torch.equal(first, second)
    assert torch.bincount(labels[second]).tolist() == [3] * 10


def test_a_class_with_too_few_images_gives_all_of_them():
    labels = torch.tensor([0] * 20 + [1] * 3)
    assert torch.bincount(labels[balanced_subset(labels, 12)]).tolist() == [9, 3]


@pytest.mark.parametrize("subset", [0, 1438])
def test_a_subset_of_impossible_size_is_an_error(subset):
    with pytest.raises(UserError, match=f"DATASET.SUBSET {subset}: expected 1 to 1437"):
        load_dataset("digits", "unused", subset=subset)


def test_held_out_images_are_tested_on_and_never_trained_on():
    every, data = load_dataset("digits", "unused").train, load_dataset("digits", "unused", held_out=200)
    both = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert (len(data.train), len(data.test)) == (1237, 200)
    assert Counter(map(tuple, both.tolist())) == Counter(map(tuple, every.images.flatten(1).tolist()))
    assert torch.bincount(data.test.labels).tolist() == [20] * 10


@pytest.mark.parametrize("choice", [{"subset": 50}, {"subset": 50, "subset_seed": 3}])
def test_whoever_sees_fewer_images_holds_out_the_same(choice):
    teacher, student = (load_dataset("digits", "unused", held_out=200, **kept) for kept in ({}, choice))
    assert torch.equal(teacher.test.images, student.test.images)
    assert torch.equal(teacher.test.labels, student.test.labels)
    trained = set(map(tuple, teacher.train.images.flatten(1).tolist()))
    assert trained.issuperset(map(tuple, student.train.images.flatten(1).tolist()))
    assert torch.bincount(student.train.labels).tolist() == [5] * 10


@pytest.mark.parametrize(
    ("held_out", "subset", "refused"),
    [
        (1437, None, "DATASET.HELD_OUT 1437: expected less than 1437, the training images of this data set"),
        (1380, 58, "DATASET.SUBSET 58: expected 1 to 57, the training images of this data set"),
    ],
)
def test_more_images_than_there_are_can_neither_be_held_out_nor_be_left(held_out, subset, refused):
    with pytest.raises(UserError, match=f"^{refused}"):
        load_dataset("digits", "unused", held_out=held_out, subset=subset)


def test_no_class_loses_its_last_training_image_to_the_held_out_ones():
    labels = torch.tensor([0] * 20 + [1] * 3)
    with pytest.raises(UserError, match=r"^DATASET\.HELD_OUT 8: no image of class 1 would be left to train on"):
        choose_images(labels, subset=None, subset_seed=0, held_out=8)
    assert 1 in labels[choose_images(labels, subset=None, subset_seed=0, held_out=4)[:-4]]


# ---------------------------------------------------------------- digits


def test_digits_are_scikit_learns_images_split_80_to_20_by_class():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", "unused")
    source = load_digits()
    grey = torch.cat([data.train.images, data.test.images])
    assert data.train.images.shape == (1437, 3, 8, 8)
    assert data.test.images.shape == (360, 3, 8, 8)
    assert grey.eq(grey[:, :1]).all()
    joined = np.concatenate([data.train.labels, data.test.labels])
    restored = np.round(grey[:, 0].flatten(1).double().numpy() * 16 / 255).astype(int)
    expected = Counter((label, tuple(row)) for label, row in zip(source.target, source.data.astype(int), strict=True))
    assert Counter((label, tuple(row)) for label, row in zip(joined, restored, strict=True)) == expected
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_digits_are_augmented_by_one_pixel_and_never_mirrored():
    assert load_dataset("digits", "unused").augment == Augment(1, flip=False)


def test_digits_take_an_image_size_and_a_subset():
    data = load_dataset("digits", "unused", image_size=16, subset=50)
    assert data.train.images.shape == (50, 3, 16, 16)
    assert torch.bincount(data.train.labels).tolist() == [5] * 10
    assert data.test.images.shape == (360, 3, 16, 16)


# ---------------------------------------------------------------- CIFAR


def write_cifar100_pickles(root: Path, monkeypatch, *, of_a_class: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The official layout with random images, 100 to test on; torchvision is told the checksums of these files."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    train, test = random_images(100 * of_a_class, seed=1), random_images(100, seed=2)
    labels = list(range(100))
    names = [f"class {label}" for label in labels]
    contents = {
        "train": {"data": train.transpose(0, 3, 1, 2).reshape(len(train), -1), "fine_labels": labels * of_a_class},
        "test": {"data": test.transpose(0, 3, 1, 2).reshape(100, -1), "fine_labels": labels[::-1]},
        "meta": {"fine_label_names": names},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    return train, test


@pytest.mark.parametrize("given", [".", "cifar-100-python"])
def test_official_cifar_pickles_round_trip(tmp_path, monkeypatch, given):
    train, test = write_cifar100_pickles(tmp_path, monkeypatch)
    data = load_dataset("cifar100", tmp_path / given)
    assert torch.equal(data.train.images, to_tensor(train))
    assert torch.equal(data.test.images, to_tensor(test))
    assert data.train.labels.tolist() == list(range(100))
    assert data.test.labels.tolist() == list(range(99, -1, -1))
    assert data.classes[3] == "class 3"
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert data.augment == Augment(4, flip=True)


def test_a_subset_of_the_pickles_is_that_of_all_images(tmp_path, monkeypatch):
    train, _ = write_cifar100_pickles(tmp_path, monkeypatch)
    some = load_dataset("cifar100", tmp_path, subset=7, subset_seed=3).train
    assert torch.equal(some.images, to_tensor(train)[balanced_subset(torch.arange(100), 7, seed=3)])


def test_held_out_pickles_come_from_the_training_images(tmp_path, monkeypatch):
    train, _ = write_cifar100_pickles(tmp_path, monkeypatch, of_a_class=2)
    data = load_dataset("cifar100", tmp_path, held_out=7)
    held = balanced_subset(torch.arange(100).repeat(2), 7)
    others = torch.tensor(sorted(set(range(200)) - set(held.tolist())))
    assert torch.equal(data.test.images, to_tensor(train)[held])
    assert torch.equal(data.train.images, to_tensor(train)[others])


def test_the_official_archive_is_unpacked_without_a_download(tmp_path, monkeypatch):
    train, _ = write_cifar100_pickles(tmp_path / "made", monkeypatch)
    archive = Path(shutil.make_archive(tmp_path / "cifar-100-python", "gztar", tmp_path / "made"))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("download"))
    assert torch.equal(load_dataset("cifar100", tmp_path).train.images, to_tensor(train))


def test_a_run_waits_while_another_unpacks(tmp_path, monkeypatch):
    write_cifar100_pickles(tmp_path, monkeypatch)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_dataset, "cifar100", tmp_path)
        time.sleep(0.5)
        waited = not reading.done()
        os.close(descriptor)
        assert len(reading.result().train) == 100
    assert waited


def test_a_pickle_with_another_checksum_is_never_read(tmp_path, monkeypatch):
    write_cifar100_pickles(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": []}))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a changed pickle was read"))
    monkeypatch.setattr(
        torchvision.datasets.cifar, "download_and_extract_archive", lambda *_, **__: pytest.fail("download")
    )
    with pytest.raises(UserError, match="cifar-100-python: a file is absent or its checksum"):
        load_dataset("cifar100", tmp_path)


def test_a_failed_download_names_the_folder_and_the_layouts(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(UserError) as raised:
        load_dataset("cifar100", tmp_path / "here")
    for part in (
        str(tmp_path / "here"),
        "cifar-100-python/",
        "cifar-100-python.tar.gz",
        "train-*.parquet",
        "no network",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("name", "folder", "columns"),
    [
        ("cifar100", ".", ("img", "fine_label")),
        ("cifar100", "cifar100", ("image", "label")),
        ("cifar10", "plain_text", ("img", "label")),
        ("cifar10", "data", ("image", "label")),
    ],
)
def test_parquet_shards_round_trip(tmp_path, name, folder, columns):
    classes = 100 if name == "cifar100" else 10
    train, test = random_images(classes, seed=1), random_images(7, seed=2)
    names = [f"class {label}" for label in range(classes)]
    labels = list(range(classes))
    for shard in range(2):
        path = tmp_path / folder / f"train-0000{shard}-of-00002.parquet"
        part = slice(shard * classes // 2, (shard + 1) * classes // 2)
        write_parquet(path, train[part], labels[part], *columns, names=names)
    write_parquet(tmp_path / folder / "test-00000-of-00001.parquet", test, [9, 8, 7, 6, 5, 4, 3], *columns)
    data = load_dataset(name, tmp_path)
    assert torch.equal(data.train.images, to_tensor(train))
    assert torch.equal(data.test.images, to_tensor(test))
    assert data.train.labels.tolist() == labels
    assert data.test.labels.tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert data.train.num_classes == classes
    assert data.classes == names


def test_parquet_with_plain_binary_images_is_read(tmp_path):
    images = random_images(3)
    table = pa.table({"img": [png(image) for image in images], "fine_label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "test-0.parquet")
    data, classes = read_parquet(CIFAR100, [tmp_path / "test-0.parquet"])
    assert torch.equal(data.images, to_tensor(images))
    assert classes is None


def write_small_cifar10(folder: Path, labels=tuple(range(10)), **options) -> None:
    for split in ("train", "test"):
        write_parquet(
            folder / f"{split}-0.parquet", random_images(len(labels)), labels, label_column="label", **options
        )


def test_cifar_takes_an_image_size(tmp_path):
    write_small_cifar10(tmp_path)
    data = load_dataset("cifar10", tmp_path, image_size=16)
    assert data.train.images.shape == (10, 3, 16, 16)
    blocks = torch.nn.functional.avg_pool2d(data.test.images.float(), 16).flatten()
    originals = to_tensor(random_images(10)).float().mean((2, 3)).flatten()
    torch.testing.assert_close(blocks, originals, atol=2.0, rtol=0)  # resizing keeps an image's mean colour


def test_a_subset_of_parquet_images_is_that_of_all_of_them_and_no_other_is_decoded(tmp_path, monkeypatch):
    write_small_cifar10(tmp_path, list(range(10)) * 3)
    everything = load_dataset("cifar10", tmp_path).train
    decoded = []
    decode = cifar.decode_images
    monkeypatch.setattr(
        cifar, "decode_images", lambda sources, *rest: decoded.append(len(sources)) or decode(sources, *rest)
    )
    some = load_dataset("cifar10", tmp_path, subset=7, subset_seed=3).train
    chosen = balanced_subset(everything.labels, 7, seed=3)
    assert torch.equal(some.images, everything.images[chosen])
    assert torch.equal(some.labels, everything.labels[chosen])
    assert decoded == [7, 30]  # training and test images


def test_a_broken_image_of_a_subset_is_named_by_its_own_row(tmp_path):
    images = [png(image) for image in random_images(10)]
    images[6] = b"broken"
    pq.write_table(pa.table({"img": images, "label": list(range(10))}), tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match=r"test-0\.parquet, row 6: not a readable image"):
        read_parquet(cifar.CIFAR10, [tmp_path / "test-0.parquet"], lambda labels: torch.tensor([2, 6]))


def test_missing_parquet_columns_are_named_with_those_present(tmp_path):
    write_small_cifar10(tmp_path, image_column="picture")
    with pytest.raises(UserError, match=r"train-0\.parquet: no image column img or image; the file has picture, label"):
        load_dataset("cifar10", tmp_path)


def test_cifar10_does_not_take_the_fine_labels_of_cifar100(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", random_images(10), range(10))
    with pytest.raises(UserError, match="no label column label; the file has img, fine_label"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("label", [-1, 10, None])
def test_a_label_out_of_range_is_named_by_file_and_row(tmp_path, label):
    write_small_cifar10(tmp_path, [0, 1, 2, label, *range(4, 10)])
    with pytest.raises(UserError, match=rf"train-0\.parquet, row 3: label {label} is not in 0\.\.9"):
        load_dataset("cifar10", tmp_path)


def test_a_class_without_training_images_is_an_error(tmp_path):
    write_small_cifar10(tmp_path, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    with pytest.raises(UserError, match=r"none of \[9\]"):
        load_dataset("cifar10", tmp_path)


def test_recorded_class_names_of_another_data_set_are_an_error(tmp_path):
    write_small_cifar10(tmp_path, names=["a", "b"])
    with pytest.raises(UserError, match="label has 2 classes; cifar10 has 10"):
        load_dataset("cifar10", tmp_path)


def test_a_missing_shard_is_an_error(tmp_path):
    write_small_cifar10(tmp_path)
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(UserError, match="one of 3 files by its name, but there are 1"):
        load_dataset("cifar10", tmp_path)


def test_a_missing_split_is_an_error(tmp_path):
    write_small_cifar10(tmp_path)
    (tmp_path / "test-0.parquet").unlink()
    with pytest.raises(UserError, match=r"no test-\*\.parquet"):
        load_dataset("cifar10", tmp_path)


def test_an_unreadable_image_is_named_by_file_and_row(tmp_path):
    images = [png(image) for image in random_images(10)]
    images[4] = images[4][:100]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", images, range(10), label_column="label")
    with pytest.raises(UserError, match=r"train-0\.parquet, row 4: not a readable image"):
        load_dataset("cifar10", tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path):
    write_small_cifar10(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"train-0\.parquet: not a readable parquet file"):
        load_dataset("cifar10", tmp_path)


def test_images_of_another_size_are_not_cifar(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", random_images(10, 28), range(10), label_column="label")
    with pytest.raises(UserError, match="28x28 pixels; CIFAR has 32x32"):
        load_dataset("cifar10", tmp_path)


def test_the_real_cifar100_test_split_is_complete(real_data):
    data, classes = read_parquet(CIFAR100, sorted((real_data / "cifar100").glob("test-*.parquet")))
    assert data.images.shape == (10000, 3, 32, 32)
    assert torch.bincount(data.labels).tolist() == [100] * 100
    assert (classes[0], classes[99]) == ("apple", "worm")
    mean, std = channel_statistics(data.images)
    np.testing.assert_allclose(mean, CIFAR100.mean, atol=0.01)
    np.testing.assert_allclose(std, CIFAR100.std, atol=0.01)


# ---------------------------------------------------------------- folders


def write_class_folders(
    folder: Path, classes=("ant", "bee"), count: int = 3, size: int = 10, seed: int = 0
) -> np.ndarray:
    images = random_images(count * len(classes), size, seed)
    for index, image in enumerate(images):
        write_image(folder / classes[index // count] / f"{index % count}.png", image)
    return images


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_class_folders_round_trip(tmp_path, held_out):
    train = write_class_folders(tmp_path / "train")
    test = write_class_folders(tmp_path / held_out, ("bee",), seed=1)
    data = load_dataset("folder", tmp_path)
    assert torch.equal(data.train.images, to_tensor(train))
    assert torch.equal(data.test.images, to_tensor(test))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [1, 1, 1]
    assert data.classes == ["ant", "bee"]
    assert (data.mean, data.std) == channel_statistics(to_tensor(train))


def test_folder_images_of_any_size_and_mode_come_in_the_image_size(tmp_path):
    write_class_folders(tmp_path / "val", size=20)
    wide = np.zeros((16, 32, 3), dtype=np.uint8)
    wide[:, 8:24] = (200, 100, 50)  # the central square
    write_image(tmp_path / "train" / "ant" / "wide.png", wide)
    write_image(tmp_path / "train" / "bee" / "grey.jpg", np.full((300, 200), 77, dtype=np.uint8))
    data = load_dataset("folder", tmp_path, image_size=16)
    assert data.train.images.shape == (2, 3, 16, 16)
    assert data.train.images[0].flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert data.train.images[1].unique().tolist() == [77]
    assert data.test.images.shape == (6, 3, 16, 16)


def test_large_images_decoded_in_threads_keep_their_order(tmp_path):
    for split in ("train", "val"):
        for value in range(130):
            write_image(tmp_path / split / "ant" / f"{value:03}.png", np.full((160, 160, 3), value, dtype=np.uint8))
    data = load_dataset("folder", tmp_path, image_size=4)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(130))


def test_folder_images_of_several_sizes_need_an_image_size(tmp_path):
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val")
    write_image(tmp_path / "train" / "bee" / "odd.png", random_images(1, 12)[0])
    with pytest.raises(UserError, match=r"odd\.png: 12x12 pixels, but .*0\.png has 10x10"):
        load_dataset("folder", tmp_path)


def test_train_and_test_images_of_different_size_need_an_image_size(tmp_path):
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", size=12)
    with pytest.raises(UserError, match="training images have 10x10 pixels, test images 12x12"):
        load_dataset("folder", tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="train: not found"):
        load_dataset("folder", tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    write_class_folders(tmp_path / "train")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(UserError, match=r"train: .*cat"):
        load_dataset("folder", tmp_path)


def test_a_test_class_that_train_lacks_is_named(tmp_path):
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", ("ant", "wasp"))
    with pytest.raises(UserError, match=r"wasp: .*train has no class of that name"):
        load_dataset("folder", tmp_path)


def test_an_unreadable_file_is_named(tmp_path):
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val")
    (tmp_path / "val" / "bee" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bee.1\.png: not a readable image"):
        load_dataset("folder", tmp_path)


def write_tiny_imagenet(root: Path, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "tiny-imagenet-200"
    train, test = random_images(4, 64), random_images(2, 64, seed=1)
    for index, image in enumerate(train):
        wnid = f"n0{index // 2}"
        write_image(folder / "train" / wnid / "images" / f"{wnid}_{index}.png", image)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("ignored\n")
    for index, image in enumerate(test):
        write_image(folder / "val" / "images" / f"val_{index}.png", image)
    (folder / "val" / "val_annotations.txt").write_text("".join(line + "\n" for line in lines))
    return train, test


@pytest.mark.parametrize("given", [".", "tiny-imagenet-200"])
def test_tiny_imagenet_round_trips(tmp_path, given):
    train, test = write_tiny_imagenet(tmp_path, ["val_0.png\tn01\t0\t0\t62\t57", "val_1.png\tn00\t1\t2\t3\t4"])
    data = load_dataset("tiny-imagenet", tmp_path / given)
    assert torch.equal(data.train.images, to_tensor(train))
    assert torch.equal(data.test.images, to_tensor(test))
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.test.labels.tolist() == [1, 0]
    assert data.classes == ["n00", "n01"]
    assert data.augment == Augment(8, flip=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_1.png n01", "line 2: expected a file name, a tab and a class"),
        ("val_1.png\tn99", "line 2: .*has no class n99"),
        ("gone.png\tn01", r"gone\.png: not a readable image"),
    ],
)
def test_bad_annotations_are_named(tmp_path, line, message):
    write_tiny_imagenet(tmp_path, ["val_0.png\tn01", line])
    with pytest.raises(UserError, match=message):
        load_dataset("tiny-imagenet", tmp_path)


def test_missing_annotations_are_named(tmp_path):
    write_class_folders(tmp_path / "train")
    with pytest.raises(UserError, match=r"val_annotations\.txt: not found"):
        load_dataset("tiny-imagenet", tmp_path)


# ---------------------------------------------------------------- arguments


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    known = "cifar100, cifar10, tiny-imagenet, folder, digits"
    with pytest.raises(UserError, match=f"DATASET.NAME 'mnist': unknown; choose from {known}"):
        load_dataset("mnist", tmp_path)


def test_an_image_size_of_zero_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"DATASET\.IMAGE_SIZE 0"):
        load_dataset("digits", tmp_path, image_size=0)
