"""What DSKD chose, written by both pipelines, and the page that shows it."""

import base64
import json
import re
import shutil
import socket
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from cv_fixtures import read_run, save_teacher, short_config
from nlp_fixtures import execute, flags, tiny, weights_of  # noqa: F401

from common.run.choices import ChoiceLog
from common.run.confusion import Confusion, write_confusion
from common.run.errors import UserError
from common.run.record import RunRecord
from cv.config import as_dict
from cv.trainer import train
from dskd import Curvature, DirectionSensitivityLoss, Own
from scripts import report as script
from scripts.lib.report import plots
from scripts.lib.report.classes import mixed_up
from scripts.lib.report.heatmaps import overlaps, thinned
from scripts.lib.report.labels import labels
from scripts.lib.report.load import Choice, Selected, load_run
from scripts.lib.report.networks import weight_pairs
from scripts.lib.report.page import report
from scripts.lib.report.spectra import first_middle_last, singular_values, weight_spectrum

HOSTILE = '<script>alert("x")</script>'
FINISHED = {"metric": "accuracy", "last": 0.71, "best": 0.74, "throughput": 37.2, "throughput_unit": "examples/s"}
FINISHED |= {
    "wall_seconds": 226.6,
    "device": "a processor",
    "git_revision": "f38e05e",
    "command": "python run.py --seed 1",
}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "directions.jsonl").read_text().splitlines()]


def folder_of(words: list[str]) -> Path:
    return Path(words[words.index("--output_dir") + 1])


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def choice_line(step: int, *pairs: str) -> dict:
    selected = {"index": [0, 2, 5], "weight": [0.5, 0.3, 0.2], "sigma": [1.0, 0.4, 0.05]}
    weights = dict.fromkeys(pairs, selected)
    return {"step": step, "weights": weights, "distance": {pair: 1 - step / 100 for pair in pairs}}


def text_run(folder: Path, *, dskd: bool = True, finished: bool = True, **settings) -> Path:
    """What the text pipeline leaves behind."""
    RunRecord(folder, {"task_name": "RTE", "method": "theseus", "seed": 1, "if_svd": dskd, **settings})
    more = {"dskd_loss": 25.2, "effective_directions": 2.6} if dskd else {}
    lines = [{"step": s, "loss": 3.1, "task_loss": 0.7, "learning_rate": 5e-5, **more} for s in (10, 20)]
    lines += [{"step": s, "eval_dev_accuracy": 0.5 + s / 100, "eval_dev_loss": 9.0, "epoch": s / 10} for s in (10, 20)]
    write_lines(folder / "metrics.jsonl", lines)
    if dskd:
        pairs = ("0.attention.self.query", "0.output.dense")
        write_lines(folder / "directions.jsonl", [choice_line(s, *pairs) for s in (10, 20)])
    if finished:
        (folder / "result.json").write_text(json.dumps(FINISHED))
    return folder


def vision_run(folder: Path, *, dskd: bool = True, start: str = "random", rate: float = 0.05) -> Path:
    """What the vision pipeline leaves behind, without the student."""
    config = {"DATASET": {"NAME": "digits"}, "DISTILLER": {"TYPE": "kd", "STUDENT": "resnet8", "TEACHER": "resnet20"}}
    config["DISTILLER"]["START"] = start
    RunRecord(folder, {**config, "SOLVER": {"SEED": 4, "LR": rate}, "DSKD": {"ENABLED": dskd, "BASIS": "update"}})
    more = {"dskd_loss": 4.2} if dskd else {}
    lines = [{"step": 3, "loss": 11.0, "loss_ce": 0.2, "loss_kd": 9.8, "images_per_second": 900.0, **more}]
    write_lines(folder / "metrics.jsonl", [*lines, {"step": 3, "epoch": 1, "test_top1": 10.8, "test_top5": 54.7}])
    return folder


def page_of(monkeypatch, *words: Path | str) -> str:
    """Run the script; the page is the file named last, or its default place."""
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
    script.main()
    return (Path(words[-1]) if "--output" in words else Path(words[0]) / "report.html").read_text(encoding="utf-8")


def pictures(page: str) -> dict[str, str]:
    """alt -> SVG."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"', page)
    return {alt: base64.b64decode(data).decode() for data, alt in found}


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict]]:
    parser = _Elements()
    parser.feed(page)
    return parser.found


# The record


@pytest.fixture
def followed(tmp_path):
    """A loss with one pair, its record, and a function that takes a step with a given update and gradient."""
    student, teacher = torch.nn.Parameter(torch.eye(3)), 2 * torch.eye(3)
    dskd = DirectionSensitivityLoss([("layer", student, teacher)], Own(rank=2), svd_steps=2)
    record = ChoiceLog(tmp_path, dskd, [("layer", student, teacher)])

    def step(update: torch.Tensor, grad: torch.Tensor) -> None:
        student.grad = grad
        with dskd.observe(0.0), torch.no_grad():
            student.add_(update)
        record.follow(dskd.steps)

    return step


def test_a_choice_is_a_line_with_the_weights_above_zero_and_the_distance(followed, tmp_path):
    followed(torch.zeros(3, 3), torch.ones(3, 3))
    assert read_lines(tmp_path) == []
    # singular values 4, 2, 1 meet gradients 1, 5, 3: sensitivities 4, 10, 3, of which rank 2 keeps 4 and 10
    followed(torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 5.0, 3.0])))
    (line,) = read_lines(tmp_path)
    assert line["step"] == 2
    assert line["weights"] == {"layer": {"index": [1], "weight": [1.0], "sigma": [0.5]}}  # min-max: the least one is 0
    # (5, 3, 2) - (2, 2, 2) = (3, 1, 0) over (2, 2, 2)
    assert line["distance"] == {"layer": float(f"{(10 / 12) ** 0.5:.4g}")}


@pytest.mark.parametrize(("svd_steps", "written"), [(1, [1, 21, 41]), (8, [8, 24, 48]), (20, [20, 40]), (25, [25, 50])])
def test_of_a_curvature_that_is_renewed_often_one_in_20_steps_is_written(tmp_path, svd_steps, written):
    student, teacher = torch.nn.Parameter(torch.eye(3)), 2 * torch.eye(3)
    dskd = DirectionSensitivityLoss([("layer", student, teacher)], Curvature(), svd_steps)
    record = ChoiceLog(tmp_path, dskd, [("layer", student, teacher)])
    for step in range(50):
        student.grad = torch.full((3, 3), step + 1.0)
        with dskd.observe(0.0), torch.no_grad():
            student.add_(1.0)
        record.follow(dskd.steps)
    assert [line["step"] for line in read_lines(tmp_path)] == written


def test_a_postponed_choice_is_written_when_it_is_made(followed, tmp_path):
    followed(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.warns(UserWarning, match="not finite"):
        followed(torch.ones(3, 3), torch.full((3, 3), torch.inf))
    assert read_lines(tmp_path) == []
    followed(torch.ones(3, 3), torch.ones(3, 3))
    assert [line["step"] for line in read_lines(tmp_path)] == [3]


# The pipelines


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """One epoch of 4 steps with a choice in every second step, saved at its end."""
    folder = tmp_path_factory.mktemp("vision")
    teacher = save_teacher(folder / "teacher")
    train(short_config(folder / "run", teacher, "DSKD.ENABLED true DSKD.SVD_STEPS 2"))
    return folder


def test_the_vision_pipeline_writes_its_choices(vision):
    lines = read_lines(vision / "run")
    assert [line["step"] for line in lines] == [2, 4]
    state = read_run(vision / "run").checkpoint["dskd"]
    assert [set(line["weights"]) for line in lines] == [set(state["pairs"])] * 2
    for weights in lines[-1]["weights"].values():
        assert weights["index"] == sorted(weights["index"])
        assert sum(weights["weight"]) == pytest.approx(1, abs=1e-3)


def test_resuming_drops_choices_behind_the_checkpoint_and_writes_those_to_come(vision):
    folder, teacher = vision / "run", vision / "teacher"
    before = read_lines(folder)
    with (folder / "directions.jsonl").open("a") as file:
        file.write(json.dumps(choice_line(6, *before[0]["weights"])) + "\n")
    longer = short_config(folder, teacher, "DSKD.ENABLED true DSKD.SVD_STEPS 2 SOLVER.EPOCHS 2")
    train(longer, resume=True)
    after = read_lines(folder)
    assert [line["step"] for line in after] == [2, 4, 6, 8]
    assert after[:2] == before
    assert len(after[2]["weights"]["stages.0.0.conv1"]["index"]) > 3  # not the line that was appended


def test_a_run_without_dskd_has_no_record_of_directions_even_in_a_folder_that_had_one(tmp_path, vision):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "directions.jsonl").touch()
    shutil.copy(vision / "run" / "config.json", tmp_path)
    train(short_config(tmp_path, vision / "teacher"), overwrite=True)
    assert not (tmp_path / "directions.jsonl").exists()


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):  # noqa: F811
    """The command line of a run of 6 steps with a choice in every second one and a checkpoint after the fourth."""
    words = ("--ifsvd", "--svd_steps", "2", "--rank_size", "4", "--num_train_epochs", "2", "--save_steps", "4")
    words = flags(tiny, tmp_path_factory.mktemp("text"), *words)
    execute(words)
    return words


def test_the_text_pipeline_writes_its_choices(text):
    run = load_run(folder_of(text))
    assert [choice.step for choice in run.choices] == [2, 4, 6]
    for choice in run.choices:
        assert len(choice.weights) == 2 * 6
        assert all(0 < len(selected.index) <= 4 for selected in choice.weights.values())
    assert max(selected.sigma.max() for selected in run.choices[-1].weights.values()) == 1
    effective = [run.choices[-1].effective(pair) for pair in run.choices[-1].weights]
    assert run.series("effective_directions")[1][-1] == pytest.approx(np.mean(effective), rel=1e-3)


def test_a_resumed_text_run_makes_and_writes_the_same_choices(text):
    folder = folder_of(text)
    before = read_lines(folder)
    for name in ("checkpoint-6", "student", "student_best"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_lines(folder / "directions.jsonl", [*before[:2], choice_line(5, "p"), choice_line(6, "p")])
    execute([*text, "--resume"])
    assert read_lines(folder) == before


def spectra_of(page: str) -> list[set[str]]:
    """Names of the pairs whose spectra are drawn: of the updates, of the weights."""
    patterns = (
        "Singular values of the updates of (.+) at their selected directions",
        "Singular values of (.+), student",
    )
    return [{found[1] for alt in pictures(page) if (found := re.match(pattern, alt))} for pattern in patterns]


def test_the_report_of_a_real_vision_run_has_both_spectra_of_every_pair(vision, monkeypatch):
    pairs = set(read_lines(vision / "run")[0]["weights"])
    assert spectra_of(page_of(monkeypatch, vision / "run")) == [pairs, pairs]


def test_the_report_of_a_vision_run_has_the_score_of_its_teacher_on_the_same_images(vision, monkeypatch):
    row = '<th scope="row">teacher</th><td>10.00 %</td>'  # as the teacher's model.json says
    assert row in page_of(monkeypatch, vision / "run")
    monkeypatch.setattr("scripts.lib.report.networks.read_json", lambda path: {"accuracy": 10.0, "held_out": 9})
    assert row not in page_of(monkeypatch, vision / "run")


def test_the_report_of_a_real_text_run_has_both_spectra(text, monkeypatch):
    lines = [line["weights"] for line in read_lines(folder_of(text))]
    chosen = {pair for weights in lines for pair in weights if any(weights[pair]["sigma"])}
    assert chosen  # a layer that was not sampled in a step that chose has none
    assert spectra_of(page_of(monkeypatch, folder_of(text))) == [chosen, set(lines[0])]


def test_the_report_of_a_run_along_the_curvature_ranks_by_it_and_has_no_spectra_of_updates(tmp_path, monkeypatch):
    settings = "DSKD.ENABLED true DSKD.BASIS curvature DSKD.SVD_STEPS 1"
    train(short_config(tmp_path / "run", save_teacher(tmp_path / "teacher"), settings))
    lines = read_lines(tmp_path / "run")
    page = page_of(monkeypatch, tmp_path / "run")
    assert "the largest eigenvalue of the curvature" in page
    assert spectra_of(page) == [set(), set(lines[0]["weights"])]


def test_a_text_student_stands_beside_the_last_predecessor_layer_of_its_group(text, tiny):  # noqa: F811
    pairs = {name: (ours, theirs) for name, ours, theirs in weight_pairs(load_run(folder_of(text)))}
    ours, theirs = pairs["0.output.dense"]
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(ours, weights_of(folder_of(text) / "student")[name.format(0)])
    assert torch.equal(theirs, weights_of(tiny.model)[name.format(1)])  # 4 layers to 2


def test_the_teacher_of_a_run_that_trained_its_predecessor_is_that_one(tmp_path, tiny):  # noqa: F811
    folder = text_run(tmp_path, model_name_or_path="not/here", finetune_predecessor=True)
    shutil.copytree(tiny.model, folder / "student")
    shutil.copytree(tiny.model, folder / "predecessor")
    assert len(weight_pairs(load_run(folder))) == 4 * 6


# The page


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> str:
    """The page of a finished text run with DSKD."""
    return report([load_run(text_run(tmp_path_factory.mktemp("shown")))])


def test_the_page_stands_alone_and_is_accessible(shown):
    found = elements(shown)
    tags = dict(reversed(found))
    assert tags["html"]["lang"] == "en"
    assert "title" in tags
    assert [attrs["content"] for tag, attrs in found if attrs.get("name") == "viewport"]
    assert {"script", "link", "iframe"}.isdisjoint(tags)
    images = [attrs for tag, attrs in found if tag == "img"]
    assert len(images) > 5
    assert all(image["alt"] and image["src"].startswith("data:") for image in images)
    assert not [attrs for _, attrs in found if "href" in attrs]


def test_every_picture_is_well_formed_and_fetches_nothing(shown):
    for svg in pictures(shown).values():
        for element in ElementTree.fromstring(svg).iter():
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)


CELLS = np.array([[0, 0, 31], [0, 1, 9], [1, 0, 2], [1, 1, 18]])


def test_the_confusion_matrix_of_few_classes_is_drawn_with_its_counts(tmp_path, monkeypatch):
    write_confusion(text_run(tmp_path), Confusion(("no", HOSTILE), CELLS, 20, "dev"))
    page = page_of(monkeypatch, tmp_path)
    svg = pictures(page)["Confusion matrix of 2 classes"]
    assert [f"<!-- {count} -->" in svg for count in (31, 9, 2, 18)] == [True] * 4
    # (31/40 + 18/20) / 2; (2 * 31 / (40 + 33) + 2 * 18 / (20 + 27)) / 2
    assert "60 examples\n(dev): accuracy 0.8167, balanced accuracy 0.8375, macro F1 0.8076." in page
    assert "<td>40</td><td>33</td><td>77.5%</td><td>93.9%</td>" in page
    assert HOSTILE not in page + svg


def test_of_many_classes_the_pairs_that_are_mixed_up_most_are_listed(tmp_path, monkeypatch):
    cells = np.array([[i, i, 50] for i in range(100)] + [[3, 7, 25], [7, 3, 4], *([i, 0, 1] for i in range(20, 40))])
    write_confusion(text_run(tmp_path), Confusion(tuple(f"class {i}" for i in range(100)), cells, 20, "dev"))
    page = page_of(monkeypatch, tmp_path)
    assert not [alt for alt in pictures(page) if alt.startswith("Confusion")]
    rows = re.findall(r'<th scope="row">(class \d+)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', page)
    assert rows[:2] == [("class 3", "class 7", "25", "33.3%"), ("class 7", "class 3", "4", "7.4%")]
    assert len(rows) == 15


def test_many_classes_without_a_mistake_say_so(tmp_path, monkeypatch):
    cells = np.array([[i, i, 50] for i in range(100)])
    write_confusion(text_run(tmp_path), Confusion(tuple(map(str, range(100))), cells, 20, "dev"))
    assert "No example of the 100 classes is taken for another." in page_of(monkeypatch, tmp_path)


@pytest.mark.parametrize(("classes", "count"), [(2, 10**6), (12, 9999), (12, 7), (1, 1)])
def test_counts_of_a_confusion_matrix_fit_into_their_cells(classes, count):
    cells = np.array([[i, j, count] for i in range(classes) for j in range(classes)])
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.lib.report.classes.svg", lambda figure: figures.append(figure) or plots.svg(figure))
        mixed_up(Confusion(tuple(f"a long name {i}" for i in range(classes)), cells, 1, "dev"))
    (axis,) = figures[0].axes
    cell = axis.get_window_extent().width / classes
    assert all(text.get_window_extent().width <= cell for text in axis.texts)
    assert all(text.get_fontsize() >= 5 for text in axis.texts)


def test_header_and_figures_come_from_the_result(shown):
    for words in ("theseus + DSKD (own)", "RTE", "a processor", "f38e05e", "python run.py --seed 1"):
        assert words in shown
    for cell in ("0.7100", "0.7400", "37.2 examples/s", "3.8 min"):
        assert f"<td>{cell}</td>" in shown


def test_losses_of_very_different_size_have_axes_of_their_own(shown):
    found = pictures(shown)
    assert {"Task loss over the optimizer steps", "DSKD loss over the optimizer steps"} <= found.keys()


@pytest.mark.parametrize("make", [text_run, vision_run])
def test_without_dskd_nothing_is_said_about_directions(tmp_path, monkeypatch, make):
    page = page_of(monkeypatch, make(tmp_path, dskd=False))
    assert "Task loss over the optimizer steps" in pictures(page)
    assert "direction" not in page.lower()


def test_a_run_in_progress_is_reported_as_far_as_it_is(tmp_path, monkeypatch):
    folder = text_run(tmp_path, finished=False)
    for name in ("metrics.jsonl", "directions.jsonl"):  # the process is writing a line
        with (folder / name).open("a") as file:
            file.write('{"step": 30, "lo')
    page = page_of(monkeypatch, folder)
    assert "in progress, last log line at step 20" in page
    assert "<td>0.7000</td>" in page  # the last evaluation
    assert "Evaluation metric over the optimizer steps" in pictures(page)


def test_a_run_that_has_just_started_has_a_page(tmp_path, monkeypatch):
    RunRecord(tmp_path, {"task_name": "RTE", "method": "kd", "if_svd": True, "seed": 1})
    page = page_of(monkeypatch, tmp_path)
    assert "There is no log line with numbers yet" in page
    assert "No directions have been chosen" in page


def test_a_vision_run_whose_teacher_is_gone_says_so(tmp_path, monkeypatch):
    folder = vision_run(tmp_path)
    RunRecord(folder, as_dict(short_config(folder, tmp_path / "nowhere", "DSKD.ENABLED true")))
    save_teacher(folder / "student", "resnet8")
    assert "Left out: " in page_of(monkeypatch, folder)


@pytest.fixture
def lookups(monkeypatch) -> list:
    """Hosts that were to be reached; none is."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or [])
    return asked


@pytest.mark.parametrize("model", ["nobody/nowhere", "/not/here"])
def test_a_text_run_whose_predecessor_is_not_here_says_so(tmp_path, monkeypatch, tiny, lookups, model):  # noqa: F811
    folder = text_run(tmp_path, model_name_or_path=model)
    shutil.copytree(tiny.model, folder / "student")
    assert f"Left out: {model} is neither a folder nor a model that has been" in page_of(monkeypatch, folder)
    assert lookups == []


def test_a_predecessor_of_the_hub_is_read_from_the_cache(tmp_path, tiny, lookups):  # noqa: F811
    folder = text_run(tmp_path / "run", model_name_or_path="some/model", cache_dir=str(tmp_path / "cache"))
    shutil.copytree(tiny.model, folder / "student")
    cached = tmp_path / "cache" / "models--some--model"
    shutil.copytree(tiny.model, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert len(weight_pairs(load_run(folder))) == 4 * 6
    assert lookups == []


def test_a_broken_student_is_said_in_a_line(tmp_path, monkeypatch, tiny):  # noqa: F811
    folder = text_run(tmp_path, model_name_or_path=str(tiny.model))
    shutil.copytree(tiny.model, folder / "student")
    (folder / "student" / "model.safetensors").write_bytes(b"torn")
    assert f"Left out: {folder / 'student'} is not a transformers model" in page_of(monkeypatch, folder)


def test_updates_of_unknown_singular_values_have_no_spectra(tmp_path, monkeypatch):
    folder = text_run(tmp_path)
    line = choice_line(10, "known", "unknown")
    line["weights"]["unknown"] = {**line["weights"]["unknown"], "sigma": [0, 0, 0]}
    write_lines(folder / "directions.jsonl", [line])
    assert spectra_of(page_of(monkeypatch, folder))[0] == {"known"}


def test_whatever_comes_from_files_is_shown_as_text(tmp_path, monkeypatch):
    folder = text_run(tmp_path, model_name_or_path=HOSTILE, method=HOSTILE, **{HOSTILE: "$x_{$\ud800"})
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "device": HOSTILE, "last": HOSTILE, "metric": HOSTILE}))
    name = f"$\\frac{{$ \x00 {HOSTILE}"
    write_lines(folder / "directions.jsonl", [choice_line(s, name) for s in (10, 20)])
    write_lines(
        folder / "metrics.jsonl", [{"step": 1, "loss_a$_{": 1.0, f"loss_{HOSTILE}": 2.0, f"eval_{HOSTILE}": 0.5}]
    )
    page = page_of(monkeypatch, folder)
    assert "script" not in dict(elements(page))
    assert page.count("&lt;script&gt;") >= 5
    for svg in pictures(page).values():
        assert not [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("script")]


def test_the_same_run_gives_the_same_page(shown, tmp_path, monkeypatch):
    assert page_of(monkeypatch, text_run(tmp_path)) == shown


# Several runs


def test_several_runs_share_plots_and_are_named_by_their_settings(tmp_path, monkeypatch):
    folders = [
        text_run(tmp_path / "a", lambda_size=0.1),
        text_run(tmp_path / "b", dskd=False),
        text_run(tmp_path / "c", lambda_size=0.3, output_dir="elsewhere"),
        vision_run(tmp_path / "d"),
    ]
    page = page_of(monkeypatch, *folders, "--output", tmp_path / "all.html")
    names = ["RTE: theseus + DSKD (own), seed 1, lambda 0.1", "RTE: theseus, seed 1"]
    names += ["RTE: theseus + DSKD (own), seed 1, lambda 0.3", "digits: kd + DSKD (update), seed 4"]
    assert labels([load_run(folder) for folder in folders]) == names
    for name in names:
        assert f"<summary>{name}</summary>" in page
    metrics = [alt for alt in pictures(page) if " on " in alt]
    assert [alt.split(" over")[0] for alt in metrics] == ["dev_accuracy on RTE", "top1 on digits"]


def test_labels_say_that_a_student_starts_from_the_teacher(tmp_path):
    runs = [load_run(vision_run(tmp_path / start, start=start)) for start in ("random", "teacher")]
    assert labels(runs) == ["kd + DSKD (update), seed 4", "kd + DSKD (update), from the teacher, seed 4"]


def test_labels_of_different_methods_say_what_else_differs(tmp_path):
    runs = [load_run(vision_run(tmp_path / str(rate), dskd=rate > 0.05, rate=rate)) for rate in (0.05, 0.1)]
    assert labels(runs) == ["kd, seed 4, learning rate 0.05", "kd + DSKD (update), seed 4, learning rate 0.1"]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, with their layout done."""
    drawn = []
    monkeypatch.setattr(plots, "svg", lambda figure: drawn.append(figure) or figure.draw_without_rendering())
    return drawn


@pytest.mark.parametrize("count", [2, 5])
def test_a_legend_of_long_labels_fits_into_its_plot_and_leaves_room_for_the_curves(figures, count):
    points = (np.arange(3.0), np.arange(3.0))
    long = "dkd + DSKD (own, shuffled), from the teacher, seed {}, learning rate 0.05, SVD steps 1000"
    plots.curves({long.format(seed): points for seed in range(count)}, "loss")
    (figure,) = figures
    box, (axis,) = figure.legends[0].get_window_extent(), figure.axes
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert axis.get_window_extent().height > 1.7 * figure.dpi


@pytest.mark.parametrize(("values", "height"), [([96.0, 96.2], 1), ([90.0, 96.0], 6.6)])
def test_an_axis_of_a_metric_does_not_magnify_noise(figures, values, height):
    plots.curves({"top1": (np.arange(2), np.array(values))}, "top1 (%)", span=1)
    low, high = figures[0].axes[0].get_ylim()
    assert high - low == pytest.approx(height)
    assert (low + high) / 2 == pytest.approx(np.mean(values))


def test_a_single_point_is_drawn_as_a_dot_and_explained(tmp_path, monkeypatch, figures):
    plots.curves({"loss": (np.array([3.0]), np.array([0.7]))}, "loss")
    assert figures[0].axes[0].lines[0].get_marker() == "o"
    monkeypatch.undo()
    assert "A dot alone is a single value" in page_of(monkeypatch, vision_run(tmp_path))


def test_a_run_with_dskd_has_the_score_of_the_same_run_without_it(tmp_path, monkeypatch):
    same, other = {"dskd": False}, {"dskd": False, "learning_rate": 1e-4}
    folders = [text_run(tmp_path / "on"), text_run(tmp_path / "other", **other), text_run(tmp_path / "off", **same)]
    result = json.loads((folders[2] / "result.json").read_text())
    (folders[2] / "result.json").write_text(json.dumps({**result, "last": 0.7}))
    page = page_of(monkeypatch, *folders, "--output", tmp_path / "all.html")
    assert page.count(" with it)") == 1
    assert "<td>0.7000 (+0.0100 with it)</td>" in page
    alone = page_of(monkeypatch, *folders[:2], "--output", tmp_path / "two.html")
    assert " with it)" not in alone


def test_runs_of_equal_settings_are_named_by_their_folders(tmp_path):
    runs = [load_run(text_run(tmp_path / name)) for name in "ab"]
    assert [name.split(" [")[1] for name in labels(runs)] == [f"{tmp_path / name}]" for name in "ab"]


# Numbers


def choice(step: int, index: list[int], weight: list[float]) -> Choice:
    return Choice(step, {"p": Selected(np.array(index), np.array(weight), np.ones(len(index)))}, {"p": 1.0})


def test_overlap_of_consecutive_choices():
    shared, jaccard = overlaps([choice(1, [0, 1, 4], [0.5, 0.3, 0.2]), choice(2, [1, 4, 9], [0.1, 0.6, 0.3])], ["p"])
    assert shared == pytest.approx(np.array([[0.1 + 0.2]]))
    assert jaccard == pytest.approx(np.array([[2 / 4]]))


def test_effective_directions_of_a_choice():
    assert choice(1, [3, 7], [0.75, 0.25]).effective("p") == pytest.approx(1 / (0.75**2 + 0.25**2))


def test_of_many_choices_the_first_and_the_last_are_drawn():
    steps = [each.step for each in thinned([choice(step, [0], [1.0]) for step in range(1000)])]
    assert (steps[0], steps[-1]) == (0, 999)
    assert len(set(steps)) == len(steps) == 150


@pytest.mark.parametrize(("count", "steps"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (6, [0, 3, 5])])
def test_spectra_are_of_the_first_a_middle_and_the_last_choice(count, steps):
    assert [each.step for each in first_middle_last([choice(step, [0], [1.0]) for step in range(count)])] == steps


def test_the_singular_values_of_a_convolution_are_those_of_its_rows():
    weight = torch.zeros(2, 3, 1, 1)
    weight[0, 2], weight[1, 0] = 3, -5
    assert singular_values(weight) == pytest.approx(np.array([5, 3]))


def test_a_student_that_diverged_has_no_spectrum():
    with pytest.raises(UserError, match="not finite"):
        singular_values(torch.tensor([[1.0, torch.nan]]))


def test_a_matrix_of_zeros_has_an_empty_panel():
    assert "</svg>" in weight_spectrum(np.zeros(3), np.zeros(3))


# What cannot be reported


def refused(monkeypatch, *words) -> str:
    with pytest.raises(UserError) as caught:
        page_of(monkeypatch, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_empty_folder_is_refused(tmp_path, monkeypatch):
    assert "no such folder" in refused(monkeypatch, tmp_path / "nowhere")
    assert "has no config.json" in refused(monkeypatch, tmp_path)


def test_a_folder_without_a_log_is_refused(tmp_path, monkeypatch):
    (text_run(tmp_path) / "metrics.jsonl").unlink()
    assert "has no metrics.jsonl" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "directions.jsonl"])
@pytest.mark.parametrize("line", ['{"step": 1, ', "[1]", '{"step": "x"}', '{"loss": 1}'])
def test_a_broken_line_is_named(tmp_path, monkeypatch, name, line):
    path = text_run(tmp_path) / name
    kept = path.read_text()
    path.write_text(f"{line}\n{kept}")
    assert f"{path}, line 1" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl", "directions.jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\n", b"[" * 100_000, b"[]\n", b"3\n", b'{"step": 1' + b"0" * 400 + b"}\n", b'{"step": NaN}\n'],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, monkeypatch, name, content):
    path = text_run(tmp_path) / name
    path.write_bytes(content)
    if content or name.endswith(".json"):
        assert str(path) in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize("section", ["DATASET", "DISTILLER", "DSKD", "SOLVER"])
@pytest.mark.parametrize("value", [3, "text", [1], None])
def test_a_group_of_settings_of_another_type_is_named(tmp_path, monkeypatch, section, value):
    path = vision_run(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), section: value}))
    assert f"{path}: {section} is {value!r}, a group of settings is expected" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "change", [{"weight": [1e300, 1.0, 1.0]}, {"weight": [10**40, 1, 1]}, {"index": [0, 1, 10**30]}]
)
def test_a_size_that_no_run_has_is_named(tmp_path, monkeypatch, change):
    line = choice_line(10, "p")
    line["weights"]["p"] = {**line["weights"]["p"], **change}
    write_lines(text_run(tmp_path) / "directions.jsonl", [line])
    assert "directions.jsonl, line 1" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize("value", [3, "text", [1], {"a": 1}, None, True])
def test_settings_and_results_of_another_type_have_a_page(tmp_path, monkeypatch, value):
    folder = vision_run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["DSKD"] = {name: value for name in ("BASIS", "LAYERS", "PAIRS")} | {"ENABLED": True}
    config["DISTILLER"] |= {"TEACHER": value, "TEACHER_CKPT": value}
    (folder / "config.json").write_text(json.dumps({**config, "DATASET": {"NAME": value, "HELD_OUT": value}}))
    (folder / "result.json").write_text(json.dumps(dict.fromkeys((*FINISHED, "peak_memory_bytes", "steps"), value)))
    save_teacher(folder / "student", "resnet8")
    assert "</html>" in page_of(monkeypatch, folder)


@pytest.mark.parametrize("place", ["student", "predecessor"])
def test_code_that_comes_with_a_model_never_runs(tmp_path, monkeypatch, tiny, place):  # noqa: F811
    folder = text_run(tmp_path / "run", model_name_or_path=str(tmp_path / "predecessor"))
    for path in (folder / "student", tmp_path / "predecessor"):
        shutil.copytree(tiny.model, path)
    model = folder / "student" if place == "student" else tmp_path / "predecessor"
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "Left out: " in page_of(monkeypatch, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "pair",
    [
        {"index": [1], "sigma": [1.0]},
        {"index": [1], "weight": [1.0]},
        {"index": [1, 2], "weight": [1.0], "sigma": [1.0, 0.5]},
        {"index": [1, 2], "weight": [0.7, 0.3], "sigma": [1.0]},
        {"index": [], "weight": [], "sigma": []},
        {"index": [-1], "weight": [1.0], "sigma": [1.0]},
        {"index": [1], "weight": [1.0], "sigma": [-0.1]},
        {"index": [1], "weight": [1.0], "sigma": [1.5]},
        {"index": [1], "weight": [1.0], "sigma": [float("nan")]},
        3,
    ],
)
def test_a_choice_that_makes_no_sense_is_named(tmp_path, monkeypatch, pair):
    path = text_run(tmp_path) / "directions.jsonl"
    write_lines(path, [{"step": 1, "weights": {"p": pair}, "distance": {"p": 1.0}}])
    assert f"{path}, line 1" in refused(monkeypatch, tmp_path)


def test_a_finished_run_with_a_torn_last_line_is_broken(tmp_path, monkeypatch):
    with (text_run(tmp_path) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert "metrics.jsonl, line 5 is not valid JSON" in refused(monkeypatch, tmp_path)


def test_several_runs_need_a_place_for_the_page(tmp_path, monkeypatch):
    assert "--output" in refused(monkeypatch, text_run(tmp_path / "a"), text_run(tmp_path / "b"))
