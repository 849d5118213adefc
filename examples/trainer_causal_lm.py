"""transformers' Trainer: a Llama of two layers, cut out of one of four, learns from it. Tiny, with random weights.

step  5: task 3.928, DSKD 0.0007
step 10: task 3.911, DSKD 0.0026
step 15: task 3.919, DSKD 0.0029
step 20: task 3.914, DSKD 0.0030
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from dskd import DirectionSensitivityLoss, Own, pair_weights
from dskd.integrations.transformers import DskdTrainer

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
KEPT = (1, 3)  # layers of the teacher that the student begins as


def make_loss(student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> DirectionSensitivityLoss:
    places = [(f"model.layers.{i}", f"model.layers.{j}") for i, j in enumerate(KEPT)]
    names = [(f"{mine}.{module}", f"{theirs}.{module}") for mine, theirs in places for module in MODULES]
    return DirectionSensitivityLoss(pair_weights(student, teacher, names), Own(rank=8), svd_steps=5)


def main() -> None:
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **SIZES)).eval()
    student = LlamaForCausalLM(LlamaConfig(num_hidden_layers=len(KEPT), **SIZES))
    student.load_state_dict(teacher.state_dict(), strict=False)
    for i, j in enumerate(KEPT):
        student.model.layers[i].load_state_dict(teacher.model.layers[j].state_dict())

    texts = torch.randint(50, (160, 12))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=20, learning_rate=1e-3,
            logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = DskdTrainer(
            model=student,
            args=arguments,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
            dskd=make_loss(student, teacher),
            dskd_weight=0.1,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']:2}: task {line['task_loss']:.3f}, DSKD {line['dskd_loss']:.4f}")


if __name__ == "__main__":
    main()
