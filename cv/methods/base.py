"""What every distillation method shares: a student, a frozen teacher, and losses computed in float32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.models.library import LibraryNetwork

if TYPE_CHECKING:
    from cv.models.features import Features


class FeatureShapes(NamedTuple):
    """Shapes of `Features` for one image."""

    maps: tuple[torch.Size, ...]  # (C, H, W) of the stem and of the end of every stage
    pooled: int  # width of the classifier's input


class Distiller(nn.Module, ABC):
    """Base of the methods; `distiller(images, labels, indices) -> (student logits, {name: scalar loss})`.

    The losses are already weighted: the training loss is their sum. A method states its settings in `defaults()` and
    computes its losses in `losses()`; auxiliary modules that it trains are ordinary submodules.

    student, teacher: networks with `features(images)` and `classifier`; the teacher is frozen here and stays in eval
        mode. `vanilla` needs none, and does not run the one it may be given.
    settings: the method's block of the configuration, with the keys of `defaults()`.
    num_classes, image_shape (C, H, W), num_train: the data set's classes, image shape and number of training images.
    more_teachers: further teachers, of methods with `takes_teachers`: of all of them the softened probabilities are
        averaged, at the method's setting T; features are the first one's.
    teacher_images: for each teacher what makes its images of the student's, where they are normalised otherwise.
    Raises UserError where teacher, student, data set and settings do not fit together.
    """

    needs_teacher = True
    compares_classes = True  # the loss compares the two networks class by class
    takes_teachers = False  # several: the loss looks at softened probabilities alone
    compares_maps = False  # the loss compares feature maps
    notes: tuple[str, ...] = ()  # lines for the user, of what this method does on this data set

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: CfgNode,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        num_train: int,
        more_teachers: Sequence[nn.Module] = (),
        teacher_images: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.more_teachers = nn.ModuleList(each.requires_grad_(False).eval() for each in more_teachers)
        self.teacher_images = nn.ModuleList(teacher_images or [nn.Identity() for _ in (teacher, *more_teachers)])
        self.settings = settings
        self.num_classes, self.image_shape, self.num_train = num_classes, tuple(image_shape), num_train
        self.register_buffer("epoch", torch.tensor(1.0), persistent=False)  # counts from 1; the trainer sets it
        if self.needs_teacher and teacher is None:
            raise UserError(f"method {self.name}: no teacher was given, and only vanilla trains without one")
        self._check_classes("student", student)
        if self.needs_teacher and self.compares_classes:
            for each in (teacher, *self.more_teachers):
                self._check_classes("teacher", each)
        if self.compares_maps:
            for role, network in (("student", student), ("teacher", teacher)):
                self._check_maps(role, network)

    @staticmethod
    @abstractmethod
    def defaults() -> CfgNode:
        """The method's settings with their default values."""

    @abstractmethod
    def losses(self, student: Features, teacher: Features | None, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """The weighted losses by name. labels (N,); indices (N,) of the images in the training set.

        Runs outside autocast; features may come in lower precision, so what is read of them is cast to float32.
        """

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """images (N, C, H, W), labels (N,), indices (N,) -> student logits (N, classes), weighted losses by name."""
        student = self.student.features(images)
        teacher = None
        if self.needs_teacher:
            with torch.no_grad():
                teacher = self._taught(images)
        with torch.autocast(images.device.type, enabled=False):
            losses = self.losses(student, teacher, labels, indices)
        return student.logits, losses

    def _taught(self, images: Tensor) -> Features:
        """The teacher's features, with the logits of all teachers together."""
        first, *more = self.teacher_images
        features = self.teacher.features(first(images))
        if not more:
            return features
        logits = [teacher(change(images)) for teacher, change in zip(self.more_teachers, more, strict=True)]
        with torch.autocast(images.device.type, enabled=False):
            return features._replace(logits=mean_logits([features.logits, *logits], self.settings.T))

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        for each in filter(None, (self.teacher, *self.more_teachers)):
            each.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The student's parameters, then those of the method's own modules."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def warmup(self, epochs: int) -> Tensor:
        """Factor that grows linearly over the first `epochs` epochs: epoch / epochs, at most 1."""
        return (self.epoch / max(epochs, 1)).clamp(max=1.0)

    @property
    def name(self) -> str:
        """The method's name in the registry and, in capitals, of its block of settings."""
        return type(self).__name__.lower()

    def bad_setting(self, key: str, expected: str) -> UserError:
        """The error for a setting out of range; `expected` says what would be right."""
        return UserError(f"{self.name.upper()}.{key} = {self.settings[key]}: expected {expected}")

    def require_positive(self, *keys: str) -> None:
        for key in keys:
            if not self.settings[key] > 0:
                raise self.bad_setting(key, "a number above 0")

    def matched_shapes(self) -> tuple[FeatureShapes, FeatureShapes]:
        """Shapes of student and teacher, for methods that compare them stage by stage.

        Raises UserError where the networks do not have the same number of stages.
        """
        student = feature_shapes(self.student, self.image_shape)
        teacher = feature_shapes(self.teacher, self.image_shape)
        if len(student.maps) != len(teacher.maps):
            ours, theirs = ([tuple(shape) for shape in shapes.maps[1:]] for shapes in (student, teacher))
            fewer, more, extra = (
                ("student", "teacher", theirs) if len(ours) < len(theirs) else ("teacher", "student", ours)
            )
            unmatched = range(min(len(ours), len(theirs)) + 1, len(extra) + 1)
            raise UserError(
                f"method {self.name} compares stage by stage, but stage {', '.join(map(str, unmatched))} of the {more} "
                f"has no counterpart in the {fewer}: student stages (C, H, W) {ours}, teacher stages {theirs}"
            )
        return student, teacher

    def _check_maps(self, role: str, network: nn.Module) -> None:
        if isinstance(network, LibraryNetwork) and len(feature_shapes(network, self.image_shape).maps) < 2:
            raise UserError(
                f"method {self.name} compares feature maps, and the {role} has none of height and width; take kd, dkd, "
                "crd or vanilla with DSKD"
            )

    def _check_classes(self, role: str, model: nn.Module) -> None:
        width = model.classifier.out_features
        if width != self.num_classes:
            raise UserError(f"method {self.name}: the {role} has {width} classes, the data set {self.num_classes}")


def mean_logits(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits z of which softmax(z / T) is the mean of softmax(z_i / T), the teachers' softened probabilities.

    logits: (N, classes) of each teacher -> (N, classes) in float32.
    """
    softened = torch.stack([F.log_softmax(each.float() / temperature, dim=1) for each in logits])
    return temperature * (softened.logsumexp(0) - math.log(len(logits)))


@torch.no_grad()
def feature_shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> FeatureShapes:
    """Shapes of a network's features, by running it on one blank image (C, H, W); batch statistics stay untouched."""
    training = model.training
    weight = model.classifier.weight
    features = model.eval().features(torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype))
    model.train(training)
    return FeatureShapes(tuple(feature.shape[1:] for feature in features.maps), features.pooled.shape[1])
