"""A tiny BERT with Theseus modules in it."""

import torch
from nlp_fixtures import TEXT_WORDS, tiny_config
from torch import nn
from transformers import BertForSequenceClassification

from bert_of_theseus.modeling import TheseusModel


def bert(dropout: float = 0.0, **settings) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(
        tiny_config(num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **settings)
    )


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5 + len(TEXT_WORDS), (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def theseus(
    layers: int = 2, probability: float = 0.5, *, model: nn.Module | None = None, seed: int = 0
) -> TheseusModel:
    wrapped = TheseusModel(model or bert(), layers, seed=seed).train()
    wrapped.replacing_probability = probability
    for module in wrapped.theseus_modules:  # away from the layers that they were copied from
        with torch.no_grad():
            for parameter in module.successor.parameters():
                parameter.add_(0.05)
    return wrapped


def choose(model: TheseusModel, replaced: list[bool]) -> TheseusModel:
    model._draw = lambda: replaced
    return model
