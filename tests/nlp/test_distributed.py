"""Two processes on the CPU, as of two machines: ranks have the same weights and directions, an example counts once."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import launched
import pytest
import torch
from nlp_fixtures import assert_same_bits, flags, log_of, result_of, tiny_tokenizer, weights_of, write_model, write_rte
from transformers import AutoModelForSequenceClassification

from bert_of_theseus.training import last_checkpoint
from common import ROOT

# Runs the pipeline under torchrun; each rank leaves what it ended with.
RANK = """
import os, sys
sys.path[:0] = {paths!r}
from common.torchvision_repair import repair_torchvision
repair_torchvision()
import torch
from bert_of_theseus import pipeline
from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.data import TokenizedDataset
from common.run.errors import run_cli

seen, read = [], []
item = TokenizedDataset.__getitem__

def reading(dataset, index):
    if len(dataset) == 24:  # the training set
        read.append(index)
    return item(dataset, index)

TokenizedDataset.__getitem__ = reading

class Spy(pipeline.MethodStateCallback):
    def on_train_begin(self, args, state, control, **others):
        super().on_train_begin(args, state, control, **others)
        read.clear()  # what was looked at to find the lengths

    def on_optimizer_step(self, args, state, control, **others):
        super().on_optimizer_step(args, state, control, **others)
        gradients = [p.grad for m in self.theseus.theseus_modules for p in m.successor.parameters()]
        seen.append((sorted(self.theseus.sampled), all(gradient is not None for gradient in gradients)))

    def on_train_end(self, args, state, control, **others):
        super().on_train_end(args, state, control, **others)
        trained = {{name: p.detach() for name, p in self.theseus.named_parameters() if p.requires_grad}}
        kept = {{"dskd": self.dskd.state_dict(), "trained": trained, "seen": seen, "read": read}}
        kept["process"] = args.process_index
        torch.save(kept, os.path.join({folder!r}, "rank" + os.environ["RANK"] + ".pt"))

pipeline.MethodStateCallback = Spy
run_cli(lambda: pipeline.run(parse_arguments(sys.argv[1:])))
file = os.path.join({folder!r}, "rank" + os.environ["RANK"] + ".pt")
torch.save(torch.load(file, weights_only=True) | {{"in a group": torch.distributed.is_initialized()}}, file)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = SimpleNamespace(model=write_model(folder / "model"), data=write_rte(folder / "data", dev=13, test=7))
    script = folder / "rank.py"
    script.write_text(RANK.format(paths=[str(ROOT), str(ROOT / "nlp" / "BERT-of-Theseus")], folder=str(folder)))
    more = ("--ifsvd", "--svd_steps", "2", "--rank_size", "4", "--basis", "update", "--max_steps", "7", "--do_predict")
    more += ("--gradient_accumulation_steps", "2", "--per_gpu_eval_batch_size", "2")
    words = flags(paths, folder / "run", *more)
    words[words.index("--per_gpu_train_batch_size") + 1] = "2"
    printed = launched.launch_two_agents(script, words)
    kept = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    more = {"words": words, "data": paths.data, "printed": printed}
    return SimpleNamespace(first=kept[0], second=kept[1], run=folder / "run", **more)


def test_both_ranks_took_part(ranks):
    assert (ranks.first["process"], ranks.second["process"]) == (0, 1)
    result = result_of(ranks.run)
    assert result["steps"] == 7
    assert result["throughput"] > 7 * 2 * 2 * 2 / result["wall_seconds"] * 0.99  # steps x batches x examples x ranks


def test_both_ranks_choose_the_same_directions(ranks):
    for one, other in zip(ranks.first["dskd"]["chosen"], ranks.second["dskd"]["chosen"], strict=True):
        assert one["spectrum"].any()  # chosen, no longer the first ones
        for key in ("weights", "left", "right"):
            assert torch.equal(one[key], other[key])


def test_both_ranks_hold_the_same_gradient_of_dskd(ranks):
    held, other = ranks.first["dskd"]["held"], ranks.second["dskd"]["held"]
    assert torch.equal(held["value"], other["value"])
    assert all(torch.equal(*pair) for pair in zip(held["gradients"], other["gradients"], strict=True))


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_ranks_share_the_examples_of_every_epoch(ranks, epoch):
    halves = [kept["read"][12 * epoch : 12 * (epoch + 1)] for kept in (ranks.first, ranks.second)]
    assert sorted(halves[0] + halves[1]) == list(range(24))


def test_both_ranks_end_with_the_same_weights(ranks):
    assert_same_bits(ranks.first["trained"], ranks.second["trained"])


def test_both_ranks_draw_the_same_modules_and_all_successors_have_gradients(ranks):
    assert ranks.first["seen"] == ranks.second["seen"]
    assert len(ranks.first["seen"]) == 7
    assert any(len(sampled) < 2 for sampled, _ in ranks.first["seen"])  # so that gradients of zero were needed
    assert all(complete for _, complete in ranks.first["seen"])


def test_the_task_loss_that_is_logged_is_the_mean_over_ranks(ranks):
    for line in log_of(ranks.run, "task_loss"):
        assert line["loss"] == pytest.approx(line["task_loss"] + 0.1 * line["dskd_loss"], rel=1e-3)


def test_only_one_rank_writes_the_record_and_prints(ranks):
    assert [line["step"] for line in log_of(ranks.run, "task_loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert sum(printed.count("the student is a plain") for printed in ranks.printed) == 1


def student_labels(ranks, name: str) -> tuple[list[str], list[list[str]]]:
    rows = [line.split("\t") for line in (ranks.data / f"{name}.tsv").read_text().splitlines()[1:]]
    batch = tiny_tokenizer()([row[1] for row in rows], [row[2] for row in rows], padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(ranks.run / "student").eval()
    with torch.no_grad():
        return [model.config.id2label[i] for i in model(**batch).logits.argmax(-1).tolist()], rows


def test_an_odd_number_of_dev_examples_is_counted_once_each(ranks):
    predicted, rows = student_labels(ranks, "dev")
    correct = sum(label == row[3] for label, row in zip(predicted, rows, strict=True))
    assert result_of(ranks.run)["last"] == pytest.approx(correct / 13)


def test_predictions_are_complete_and_in_the_order_of_the_file(ranks):
    predicted, _ = student_labels(ranks, "test")
    written = (ranks.run / "predictions" / "RTE.tsv").read_text().splitlines()[1:]
    assert written == [f"{i}\t{label}" for i, label in enumerate(predicted)]


def test_the_student_that_is_exported_is_the_one_that_the_ranks_trained(ranks):
    student = weights_of(ranks.run / "student")
    name = "encoder.layer.1.{}output.dense.weight"
    trained = ranks.first["trained"]["model.bert." + name.format("successor.")]
    assert torch.equal(student["bert." + name.format("")], trained)


def test_both_ranks_leave_the_group_before_they_exit(ranks):
    """A group that is left to the interpreter's exit aborts the process now and then."""
    assert not ranks.first["in a group"]
    assert not ranks.second["in a group"]


def test_a_preempted_group_saves_one_step_on_all_ranks_and_goes_on(tmp_path):
    paths = SimpleNamespace(model=write_model(tmp_path / "model"), data=write_rte(tmp_path / "data"))
    script = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    words += flags(paths, tmp_path / "run", "--max_steps", "100000", "--save_steps", "100000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "'loss'" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "is saved in checkpoint-" in errors
    found = last_checkpoint(tmp_path / "run")
    assert found is not None
    assert {path.name for path in found.iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"}


def test_a_users_error_is_said_once(tmp_path):
    paths = SimpleNamespace(model=write_model(tmp_path / "model"), data=write_rte(tmp_path / "data"))
    done = launched.launch(launched.GLUE, flags(paths, tmp_path / "run", "--max_seq_length", "9999"))
    assert done.returncode != 0
    assert done.stderr.count("error: --max_seq_length 9999: the model takes 64 tokens at most") == 1, done.stderr


def test_a_process_that_is_killed_is_started_again_and_resumed_to_the_same_bits(tmp_path, ranks):
    words = [*ranks.words, "--output_dir", str(tmp_path / "run"), "--save_steps", "2"]
    done = launched.launch_killed(launched.GLUE, words, 4, tmp_path / "process.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"started again by torchrun, the run in {tmp_path / 'run'} is resumed") == 1
    assert_same_bits(weights_of(tmp_path / "run" / "student"), weights_of(ranks.run / "student"))
    assert [line["step"] for line in log_of(tmp_path / "run", "task_loss")] == [1, 2, 3, 4, 5, 6, 7]
