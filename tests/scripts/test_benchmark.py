"""scripts/benchmark.py with --quick: every part writes the figures that the pages cite, and prints its table."""

import json
import os
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from nlp_fixtures import write_model, write_rte

from common import ROOT
from common.run.errors import UserError
from scripts import benchmark

SUMMARY = {"median", "min", "max", "repeats"}


@pytest.fixture
def execute(tmp_path, monkeypatch, capsys):
    """Run one part; returns (what it wrote, the lines that it printed)."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(what: str, *more: str) -> tuple[dict, list[str]]:
        words = ["benchmark.py", what, "--quick", "--output", str(tmp_path / "results"), *map(str, more)]
        monkeypatch.setattr(sys, "argv", words)
        benchmark.main()
        written = json.loads((tmp_path / "results" / f"{what}.json").read_text())
        assert {"device", "versions", "git_revision"} <= written.keys()
        return written, capsys.readouterr().out.splitlines()

    return run


def rows(lines: list[str]) -> list[list[str]]:
    """Cells of the table's rows; the header and the line below it left out."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_method_writes_the_share_of_a_step_and_the_ratio_to_the_svd_in_every_step(execute):
    written, lines = execute("method")
    for result in written["results"]:
        cost, step = result["dskd_seconds_per_step"], result["seconds"]["step"]["median"]
        assert result["share_of_step"] == pytest.approx(cost / step)
        assert result["per_step_svd_over_dskd"] > 0
        assert result["kept_copies_of_matched_weights"] > 0
    assert [row[0] for row in rows(lines)] == [result["case"] for result in written["results"]]


def test_curvature_writes_its_share_of_a_step_for_every_setting(execute):
    written, lines = execute("curvature")
    for case in written["cases"]:
        medians = {name: values["median"] for name, values in case["seconds"].items()}
        step = medians.pop("step")
        for factors in ("full", "diagonal"):
            choice, expansion, held = (
                medians[f"{name}, {factors}"] for name in ("choose directions", "expand", "held")
            )
            for every in (1, 2, 4, 8):
                expected = (held + (expansion + choice) / every) / step
                assert case["share_of_step"][f"{factors} {every}"] == pytest.approx(expected)
    head = lines[0].strip("| ").split(" | ")
    assert head == ["factors", "renewed", *(case["case"] for case in written["cases"]), "minus KD"]
    assert [row[:2] for row in rows(lines)][::5] == [["full", "every step"], ["diagonal", "every 4 steps"]]


def test_cv_writes_speed_and_memory_of_both_loops_in_both_precisions(execute, monkeypatch):
    from scripts.lib.benchmark import cifar, loops

    monkeypatch.setattr(cifar, "load_dataset", lambda name, root: loops.random_images(32))
    monkeypatch.setattr(loops, "peak_memory_apart", lambda loop, precision, *_: len(loop + precision))
    asked = set()
    monkeypatch.setattr(loops, "at_once", lambda pools, steps: asked.add((len(pools), steps)))
    written, lines = execute("cv", "--cifar100", "images")
    number, threads = written["runs_at_once"], torch.get_num_threads()
    assert asked == {
        (processes, loops.Steps(loop, precision, 8, 1, each, images))
        for precision in ("fp32", "bf16")
        for loop, processes, each, images in (
            ("ours", 1, threads, "images"),
            ("plain", 1, threads, "images"),
            ("ours", 1, number, 8),
            ("ours", number, 1, 8),
        )
    }
    for result in written["precisions"].values():
        rates = result["images_per_second"]
        assert rates["ours"].keys() == rates["plain"].keys() == SUMMARY
        assert result["ratio"] == pytest.approx(rates["ours"]["median"] / rates["plain"]["median"])
        assert result["peak_memory_bytes"] == {"ours": 8, "plain": 9}
        together = result["runs"]["images_per_second"]
        assert result["runs"]["ratio"] == pytest.approx(together["many"]["median"] / together["one"]["median"])
        share, seconds = result["step"]["share"], result["step"]["seconds"]
        assert list(share) == ["data", "teacher", "student", "backward", "optimizer", "DSKD"]
        assert sum(share.values()) == pytest.approx(1)
        dskd = seconds["held"] + seconds["expand"] + seconds["choose directions"] / 100
        assert share["DSKD"] / share["student"] == pytest.approx(dskd / seconds["student"])
    assert [(row[0], *row[-2:]) for row in rows(lines[:4])] == [(name, "0", "0") for name in ("fp32", "bf16")]
    assert [row[0] for part in (lines[5:9], lines[10:14]) for row in rows(part)] == ["fp32", "bf16"] * 2


def test_cv_needs_no_data(execute, monkeypatch):
    from scripts.lib.benchmark import cifar, loops

    monkeypatch.setattr(cifar, "load_dataset", lambda *_: pytest.fail("looked for data"))
    monkeypatch.setattr(cifar, "build", lambda *_: SimpleNamespace(run=lambda steps: None))
    monkeypatch.setattr(cifar, "shares", lambda *_: {"share": {"data": 1.0}})
    monkeypatch.setattr(loops, "peak_memory_apart", lambda *_: 1)
    monkeypatch.setattr(loops, "at_once", lambda _, steps: asked.add(steps.images))
    asked = set()
    written, _ = execute("cv", "--cifar100", "random")
    assert written["case"].endswith(", random images")
    assert all(isinstance(images, int) for images in asked)


def test_compiled_writes_the_speed_beside_the_eager_loop_and_the_seconds_of_the_first_step(execute, monkeypatch):
    compiled = []

    def compile_nothing(function, mode, dynamic):
        compiled.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    written, lines = execute("compiled")
    assert compiled == ["ResNet"] * 4  # two networks in each precision
    for result in written["precisions"].values():
        rates = result["images_per_second"]
        assert rates["eager"].keys() == rates["compiled"].keys() == SUMMARY
        assert result["ratio"] == pytest.approx(rates["compiled"]["median"] / rates["eager"]["median"])
        assert result["first_step_seconds"] > 0
    assert [row[0] for row in rows(lines)] == ["fp32", "bf16"]


def test_the_parts_of_a_step_are_a_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.lib.benchmark.cifar import step_parts
    from scripts.lib.benchmark.loops import build, random_images

    data = random_images(8)
    whole, in_parts = (build("ours", data, 4, "fp32") for _ in range(2))
    whole.run(2)
    works = step_parts(in_parts)
    for work in [*works.values()] * 2:
        work()
    state = in_parts.kd.student.state_dict()
    for name, expected in whole.kd.student.state_dict().items():
        torch.testing.assert_close(state[name], expected)


def test_runs_at_once_are_processes_with_their_own_threads():
    from scripts.lib.benchmark.loops import Steps, at_once, processes

    pools = processes(2)
    assert len({os.getpid(), *(pool.submit(os.getpid).result() for pool in pools)}) == 3
    # in one of them: a process takes seconds to start
    at_once(pools[:1], Steps("ours", "fp32", batch=2, steps=1, threads=3, images=2))
    assert pools[0].submit(torch.get_num_threads).result() == 3
    for pool in pools:
        pool.shutdown(wait=False)


def test_memory_is_that_of_the_loop_and_not_of_the_measuring_process(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.lib.benchmark.loops import peak_memory_apart

    ballast = torch.ones(1_000_000_000, dtype=torch.uint8)
    peak = peak_memory_apart("plain", "fp32", batch=4, steps=1, images=8)
    assert 50e6 < peak < len(ballast)  # torch alone takes more than the lower bound


@pytest.fixture(scope="module")
def glue_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_rte(folder / "RTE", train=24, dev=12)
    return ["--glue", folder, "--model", write_model(folder / "model"), "--tasks", "RTE"]


def test_nlp_writes_speed_padding_and_metric_of_both_loops(execute, glue_run, monkeypatch):
    from scripts.lib.benchmark import glue

    monkeypatch.setattr(glue, "LENGTH", 32)  # the tiny model's tokens are few
    written, lines = execute("nlp", *glue_run, "--seeds", "2", "--precision", "fp32")
    result = written["tasks"]["RTE"]
    rates = result["examples_per_second"]
    assert rates["ours"].keys() == rates["plain"].keys() == SUMMARY
    assert result["ratio"] == pytest.approx(rates["ours"]["median"] / rates["plain"]["median"])
    assert result["tokens_per_example"]["ours"] < result["tokens_per_example"]["plain"] == 32
    assert rates["ours"]["repeats"] == rates["plain"]["repeats"] == 2  # a warm-up and one timed block for every seed
    assert result["metric"] == "accuracy"
    trainings = ["ours", "plain", "plain, equal time"]
    assert all(list(result[key]) == trainings for key in ("dev_metric", "dev_loss"))
    assert all(len(values) == 2 for key in ("dev_metric", "dev_loss") for values in result[key].values())
    (row,) = rows(lines)
    found = [[100 * value for value in result["dev_metric"][name]] for name in trainings]
    assert row[0] == "RTE"
    assert row[-3:] == [f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in found]


def test_the_plain_loop_takes_the_steps_that_fit_into_our_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.lib.benchmark.glue import equal_time_steps

    assert equal_time_steps({"ours": [1.0, 3.0], "plain": [4.0, 6.0]}, steps=56) == 22
    assert equal_time_steps({"ours": [1.0], "plain": [100.0]}, steps=56) == 1


def test_nlp_looks_at_the_data_of_all_tasks_before_the_first_training(execute, glue_run, monkeypatch):
    from scripts.lib.benchmark import glue

    monkeypatch.setattr(glue, "_train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match="WNLI"):
        execute("nlp", *glue_run, "--tasks", "RTE", "WNLI")


def test_an_output_that_cannot_be_written_is_found_out_first(execute, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "curvature", "--quick", "--output", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"^--output .* is a file$"):
        benchmark.main()


def test_nlp_refuses_a_number_of_seeds_below_one(execute, glue_run):
    with pytest.raises(UserError, match="--seeds: '0' is not a whole number of at least 1"):
        execute("nlp", *glue_run, "--seeds", "0")


def test_the_glue_loops_take_their_steps_from_the_same_weights(monkeypatch, execute, tmp_path, glue_run):
    from scripts.lib.benchmark import glue

    starts, steps, planned = [], [], []

    class Watched(glue.PlainGlue):
        def __init__(self, model, data, batch, rate, total_steps, bf16):
            starts.append([p.detach().clone() for p in model.parameters()])
            planned.append(total_steps)
            super().__init__(model, data, batch, rate, total_steps, bf16)

        def run(self, count):
            steps.append(count)
            super().run(count)

    class WatchedTurns(glue.Turns):
        def on_train_begin(self, args, state, control, model=None, **_):
            starts.append([p.detach().clone() for p in model.parameters()])
            super().on_train_begin(args, state, control)

        def on_train_end(self, args, state, control, **_):
            assert state.global_step == sum(steps)

    monkeypatch.setattr(glue, "LENGTH", 32)
    monkeypatch.setattr(glue, "PlainGlue", Watched)
    monkeypatch.setattr(glue, "Turns", WatchedTurns)
    monkeypatch.setattr(glue, "equal_time_steps", lambda seconds, steps: 10 * steps + len(seconds["plain"]))
    execute("nlp", *glue_run, "--seeds", "1", "--precision", "fp32")
    assert len(starts) == 3
    assert all(torch.equal(first, other) for first, *others in zip(*starts, strict=True) for other in others)
    assert steps == [1, 1, 21]  # two blocks of one step, of which one is timed
    assert planned == [2, 21]


def test_sampled_batches_are_whole_batches_of_the_epoch_and_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.lib.benchmark.glue_loops import SampledBatches

    torch.manual_seed(0)
    sampled = SampledBatches(range(103), batch=5, steps=8)
    order = list(sampled)
    batches = [tuple(order[start : start + 5]) for start in range(0, 40, 5)]
    assert len(order) == len(sampled) == 40
    assert all(batch == tuple(range(batch[0], batch[0] + 5)) and batch[0] % 5 == 0 for batch in batches)
    assert len(set(batches)) == 8
    assert batches != [tuple(range(start, start + 5)) for start in range(0, 40, 5)]


def test_startup_writes_the_seconds_of_every_command(execute, monkeypatch):
    from scripts.lib.benchmark import startup

    monkeypatch.setattr(startup, "REFERENCES", {"Python alone": ["-c", "pass"]})  # the others are slow
    written, lines = execute("startup")
    assert written["seconds"].keys() == written["commands"].keys()
    assert [row[0] for row in rows(lines)] == list(written["seconds"])
    medians = {name: result["median"] for name, result in written["seconds"].items()}
    slowest = max(medians, key=medians.get)
    assert slowest.startswith("first training step")
    assert all(medians[name] < medians[slowest] / 2 for name in medians if name.endswith("--help"))


def test_render_fills_the_page_from_the_files(execute, tmp_path, monkeypatch):
    from scripts.lib.benchmark import page

    written, lines = execute("curvature")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text("before\n<!-- curvature -->\nold\n<!-- /curvature -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "render", "--output", str(tmp_path / "results")])
    benchmark.main()
    shown = page.PAGE.read_text(encoding="utf-8").splitlines()
    assert shown[:2] + shown[-2:] == ["before", "<!-- curvature -->", "<!-- /curvature -->", "after"]
    assert shown[3:11] == lines[:8]
    assert shown[12].startswith(f"[curvature.json](../results/benchmark/curvature.json): {written['device']}, torch ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file; python scripts/benchmark.py growth writes it"),
        ("{}", "of another version .* without 'lines'"),
    ],
)
def test_render_says_which_file_it_cannot_use(tmp_path, text, told):
    from scripts.lib.benchmark.page import filled

    if text:
        (tmp_path / "growth.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"growth\.json: {told}"):
        filled("<!-- growth -->\n<!-- /growth -->\n", tmp_path)


def test_startup_says_which_training_did_not_start(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.lib.benchmark import startup

    with pytest.raises(UserError, match="no first training step: python -c raise SystemExit"):
        startup._first_step(["-c", "raise SystemExit"])
