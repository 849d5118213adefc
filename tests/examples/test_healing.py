"""examples/heal_causal_lm.py on a tiny model: what it prints, and a student that needs none of our code."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import ROOT

HEALING = ROOT / "examples" / "heal_causal_lm.py"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "by", "two", "trees"]
LINE = re.compile(r"(teacher|pruned|healed): perplexity (\d+\.\d), \d+\.\d M parameters, \d+ tokens/s")
ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (each.from_pretrained(sys.argv[1]) for each in (AutoModelForCausalLM, AutoTokenizer))
tokens = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
print(type(model).__name__, model.generate(tokens, max_new_tokens=4, do_sample=False).shape[1])
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a random Llama of six layers and its tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("material")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "model")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": len(vocabulary)}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes)).save_pretrained(folder / "model")
    drawn = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(2)).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in drawn))
    return folder


def run(*words: str) -> subprocess.CompletedProcess:
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/environment"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("heal_causal_lm", HEALING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def heal(program, material, monkeypatch, capsys):
    """Runs the program in this process; gives the perplexities."""

    def heal(output, words: str) -> dict[str, float]:
        flags = (
            f"--model {material}/model --text {material}/text.txt --length 8 --tokens 400 --drop 2 --output {output}"
        )
        monkeypatch.setattr(sys, "argv", [str(HEALING), *flags.split(), *words.split()])
        program.main()
        return {name: float(value) for name, value in LINE.findall(capsys.readouterr().out)}

    return heal


def test_the_student_is_healed_and_a_plain_model(heal, tmp_path):
    found = heal(tmp_path / "student", "--steps 30 --lr 3e-2 --by influence")
    assert list(found) == ["teacher", "pruned", "healed"]
    assert found["healed"] < found["pruned"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, len(student.model.layers)) == (4, 4)
    alone = run("-c", ALONE, str(tmp_path / "student"))
    assert alone.stdout.split() == ["LlamaForCausalLM", "7"], alone.stderr


def way(material, folder) -> float:
    """How far the student's layers 0 and 3 have gone from the teacher's first and last."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, material / "model"))
    ours, theirs = ([model.model.layers[i] for i in (0, -1)] for model in (student, teacher))
    gaps = [
        a - b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x.parameters(), y.parameters(), strict=True)
    ]
    return sum(gap.detach().square().sum().item() for gap in gaps) ** 0.5


def test_every_anchor_holds_the_layers_near_the_teachers(material, heal, tmp_path):
    heal(tmp_path / "free", "--steps 12 --lr 1e-2")
    free = way(material, tmp_path / "free")
    shares = {"curvature": 0.8, "l2sp": 0.8, "ewc": 0.8, "own": 0.95}  # own pulls along few directions
    for anchor, share in shares.items():
        weight = 1000 if anchor == "own" else 5000
        heal(tmp_path / anchor, f"--steps 12 --lr 1e-2 --weight {weight} --decoupled --anchor {anchor}")
        assert 0 < way(material, tmp_path / anchor) < share * free, anchor


def test_without_a_model_it_says_what_is_missing(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(HEALING)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert (ended.value.code, capsys.readouterr().err.split("error: ")[-1]) == (2, "give --model or --smollm2\n")
