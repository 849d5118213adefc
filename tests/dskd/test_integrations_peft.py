"""LoRA (peft): a frozen base weight cannot be moved and is refused; merged, or trained itself, it can.

The former code took it, handed gradients to nobody, and the training went on without DSKD.
"""

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dskd import Curvature, DirectionSensitivityLoss

NAME = "model.layers.0.self_attn.q_proj"


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=1, **sizes))


def with_adapter(**settings) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    return peft.get_peft_model(llama(0), config)


def loss_of(weight: nn.Parameter) -> DirectionSensitivityLoss:
    return DirectionSensitivityLoss([("q_proj", weight, llama(1).get_submodule(NAME).weight)], Curvature(), svd_steps=2)


def train(model: nn.Module, dskd: DirectionSensitivityLoss, steps: int = 10) -> tuple[float, float]:
    """How far apart student and teacher are before and after."""
    optimizer = torch.optim.SGD([W for W in model.parameters() if W.requires_grad], lr=0.1)
    dskd.attach(optimizer, steps, weight=1.0)
    before = torch.dist(dskd.students[0], dskd.teachers[0]).item()
    for _ in range(steps):
        ids = torch.randint(20, (2, 6))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return before, torch.dist(dskd.students[0], dskd.teachers[0]).item()


def test_a_frozen_base_weight_is_refused_with_what_to_do():
    layer = with_adapter().get_submodule(f"base_model.model.{NAME}")
    with pytest.raises(ValueError, match=r"pair q_proj: the student's weight is frozen .* merge the adapter first"):
        loss_of(layer.base_layer.weight)


def test_the_sum_of_base_weight_and_adapter_is_refused():
    """It is no parameter: a step changes others."""
    layer = with_adapter().get_submodule(f"base_model.model.{NAME}")
    layer.base_layer.weight.requires_grad_()
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    with pytest.raises(ValueError, match="is computed from other tensors; give the parameter that is trained"):
        loss_of(merged)


def test_a_base_weight_that_is_trained_follows_the_teacher():
    model = with_adapter()
    weight = model.get_submodule(f"base_model.model.{NAME}").base_layer.weight
    weight.requires_grad_()
    before, after = train(model, loss_of(weight))
    assert after < before


def test_a_merged_model_follows_the_teacher():
    model = with_adapter().merge_and_unload()
    model.requires_grad_(True)
    dskd = loss_of(model.get_submodule(NAME).weight)
    before, after = train(model, dskd)
    assert after < before
    assert dskd.choices == 5


def test_merging_after_the_loss_was_made_is_refused_by_attach():
    """Merged weights are others."""
    model = with_adapter()
    layer = model.get_submodule(f"base_model.model.{NAME}")
    layer.base_layer.weight.requires_grad_()
    dskd = loss_of(layer.base_layer.weight)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone())
    with pytest.raises(ValueError, match="pair q_proj: the student's weight is in no parameter group"):
        dskd.attach(torch.optim.SGD(model.parameters(), lr=0.1), 10)
