"""Examples per second of the GLUE loop beside the plain loop of the transformers example, and the metric of both.

Both fine-tune the same encoder from the same start at equal batch size, precision, optimizer and schedule. Their timed
steps are one training, so that its end gives the metric that each loop reaches with the same number of steps. The
plain loop then trains once more, from the same start for as many steps as fit into the time of ours.
"""

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.data import tokenize
from bert_of_theseus.loading import load_data, load_model, max_length
from bert_of_theseus.training import collator, metrics_function, training_arguments
from common.run.errors import UserError
from scripts.lib.benchmark import tables
from scripts.lib.benchmark.glue_loops import PlainGlue, SampledTrainer, Turns
from scripts.lib.benchmark.timing import summary, write

BATCH, LENGTH, LEARNING_RATE = 32, 128, 1e-4
BLOCKS = 7  # of a training; the first one is the warm-up
TRAININGS = ("ours", "plain", "plain, equal time")


def run(
    folder: Path, quick: bool, glue: str, model: str, tasks: Sequence[str], seeds: int, block: int, precision: str
) -> str:
    """Every task with seeds 1 to `seeds`, 7 blocks of `block` steps each; returns the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    size = {"batch": BATCH, "blocks": BLOCKS, "block": block, "dev_examples": None}
    if quick:
        size = {"batch": 4, "blocks": 2, "block": 1, "dev_examples": 8}
    results = {}
    for name in tasks:  # what is wrong with the last one's data is not to be found out after hours
        load_data(_arguments(Path(glue) / name, model, 1, precision, size["batch"], 1))
    for name in tasks:
        runs = [_train(Path(glue) / name, model, seed, precision, **size) for seed in range(1, seeds + 1)]
        results[name] = _task_results(runs, size["batch"] * size["block"])
    case = f"fine-tuning all layers of the encoder, at most {LENGTH} tokens, learning rate {LEARNING_RATE}"
    found = {"case": case, "precision": precision, "seeds": seeds, **size, "tasks": results}
    path = write("nlp", found, folder)
    return f"{tables.nlp(found)}\n\n{path}"


def _arguments(data: Path, model: str, seed: int, precision: str, batch: int, steps: int) -> Namespace:
    """What a user of the training script would write."""
    words = f"--do_train --do_eval --method finetune --task_name {data.name} --max_seq_length {LENGTH}"
    words += f" --max_steps {steps} --learning_rate {LEARNING_RATE} --per_gpu_train_batch_size {batch} --seed {seed}"
    words += " --report_to none --disable_tqdm" + (" --bf16" if precision == "bf16" else "")
    return parse_arguments(
        [*words.split(), "--model_name_or_path", model, "--data_dir", str(data), "--output_dir", "."]
    )


def _train(
    data: Path, model: str, seed: int, precision: str, *, batch: int, blocks: int, block: int, dev_examples: int | None
) -> dict[str, dict]:
    """One training by each loop, block by block in turns, then one by the plain loop that takes as long as ours.

    dev_examples: how many to evaluate on, None for all.

    Returns:
        Seconds of the timed blocks and tokens of an example by loop; metric and loss by training.
    """
    steps = blocks * block
    args = _arguments(data, model, seed, precision, batch, steps)
    sets, task = load_data(args)
    if len(sets["train"]) < batch:
        raise UserError(f"{data}: {len(sets['train'])} training examples, fewer than the batch of {batch}")
    with tempfile.TemporaryDirectory() as folder:
        setup = training_arguments(args, Path(folder), save_strategy="no")
        models = {}
        for name in TRAININGS:
            set_seed(seed)  # the new classifier of all is drawn alike
            tokenizer, loaded = load_model(args, task)
            models[name] = loaded.to(setup.device)
        length = max_length(args, models["ours"])
        dev = sets[task.dev_sets[0]]
        dev = tokenize(dev.subset(range(len(dev))[:dev_examples]), tokenizer, length)
        train = tokenize(sets["train"], tokenizer, length)
        same = {"args": setup, "train_dataset": train, "processing_class": tokenizer}
        same |= {"data_collator": collator(tokenizer), "compute_metrics": metrics_function(task)}
        trainers = {name: SampledTrainer(model=model, **same) for name, model in models.items()}
        for trainer in trainers.values():
            trainer.remove_callback(PrinterCallback)
        padded = tokenize(sets["train"], tokenizer, length, pad_to_max_length=True)
        plain = PlainGlue(models["plain"], padded, batch, LEARNING_RATE, steps, bf16=args.bf16)
        turns = Turns(plain.run, block)
        trainers["ours"].add_callback(turns)
        trainers["ours"].train()
        seconds = {loop: values[1:] for loop, values in turns.seconds.items()}
        fitting = equal_time_steps(seconds, steps)
        PlainGlue(models["plain, equal time"], padded, batch, LEARNING_RATE, fitting, bf16=args.bf16).run(fitting)
        scores = {name: trainer.evaluate(dev) for name, trainer in trainers.items()}
    # all examples of a batch are padded to its longest
    tokens = np.mean([train.lengths[batch].max() for batch in trainers["ours"].sampled.chosen])
    return {
        "seconds": seconds,
        "tokens": {"ours": float(tokens), "plain": float(length)},
        "equal_time_steps": fitting,
        "metric": {name: score[f"eval_{task.primary}"] for name, score in scores.items()},
        "loss": {name: score["eval_loss"] for name, score in scores.items()},
        "metric_name": task.primary,
    }


def equal_time_steps(seconds: Mapping[str, Sequence[float]], steps: int) -> int:
    """Steps of the plain loop in the time of `steps` of ours, at least one; seconds: of equal blocks of both loops."""
    return max(1, int(steps * sum(seconds["ours"]) / sum(seconds["plain"])))


def _task_results(runs: list[dict], examples: int) -> dict:
    """One task's figures from the runs of all seeds; `examples`: of a block."""
    loops = ("ours", "plain")
    rates = {loop: summary([examples / value for run in runs for value in run["seconds"][loop]]) for loop in loops}
    return {
        "examples_per_second": rates,
        "ratio": rates["ours"]["median"] / rates["plain"]["median"],
        "tokens_per_example": {loop: float(np.mean([run["tokens"][loop] for run in runs])) for loop in loops},
        "metric": runs[0]["metric_name"],
        "equal_time_steps": [run["equal_time_steps"] for run in runs],
        "dev_metric": {name: [run["metric"][name] for run in runs] for name in TRAININGS},
        "dev_loss": {name: [run["loss"][name] for run in runs] for name in TRAININGS},
    }
