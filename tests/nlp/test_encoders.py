"""Encoders of other families than BERT: each method makes a student of them that is saved as it was evaluated."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from nlp_fixtures import LABELS, VOCABULARY, execute, flags, result_of, tiny_tokenizer, write_rte
from theseus_fixtures import choose
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_of_theseus import pipeline
from bert_of_theseus.distillation import DistilledModel
from bert_of_theseus.modeling import TheseusModel, check_export, copied_layers, encoder_layers, layer_pairs
from common.run.errors import UserError

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 2}
DISTILBERT |= {key: SIZES[key] for key in ("vocab_size", "max_position_embeddings", "initializer_range")}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
ENCODERS = {  # the configuration's name without "Config", its settings, the matrices of a layer
    "roberta": ("Roberta", SIZES, 6),
    "electra": ("Electra", SIZES | {"embedding_size": 16}, 6),
    "distilbert": ("DistilBert", DISTILBERT, 6),
    "modernbert": ("ModernBert", SIZES | {"local_attention": 4}, 4),
    "deberta": ("Deberta", SIZES | RELATIVE, 6),
    "deberta_v2": ("DebertaV2", SIZES | RELATIVE | {"conv_kernel_size": 3, "position_buckets": 4}, 8),
    "mpnet": ("MPNet", SIZES, 6),
    "xlm_roberta": ("XLMRoberta", SIZES, 6),
    "big_bird": ("BigBird", SIZES | {"block_size": 2, "num_random_blocks": 1}, 6),
}
BY_PLACE = {"modernbert"}  # its first layer lacks the norm that others begin with


def make(name: str, **settings):
    """A tiny random model with outputs that differ from example to example."""
    torch.manual_seed(7)
    family, sizes, _ = ENCODERS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, id2label=dict(enumerate(LABELS)), **settings)
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(VOCABULARY), (4, 19), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def moved(module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return SimpleNamespace(data=write_rte(tmp_path_factory.mktemp("encoders"), train=8, dev=6, test=5), model=None)


@pytest.mark.parametrize("name", ENCODERS)
def test_module_replacing_runs_the_model_itself_with_another_stack(name, tmp_path):
    predecessor, inputs = make(name), batch(make(name))
    expected = predecessor(**inputs).logits
    assert expected.std(0).max() > 0.01
    model = TheseusModel(predecessor, 2)
    for module in model.theseus_modules:
        moved(module.successor)
    choose(model.train(), [False, False])
    for each in model.modules():
        each.training = isinstance(each, TheseusModel)  # no dropout
    torch.testing.assert_close(model(**inputs).logits, expected)

    choose(model, [True, False])(**inputs, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert len(model.pairs()) == 2 * ENCODERS[name][2]

    evaluated = model.eval()(**inputs).logits
    assert not torch.allclose(evaluated, expected, atol=1e-3)
    student = saved_and_loaded(model.successor(), tmp_path / "student")
    assert len(encoder_layers(student)) == student.config.num_hidden_layers == 2
    torch.testing.assert_close(student(**inputs).logits, evaluated)


@pytest.mark.parametrize("start", ["first", "paired"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_copy_with_fewer_layers_is_saved_as_it_is_or_refused(name, start, tmp_path):
    teacher = make(name)
    inputs = batch(teacher)
    student = copied_layers(teacher, 2, start).eval()
    if start == "paired" and name in BY_PLACE:
        with pytest.raises(
            UserError, match=rf"{type(teacher).__name__} makes its layers by their place.*--start first"
        ):
            check_export(student, student, inputs)
        return
    check_export(student, student, inputs)
    assert len(layer_pairs(student, teacher)) == 2 * ENCODERS[name][2]
    torch.testing.assert_close(
        saved_and_loaded(student, tmp_path / "student")(**inputs).logits, student(**inputs).logits
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_pkd_compares_what_comes_out_of_the_layers(name, monkeypatch):
    teacher = make(name)
    student = copied_layers(teacher, 2).eval()
    inputs, compared, seen = batch(teacher), [], []
    for layer in (encoder_layers(student)[0], encoder_layers(teacher)[1]):
        layer.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
    model = DistilledModel(student, teacher, alpha=0.5, temperature=2.0, beta=1.0)
    monkeypatch.setattr(
        "bert_of_theseus.distillation.patient_loss",
        lambda ours, theirs: compared.extend((*ours, *theirs)) or torch.tensor(0.0),
    )
    model.training = True  # of this module alone: no dropout
    model(**inputs, labels=torch.tensor([0, 1, 1, 0]))
    states = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert len(compared) == len(states) == 2
    for one, other in zip(compared, states, strict=True):
        if name == "deberta_v2" and one is compared[0]:
            continue  # what its convolution makes of the first layer's
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ENCODERS)
def test_runs_of_every_method_save_the_student_that_they_evaluated(name, places, tmp_path, monkeypatch):
    model = make(name)
    model.save_pretrained(tmp_path / "model")
    forward = inspect.signature(type(model).forward).parameters
    names = [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in forward]
    tiny_tokenizer(model_input_names=names).save_pretrained(tmp_path / "model")
    caught = []
    monkeypatch.setattr(pipeline, "write_predictions", lambda task, where, logits, name: caught.append(logits) or where)
    texts = [line.split("\t")[1:] for line in (places.data / "test.tsv").read_text().splitlines()[1:]]
    for i, method in enumerate(("theseus", "finetune", "kd", "pkd"), start=list(ENCODERS).index(name)):
        output = tmp_path / method
        words = [*flags(places, output, "--do_predict", model=tmp_path / "model"), "--method", method]
        words += ["--ifsvd", "--svd_steps", "1", "--rank_size", "4"] if i % 2 else []  # every method with and without
        execute([*words, "--num_successor_layers", "2", "--max_steps", "1"])
        assert result_of(output)["layers"] == 2
        loaded = AutoModelForSequenceClassification.from_pretrained(output / "student").eval()
        tokenizer = AutoTokenizer.from_pretrained(output / "student")
        inputs = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
        torch.testing.assert_close(loaded(**inputs).logits, torch.tensor(caught[-1]), rtol=0, atol=1e-5)


def test_bigbird_attends_in_full_from_the_beginning(places, tmp_path):
    assert make("big_bird").config.attention_type == "block_sparse"
    make("big_bird").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    execute([*flags(places, tmp_path / "run", model=tmp_path / "model"), "--max_steps", "1"])
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.attention_type == student.bert.attention_type == "original_full"


@pytest.mark.skipif(transformers.__version__ < "5", reason="kinds of layers are not in older configs")
def test_a_student_of_modernbert_has_its_layers_kinds():
    model = make("modernbert")
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert model.config.layer_types == kinds
    student = TheseusModel(model, 2).successor()
    assert student.config.layer_types == [layer.attention_type for layer in encoder_layers(student)] == kinds[:2]


REFUSED = [
    ("Albert", SIZES | {"embedding_size": 16}, "AlbertForSequenceClassification shares weights among its 4 layers"),
    ("GPT2", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2}, "GPT2ForSequenceClassification is a decoder"),
    ("XLM", {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 2}, "its 2 layers in 2 stacks"),
]


@pytest.mark.parametrize(("family", "sizes", "told"), REFUSED, ids=[case[0] for case in REFUSED])
def test_others_are_refused_in_one_line_that_names_what_is_supported(family, sizes, told):
    model = AutoModelForSequenceClassification.from_config(getattr(transformers, f"{family}Config")(**sizes))
    for attempt in (lambda: TheseusModel(model, 1), lambda: copied_layers(model, 1)):
        with pytest.raises(UserError, match=f"{told}.*BERT, RoBERTa, .*ModernBERT"):
            attempt()


def test_albert_is_fine_tuned_as_a_whole_alone(places, tmp_path):
    torch.manual_seed(7)
    config = transformers.AlbertConfig(**SIZES, embedding_size=16, id2label=dict(enumerate(LABELS)))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [*flags(places, tmp_path / "run", model=tmp_path / "model"), "--max_steps", "1"]
    for method in ("theseus", "kd", "pkd"):
        with pytest.raises(UserError, match="shares weights"):
            execute([*words, "--method", method])
    execute([*words, "--method", "finetune"])
    assert result_of(tmp_path / "run")["layers"] == 4


def test_an_image_classifier_is_refused_in_one_line(places, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"vit is no text classifier of transformers \(BERT, .* are supported\)"):
        execute(flags(places, tmp_path / "run", model=tmp_path / "vit"))


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "deberta_v2", "mpnet"])
def test_a_pretrained_encoder_without_a_head_can_be_fine_tuned(name, places, tmp_path):
    model = make(name)
    model.base_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path / "model")
    words = flags(places, tmp_path / "run", "--method", "finetune", "--max_steps", "1", model=tmp_path / "model")
    execute([*words, "--num_successor_layers", "2"])
    assert result_of(tmp_path / "run")["layers"] == 2
