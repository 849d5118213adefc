"""Module replacing: what runs, what trains, which weights pair, and the trap of gradients that are None."""

import copy

import pytest
import torch
from nlp_fixtures import LABELS, VOCABULARY
from theseus_fixtures import batch, bert, choose, theseus
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bert_of_theseus.modeling import TheseusModel, copied_layers, encoder_layers, layer_pairs
from bert_of_theseus.schedules import replacing_schedule
from bert_of_theseus.training import compile_layers
from common.run.errors import UserError
from dskd.pairing import linear_names

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": len(LABELS),
}
BERT_MATRICES = {
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
}


def draws(model: TheseusModel, count: int) -> list[list[bool]]:
    return [model._draw() for _ in range(count)]


def test_never_replacing_is_the_predecessor():
    predecessor = bert().train()
    expected = predecessor(**batch()).logits
    model = theseus(probability=0.0, model=copy.deepcopy(predecessor))
    torch.testing.assert_close(model(**batch()).logits, expected)


def test_always_replacing_is_the_successor_alone():
    model = theseus(probability=1.0)
    expected = model.successor().eval()(**batch()).logits
    torch.testing.assert_close(model(**batch()).logits, expected)


def test_a_mixed_draw_runs_the_successor_of_replaced_modules_and_all_predecessor_layers_of_the_others():
    predecessor = bert()
    model = choose(theseus(model=copy.deepcopy(predecessor)), [False, True])
    hybrid = copy.deepcopy(predecessor)
    layers = list(encoder_layers(predecessor))
    hybrid.bert.encoder.layer = nn.ModuleList([layers[0], layers[1], model.theseus_modules[1].successor])
    torch.testing.assert_close(model(**batch()).logits, hybrid(**batch()).logits)


def test_evaluation_runs_the_successor_alone_whatever_the_probability():
    model = theseus(probability=0.0).eval()
    torch.testing.assert_close(model(**batch()).logits, model.successor().eval()(**batch()).logits)


def test_evaluation_takes_no_draw():
    model = theseus().eval()
    before = model.generator.get_state()
    model(**batch())
    assert torch.equal(model.generator.get_state(), before)


@pytest.mark.parametrize(("start", "chosen"), [("first", [0, 1]), ("paired", [1, 3])])
def test_a_student_starts_as_the_first_or_the_paired_layers_whatever_its_method(start, chosen):
    model = bert()
    wanted = [copy.deepcopy(encoder_layers(model)[i].state_dict()) for i in chosen]
    copied = encoder_layers(copied_layers(model, 2, start))
    successors = [module.successor for module in TheseusModel(model, 2, start=start).theseus_modules]
    for layers in (copied, successors):
        for layer, state in zip(layers, wanted, strict=True):
            assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_paired_layers_are_at_no_distance_from_their_teachers():
    teacher = bert()
    for pairs in (
        layer_pairs(copied_layers(teacher, 2, "paired"), teacher),
        TheseusModel(teacher, 2, start="paired").pairs(),
    ):
        assert all(torch.equal(ours, theirs) for _, ours, theirs in pairs)


@pytest.mark.parametrize(("count", "groups"), [(1, [4]), (2, [2, 2]), (4, [1, 1, 1, 1])])
def test_any_ratio_that_divides_is_grouped(count, groups):
    assert [len(module.predecessors) for module in TheseusModel(bert(), count).theseus_modules] == groups


def test_a_ratio_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="4 layers do not divide into 3 groups"):
        TheseusModel(bert(), 3)


def test_only_successor_layers_train():
    model = theseus()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if ".successor." in name}
    assert trained == expected
    assert trained


def test_the_frozen_predecessor_gets_no_gradient_and_stays_as_it_is():
    model = theseus()
    frozen = {name: value.clone() for name, value in model.state_dict().items() if ".successor." not in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def test_unsampled_layers_get_zero_gradients_rather_than_none():
    model = choose(theseus(), [True, False])
    model(**batch()).loss.backward()
    sampled, unsampled = (module.successor for module in model.theseus_modules)
    assert any(parameter.grad.any() for parameter in sampled.parameters())
    for parameter in unsampled.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_all_modules_unsampled_still_gives_all_successors_zero_gradients():
    model = choose(theseus(), [False, False])
    model(**batch()).loss.backward()
    gradients = [p.grad for module in model.theseus_modules for p in module.successor.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_adamw_keeps_moving_an_unsampled_layer_by_its_momentum():
    model = choose(theseus(), [True, True])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    weight = model.theseus_modules[1].successor.output.dense.weight
    before, momentum = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    choose(model, [True, False])(**batch()).loss.backward()
    optimizer.step()
    moved = (weight - before)[momentum.abs() > 1e-6]
    assert moved.numel()
    assert (moved.sign() == -momentum[momentum.abs() > 1e-6].sign()).all()


def test_zero_gradients_leave_the_gradients_of_the_sampled_layers_as_they_are():
    model = choose(theseus(), [True, False])
    weight = model.theseus_modules[0].successor.output.dense.weight
    with model.running([True, False]) as plain:  # the same draw, without the wrapper's forward
        (expected,) = torch.autograd.grad(plain(**batch()).loss, weight)
    model(**batch()).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_draws_repeat_under_one_seed_and_differ_under_another():
    first, again, other = (draws(theseus(seed=seed), 32) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_draws_neither_read_nor_move_the_global_random_numbers():
    torch.manual_seed(1)
    first = draws(theseus(seed=5), 32)
    torch.manual_seed(2)
    model = theseus(seed=5)
    state = torch.get_rng_state()
    assert draws(model, 32) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_are_replaced_as_often_as_the_probability_says():
    rate = torch.tensor(draws(theseus(probability=0.3), 4000)).float().mean(0)
    assert ((rate - 0.3).abs() < 0.03).all()  # four standard deviations of 4000 draws


def test_unsampled_pairs_are_those_of_layers_that_no_forward_since_the_last_clearing_replaced():
    model = choose(theseus(), [False, True])
    model(**batch())
    assert model.unsampled_pairs() == {f"0.{name}" for name in BERT_MATRICES}
    choose(model, [True, False])(**batch())
    assert model.unsampled_pairs() == set()
    model.sampled.clear()
    assert len(model.unsampled_pairs()) == 12


def test_a_successor_pairs_its_six_matrices_with_the_last_layer_of_its_group():
    model = theseus()
    pairs = {name: (student, teacher) for name, student, teacher in model.pairs()}
    assert pairs.keys() == {f"{i}.{name}" for i in range(2) for name in BERT_MATRICES}
    for name, (student, teacher) in pairs.items():
        index, _, path = name.partition(".")
        module = model.theseus_modules[int(index)]
        assert student is module.successor.get_submodule(path).weight
        assert teacher is module.predecessors[1].get_submodule(path).weight


def test_a_shallower_model_pairs_with_the_same_layers_of_its_teacher():
    teacher = bert(num_hidden_layers=6)
    pairs = layer_pairs(copied_layers(teacher, 3), teacher)
    last = {int(name.split(".")[0]): weight for name, _, weight in pairs if name.endswith("intermediate.dense")}
    expected = {i: encoder_layers(teacher)[k].intermediate.dense.weight for i, k in enumerate((1, 3, 5))}
    assert all(last[i] is weight for i, weight in expected.items())


def test_layers_of_unequal_width_are_refused_with_both_names_and_shapes():
    with pytest.raises(UserError, match=r"0\.attention\.self\.query \(16, 16\), teacher 1\.attention.* \(32, 32\)"):
        layer_pairs(bert(num_hidden_layers=2, hidden_size=16), bert())


def test_a_copy_of_the_first_layers_is_an_independent_trainable_copy():
    model = bert().requires_grad_(False)
    student = copied_layers(model, 3)
    assert student.config.num_hidden_layers == len(encoder_layers(student)) == 3
    assert len(encoder_layers(model)) == 4
    assert all(parameter.requires_grad for parameter in student.parameters())
    shared = {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_more_first_layers_than_there_are_is_refused():
    with pytest.raises(UserError, match="--num_successor_layers 5: the model has 4 layers"):
        copied_layers(bert(), 5)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (RobertaForSequenceClassification, RobertaConfig(**SIZES, pad_token_id=0, max_position_embeddings=40)),
        (ElectraForSequenceClassification, ElectraConfig(**SIZES, embedding_size=16)),
    ],
)
def test_roberta_and_electra_are_wrapped_like_bert(architecture, config):
    model = theseus(model=architecture(config).eval())
    choose(model, [True, False])(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    student = model.eval().successor()
    assert type(student) is architecture
    assert len(model.pairs()) == 2 * len(linear_names(encoder_layers(student)[0])) == 12
    torch.testing.assert_close(model(**batch()).logits, student(**batch()).logits)


def test_a_loss_may_be_divided_in_place():
    loss = theseus()(**batch()).loss
    loss /= 2  # as the Trainer of older transformers does
    loss.backward()


def test_compiling_compiles_every_predecessor_and_successor_layer_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    model = theseus()
    compile_layers(model)
    expected = [layer for m in model.theseus_modules for layer in (*m.predecessors, m.successor)]
    assert {id(module) for module in compiled} == {id(layer) for layer in expected}
    assert len(compiled) == len(expected) == 6


def test_compiling_a_plain_model_compiles_its_layers(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    model = bert()
    compile_layers(model)
    assert compiled == list(encoder_layers(model))


@pytest.mark.parametrize(("step", "probability"), [(0, 0.3), (1000, 0.6), (2333, 0.9999), (2334, 1.0), (10_000, 1.0)])
def test_the_linear_schedule_grows_to_one(step, probability):
    assert replacing_schedule("linear", 0.3, 0.0003, 0)(step) == pytest.approx(probability)


@pytest.mark.parametrize(("step", "probability"), [(0, 0.5), (9, 0.5), (10, 1.0), (11, 1.0)])
def test_the_constant_schedule_jumps_to_one(step, probability):
    assert replacing_schedule("constant", 0.5, 0.1, 10)(step) == probability


def test_the_constant_schedule_without_steps_never_jumps():
    assert replacing_schedule("constant", 0.5, 0.1, 0)(10**6) == 0.5


def test_another_schedule_is_an_error():
    with pytest.raises(ValueError, match="cosine"):
        replacing_schedule("cosine", 0.5, 0.1, 0)
