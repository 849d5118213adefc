"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download."""

import torch

from cv.data.image_set import ImageSet


def read_digits() -> tuple[ImageSet, ImageSet, list[str]]:
    """1,437 training and 360 test images (3, 8, 8): a fixed stratified split, 80 to 20.

    The grey values 0..16 are scaled to 0..255 and replicated to three channels, so that every network takes them.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    everything = ImageSet(grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long(), 10)
    train, test = train_test_split(range(len(everything)), test_size=0.2, stratify=digits.target, random_state=0)
    return everything.take(torch.tensor(sorted(train))), everything.take(torch.tensor(sorted(test))), list("0123456789")
