"""Random resized crops of a whole batch: torchvision's distribution of boxes, and its pixels."""

import pytest
import torch
from cv_fixtures import short_run
from scipy.stats import chisquare, ks_2samp

from common.torchvision_repair import repair_torchvision
from cv.data import ResizedCrop, load_dataset

repair_torchvision()

from torchvision.transforms import RandomResizedCrop  # noqa: E402
from torchvision.transforms import functional as TF  # noqa: E402

COUNT = 4000


def boxes(height: int, width: int, count: int = COUNT) -> torch.Tensor:
    return ResizedCrop(height, width, flip=True).draw(count, torch.Generator().manual_seed(1))


def their_boxes(height: int, width: int) -> torch.Tensor:
    torch.manual_seed(2)
    image = torch.zeros(1, height, width)
    settings = RandomResizedCrop(8)
    return torch.tensor([settings.get_params(image, settings.scale, settings.ratio) for _ in range(COUNT)])


@pytest.mark.parametrize(("height", "width"), [(224, 224), (40, 64), (60, 20)])  # the last: draws that do not fit
def test_the_boxes_have_the_distribution_of_torchvisions(height, width):
    ours, theirs = boxes(height, width)[:, :4].double(), their_boxes(height, width).double()
    for look in (
        *(lambda box, column=column: box[:, column] for column in range(4)),
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] / (height - box[:, 2]).clamp(min=1),
        lambda box: box[:, 1] / (width - box[:, 3]).clamp(min=1),
    ):
        assert ks_2samp(look(ours).numpy(), look(theirs).numpy()).pvalue > 1e-3


def test_boxes_that_never_fit_are_those_of_torchvision():
    """An image so wide that ten draws fit only now and then: the box in the middle."""
    ours, theirs = (box[:, :4].unique(dim=0, return_counts=True) for box in (boxes(10, 2000), their_boxes(10, 2000)))
    commonest = [found[counts.argmax()].tolist() for found, counts in (ours, theirs)]
    assert commonest[0] == commonest[1] == [0, 993, 10, 13]


def test_corners_are_uniform_and_sides_independent_of_mirroring():
    top, _, height, _, mirrored = boxes(8, 8, 60_000).T
    chosen = top[height == 6]
    assert chisquare(torch.bincount(chosen, minlength=3).numpy()).pvalue > 1e-3
    assert abs(mirrored.double().mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([height, mirrored]).double())[0, 1]) < 0.02


def test_without_flip_nothing_is_mirrored():
    assert ResizedCrop(9, 9, flip=False).draw(500, torch.Generator())[:, 4].eq(0).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (1, 5)])
def test_the_pixels_are_those_of_torchvisions_resize(height, width):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (64, 3, height, width), generator=generator, dtype=torch.uint8)
    crop = ResizedCrop(height, width, flip=True)
    draws = crop.draw(64, generator)
    worst, differing = 0, 0.0
    for image, (*box, mirrored), ours in zip(images, draws.tolist(), crop(images, draws), strict=True):
        theirs = TF.resized_crop(image, *box, size=[height, width], antialias=True)
        theirs = TF.hflip(theirs) if mirrored else theirs
        difference = (ours.int() - theirs.int()).abs()
        worst, differing = max(worst, int(difference.max())), differing + difference.bool().double().mean().item() / 64
    assert worst <= 1  # of 255: their weights are rounded to 16 bits
    assert differing < 0.02


def test_a_whole_image_stays_as_it_is():
    images = torch.randint(256, (2, 3, 9, 7), dtype=torch.uint8)
    draws = torch.tensor([[0, 0, 9, 7, 0], [0, 0, 9, 7, 1]])
    assert torch.equal(ResizedCrop(9, 7, flip=True)(images, draws), torch.stack([images[0], images[1].flip(2)]))


def test_an_image_is_augmented_alike_in_any_batch():
    images = torch.randint(256, (7, 3, 12, 12), dtype=torch.uint8)
    crop = ResizedCrop(12, 12, flip=True)
    draws = crop.draw(7, torch.Generator().manual_seed(0))
    alone = torch.cat([crop(images[i : i + 1], draws[i : i + 1]) for i in range(7)])
    assert torch.equal(crop(images, draws), alone)


def test_the_key_chooses_the_crop_and_digits_are_never_mirrored(tmp_path):
    assert load_dataset("digits", "", crop="resized").augment == ResizedCrop(8, 8, flip=False)
    padded, resized = (
        short_run(tmp_path / crop, None, f"DISTILLER.TYPE vanilla DATASET.CROP {crop}") for crop in ("pad", "resized")
    )
    assert padded.steps[0]["loss"] != resized.steps[0]["loss"]
