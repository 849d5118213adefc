"""One run of the tables heal_smollm2: a language model without some of its layers, healed on little text by KD.

python scripts/heal.py --model FOLDER --gguf FILE --glue FOLDER --arm kd --lr 3e-4 --output_dir FOLDER
The training is that of examples/heal_causal_lm.py. News are the premises of RTE, reviews the sentences of SST-2.
"""

import argparse
import math
import time
from pathlib import Path
from types import SimpleNamespace

import _paths  # noqa: F401
import torch

from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable
from common.run.numbers import Number
from common.run.record import RunRecord
from common.torchvision_repair import repair_torchvision

LENGTH = 96  # tokens of a block
HELD_OUT = 64  # blocks that are tested on
BATCH = 8  # blocks of an optimizer step
TRAIN = {"news": ("RTE/train.tsv", "sentence1"), "reviews": ("SST-2/train.tsv", "sentence")}  # file and column
TESTS = {"news": ("RTE/dev.tsv", "sentence1"), "reviews": ("SST-2/dev.tsv", "sentence")}
ANCHORED = ("curvature", "l2sp", "ewc", "own")
ARMS = ("teacher", "pruned", "kd", "lora", "neighbours", *ANCHORED)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags' values; an arm and a weight that do not fit are refused."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--gguf", default="", help="its file, if the folder has a GGUF")
    parser.add_argument("--glue", type=Path, required=True, help="folder of GLUE's TSV files, RTE and SST-2")
    parser.add_argument("--text", choices=TRAIN, default="news", help="what is trained on (default: news)")
    parser.add_argument("--arm", choices=ARMS, required=True, help="neighbours: only layers beside a gap are trained")
    parser.add_argument("--drop", type=Number(int, 1), default=8, help="layers that go, evenly (default: 8)")
    parser.add_argument("--weight", type=Number(float, 0), default=0.0, help="of the anchor")
    parser.add_argument("--decoupled", action="store_true", help="the anchor pulls beside AdamW's step")
    parser.add_argument("--held_out", action="store_true", help="test on the training set's text, to tune on")
    parser.add_argument("--blocks", type=Number(int, 1), default=32, help="of 96 tokens to train on (default: 32)")
    parser.add_argument("--lr", type=Number(float, 0), default=3e-4, help="of AdamW (default: 3e-4)")
    parser.add_argument("--steps", type=Number(int, 1), default=12, help="of 8 blocks (default: 12)")
    parser.add_argument("--seed", type=Number(int, 0), default=1, help="of the blocks and their order")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(words)
    if (args.arm in ANCHORED) != (args.weight > 0):
        wanted = "a weight above 0" if args.arm in ANCHORED else "none"
        raise UserError(f"--weight {args.weight:g}: --arm {args.arm} takes {wanted}")
    return args


def main() -> None:
    args = parse_arguments()
    for file in (TRAIN[args.text], *TESTS.values()):
        if not (args.glue / file[0]).is_file():
            raise UserError(f"--glue: there is no {args.glue / file[0]}")
    check_writable("--output_dir", args.output_dir)
    repair_torchvision()
    from examples.heal_causal_lm import load, measure, pruned

    torch.manual_seed(args.seed)
    try:
        tokenizer, teacher = load(args.model, args.gguf)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if args.drop > (most := teacher.config.num_hidden_layers - 2):
        raise UserError(f"--drop {args.drop}: the first and the last layer stay; at most {most} can go")
    blocks = blocks_of(tokenizer, args.glue, *TRAIN[args.text])
    blocks, held_out = blocks[:-HELD_OUT], blocks[-HELD_OUT:]  # no run trains on the held-out ones
    tests = {args.text: held_out}
    if not args.held_out:
        tests = {kind: blocks_of(tokenizer, args.glue, *text)[:HELD_OUT] for kind, text in TESTS.items()}
    student, kept = (teacher, []) if args.arm == "teacher" else pruned(teacher, blocks[:1], args.drop, "even")
    training = blocks[torch.randperm(len(blocks))[: args.blocks]]
    result = {} if args.arm in ("teacher", "pruned") else train(student, teacher, kept, training, args)
    perplexities = {f"perplexity_{kind}": measure(student, text)[0] for kind, text in tests.items()}
    if not all(map(math.isfinite, perplexities.values())):
        untrained = f"--model {args.model}: its outputs are not finite, before any training; the model is broken"
        trained = f"the training has diverged; lower --lr {args.lr:g} or --weight {args.weight:g}"
        raise UserError(trained if result else untrained)
    score = -math.log(perplexities[f"perplexity_{args.text}"])
    settings = {key: str(value) for key, value in vars(args).items()}
    RunRecord(args.output_dir, settings).finish(
        metric="log-likelihood of a token", last=score, best=score, method=args.arm, **perplexities, **result
    )
    print(", ".join(f"{name} {value:.1f}" for name, value in perplexities.items()))


def train(student, teacher, kept: list[int], training: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Heal; gives what it took."""
    from examples.heal_causal_lm import heal

    if args.arm == "lora":
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    elif args.arm == "neighbours":
        student.requires_grad_(False)
        for place, i in enumerate(kept):
            if {i - 1, i + 1} - {*kept, -1, kept[-1] + 1}:
                student.model.layers[place].requires_grad_(True)
    settings = SimpleNamespace(**{**vars(args), "anchor": args.arm, "output": args.output_dir})
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    start = time.perf_counter()
    heal(student, teacher, kept, training, settings, bf16=True, per_device_train_batch_size=BATCH)
    seconds = time.perf_counter() - start
    done = {"steps": args.steps, "tokens": training.numel(), "trained_parameters": trained, "wall_seconds": seconds}
    return done | {"throughput": args.steps * BATCH * LENGTH / seconds, "throughput_unit": "tokens/s"}


def blocks_of(tokenizer, glue: Path, file: str, column: str) -> torch.Tensor:
    """(blocks, 96) tokens of a column of a TSV file, without what comes twice."""
    import pandas as pd

    table = pd.read_csv(glue / file, sep="\t", quoting=3)
    if column not in table:
        raise UserError(f"--glue: {glue / file} has no column {column}")
    lines = table[column].drop_duplicates()
    tokens = torch.tensor(tokenizer("\n".join(lines))["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


if __name__ == "__main__":
    run_cli(main)
