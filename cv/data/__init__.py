"""Image data that lives in memory as uint8 and is augmented in batches on the training device."""

from cv.data.augment import Augment, ResizedCrop, normalize
from cv.data.image_set import DataSets, ImageSet
from cv.data.load import load_dataset
from cv.data.loader import EpochLoader

__all__ = ["Augment", "DataSets", "EpochLoader", "ImageSet", "ResizedCrop", "load_dataset", "normalize"]
