"""`pair_layers`: what it finds in networks of every kind, what it leaves out and says of it, and what it refuses."""

import copy
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.utils import parametrizations

from cv.models import build_model
from dskd import Curvature, DirectionSensitivityLoss, Own, Spectrum, pair_layers
from dskd.pairing import LayerPairs

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA_LAYER = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def transformer(kind: str, layers: int) -> nn.Module:
    """A tiny transformers model with random weights."""
    t, size = transformers, {**SMALL, "num_hidden_layers": layers, "vocab_size": 40}
    if kind == "distilbert":
        return t.DistilBertModel(t.DistilBertConfig(vocab_size=40, dim=16, n_layers=layers, n_heads=2, hidden_dim=32))
    if kind == "gpt2":
        tokens = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=layers, n_head=2, n_positions=32, **tokens))
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, **SMALL, num_hidden_layers=layers))
    makers = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**size)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**size)),
        "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(embedding_size=8, **size)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=1, **size)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(num_key_value_heads=1, **size)),
        "albert": lambda: t.AlbertModel(t.AlbertConfig(embedding_size=8, **size)),
        "bart": lambda: t.BartModel(
            t.BartConfig(
                vocab_size=40,
                d_model=16,
                encoder_layers=layers,
                decoder_layers=layers,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
            )
        ),
    }
    return makers[kind]()


def names(pairs: LayerPairs) -> list[tuple[str, str]]:
    return [(name, pairs.teacher_names[name]) for name, _, _ in pairs]


def reasons(pairs: LayerPairs) -> dict[str, str]:
    return {each.student: each.reason for each in pairs.left_out}


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


class Block(nn.Module):
    def __init__(self, width: int = 8, inner: int = 12):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, inner), nn.Linear(inner, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    """A stack of blocks between two linear layers."""

    def __init__(self, depth: int, width: int = 8):
        super().__init__()
        self.inlet, self.blocks = nn.Linear(4, width), nn.ModuleList(Block(width) for _ in range(depth))
        self.outlet = nn.Linear(width, 2)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.outlet(x)


class TimmBlock(nn.Module):
    """A grouped bottleneck with timm's names."""

    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, groups=groups, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(width), nn.ReLU()
        self.downsample = nn.Sequential(nn.Conv2d(before, width, 1), nn.BatchNorm2d(width)) if before != width else None


class TimmResNet(nn.Module):
    """conv1, bn1, act1, layer1 to layer4, fc, as timm names them."""

    def __init__(self, depths: tuple[int, ...], groups: int = 4):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        before = 8
        for stage, depth in enumerate(depths):
            width = 8 * 2**stage
            blocks = [TimmBlock(before if i == 0 else width, width, groups) for i in range(depth)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            before = width
        self.fc = nn.Linear(before, 5)


# ---- transformers ----

STACKS = [
    ("bert", "bert.encoder.layer", BERT_LAYER),
    ("roberta", "roberta.encoder.layer", BERT_LAYER),
    ("electra", "electra.encoder.layer", BERT_LAYER),
    ("llama", "model.layers", LLAMA_LAYER),
    ("qwen2", "model.layers", LLAMA_LAYER),
    ("gpt2", "transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
]


@pytest.mark.parametrize(("kind", "stack", "layers"), STACKS, ids=[kind for kind, *_ in STACKS])
def test_every_matrix_of_a_transformer_layer_pairs_with_that_of_the_last_of_its_group(kind, stack, layers):
    pairs = pair_layers(transformer(kind, 2), transformer(kind, 6))
    expected = [(f"{stack}.{i}.{name}", f"{stack}.{k}.{name}") for i, k in ((0, 2), (1, 5)) for name in layers]
    assert names(pairs) == expected
    assert "last_of_group" in pairs.how


@pytest.mark.parametrize("kind", ["distilbert", "vit"])
def test_all_linear_layers_of_encoders_with_other_names_pair(kind):
    student, teacher = transformer(kind, 2), transformer(kind, 4)
    pairs = pair_layers(student, teacher)
    assert len(pairs) == 2 * 6
    for name, ours, theirs in pairs:
        assert ours is student.get_submodule(name).weight
        assert theirs is teacher.get_submodule(pairs.teacher_names[name]).weight
        assert re.sub(r"\d+", "", name) == re.sub(r"\d+", "", pairs.teacher_names[name])


def test_depths_that_do_not_divide_spread_evenly():
    pairs = pair_layers(Tower(3), Tower(5))
    assert [(ours, theirs) for ours, theirs in names(pairs) if ours.endswith("up")] == [
        ("blocks.0.up", "blocks.0.up"),
        ("blocks.1.up", "blocks.2.up"),
        ("blocks.2.up", "blocks.4.up"),
    ]
    assert "spread_evenly" in pairs.how


def test_models_that_wrap_the_encoder_otherwise_pair():
    config = transformers.BertConfig(**SMALL, num_hidden_layers=2, vocab_size=40)
    pairs = pair_layers(transformers.BertModel(config), transformers.BertForMaskedLM(config))
    assert ("encoder.layer.1.output.dense", "bert.encoder.layer.1.output.dense") in names(pairs)
    assert len(pairs) == 12


def test_encoder_and_decoder_stacks_each_pair_with_their_own():
    pairs = pair_layers(transformer("bart", 1), transformer("bart", 2))
    assert ("encoder.layers.0.fc1", "encoder.layers.1.fc1") in names(pairs)
    assert ("decoder.layers.0.encoder_attn.k_proj", "decoder.layers.1.encoder_attn.k_proj") in names(pairs)


def test_a_single_stack_finds_its_like_among_several():
    teacher = nn.ModuleDict({"text": Tower(6), "other": nn.ModuleList(nn.Bilinear(2, 2, 2) for _ in range(9))})
    teacher["image"] = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2))})
    pairs = pair_layers(nn.ModuleDict({"image": nn.ModuleDict({"blocks": nn.ModuleList([Block()])})}), teacher)
    assert names(pairs) == [(f"image.blocks.0.{name}", f"image.blocks.1.{name}") for name in ("up", "down")]
    longest = pair_layers(Tower(2), teacher)
    assert ("blocks.0.up", "text.blocks.2.up") in names(longest)


def test_albert_whose_layers_are_one_module_pairs_with_albert():
    pairs = pair_layers(transformer("albert", 4), transformer("albert", 4))
    assert len(pairs) == 6


def test_experts_in_blocks_are_no_stack_of_their_own():
    def network(depth):
        blocks = [nn.ModuleDict({"gate": nn.Linear(8, 3), "experts": nn.ModuleList(Block() for _ in range(9))})]
        return nn.ModuleList(copy.deepcopy(blocks[0]) for _ in range(depth))

    pairs = pair_layers(network(2), network(4))
    assert ("0.gate", "1.gate") in names(pairs)
    assert ("1.experts.8.down", "3.experts.8.down") in names(pairs)


def test_attention_of_torch_pairs_its_input_projections_as_one_matrix():
    def encoder(depth):
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), depth, enable_nested_tensor=False)

    pairs = pair_layers(encoder(1), encoder(2))
    assert [name for name, _, _ in pairs] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    assert pairs[0][1].shape == (48, 16)
    attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
    assert [name for name, _, _ in pair_layers(attention, copy.deepcopy(attention))] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj",
    ]


# ---- recurrent networks ----


class Tagger(nn.Module):
    """An embedding, a recurrent layer and a linear one."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM, layers: int = 1, **settings):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 8), kind(8, 6, layers, batch_first=True, **settings)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.rnn(self.embedding(x))[0])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_every_matrix_of_a_recurrent_layer_pairs_with_that_of_the_same_depth(kind, gates):
    student, teacher = Tagger(kind), Tagger(kind, 2)
    pairs = pair_layers(student, teacher)
    assert names(pairs) == [(name, name) for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "out")]
    assert pairs[0][1] is student.rnn.weight_ih_l0
    assert pairs[1][2] is teacher.rnn.weight_hh_l0
    assert [tuple(W.shape) for _, W, _ in pairs] == [(6 * gates, 8), (6 * gates, 6), (3, 6)]
    assert reasons(pair_layers(teacher, student)) == {f"rnn.weight_{x}h_l1": "no counterpart" for x in "ih"}


def test_both_directions_and_projections_of_a_recurrent_layer_pair():
    layer = nn.LSTM(4, 6, bidirectional=True, proj_size=3)
    expected = [f"weight_{which}_l0{way}" for way in ("", "_reverse") for which in ("ih", "hh", "hr")]
    assert [name for name, _, _ in pair_layers(layer, copy.deepcopy(layer))] == expected


def test_cells_pair_in_blocks_and_with_layers_by_a_pattern():
    student, teacher = (nn.ModuleList(nn.GRUCell(5, 5) for _ in range(depth)) for depth in (2, 4))
    assert ("1.weight_hh", "3.weight_hh") in names(pair_layers(student, teacher))
    layer = nn.GRU(5, 5, 2)
    assert names(pair_layers(student, layer, [("0.weight_hh", "weight_hh_l1")])) == [("0.weight_hh", "weight_hh_l1")]
    parametrizations.weight_norm(teacher[0], "weight_hh")
    assert ("0.weight_hh", "0.weight_hh") in names(pair_layers(student, teacher, "names"))


def test_recurrent_layers_that_do_not_pair_are_left_out_with_the_reason():
    student, teacher = Tagger(), Tagger()
    student.rnn.weight_ih_l0.requires_grad_(False)
    parametrizations.weight_norm(student.rnn, "weight_hh_l0")
    assert reasons(pair_layers(student, teacher)) == {
        "rnn.weight_ih_l0": "frozen (requires_grad is False)",
        "rnn.weight_hh_l0": "computed from other tensors (a parametrization)",
    }
    tied = Tagger(layers=2)
    tied.rnn.weight_hh_l1 = tied.rnn.weight_hh_l0
    found = reasons(pair_layers(tied, Tagger(layers=2)))
    assert found["rnn.weight_hh_l0"] == "shared with rnn.weight_hh_l1"
    wide = nn.LSTM(8, 3)  # with as many rows as a GRU of 4
    with pytest.raises(ValueError, match=r"dimensions differ, GRU \(out, in\) beside LSTM \(out, in\): weight_ih_l0"):
        pair_layers(nn.GRU(8, 4), wide)


def test_recurrent_layers_are_drawn_to_the_teachers():
    torch.manual_seed(0)
    student, teacher = Tagger(), Tagger()
    pairs = pair_layers(student, teacher)
    loss = DirectionSensitivityLoss(pairs, Curvature(), svd_steps=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss.attach(optimizer, total_steps=20, weight=1.0)
    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        student(torch.randint(20, (4, 5))).square().mean().backward()
        optimizer.step()
    assert loss().item() < before / 2
    assert loss.choices == 20


# ---- residual networks ----


def test_resnet56_and_resnet20_pair_block_by_block_in_each_stage():
    pairs = pair_layers(build_model("resnet20", 10), build_model("resnet56", 10))
    blocks = [(f"stages.{s}.{i}", f"stages.{s}.{k}") for s in range(3) for i, k in enumerate((0, 4, 8))]
    for ours, theirs in blocks:
        assert (f"{ours}.conv1", f"{theirs}.conv1") in names(pairs)
        assert (f"{ours}.conv2", f"{theirs}.conv2") in names(pairs)
    assert len(pairs) == 2 * 9 + 2  # and the shortcuts of the two stages that change the shape
    assert reasons(pairs) == {"conv1": "outside of the blocks", "classifier": "outside of the blocks"}


def test_resnets_of_torchvision_pair_in_each_of_the_four_stages():
    pairs = pair_layers(torchvision.models.resnet18(), torchvision.models.resnet34())
    for stage, last in ((1, 2), (2, 3), (3, 5), (4, 2)):
        assert (f"layer{stage}.1.conv2", f"layer{stage}.{last}.conv2") in names(pairs)
    assert len(pairs) == 16 + 3


def test_basic_blocks_and_bottlenecks_pair_where_shapes_allow():
    pairs = pair_layers(torchvision.models.resnet18(), torchvision.models.resnet50())
    assert ("layer1.0.conv2", "layer1.0.conv2") in names(pairs)
    assert reasons(pairs)["layer1.0.conv1"] == "shapes differ, (64, 64, 3, 3) beside (64, 64, 1, 1)"


def test_the_naming_of_timm_and_grouped_convolutions_pair():
    pairs = pair_layers(TimmResNet((1, 2, 1, 1)), TimmResNet((3, 4, 3, 1)))
    assert ("layer2.1.conv2", "layer2.3.conv2") in names(pairs)
    weights = {name: weight for name, weight, _ in pairs}
    assert weights["layer2.1.conv2"].shape == (16, 4, 3, 3)  # as the network has it
    loss = DirectionSensitivityLoss(pairs, Own(rank=2))
    loss().backward()
    assert all(weight.grad is not None for weight in weights.values())


def test_equal_shapes_of_unequal_groups_do_not_pair():
    student, teacher = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(ValueError, match="dimensions differ, convolution in 2 groups beside convolution"):
        pair_layers(student, teacher)


@pytest.mark.parametrize("name", ["wrn_16_1", "mobilenetv2", "shufflenetv1", "shufflenetv2", "vgg13"])
def test_every_matrix_in_the_stages_of_equal_networks_pairs(name):
    student, teacher = build_model(name, 10), build_model(name, 10)
    pairs = pair_layers(student, teacher)
    assert all(ours == theirs for ours, theirs in names(pairs))
    assert set(reasons(pairs).values()) == {"outside of the blocks"}
    assert len(pairs) > 3


def test_stages_of_modules_that_hold_their_blocks_are_stages():
    def network(*depths):
        stages = [nn.ModuleDict({"down": nn.Conv2d(4 * 2**i, 8 * 2**i, 2)}) for i in range(len(depths))]
        for i, depth in enumerate(depths):
            stages[i]["blocks"] = nn.Sequential(*(TimmBlock(8 * 2**i, 8 * 2**i, 1) for _ in range(depth)))
        return nn.ModuleDict({"stages": nn.ModuleList(stages)})

    pairs = pair_layers(network(2, 1, 1), network(2, 9, 3))
    assert ("stages.0.blocks.1.conv1", "stages.0.blocks.1.conv1") in names(pairs)
    assert ("stages.1.blocks.0.conv1", "stages.1.blocks.0.conv1") in names(pairs)
    assert len(pairs) == 8


def test_networks_with_unequal_numbers_of_stages_pair_by_name():
    pairs = pair_layers(TimmResNet((1, 2, 1)), TimmResNet((3, 4, 3, 2)))
    assert pairs.how == "by name"
    assert ("layer2.1.conv2", "layer2.1.conv2") in names(pairs)
    assert reasons(pairs) == {"fc": "shapes differ, (5, 32) beside (5, 64)"}


# ---- rules and patterns ----


def test_networks_without_stacks_pair_by_name():
    pairs = pair_layers(mlp(4, 8, 3), mlp(4, 8, 3, 2))
    assert names(pairs) == [("0", "0"), ("1", "1")]
    assert pairs.how == "by name"


def test_a_rule_by_its_name_and_as_a_function():
    student, teacher = Tower(2), Tower(4)
    assert names(pair_layers(student, teacher, "spread_evenly"))[2] == ("blocks.1.up", "blocks.3.up")
    assert names(pair_layers(student, teacher, "spread_evenly"))[0] == ("blocks.0.up", "blocks.0.up")
    assert names(pair_layers(student, teacher, "last_of_group"))[0] == ("blocks.0.up", "blocks.1.up")
    assert ("inlet", "inlet") in names(pair_layers(student, teacher, "names"))
    turned = pair_layers(student, teacher, lambda theirs, ours: np.arange(theirs)[:-3:-1])
    assert names(turned)[0] == ("blocks.0.up", "blocks.3.up")


def test_patterns_name_layers_of_both():
    pairs = pair_layers(Tower(2), Tower(4), [("blocks.*.up", "blocks.*.up"), ("outlet", "outlet")])
    assert names(pairs) == [("blocks.0.up", "blocks.0.up"), ("blocks.1.up", "blocks.1.up"), ("outlet", "outlet")]
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    assert len(pair_layers(attention, copy.deepcopy(attention), [("*.in_proj_weight", "*.in_proj_weight")])) == 1


def test_a_pattern_without_a_star_pairs_or_says_why_not():
    with pytest.raises(ValueError, match=r"student inlet and teacher outlet: shapes differ, \(8, 4\) beside \(2, 8\)"):
        pair_layers(Tower(2), Tower(2), [("blocks.*.up", "blocks.*.up"), ("inlet", "outlet")])
    pairs = pair_layers(Tower(2), Tower(2), [("blocks.*.up", "blocks.*.up"), ("*let", "*")])
    assert reasons(pairs) == {"inlet": "no counterpart", "outlet": "no counterpart"}


@pytest.mark.parametrize(
    ("by", "error", "text"),
    [
        ("deepest", ValueError, "rules names, last_of_group, spread_evenly, got 'deepest'"),
        (3, TypeError, "a rule or a list of patterns, got 3"),
        ([("a", "b", "c")], TypeError, r"a pattern is \(student layer, teacher layer\)"),
        (["ab"], TypeError, "a pattern is"),
        ([("nowhere.*", "*")], ValueError, r"the student has no layer 'nowhere.\*'"),
        ([("inlet", "inlet"), ("*let", "*let")], ValueError, "name the student's layer inlet 2 times"),
        ([("*.*.up", "*.up")], ValueError, r"differ in their number of \*"),
        (lambda theirs, ours: [0], ValueError, r"blocks \(2 blocks\) .* must give 2 numbers from 0 to 3, got \[0\]"),
        (lambda theirs, ours: [0, 4], ValueError, r"from 0 to 3, got \[0, 4\]"),
        (lambda theirs, ours: [0, -1], ValueError, r"from 0 to 3, got \[0, -1\]"),
        (lambda theirs, ours: 5, ValueError, "student blocks .* teacher blocks .* do not pair"),
    ],
)
def test_a_rule_or_pattern_that_does_not_fit_is_refused_in_one_line(by, error, text):
    with pytest.raises(error, match=text) as caught:
        pair_layers(Tower(2), Tower(4), by)
    assert "\n" not in str(caught.value)


def test_a_depth_rule_without_stacks_is_refused():
    with pytest.raises(ValueError, match=r"no stacks of blocks match, student none, teacher blocks \(2 blocks\); name"):
        pair_layers(mlp(4, 8), Tower(2), "last_of_group")


def test_a_student_that_is_deeper_than_its_teacher_is_refused():
    with pytest.raises(ValueError, match=r"student blocks \(4 blocks\) and teacher blocks \(3 blocks\) do not pair"):
        pair_layers(Tower(4), Tower(3))


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match="got a dict as the teacher"):
        pair_layers(Tower(1), {})


def test_nothing_that_pairs_is_refused_with_what_was_looked_for():
    with pytest.raises(ValueError, match=r"student Sequential and the teacher Tower pair by name \(no counterpart: 0"):
        pair_layers(mlp(4, 8), Tower(2))
    with pytest.raises(
        ValueError, match=r"no layers with a matrix\); name the layers: pair_layers\(student, teacher, \[\("
    ):
        pair_layers(nn.LayerNorm(3), nn.LayerNorm(3))


# ---- what is left out ----


def test_frozen_weights_are_left_out_and_all_frozen_is_refused():
    student = Tower(2)
    student.blocks[0].requires_grad_(False)
    pairs = pair_layers(student, Tower(2))
    assert [name for name, _, _ in pairs] == ["blocks.1.up", "blocks.1.down"]
    assert reasons(pairs)["blocks.0.up"] == "frozen (requires_grad is False)"
    with pytest.raises(ValueError, match=r"pair by .* \(frozen \(requires_grad is False\): blocks.0.up and 3 more\)$"):
        pair_layers(student.requires_grad_(False), Tower(2))


def test_a_teacher_that_is_frozen_pairs():
    assert len(pair_layers(Tower(2), Tower(2).requires_grad_(False))) == 4


def test_convolutions_of_gpt2_and_linear_layers_are_turned_against_each_other():
    gpt, linear = transformer("gpt2", 1), nn.Module()
    block = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(16, 48), "c_proj": nn.Linear(16, 16)})})
    linear.h = nn.ModuleList([block])
    with pytest.raises(ValueError, match=r"dimensions differ, \(out, in\) beside \(in, out\): h.0.attn.c_attn beside"):
        pair_layers(linear, gpt)


def test_shared_weights_are_left_out_unless_a_pattern_asks_for_them():
    student, teacher = transformer("gpt2", 2), transformer("gpt2", 2)
    by_name = pair_layers(student, teacher, "names")
    assert reasons(by_name) == {"lm_head": "shared with transformer.wte.weight"}
    assert names(pair_layers(student, teacher, [("lm_head", "lm_head")])) == [("lm_head", "lm_head")]
    once = pair_layers(student, teacher, [("lm_*", "lm_*"), ("transformer.wt*", "transformer.wt*")])
    assert reasons(once) == {"transformer.wte": "shared with a layer that is paired"}


def test_a_block_that_occurs_twice_is_left_out():
    student = Tower(3)
    student.blocks[2] = student.blocks[1]
    pairs = pair_layers(student, Tower(3))
    assert [name for name, _, _ in pairs] == ["blocks.0.up", "blocks.0.down"]
    assert reasons(pairs)["blocks.1.up"] == "shared with blocks.2.up.weight"


def test_a_students_own_weight_in_the_teacher_is_left_out():
    student, teacher = Tower(2), Tower(2)
    teacher.blocks[0].up.weight = student.blocks[0].up.weight
    assert reasons(pair_layers(student, teacher))["blocks.0.up"] == "the teacher's weight is the student's own"


def test_computed_quantised_and_lazy_weights_are_left_out():
    student, teacher = Tower(3), Tower(3)
    parametrizations.weight_norm(student.blocks[0].up)
    student.blocks[1].up = nn.LazyLinear(12)
    teacher.blocks[2].up.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    teacher.blocks[0].down = nn.LazyLinear(8)
    found = reasons(pair_layers(student, teacher))
    assert found["blocks.0.up"] == "computed from other tensors (a parametrization)"
    assert found["blocks.1.up"] == "lazy and without a shape as yet (run a batch first)"
    assert found["blocks.2.up"] == "the teacher's is quantised (torch.int8)"
    assert found["blocks.0.down"] == "the teacher's is lazy and without a shape as yet (run a batch first)"


def test_a_teacher_with_a_parametrization_pairs_and_is_not_checked():
    student, teacher = Tower(1), Tower(1)
    parametrizations.weight_norm(teacher.blocks[0].up)
    pairs = pair_layers(student, teacher)
    pairs.check()
    assert [name for name, _, _ in pairs] == ["blocks.0.up", "blocks.0.down"]


class Adapter(nn.Module):
    """What peft puts around a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.merged = base.requires_grad_(False), False
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight


def adapted(depth: int) -> Tower:
    network = Tower(depth)
    for block in network.blocks:
        block.up = Adapter(block.up)
    return network


def test_layers_under_an_adapter_are_left_out_until_the_base_weight_trains():
    student = adapted(2)
    found = reasons(pair_layers(student, Tower(2)))
    assert found["blocks.0.up"] == "frozen under an adapter (merge the adapter, or train the base weight)"
    assert not any("lora" in name for name in found)
    student.blocks[0].up.base_layer.weight.requires_grad_(True)
    pairs = pair_layers(student, Tower(2))
    assert pairs[0][0] == "blocks.0.up"
    assert pairs[0][1] is student.blocks[0].up.base_layer.weight
    pairs.check()


def test_a_student_of_adapters_alone_is_refused_with_what_to_do():
    student = adapted(1).requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen under an adapter \(merge the adapter, or train the base weight\)"):
        pair_layers(student, Tower(1), [("blocks.0.up", "blocks.0.up")])
    with pytest.raises(ValueError, match=r"\(frozen under an adapter .*: blocks.0.up; frozen .*: blocks.0.down\)$"):
        pair_layers(student, Tower(1))


def test_a_teacher_whose_adapter_is_not_merged_is_left_out():
    teacher = adapted(1)
    found = reasons(pair_layers(Tower(1), teacher))
    assert found["blocks.0.up"] == "the teacher's has an adapter beside it (merge the adapter)"
    teacher.blocks[0].up.merged = True
    assert "blocks.0.up" in dict(names(pair_layers(Tower(1), teacher)))


def test_pairs_of_unequal_shape_are_kept_on_request_only():
    student, teacher = Tower(2, width=8), Tower(4, width=10)
    with pytest.raises(ValueError, match=r"shapes differ, \(12, 8\) beside \(12, 10\)"):
        pair_layers(student, teacher)
    pairs = pair_layers(student, teacher, any_shape=True)
    assert len(pairs) == 4
    assert "(12, 8) beside (12, 10)" in str(pairs)
    with pytest.raises(ValueError, match="Spectrum"):
        DirectionSensitivityLoss(pairs)
    assert DirectionSensitivityLoss(pairs, Spectrum())().isfinite()


# ---- the pairs ----


def test_a_network_in_a_wrapper_of_torch_has_the_names_of_the_network():
    pairs = pair_layers(nn.DataParallel(Tower(1)), torch.compile(Tower(2)))
    assert names(pairs)[0] == ("blocks.0.up", "blocks.1.up")


def test_pairs_are_a_list_that_prints_as_a_table():
    student = Tower(1)
    pairs = pair_layers(student, Tower(2))
    assert list(pairs) == [(name, weight, other) for name, weight, other in pairs]
    assert (
        str(pairs)
        == repr(pairs)
        == "\n".join(
            [
                "2 pairs of layers by last_of_group: blocks (1 beside 2 blocks)",
                "student        teacher        weight",
                "blocks.0.up    blocks.1.up    (12, 8)",
                "blocks.0.down  blocks.1.down  (8, 12)",
                "left out",
                "outside of the blocks: inlet, outlet",
            ]
        )
    )
    assert str(LayerPairs()) == "0 pairs of layers\nstudent  teacher  weight"


def test_a_table_names_a_few_of_many_layers_that_are_left_out():
    student = Tower(3)
    student.blocks[1:].requires_grad_(False)
    last = str(pair_layers(student, Tower(3))).splitlines()[-2:]
    assert last[0] == "frozen (requires_grad is False): blocks.1.up, blocks.1.down, blocks.2.up and 1 more"


def replaced_by_assignment(network):
    network.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)


def replaced_by_hand(network):
    network.blocks[0].up.weight = nn.Parameter(network.blocks[0].up.weight.detach().clone())


def computed_since(network):
    parametrizations.weight_norm(network.blocks[0].up)


@pytest.mark.parametrize("replace", [replaced_by_assignment, replaced_by_hand, computed_since])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_weight_that_is_the_networks_no_longer_is_refused_by_its_pair(role, replace):
    networks = {"student": Tower(1), "teacher": Tower(1)}
    pairs = pair_layers(networks["student"], networks["teacher"])
    loss = DirectionSensitivityLoss(pairs, svd_steps=2)
    replace(networks[role])
    text = f"pair blocks.0.up: the {role}'s layer has another weight .* make the loss after"
    with pytest.raises(ValueError, match=text):
        pairs.check()
    with pytest.raises(ValueError, match=text):
        DirectionSensitivityLoss(pairs)
    loss.end_step(loss.begin_step(0.0))  # no choice is due
    with pytest.raises(ValueError, match=text):
        loss.begin_step(0.5)


class DTensor(torch.Tensor):
    """Stands for torch's, which `fully_shard` puts in place of a weight."""


def test_a_weight_that_is_sharded_later_is_refused():
    student = Tower(1)
    pairs = pair_layers(student, Tower(1))
    student.blocks[0].up._parameters["weight"] = torch.zeros(12, 8).as_subclass(DTensor).requires_grad_()
    with pytest.raises(ValueError, match=r"pair blocks.0.up: the student's layer is sharded .* after fully_shard"):
        pairs.check()


def test_weights_that_all_are_frozen_since_are_refused():
    student = Tower(1)
    pairs = pair_layers(student, Tower(1))
    student.blocks[0].up.requires_grad_(False)
    pairs.check()  # one that rests for a while is no error
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"pair blocks.0.up: .* frozen by now, .* merge the adapter"):
        pairs.check()


def test_moving_loading_and_training_leave_the_weights_what_they_are():
    student = Tower(1)
    pairs = pair_layers(student, Tower(1))
    student.to(torch.float64).load_state_dict(Tower(1).state_dict())
    pairs.check()


def test_pairs_without_owners_are_not_checked():
    student, teacher = Tower(1), Tower(1)
    loss = DirectionSensitivityLoss(list(pair_layers(student, teacher)), svd_steps=1)
    replaced_by_assignment(student)
    loss.begin_step(0.0)


def test_a_student_trains_with_the_pairs():
    torch.manual_seed(0)
    student, teacher = Tower(2), Tower(4)
    loss = DirectionSensitivityLoss(pair_layers(student, teacher), Own(rank=3), svd_steps=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    loss.attach(optimizer, total_steps=6)
    before = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        (student(torch.randn(5, 4)).square().mean() + loss()).backward()
        optimizer.step()
    assert loss.choices == 3
    assert loss().item() < before
