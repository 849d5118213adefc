"""Several teachers: the mean of their softened probabilities, for the methods that look at nothing else of them."""

import pytest
import torch
from accelerate.utils import set_seed
from cv_fixtures import column, save_teacher, short_config, short_run

from common.run.errors import UserError
from cv.data import load_dataset, normalize
from cv.export import load_model, save_model
from cv.methods import METHODS
from cv.methods.base import mean_logits
from cv.methods.dkd import dkd_losses
from cv.methods.kd import kd_loss
from cv.models import build_model
from cv.trainer import output_folder, train

TWO = "DISTILLER.TEACHER '' DISTILLER.TEACHERS [resnet14,resnet8]"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("teachers")
    return [save_teacher(folder / name, name, seed=seed) for name, seed in (("resnet14", 7), ("resnet8", 8))]


def by(teachers: list, more: str = "") -> str:
    return f"{TWO} DISTILLER.TEACHER_CKPTS '[{','.join(map(str, teachers))}]' {more}"


def refusal(cfg, **how) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg, **how)
    return str(caught.value)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_logits_of_several_give_the_mean_of_their_softened_probabilities(temperature):
    logits = [3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = torch.stack([(each.double() / temperature).softmax(1) for each in logits]).mean(0)
    found = (mean_logits(logits, temperature).double() / temperature).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["kd", "dkd"])
def test_the_loss_of_the_first_step_is_towards_the_mean_of_all_teachers(tmp_path, teachers, method):
    alone = "DATASET.AUGMENT false DATASET.SUBSET 20 SOLVER.BATCH_SIZE 20 DKD.WARMUP 1 KD.T 2 DKD.T 2"
    run = short_run(tmp_path, None, by(teachers, f"DISTILLER.TYPE {method} {alone}"))
    data = load_dataset("digits", "", subset=20)
    images, labels = normalize(data.train.images, data.mean, data.std), data.train.labels
    set_seed(short_config(tmp_path, None, "").SOLVER.SEED)
    student = build_model("resnet8", 10)
    with torch.no_grad():
        mean = torch.stack([(load_model(each)[0](images) / 2).softmax(1) for each in teachers]).mean(0)
        ours = student(images)
        if method == "kd":
            expected = {"loss_kd": 0.9 * kd_loss(ours, 2 * mean.log(), 2.0)}
        else:
            tckd, nckd = dkd_losses(ours, 2 * mean.log(), labels, 2.0)
            expected = {"loss_tckd": tckd, "loss_nckd": 8 * nckd}
    for name, value in expected.items():
        assert column(run, name)[0] == pytest.approx(value.item(), rel=1e-4)


def test_one_of_several_is_as_the_only_one(tmp_path, teachers):
    one = short_run(tmp_path / "one", teachers[0])
    listed = short_run(tmp_path / "listed", None, f"DISTILLER.TEACHER '' DISTILLER.TEACHERS [resnet14] "
                       f"DISTILLER.TEACHER_CKPTS [{teachers[0]}]")  # fmt: skip
    assert column(one, "loss") == column(listed, "loss")
    assert one.result["teacher_sha256"] == listed.result["teacher_sha256"]


def test_each_teacher_gets_images_of_its_own_normalisation(tmp_path, teachers, capsys):
    torch.manual_seed(9)
    save_model(build_model("resnet8", 10), "resnet8", tmp_path / "other", mean=[0.1] * 3, std=[0.9] * 3)
    short_run(tmp_path / "run", None, by([teachers[0], tmp_path / "other"]))
    printed = capsys.readouterr().out
    assert printed.count("note: the teacher's images are normalised as those that it was trained on") == 1
    assert "mean (0.1, 0.1, 0.1), std (0.9, 0.9, 0.9)" in printed


def test_a_run_says_both_and_keeps_neither(tmp_path, teachers, capsys):
    run = short_run(tmp_path / "run", None, by(teachers))
    printed = capsys.readouterr().out
    assert (
        f"resnet8 from resnet14 of {teachers[0]}, top-1 10.00 and resnet8 of {teachers[1]}, top-1 10.00 by kd"
        in printed
    )
    assert sum(line.startswith("teacher ") for line in printed.splitlines()) == 2
    assert run.result["teacher"] == "resnet14, resnet8"
    assert not [name for name in run.checkpoint["weights"] if "teacher" in name]
    assert output_folder(short_config("", None, f"{TWO} OUTPUT_DIR ''")).parent.name == "kd_resnet14+resnet8_resnet8"


def test_a_run_goes_on_with_its_teachers_alone(tmp_path, teachers):
    short_run(tmp_path / "run", None, by(teachers))
    other = save_teacher(tmp_path / "other", "resnet8", seed=12)
    more = "SOLVER.EPOCHS 2"
    message = refusal(short_config(tmp_path / "run", None, by([teachers[0], other], more)), resume=True)
    assert message.endswith("was written with other teachers; give their folders as DISTILLER.TEACHER_CKPTS")
    assert len(short_run(tmp_path / "run", None, by(teachers, more), resume=True).epochs) == 2


def test_dskd_pairs_the_student_with_the_first(tmp_path, teachers):
    pairs = "DSKD.ENABLED true DSKD.SVD_STEPS 2"
    both = short_run(tmp_path / "both", None, by(teachers, pairs))
    first = short_run(tmp_path / "first", teachers[0], pairs)
    second = short_run(tmp_path / "second", teachers[1], f"{pairs} DISTILLER.TEACHER resnet8")
    # before the first update there is nothing but the weights that are compared
    assert column(both, "dskd_loss")[0] == column(first, "dskd_loss")[0] != column(second, "dskd_loss")[0]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"kd", "dkd"}))
def test_other_methods_refuse_several_and_say_which_takes_them(tmp_path, method):
    with pytest.raises(UserError) as caught:
        short_config(tmp_path, None, f"{TWO} DISTILLER.TYPE {method} DSKD.ENABLED true")
    given = "DISTILLER.TEACHERS = ['resnet14', 'resnet8']"
    told = f"{method} takes one, as DISTILLER.TEACHER; several are for kd and dkd"
    assert str(caught.value).endswith(f"{given}: {told}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("DISTILLER.TEACHERS [resnet14]", "in place of DISTILLER.TEACHER and TEACHER_CKPT; set those to ''"),
        (f"{TWO} DISTILLER.TEACHER_CKPTS [a]", "expected a folder for each of the 2 DISTILLER.TEACHERS"),
        ("DISTILLER.TEACHER_CKPTS [a]", "expected a folder for each of the 0 DISTILLER.TEACHERS"),
        ("DISTILLER.TEACHER '' DISTILLER.TEACHERS [1]", "expected a list of networks"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, settings, told):
    with pytest.raises(UserError) as caught:
        short_config(tmp_path, None, settings)
    assert told in str(caught.value)


def test_a_teacher_of_several_is_found_by_its_name_or_its_place_is_asked_for(tmp_path, teachers):
    message = refusal(short_config(tmp_path, None, f"{TWO} DISTILLER.TEACHER_CKPTS ['{teachers[0]}',nowhere]"))
    assert "nowhere" in message
    wanted = "DISTILLER.TEACHER '' DISTILLER.TEACHERS [wrn_16_2]"
    assert refusal(short_config(tmp_path, None, wanted)).endswith("or set DISTILLER.TEACHER_CKPTS")
