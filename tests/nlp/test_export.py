"""The exported student is a plain transformers checkpoint: same logits without our code, complete, described."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nlp_fixtures import execute, flags, tiny_tokenizer, weights_of, write_model, write_rte
from transformers import AutoModelForSequenceClassification

from bert_of_theseus import pipeline
from bert_of_theseus.training import save_student

# The blocked names cannot be imported, wherever they may be installed. torchvision is among them because the repair of
# mismatched installs is our code; transformers does without it.
LOAD_ELSEWHERE = """
import json, sys
for name in ("common", "bert_of_theseus", "cv", "torchvision"):
    sys.modules[name] = None
try:
    import common
    sys.exit("our code can be imported")
except ImportError:
    pass
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, firsts, seconds = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model.eval()(**tokenizer(firsts, seconds, padding=True, return_tensors="pt")).logits
print(json.dumps({"logits": logits.tolist(), "class": type(model).__name__, "module": type(model).__module__}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Theseus run with DSKD; `logits` are those of the model in the Trainer, in the order of the test file."""
    folder = tmp_path_factory.mktemp("exported")
    paths = SimpleNamespace(model=write_model(folder / "model"), data=write_rte(folder / "data", test=21))
    caught = []

    def catch(task, where, logits, name):
        caught.append(logits)
        return where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_predictions", catch)
        more = ("--ifsvd", "--svd_steps", "2", "--rank_size", "4", "--max_steps", "6", "--do_predict")
        execute(flags(paths, folder / "run", *more, "--per_gpu_eval_batch_size", "4"))
    rows = [line.split("\t") for line in (paths.data / "test.tsv").read_text().splitlines()[1:]]
    texts = [row[1] for row in rows], [row[2] for row in rows]
    return SimpleNamespace(student=folder / "run" / "student", texts=texts, logits=caught[0], elsewhere=folder)


def test_it_gives_the_same_logits_in_a_process_that_cannot_import_our_code(exported):
    words = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, exported.student, *map(json.dumps, exported.texts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=exported.elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["class"] == "BertForSequenceClassification"
    assert told["module"].startswith("transformers.")
    assert np.ptp(exported.logits, axis=0).max() > 0.1  # a model whose outputs are all alike would prove nothing
    np.testing.assert_allclose(told["logits"], exported.logits, rtol=0, atol=1e-5)


def test_it_has_the_weights_of_its_layers_and_no_others(exported):
    names = weights_of(exported.student).keys()
    assert {int(name.split(".")[3]) for name in names if ".layer." in name} == {0, 1}
    assert not [name for name in names if "successor" in name or "predecessor" in name]


def test_its_config_has_the_layers_and_the_labels(exported):
    config = json.loads((exported.student / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_nothing_in_it_is_a_pickle(exported):
    kinds = {path.suffix for path in exported.student.iterdir()}
    assert kinds - {".txt"} == {".json", ".md", ".safetensors"}  # .txt: a vocabulary, before transformers 5


def test_its_card_says_how_it_was_made_and_how_good_it_is(exported):
    card = (exported.student / "README.md").read_text()
    result = json.loads((exported.student.parent / "result.json").read_text())
    assert "RTE: 2 layers, theseus + DSKD (own, lambda 0.1, rank 4)" in card
    assert f"| dev_accuracy | {result['last']:.4f} |" in card
    assert "seed 42" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_saving_replaces_an_earlier_student_whole(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "model"))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "stale.bin").write_text("")
    save_student(model, tiny_tokenizer(), tmp_path / "student", "card")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "student"}
    assert not (tmp_path / "student" / "stale.bin").exists()
    assert (tmp_path / "student" / "README.md").read_text() == "card"


def test_saving_leaves_the_model_in_its_own_precision(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "model")).to(torch.bfloat16)
    save_student(model, tiny_tokenizer(), tmp_path / "student", "card")
    assert model.dtype == torch.bfloat16
    assert {value.dtype for value in weights_of(tmp_path / "student").values()} == {torch.float32}
