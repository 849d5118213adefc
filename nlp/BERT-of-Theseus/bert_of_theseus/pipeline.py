"""One run from data to result: load, fine-tune the predecessor if asked, compress, evaluate, predict, export."""

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from bert_of_theseus.data import load_task_data, selection_split, tokenize
from bert_of_theseus.metrics import primary
from bert_of_theseus.modeling import TheseusModel, encoder_layers, first_layers, layer_pairs
from bert_of_theseus.predictions import write_predictions
from bert_of_theseus.schedules import replacing_schedule
from bert_of_theseus.tasks import Task, custom_task, get_task
from bert_of_theseus.training import (
    BestStudentCallback,
    DistillationTrainer,
    DSKDCallback,
    RecordCallback,
    ReplacingCallback,
    collator,
    compile_layers,
    first_output,
    last_checkpoint,
    metrics_function,
    save_student,
    training_arguments,
)
from common.errors import UserError
from common.files import write_json
from common.pairing import last_of_group
from common.record import RunRecord
from common.svd_loss import DirectionSensitivityLoss

# what a run writes, and what --overwrite_output_dir therefore may remove
_WRITTEN = ("checkpoint-*", "student", "student_best", "predecessor", "predictions", "runs", "metrics.jsonl")
_WRITTEN += ("config.json", "result.json", "evaluation.json")
# what a resumed run may be given otherwise than the run that it continues
_FREE_ON_RESUME = ("resume", "overwrite_output_dir", "output_dir", "data_dir", "cache_dir", "do_predict", "test_file")
_FREE_ON_RESUME += ("per_gpu_eval_batch_size", "save_total_limit", "report_to", "disable_tqdm", "torch_compile")


def run(args: argparse.Namespace) -> None:
    """Run what the command line asks for (`arguments.parse_arguments`)."""
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; use --bf16 here")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    _check_folder(output_dir, args)
    data, task = _load_data(args)
    tokenizer, model = _load_model(args, task)
    datasets = {
        name: tokenize(examples, tokenizer, _max_length(args, model), args.pad_to_max_length)
        for name, examples in data.items()
    }
    setup = training_arguments(args, output_dir)  # starts the process group of a distributed run
    if setup.process_index == 0:
        _claim_folder(output_dir, args)
    if dist.is_initialized():
        dist.barrier()
    try:
        if args.do_train:
            model = _train(args, task, tokenizer, model, datasets)
        elif args.do_eval:
            _evaluate_only(args, task, tokenizer, model, datasets)
        if args.do_predict:
            _predict(args, task, tokenizer, model, datasets)
    except FloatingPointError as error:
        raise UserError(f"the run diverged: {error}; lower --learning_rate, or use --bf16 instead of --fp16") from error


def _load_data(args: argparse.Namespace) -> tuple[dict, Task]:
    custom = args.task_name.lower() == "custom"
    task = custom_task(args.text_columns, args.label_column, args.regression) if custom else get_task(args.task_name)
    sets = []
    # a custom task's classes are those of its training file
    sets += ["train"] if args.do_train or (args.train_file and not task.labels) else []
    sets += task.dev_sets if args.do_eval else []
    sets += task.test_sets if args.do_predict else []
    files = {"train_file": args.train_file, "dev_file": args.dev_file, "test_file": args.test_file} if custom else {}
    data = load_task_data(task, args.data_dir, sets=sets, cache_dir=args.cache_dir, **files)
    task = next(iter(data.values())).task
    if args.selection_split:
        data["train"], data["selection"] = selection_split(data["train"], args.selection_split, args.seed)
    return data, task


def _load_model(args: argparse.Namespace, task: Task):
    """Tokenizer and model from a folder or the hub."""
    name = args.model_name_or_path
    lower = {"do_lower_case": True} if args.do_lower_case else {}
    labels = {} if task.regression else {"id2label": dict(enumerate(task.labels))}
    if labels:
        labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=args.cache_dir, **lower)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, cache_dir=args.cache_dir, num_labels=task.num_outputs, output_loading_info=True, **labels
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"--model_name_or_path {name}: its classifier does not have the {task.num_outputs} output(s) of "
            f"{task.name}; give a model fine-tuned on that task, or a pretrained one"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_name_or_path {name} cannot be loaded: {reason} Give a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that can be downloaded."
        ) from error
    if args.do_lower_case and tokenizer.tokenize("Read THE Text") != tokenizer.tokenize("read the text"):
        raise UserError(f"--do_lower_case has no effect on the tokenizer of {name}, which tells cases apart")
    _check_layers(args, len(encoder_layers(model)))
    fresh = [key for key in loading["missing_keys"] if key.startswith("classifier")]
    trains_classifier = args.finetune_predecessor or (args.do_train and args.method == "finetune")
    if fresh and not trains_classifier:
        print(
            f"warning: {name} is not fine-tuned on {task.name} (its classifier is newly initialised), so there is "
            "nothing to compress yet; --finetune_predecessor trains it first",
            flush=True,
        )
    return tokenizer, model.float()  # a checkpoint in half precision would otherwise be trained in it


def _check_layers(args: argparse.Namespace, layers: int) -> None:
    count = args.num_successor_layers
    if not args.do_train or (args.method == "finetune" and not count):
        return
    if args.method == "theseus" or args.if_svd:
        try:
            last_of_group(layers, count or _half(layers))
        except UserError as error:
            raise UserError(f"--num_successor_layers: {error}") from None
    elif count > layers:
        raise UserError(f"--num_successor_layers {count}: the model has {layers} layers")


def _half(layers: int) -> int:
    return max(layers // 2, 1)


def _max_length(args: argparse.Namespace, model) -> int:
    positions = getattr(model.config, "max_position_embeddings", args.max_seq_length)
    if args.max_seq_length > positions:
        raise UserError(f"--max_seq_length {args.max_seq_length}: the model takes {positions} tokens at most")
    return args.max_seq_length


def _check_folder(folder: Path, args: argparse.Namespace) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if args.resume:
        if not (folder / "config.json").exists():
            raise UserError(f"--resume: there is no run in {folder} to continue")
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, value in vars(args).items():
            if name not in _FREE_ON_RESUME and value != before.get(name):
                raise UserError(f"--resume: the run in {folder} has {name} {before.get(name)}, not {value}")
    elif args.do_train and not args.overwrite_output_dir and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is in use; give another, --overwrite_output_dir or --resume")


def _claim_folder(folder: Path, args: argparse.Namespace) -> None:
    """Only now, with data and model read, is an earlier run removed."""
    if args.do_train and args.overwrite_output_dir:
        for pattern in _WRITTEN:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if args.do_train:
        write_json(folder / "config.json", vars(args))  # before the predecessor trains, for --resume to find


def _trainer(args, task, tokenizer, model, datasets, setup, **others) -> DistillationTrainer:
    dev = {name: datasets[name] for name in (*task.dev_sets, "selection") if name in datasets}
    return DistillationTrainer(
        model=model,
        args=setup,
        train_dataset=datasets.get("train"),
        eval_dataset=dev or None,
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
        compute_metrics=metrics_function(task),
        **others,
    )


def _finetune_predecessor(args, task, tokenizer, model, datasets, folder: Path):
    """Train all of the model on the task; the result is in `folder`, and is taken from there by a resumed run."""
    if (folder / "config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder)
    setup = training_arguments(
        args,
        folder,
        learning_rate=args.predecessor_learning_rate,
        num_train_epochs=args.predecessor_num_train_epochs,
        max_steps=-1,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    print(f"fine-tuning the predecessor, {len(encoder_layers(model))} layers", flush=True)
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    trainer.train()
    metrics = _flatten(trainer.evaluate()) if args.do_eval else {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    if setup.process_index == 0:
        card = _card(args, task, model, f"{len(encoder_layers(model))} layers, fine-tuned", metrics)
        save_student(model, tokenizer, folder, card)
        if metrics:
            print(f"predecessor: {_in_words(metrics)}", flush=True)
    return model


def _build_student(args, model):
    """(what the Trainer trains, weight pairs for DSKD or None)."""
    if args.method == "theseus":
        count = args.num_successor_layers or _half(len(encoder_layers(model)))
        theseus = TheseusModel(model, count, seed=args.seed)
        return theseus, theseus.pairs()
    if not args.num_successor_layers:
        return model, None
    student = first_layers(model, args.num_successor_layers)
    return student, layer_pairs(student, model.requires_grad_(False)) if args.if_svd else None


def _train(args, task, tokenizer, model, datasets):
    output_dir = Path(args.output_dir)
    if args.finetune_predecessor:
        model = _finetune_predecessor(args, task, tokenizer, model, datasets, output_dir / "predecessor")
        set_seed(args.seed)
    student, pairs = _build_student(args, model)
    setup = training_arguments(args, output_dir)
    student.to(setup.device)
    model.to(setup.device)  # DSKD's teacher
    if args.torch_compile:
        compile_layers(student)
    dskd = _build_dskd(args, pairs)
    theseus = student if isinstance(student, TheseusModel) else None
    trainer = _trainer(
        args, task, tokenizer, student, datasets, setup, dskd=dskd, lambda_size=args.lambda_size if dskd else 0.0
    )
    following = DSKDCallback(dskd, theseus, trainer.totals)
    trainer.add_callback(following)
    if theseus is not None:
        schedule = replacing_schedule(
            args.scheduler_type, args.replacing_rate, args.scheduler_linear_k, args.steps_for_replacing
        )
        trainer.add_callback(ReplacingCallback(theseus, schedule))

    checkpoint = last_checkpoint(output_dir) if args.resume else None
    if checkpoint:
        following.load(checkpoint)
    record = None
    if setup.process_index == 0:
        step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None
        record = RunRecord(output_dir, vars(args), resume_step=step)
        trainer.add_callback(RecordCallback(record))
    best_on = f"eval_{'selection' if args.selection_split else task.dev_sets[0]}_{primary(task)}"

    def plain():
        return theseus.successor() if theseus is not None else student

    def save(folder: str, evaluation: dict[str, float]) -> None:
        export = plain()
        card = _card(args, task, export, _method_in_words(args, export), evaluation)
        save_student(export, tokenizer, output_dir / folder, card)

    if args.do_eval:
        trainer.add_callback(BestStudentCallback(best_on, lambda metrics: save("student_best", _flatten(metrics))))

    layers = len(encoder_layers(plain()))
    print(f"training: {_method_in_words(args, plain())}", flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    totals = trainer.totals
    history = [line for line in trainer.state.log_history if best_on in line]
    if args.do_eval and not (history and history[-1]["step"] == trainer.state.global_step):
        trainer.evaluate()
        history = [line for line in trainer.state.log_history if best_on in line]
    if record is None:
        return plain()
    last = _merged(trainer.state.log_history, trainer.state.global_step)
    save("student", last)
    best_step = max(history, key=lambda line: line[best_on])["step"] if history else None
    best = _merged(trainer.state.log_history, best_step)
    dev_metric = f"{task.dev_sets[0]}_{primary(task)}"
    result = record.finish(
        task=task.name,
        method=args.method,
        dskd=_dskd_settings(args) if dskd else None,
        seed=args.seed,
        metric=primary(task),
        last=last.get(dev_metric),
        best=best.get(dev_metric),
        best_chosen_on="selection split of the training set" if args.selection_split else "dev",
        last_evaluation=last,
        best_evaluation=best,
        best_step=best_step,
        layers=layers,
        parameters=sum(p.numel() for p in plain().parameters()),
        steps=trainer.state.global_step,
        wall_seconds=totals["seconds"],
        throughput=totals["examples"] / (totals["seconds"] - totals["evaluation_seconds"]),
        throughput_unit="examples/s",
    )
    if args.do_eval:
        print(f"last: {_in_words(last)}")
        print(f"best on {result['best_chosen_on']} (step {best_step}): {_in_words(best)}")
    print(f"the student is a plain transformers checkpoint: {output_dir / 'student'}", flush=True)
    return plain()


def _build_dskd(args, pairs) -> DirectionSensitivityLoss | None:
    if not args.if_svd:
        return None
    return DirectionSensitivityLoss(
        pairs,
        rank=args.rank_size,
        svd_steps=args.svd_steps,
        basis=args.basis,
        grad_steps=args.grad_steps,
        driver=args.svd_driver,
        direction=args.direction,
    )


def _evaluate_only(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    metrics = _flatten(_trainer(args, task, tokenizer, model, datasets, setup).evaluate())
    if setup.process_index == 0:
        record_file = Path(args.output_dir) / "evaluation.json"
        write_json(record_file, {"model": args.model_name_or_path, "task": task.name, **metrics})
        print(f"{_in_words(metrics)}\nwritten to {record_file}")


def _predict(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    for name in task.test_sets:
        logits = first_output(trainer.predict(datasets[name]).predictions)
        if setup.process_index == 0:
            print(f"written: {write_predictions(task, Path(args.output_dir) / 'predictions', logits, name)}")


def _flatten(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of an evaluation as `<set>_<metric>`, without the Trainer's timings and losses."""
    timings = ("_runtime", "_per_second", "_time", "_loss")
    kept = {key: value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(timings)}
    return {key.removeprefix("eval_"): value for key, value in kept.items()}


def _merged(history: list[dict], step: int | None) -> dict[str, float]:
    """All metrics of the evaluation at a step (the Trainer logs one line per evaluation set)."""
    return _flatten({key: value for line in history if line["step"] == step for key, value in line.items()})


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _dskd_settings(args) -> dict:
    names = ("lambda_size", "rank_size", "svd_steps", "grad_steps", "basis", "svd_driver", "direction")
    return {name: getattr(args, name) for name in names} | {"grad_steps": args.grad_steps or args.svd_steps}


def _method_in_words(args, student) -> str:
    words = f"{len(encoder_layers(student))} layers, {args.method}"
    return words + (
        f" + DSKD ({args.basis}, lambda {args.lambda_size:g}, rank {args.rank_size})" if args.if_svd else ""
    )


def _card(args, task: Task, model, how: str, metrics: dict[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    table = f"\n| dev metric | value |\n| --- | --- |\n{rows}\n" if metrics else ""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---
# {task.name}: {how}

From `{args.model_name_or_path}`, seed {args.seed}. {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters.
{table}
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```
"""
