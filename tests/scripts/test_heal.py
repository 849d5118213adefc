"""scripts/heal.py: one run on a tiny model, and what it refuses, in one line and before anything is trained."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.run.errors import UserError
from scripts import heal


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs it with some words on a folder of GLUE files of one line; gives its complaint."""
    for file, column in (*heal.TRAIN.values(), *heal.TESTS.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"{column}\nA line.\n", encoding="utf-8")

    def complaint(words: str) -> str:
        folders = ["--glue", str(tmp_path), "--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["heal.py", *folders, *words.split()])
        with pytest.raises(UserError) as raised:
            heal.main()
        return str(raised.value).replace(str(tmp_path), "DATA")

    return complaint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model x --arm kd --weight 1", "--weight 1: --arm kd takes none"),
        ("--model x --arm curvature", "--weight 0: --arm curvature takes a weight above 0"),
        ("--model x --arm kd --glue nowhere", "--glue: there is no nowhere/RTE/train.tsv"),
        ("--model nowhere/at/all --arm kd", "--model nowhere/at/all cannot be loaded: "),
    ],
)
def test_it_says_what_is_wrong(refused, words, said):
    assert refused(words).startswith(said)


@pytest.fixture
def material(tmp_path):
    """A random Llama of six layers, and GLUE files of numbers as words."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, **{str(i): i + 1 for i in range(10)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 11}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes)).save_pretrained(tmp_path / "model")
    lines = [" ".join(f"{i:05d}") for i in range(1600)]
    for file, column in (*heal.TRAIN.values(), *heal.TESTS.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join([column, *lines]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ("--arm kd", {"perplexity_news", "perplexity_reviews"}),
        ("--arm curvature --weight 10 --decoupled --held_out", {"perplexity_news"}),
        ("--arm kd --text reviews --held_out", {"perplexity_reviews"}),
        ("--arm neighbours", {"perplexity_news", "perplexity_reviews"}),
        ("--arm teacher", {"perplexity_news", "perplexity_reviews"}),
    ],
)
def test_a_run_writes_what_a_table_needs(material, fresh_accelerator, monkeypatch, words, measured):
    flags = (
        f"--model {material}/model --glue {material} --output_dir {material}/run --drop 2 --steps 1 --blocks 8 {words}"
    )
    monkeypatch.setattr(sys, "argv", ["heal.py", *flags.split()])
    heal.main()
    result = json.loads((material / "run" / "result.json").read_text(encoding="utf-8"))
    assert {name for name in result if name.startswith("perplexity")} == measured
    assert result["last"] == result["best"] < 0
    assert result.get("steps") == (None if "teacher" in words else 1)


@pytest.mark.parametrize(
    ("arm", "told"), [("teacher", "the model is broken"), ("pruned", "broken"), ("kd", "lower --lr")]
)
def test_a_perplexity_that_is_not_finite_is_blamed_on_a_training_that_was(
    material, fresh_accelerator, monkeypatch, arm, told
):
    monkeypatch.setattr("examples.heal_causal_lm.measure", lambda *_: (float("nan"), 0.0))
    flags = f"--model {material}/model --glue {material} --output_dir {material}/run --drop 2 --steps 1 --blocks 8"
    monkeypatch.setattr(sys, "argv", ["heal.py", *flags.split(), "--arm", arm])
    with pytest.raises(UserError, match=told):
        heal.main()
