"""Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020, "Contrastive Representation
Distillation", Sec. 3.1, with its memory buffer of all training images' embeddings)."""

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.methods.base import Distiller, feature_shapes


def sample_negatives(indices: Tensor, count: int, num_train: int) -> Tensor:
    """(N, count) indices drawn uniformly, with replacement, from the training set without the sample itself.

    Other images of the same class may be drawn: no labels are needed. (The paper's supervised variant leaves them
    out.) Drawn on the device of `indices` from its default generator.
    """
    drawn = torch.randint(num_train - 1, (len(indices), count), device=indices.device)
    return drawn + (drawn >= indices[:, None])


def nce_loss(log_scores: Tensor, num_train: int) -> Tensor:
    """-(log h(positive) + sum over negatives of log(1 - h)), mean over the batch; h = score / (score + K / M).

    log_scores (N, 1 + K) as from `Bank`, the positive first; M = num_train. The objective of Sec. 3.1 with the
    paper's h, written as h = sigmoid(log score - log(K / M)) so that no exponential overflows.
    """
    margins = log_scores - math.log((log_scores.shape[1] - 1) / num_train)
    return -(F.logsigmoid(margins[:, 0]) + F.logsigmoid(-margins[:, 1:]).sum(1)).mean()


def gather_processes(tensor: Tensor) -> Tensor:
    """The processes' tensors of equal shape, concatenated; without torch.distributed the tensor itself."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class Bank(nn.Module):
    """One embedding of unit length per training image, and the scores' normaliser; both persist in the state.

    The normaliser (num_train times the first batch's mean score) follows the authors' released code; the
    paper's formula has none.
    """

    def __init__(self, num_train: int, dim: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / dim)  # rows of about unit length
        self.register_buffer("memory", torch.empty(num_train, dim).uniform_(-bound, bound))
        self.register_buffer("log_normaliser", torch.tensor(-math.inf))  # minus infinity: not yet estimated

    def log_scores(self, anchors: Tensor, indices: Tensor, temperature: float) -> Tensor:
        """anchor . memory[index] / temperature - log normaliser; anchors (N, dim), indices (N, J) -> (N, J)."""
        # Scoring the whole bank and picking is far less memory traffic than copying N * J embeddings out of it. The
        # bank is copied because `update` writes to it before the backward pass reads it.
        scores = (anchors @ self.memory.clone().T).gather(1, indices) / temperature
        log_mean = gather_processes(scores.detach().flatten().logsumexp(0, keepdim=True) - math.log(scores.numel()))
        estimate = log_mean.logsumexp(0) + math.log(len(self.memory) / len(log_mean))
        log_normaliser = torch.where(self.log_normaliser.isinf(), estimate, self.log_normaliser)
        self.log_normaliser.copy_(log_normaliser)
        return scores - log_normaliser

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor, momentum: float) -> None:
        """memory[index] = normalise(momentum * memory[index] + (1 - momentum) * embedding), in all processes."""
        indices, embeddings = gather_processes(indices), gather_processes(embeddings.detach())
        blended = momentum * self.memory[indices] + (1 - momentum) * embeddings
        self.memory[indices] = F.normalize(blended, dim=1)


class CRD(Distiller):
    """CE_WEIGHT * cross-entropy + FEAT_WEIGHT * (student against the teacher's bank + teacher against the student's).

    Both networks' pooled features are embedded by a linear layer, each of which is trained, and scaled to unit length.
    """

    compares_classes = False

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("EMBED_DIM", "NCE_K", "NCE_T")
        if not 0 <= settings.NCE_M < 1:
            raise self.bad_setting("NCE_M", "a number from 0 to below 1")
        if self.num_train < 2:
            raise UserError(f"method crd needs at least 2 training images to contrast, not {self.num_train}")
        self.negatives = min(settings.NCE_K, self.num_train - 1)
        self.embed_student, self.embed_teacher = (
            nn.Linear(feature_shapes(model, self.image_shape).pooled, settings.EMBED_DIM)
            for model in (student, teacher)
        )
        self.bank_student, self.bank_teacher = (Bank(self.num_train, settings.EMBED_DIM) for _ in range(2))

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.EMBED_DIM = 128  # width of both embeddings (int, default 128)
        block.NCE_K = 16384  # negatives per image, at most all other training images (int, default 16384)
        block.NCE_T = 0.07  # temperature of the scores (float, > 0, default 0.07)
        block.NCE_M = 0.5  # share of the old embedding when the bank is updated (float, 0 to below 1, default 0.5)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.FEAT_WEIGHT = 0.8  # weight of the contrastive loss (float, default 0.8)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        ours = F.normalize(self.embed_student(student.pooled.float()), dim=1)
        theirs = F.normalize(self.embed_teacher(teacher.pooled.float()), dim=1)
        contrast = torch.cat((indices[:, None], sample_negatives(indices, self.negatives, self.num_train)), 1)
        loss = nce_loss(self.bank_teacher.log_scores(ours, contrast, s.NCE_T), self.num_train)
        loss = loss + nce_loss(self.bank_student.log_scores(theirs, contrast, s.NCE_T), self.num_train)
        if self.training:
            self.bank_student.update(indices, ours, s.NCE_M)
            self.bank_teacher.update(indices, theirs, s.NCE_M)
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "crd": s.FEAT_WEIGHT * loss,
        }
