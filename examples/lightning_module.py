"""Lightning: the module trains the student on its task, and a callback does the rest.

task 0.313, DSKD 2.345; 6 choices of directions
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dskd import DirectionSensitivityLoss, Own, pair_weights
from dskd.integrations.lightning import DskdCallback


def mlp(hidden_layers: int) -> nn.Sequential:
    hidden = [module for _ in range(hidden_layers) for module in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))


class Student(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = cross_entropy(self.network(inputs), labels)
        self.log("task_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    student, teacher = Student(), mlp(4)
    pairs = pair_weights(student.network, teacher, [("2", "4"), ("4", "8")])
    callback = DskdCallback(DirectionSensitivityLoss(pairs, Own(rank=8), svd_steps=5), weight=0.1)

    inputs = torch.randn(512, 10)
    data = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=16, shuffle=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, callbacks=[callback], accumulate_grad_batches=2, **quiet)
    trainer.fit(student, data)
    task, value = (trainer.callback_metrics[name].item() for name in ("task_loss", "dskd_loss"))
    print(f"task {task:.3f}, DSKD {value:.3f}; {callback.dskd.choices} choices of directions")


if __name__ == "__main__":
    main()
