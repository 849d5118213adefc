"""One run from data to result: load, fine-tune the predecessor if asked, compress, evaluate, predict, export."""

import argparse
import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.utils import logging as transformers_logging

from bert_of_theseus.data import tokenize
from bert_of_theseus.distillation import DistilledModel
from bert_of_theseus.loading import default_successor_layers, load_data, load_model, max_length
from bert_of_theseus.modeling import TheseusModel, copied_layers, encoder_layers, layer_pairs
from bert_of_theseus.output import check_folder, claim_folder
from bert_of_theseus.predictions import write_predictions
from bert_of_theseus.reporting import card, flatten, in_words, merged, method_in_words
from bert_of_theseus.schedules import replacing_schedule
from bert_of_theseus.training import (
    BestStudentCallback,
    DistillationTrainer,
    FollowOptimizerCallback,
    MethodStateCallback,
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
from common.run.choices import ChoiceLog
from common.run.errors import UserError
from common.run.files import write_json, write_text
from common.run.record import RunRecord
from common.settings import SETTINGS, of_arguments
from common.svd_loss import build_loss


def run(args: argparse.Namespace) -> None:
    """Run what the command line asks for (`arguments.parse_arguments`)."""
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; use --bf16 here")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb needs that package: pip install wandb")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    check_folder(output_dir, args)
    data, task = load_data(args)
    tokenizer, model = load_model(args, task)
    datasets = {
        name: tokenize(examples, tokenizer, max_length(args, model), args.pad_to_max_length)
        for name, examples in data.items()
    }
    setup = training_arguments(args, output_dir)  # starts the process group of a distributed run
    if setup.process_index == 0:
        claim_folder(output_dir, args)
        for name, dataset in datasets.items():
            if dataset.num_truncated:
                print(f"{name}: {dataset.num_truncated} of {len(dataset)} examples cut to {args.max_seq_length} tokens")
    if dist.is_initialized():
        dist.barrier()
    try:
        if args.do_train:
            model = _train(args, task, tokenizer, model, datasets)
        elif args.do_eval:
            _evaluate_only(args, task, tokenizer, model, datasets)
        if args.do_predict:
            if args.do_train and args.selection_split:  # the split is there to choose by
                if dist.is_initialized():
                    dist.barrier()
                model = AutoModelForSequenceClassification.from_pretrained(output_dir / "student_best")
            _predict(args, task, tokenizer, model, datasets)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # DSKD decomposes weights that are not finite
        raise UserError(f"the run diverged: {error}; lower --learning_rate, or use --bf16 instead of --fp16") from error
    if dist.is_initialized():  # left to the exit, a thread of gloo that needs the interpreter then aborts
        dist.barrier()
        dist.destroy_process_group()


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
    if setup.process_index == 0:
        print(f"fine-tuning the predecessor, {len(encoder_layers(model))} layers", flush=True)
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    trainer.train()
    metrics = flatten(trainer.evaluate()) if args.do_eval else {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    if setup.process_index == 0:
        how = f"{len(encoder_layers(model))} layers, fine-tuned"
        save_student(model, tokenizer, folder, card(args, task, model, how, metrics))
        if metrics:
            print(f"predecessor: {in_words(metrics)}", flush=True)
    return model


def _build_student(args, model):
    """(what the Trainer trains, weight pairs for DSKD or None)."""
    if args.method == "finetune" and not args.num_successor_layers:
        return model, None
    count = args.num_successor_layers or default_successor_layers(len(encoder_layers(model)))
    if args.method == "theseus":
        theseus = TheseusModel(model, count, seed=args.seed, start=args.start)
        return theseus, theseus.pairs()
    student = copied_layers(model, count, args.start)
    pairs = layer_pairs(student, model.requires_grad_(False)) if args.if_svd else None
    if args.method == "finetune":
        return student, pairs
    beta = args.pkd_beta if args.method == "pkd" else 0.0
    settings = {"alpha": args.kd_alpha, "temperature": args.kd_temperature, "beta": beta}
    return DistilledModel(student, model, **settings), pairs


def _exported(model):
    """The plain transformers model inside of what the Trainer trains."""
    if isinstance(model, TheseusModel):
        return model.successor()
    return model.student if isinstance(model, DistilledModel) else model


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
    dskd = build_loss(pairs, of_arguments(args), args.seed) if args.if_svd else None
    theseus = student if isinstance(student, TheseusModel) else None
    trainer = _trainer(
        args, task, tokenizer, student, datasets, setup, dskd=dskd, lambda_size=args.lambda_size if dskd else 0.0
    )
    circumstances = {"processes": setup.world_size, "training examples": len(datasets["train"])}
    method_state = MethodStateCallback(
        dskd, theseus, trainer.totals, circumstances=circumstances, keep=args.save_total_limit
    )
    trainer.add_callback(FollowOptimizerCallback(dskd, theseus))
    trainer.add_callback(method_state)
    if theseus is not None:
        schedule = replacing_schedule(
            args.scheduler_type, args.replacing_rate, args.scheduler_linear_k, args.steps_for_replacing
        )
        trainer.add_callback(ReplacingCallback(theseus, schedule))

    checkpoint = last_checkpoint(output_dir) if args.resume else None
    if checkpoint:
        method_state.load(checkpoint)
    record = None
    if setup.process_index == 0:
        step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None
        record = RunRecord(output_dir, vars(args), resume_step=step)
        directions = ChoiceLog(output_dir, dskd, pairs, resume_step=step) if dskd else None
        trainer.add_callback(RecordCallback(record, directions))
    layers = len(encoder_layers(_exported(student)))
    how = method_in_words(args, layers)
    best_on = f"eval_{'selection' if args.selection_split else task.dev_sets[0]}_{task.primary}"

    def save(folder: str, evaluation: dict[str, float]) -> None:
        export = _exported(student)
        save_student(export, tokenizer, output_dir / folder, card(args, task, export, how, evaluation))

    if args.do_eval:
        trainer.add_callback(BestStudentCallback(best_on, lambda metrics: save("student_best", flatten(metrics))))

    if record is not None:
        start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
        print(f"training: {how}" + (f", {start}" if args.resume else ""), flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    totals = trainer.totals
    history = [line for line in trainer.state.log_history if best_on in line]
    if args.do_eval and not (history and history[-1]["step"] == trainer.state.global_step):
        trainer.evaluate()
        history = [line for line in trainer.state.log_history if best_on in line]
    export = _exported(student)
    if record is None:
        return export
    last = merged(trainer.state.log_history, trainer.state.global_step)
    save("student", last)
    best_step = max(history, key=lambda line: line[best_on])["step"] if history else None
    best = merged(trainer.state.log_history, best_step)
    if best:  # written during that evaluation, when not all of its sets were known
        write_text(output_dir / "student_best" / "README.md", card(args, task, export, how, best))
    dev_metric = f"{task.dev_sets[0]}_{task.primary}"
    result = record.finish(
        task=task.name,
        method=args.method,
        dskd={setting.dest: getattr(args, setting.dest) for setting in SETTINGS} if dskd else None,
        seed=args.seed,
        metric=task.primary,
        last=last.get(dev_metric),
        best=best.get(dev_metric),
        best_chosen_on="selection split of the training set" if args.selection_split else "dev",
        last_evaluation=last,
        best_evaluation=best,
        best_step=best_step,
        layers=layers,
        parameters=sum(p.numel() for p in export.parameters()),
        steps=trainer.state.global_step,
        wall_seconds=totals["seconds"],
        throughput=totals["examples"] / (totals["seconds"] - totals["evaluation_seconds"]),
        throughput_unit="examples/s",
    )
    if args.do_eval:
        print(f"last: {in_words(last)}")
        print(f"best on {result['best_chosen_on']} (step {best_step}): {in_words(best)}")
    print(f"the student is a plain transformers checkpoint: {output_dir / 'student'}", flush=True)
    return export


def _evaluate_only(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    metrics = flatten(_trainer(args, task, tokenizer, model, datasets, setup).evaluate())
    if setup.process_index == 0:
        record_file = Path(args.output_dir) / "evaluation.json"
        write_json(record_file, {"model": args.model_name_or_path, "task": task.name, **metrics})
        print(f"{in_words(metrics)}\nwritten to {record_file}")


def _predict(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    for name in task.test_sets:
        logits = first_output(trainer.predict(datasets[name]).predictions)
        if setup.process_index == 0:
            print(f"written: {write_predictions(task, Path(args.output_dir) / 'predictions', logits, name)}")
