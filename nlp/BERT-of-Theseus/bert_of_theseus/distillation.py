"""Distillation of logits (KD) and of hidden states (PKD) into a student with fewer layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bert_of_theseus.modeling import encoder_layers, last_of_group


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of (N, classes) logits, mean over the batch.

    Hinton et al. (2015), section 2. A regression has one output and no distribution: the squared difference then.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def patient_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Squared distance of normalised first-token states, mean over batch and layers (Sun et al., EMNLP 2019, Eq. 7).

    student, teacher: one (N, length, hidden) tensor for every pair of layers.
    """
    distances = [
        (F.normalize(ours[:, 0], dim=-1) - F.normalize(theirs[:, 0], dim=-1)).square().sum(-1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


class DistilledModel(nn.Module):
    """A student that trains on (1 - alpha) task + alpha logits + beta hidden states; evaluation runs it alone.

    Hidden states are compared after every student layer but the last, each with the last layer of its group of teacher
    layers (PKD-Skip; the last layer is left out because the logits speak for it).

    Args:
        student, teacher: transformers models for sequence classification with the same outputs; the teacher is frozen.
        alpha: weight of the teacher's logits.
        temperature: of the softmaxes.
        beta: weight of the hidden states (0: KD without them).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, alpha: float, temperature: float, beta: float = 0.0):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.alpha, self.temperature, self.beta = alpha, temperature, beta
        self.layers = last_of_group(len(encoder_layers(teacher)), len(encoder_layers(student)))[:-1]

    def train(self, mode: bool = True) -> "DistilledModel":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, **inputs):
        if not self.training:
            return self.student(**inputs)
        states = bool(self.beta and self.layers)
        output = self.student(**inputs, output_hidden_states=states)
        with torch.no_grad():
            target = self.teacher(**inputs, output_hidden_states=states)
        loss = (1 - self.alpha) * output["loss"]
        loss = loss + self.alpha * logit_loss(output["logits"].float(), target["logits"].float(), self.temperature)
        if states:  # hidden_states[0] are the embeddings
            ours = [output["hidden_states"][i + 1].float() for i in range(len(self.layers))]
            theirs = [target["hidden_states"][k + 1].float() for k in self.layers]
            loss = loss + self.beta * patient_loss(ours, theirs)
        return {"loss": loss, "logits": output["logits"]}
