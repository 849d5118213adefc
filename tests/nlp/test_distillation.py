"""KD and PKD: their losses on numbers computed by hand, the student that trains, and the plain model that comes out."""

import math

import pytest
import torch
from nlp_fixtures import execute, flags, log_of, result_of, tiny, write_model  # noqa: F401
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from bert_of_theseus.distillation import DistilledModel, logit_loss, patient_loss
from bert_of_theseus.modeling import copied_layers


def small_bert(**settings) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes, **settings)).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(30, (3, 7), generator=generator),
        "labels": torch.randint(2, (3,), generator=generator),
    }


def test_logit_loss_is_the_scaled_divergence():
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    p = [math.exp(value / 2) for value in (1.0, 0.0)]
    q = [math.exp(value / 2) for value in (0.0, 2.0)]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    expected = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert logit_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_logit_loss_of_a_regression_is_the_squared_difference():
    assert logit_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [3.0]]), 10.0).item() == pytest.approx(2.5)


def test_patient_loss_compares_directions_of_first_tokens():
    student = [torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])]
    teacher = [torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])]
    assert patient_loss(student, teacher).item() == pytest.approx(0.6**2 + 0.2**2)


def test_pkd_compares_after_every_layer_but_the_last():
    teacher = small_bert()
    model = DistilledModel(copied_layers(teacher, 2), teacher, alpha=0.5, temperature=2.0, beta=1.0)
    assert model.layers == [1]


def test_the_loss_is_the_weighted_sum_of_its_parts():
    teacher = small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    student = copied_layers(teacher, 2)
    model = DistilledModel(student, teacher, alpha=0.25, temperature=3.0, beta=7.0).train()
    ours = student(**batch(), output_hidden_states=True)
    theirs = teacher(**batch(), output_hidden_states=True)
    expected = 0.75 * ours.loss + 0.25 * logit_loss(ours.logits, theirs.logits, 3.0)
    expected = expected + 7.0 * patient_loss([ours.hidden_states[1]], [theirs.hidden_states[2]])
    assert model(**batch())["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_the_student_gets_gradients():
    teacher = small_bert()
    model = DistilledModel(copied_layers(teacher, 2), teacher, alpha=0.5, temperature=2.0, beta=1.0).train()
    model(**batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_evaluation_runs_the_student_alone():
    teacher = small_bert()
    model = DistilledModel(copied_layers(teacher, 2), teacher, alpha=0.5, temperature=2.0).eval()
    model.teacher.forward = None  # a call would fail
    assert torch.equal(model(**batch()).logits, model.student(**batch()).logits)


@pytest.mark.parametrize("method", ["kd", "pkd"])
def test_a_run_leaves_a_plain_student_and_aligns_its_weights(tiny, tmp_path, method):  # noqa: F811
    output = tmp_path / method
    more = ("--method", method, "--num_successor_layers", "2", "--max_steps", "4", "--ifsvd", "--svd_steps", "2")
    execute(flags(tiny, output, *more, "--logging_steps", "1"))
    student = AutoModelForSequenceClassification.from_pretrained(output / "student")
    assert (student.config.num_hidden_layers, result_of(output)["method"]) == (2, method)
    assert all(math.isfinite(line["dskd_loss"]) for line in log_of(output, "dskd_loss"))
