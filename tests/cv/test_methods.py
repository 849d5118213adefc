"""What all distillation methods promise: gradients, a frozen teacher, mixed precision, settings that matter, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.run.errors import UserError
from cv.methods import METHODS, build_distiller, feature_shapes, method_defaults
from cv.models.features import Features

CLASSES, IMAGE, NUM_TRAIN, BATCH = 10, (3, 16, 16), 24, 6
DISTILLING = [name for name in METHODS if name != "vanilla"]


class TinyNet(nn.Module):
    """Stem, then one convolution per stage: the contract of the real networks at 1/1000 of their cost."""

    def __init__(self, widths=(4, 6, 8, 10), strides=(1, 1, 2, 2), classes=CLASSES):
        super().__init__()
        channels = (3, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in zip(channels, widths, strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.classifier = nn.Linear(widths[-1], classes)

    def features(self, x):
        maps, preacts = [], []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            preacts.append(norm(conv(x)))
            x = F.relu(preacts[-1])
            maps.append(x)
        pooled = x.mean((2, 3))
        return Features(self.classifier(pooled), tuple(maps), tuple(preacts), pooled)

    def forward(self, x):
        return self.features(x).logits


def last_width(name):
    """Of a teacher that the method takes beside a TinyNet of the default widths."""
    return 10 if name == "practise" else 20


def build(name, student=None, teacher=None, num_train=NUM_TRAIN, **settings):
    torch.manual_seed(0)
    student = student or TinyNet()
    teacher = teacher or TinyNet(widths=(4, 12, 16, last_width(name)))
    block = method_defaults()[name.upper()]
    block.update(settings)
    return build_distiller(
        name, student, teacher, block, num_classes=CLASSES, image_shape=IMAGE, num_train=num_train
    ).train()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, *IMAGE, generator=generator)
    return (
        images,
        torch.randint(CLASSES, (BATCH,), generator=generator),
        torch.randperm(NUM_TRAIN, generator=generator)[:BATCH],
    )


def run(distiller, seed=1):
    torch.manual_seed(2)
    return distiller(*batch(seed))


@pytest.mark.parametrize("name", METHODS)
def test_registry_name_is_the_method_s_own_name(name):
    assert build(name).name == name


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_scalars_beside_the_student_s_logits(name):
    distiller = build(name)
    logits, losses = run(distiller)
    torch.testing.assert_close(logits, distiller.student(batch()[0]))
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", DISTILLING)
def test_distillation_part_alone_reaches_the_student_s_first_layer(name):
    distiller = build(name)
    _, losses = run(distiller)
    sum(loss for part, loss in losses.items() if part != "ce").backward()
    assert distiller.student.convs[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_parameter_gets_a_gradient(name):
    distiller = build(name)
    sum(run(distiller)[1].values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.trainable_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_teacher_gets_no_gradient_and_is_not_trained(name):
    distiller = build(name)
    sum(run(distiller)[1].values()).backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert not {id(p) for p in distiller.teacher.parameters()} & {id(p) for p in distiller.trainable_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_teacher_s_batch_statistics_stay(name):
    distiller = build(name)
    before = {key: value.clone() for key, value in distiller.teacher.state_dict().items()}
    run(distiller.eval().train())
    assert all(torch.equal(value, before[key]) for key, value in distiller.teacher.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_building_leaves_the_student_s_weights_and_statistics(name):
    student = TinyNet()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    build(name, student=student)
    assert student.training
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_autocast_gives_nearly_the_same_losses_in_float32(name):
    expected = run(build(name))[1]
    distiller = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(distiller)[1]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=1e-3)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in distiller.trainable_parameters())


@pytest.mark.parametrize("name", DISTILLING)
def test_stages_of_other_sizes_distil(name):
    strides = (1, 1, 2, 2) if name == "practise" else (2, 1, 2, 1)
    distiller = build(name, teacher=TinyNet(widths=(4, 12, 16, last_width(name)), strides=strides))
    losses = run(distiller)[1]
    assert sum(losses.values()).isfinite()


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, m in METHODS.items() for k in m.defaults()])
def test_every_setting_has_an_effect(name, key):
    default = METHODS[name].defaults()[key]
    other = {"TOP_K": 3, "NCE_K": 5, "MAX_MID_CHANNEL": 3, "HINT_LAYER": 1}.get(key, type(default)(default / 2))
    changed, unchanged = build(name, **{key: other}), build(name)
    run(changed), run(unchanged)  # the share of the old embeddings in crd's bank shows from the second step on
    assert run(changed)[1] != run(unchanged)[1]


@pytest.mark.parametrize(("name", "part"), [("dkd", "nckd"), ("dkd", "tckd"), ("reviewkd", "reviewkd")])
def test_warmup_grows_linearly_to_the_full_weight(name, part):
    distiller, losses = build(name), []
    for epoch in (5, 10, 20, 40):
        distiller.epoch.fill_(epoch)
        losses.append(run(distiller)[1][part].item())
    assert losses == pytest.approx([losses[-1] * share for share in (0.25, 0.5, 1.0, 1.0)], rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_state_resumes_bit_for_bit(name):
    first = build(name)
    run(first)
    second = build(name, student=TinyNet(), teacher=TinyNet(widths=(4, 12, 16, last_width(name))))
    second.load_state_dict(first.state_dict())
    assert run(second, seed=3)[1] == run(first, seed=3)[1]


def test_feature_shapes_of_a_network():
    shapes = feature_shapes(TinyNet(), IMAGE)
    assert shapes.maps == ((4, 16, 16), (6, 16, 16), (8, 8, 8), (10, 4, 4))
    assert shapes.pooled == 10


def test_vanilla_trains_without_a_teacher():
    block = method_defaults().VANILLA
    data = {"num_classes": CLASSES, "image_shape": IMAGE, "num_train": NUM_TRAIN}
    distiller = build_distiller("vanilla", TinyNet(), None, block, **data)
    images, labels, indices = batch()
    logits, losses = distiller(images, labels, indices)
    assert set(losses) == {"ce"}
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits, labels))


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'kdd'.*vanilla, kd, dkd"):
        build_distiller("kdd", TinyNet(), None, None, num_classes=1, image_shape=IMAGE, num_train=1)


@pytest.mark.parametrize("name", DISTILLING)
def test_missing_teacher_is_a_user_error(name):
    block = method_defaults()[name.upper()]
    with pytest.raises(UserError, match=f"method {name}: no teacher"):
        build_distiller(name, TinyNet(), None, block, num_classes=CLASSES, image_shape=IMAGE, num_train=NUM_TRAIN)


@pytest.mark.parametrize("name", ["kd", "dkd", "expkd"])
def test_teacher_of_another_class_count_is_a_user_error(name):
    with pytest.raises(UserError, match="the teacher has 7 classes, the data set 10"):
        build(name, teacher=TinyNet(classes=7))


@pytest.mark.parametrize("name", ["fitnet", "at", "sp", "crd", "reviewkd"])
def test_feature_methods_take_a_teacher_of_another_class_count(name):
    assert sum(run(build(name, teacher=TinyNet(classes=7)))[1].values()).isfinite()


@pytest.mark.parametrize("name", ["at", "reviewkd"])
def test_unmatched_stage_is_named(name):
    with pytest.raises(UserError, match=r"stage 3 of the student has no counterpart in the teacher.*\(10, 4, 4\)"):
        build(name, teacher=TinyNet(widths=(4, 8, 8)))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("kd", "T", 0.0),
        ("dkd", "T", -1.0),
        ("expkd", "TOP_K", 0),
        ("expkd", "SIZE", 0),
        ("fitnet", "HINT_LAYER", 4),
        ("at", "P", 0.0),
        ("crd", "NCE_M", 1.0),
        ("crd", "NCE_K", 0),
        ("crd", "NCE_T", 0.0),
        ("reviewkd", "MAX_MID_CHANNEL", 0),
    ],
)
def test_setting_out_of_range_names_key_and_value(name, key, value):
    with pytest.raises(UserError, match=rf"{name.upper()}\.{key} = {value}: expected"):
        build(name, **{key: value})


def test_top_k_is_clipped_to_the_classes():
    assert build("expkd").top_k == CLASSES


@pytest.mark.parametrize(("num_train", "negatives"), [(24, 23), (2, 1), (20000, 16384)])
def test_crd_negatives_are_clipped_to_the_other_images(num_train, negatives):
    assert build("crd", num_train=num_train).negatives == negatives


def test_crd_needs_something_to_contrast():
    with pytest.raises(UserError, match="at least 2 training images"):
        build("crd", num_train=1)


def test_practise_compares_the_last_maps_and_leaves_the_classifier():
    distiller = build("practise", MAP_WEIGHT=3.0)
    images = batch()[0]
    ours, theirs = (network.features(images).maps[-1] for network in (distiller.student, distiller.teacher))
    torch.testing.assert_close(run(distiller)[1]["map"], 3.0 * (ours - theirs).square().mean())
    trained = {id(parameter) for parameter in distiller.trainable_parameters()}
    assert not trained & {id(parameter) for parameter in distiller.student.classifier.parameters()}


def test_practise_asks_for_maps_of_one_shape():
    shapes = r"\(10, 4, 4\) of the student and \(20, 4, 4\) of the teacher"
    with pytest.raises(UserError, match=f"method practise: the last feature maps are {shapes}"):
        build("practise", teacher=TinyNet(widths=(4, 12, 16, 20)))
