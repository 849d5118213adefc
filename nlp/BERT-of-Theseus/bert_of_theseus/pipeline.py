"""One run from data to result: load, fine-tune the predecessor if asked, compress, evaluate, predict, export."""

import argparse
import importlib.util
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForSequenceClassification, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from bert_of_theseus.data import balanced_weights, classes_in_words, sha256_of_sets, tokenize
from bert_of_theseus.distillation import DistilledModel
from bert_of_theseus.loading import (
    check_inputs,
    check_length,
    check_numbers,
    default_successor_layers,
    load_data,
    load_model,
    max_length,
)
from bert_of_theseus.modeling import TheseusModel, check_export, copied_layers, depth, layer_pairs
from bert_of_theseus.output import ClaimedFolder, check_folder, claimed
from bert_of_theseus.predictions import write_predictions, write_probabilities
from bert_of_theseus.reporting import (
    card,
    flatten,
    in_words,
    layer_map,
    majority_metric,
    merged,
    method_in_words,
    next_steps,
    summary,
)
from bert_of_theseus.schedules import replacing_schedule
from bert_of_theseus.tasks import DIAGNOSTICS
from bert_of_theseus.training import (
    BestStudentCallback,
    ConfusionCallback,
    DistillationTrainer,
    FollowOptimizerCallback,
    MethodStateCallback,
    NotFiniteAtStart,
    PatienceCallback,
    RecordCallback,
    ReplacingCallback,
    StopCallback,
    collator,
    compile_layers,
    find_checkpoint,
    first_output,
    last_checkpoint,
    metrics_function,
    save_student,
    state_bytes,
    training_arguments,
    weigh_classes,
    weights_sha256,
)
from common.run.choices import ChoiceLog
from common.run.disk import check_space
from common.run.errors import UserError
from common.run.files import write_json, write_text
from common.run.reading import reading
from common.run.record import RunRecord
from common.run.restarts import start_group
from common.run.stopping import Stopped, end_at_once, handled, stop_requests
from common.settings import SETTINGS, of_arguments
from common.svd_loss import DirectionSensitivityLoss, build_loss


def run(args: argparse.Namespace) -> None:
    """Run what the command line asks for (`arguments.parse_arguments`)."""
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; use --bf16 here")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb needs that package: pip install wandb")
    check_numbers(args)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    check_folder(output_dir, args)
    data, task = load_data(args)
    check_length(args, data)
    tokenizer, model = load_model(args, task)
    datasets = {
        name: tokenize(examples, tokenizer, max_length(args, model), args.pad_to_max_length)
        for name, examples in data.items()
    }
    check_inputs(args, tokenizer, model, datasets)
    start_group()
    setup = training_arguments(args, output_dir)  # starts the process group of a distributed run
    first = setup.process_index == 0
    # all that can be refused is, before an earlier run is moved aside
    job = (
        _assemble(args, task, tokenizer, model, datasets, setup)
        if args.do_train and not args.finetune_predecessor
        else None
    )
    if first and args.do_train:
        check_space("--output_dir", output_dir, 2 * state_bytes(job.student if job else model))
    with claimed(output_dir, args) if first else nullcontext() as claim:
        if first:
            _describe(args, task, datasets)
        if dist.is_initialized():
            dist.barrier()
        try:
            if args.do_train:
                model = _train(args, task, tokenizer, model, datasets, job, claim)
            elif args.do_eval:
                _evaluate_only(args, task, tokenizer, model, datasets)
            if args.do_predict:
                if args.do_train and args.selection_split:  # the split is there to choose by
                    if dist.is_initialized():
                        dist.barrier()
                    model = _load(output_dir / "student_best")
                _predict(args, task, tokenizer, model, datasets)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            raise UserError(_diverged(error, args, "--learning_rate")) from error
    if dist.is_initialized():  # left to the exit, a thread of gloo that needs the interpreter then aborts
        dist.barrier()
        dist.destroy_process_group()


def _describe(args, task, datasets) -> None:
    if not task.regression:
        print(classes_in_words(task), flush=True)
    for name, dataset in datasets.items():
        if dataset.num_truncated:
            print(f"{name}: {dataset.num_truncated} of {len(dataset)} examples cut to {args.max_seq_length} tokens")


def _diverged(error: Exception, args, rate: str) -> str:
    """What to change, by what went wrong."""
    if not args.do_train:
        return f"--model_name_or_path {args.model_name_or_path}: {error}; the model is broken"
    if isinstance(error, NotFiniteAtStart):
        made_here = args.finetune_predecessor and rate == "--learning_rate"
        weights = "the predecessor's weights" if made_here else f"the weights of {args.model_name_or_path}"
        bf16 = ", or use --bf16 instead of --fp16" if args.fp16 else ""
        return (
            f"the loss is not finite in step 1, before any update: {error}; look at {weights}, the train set and the "
            f"settings of the loss{bf16}"
        )
    advice = [f"lower {rate}"]
    if "dskd_loss" in str(error) or isinstance(error, torch.linalg.LinAlgError):  # it decomposes what is not finite
        advice.append("or --lambda_size")
    if args.fp16:
        advice.append("or use --bf16 instead of --fp16")
    kept = last_checkpoint(Path(args.output_dir))
    return f"the run diverged: {error}; {' '.join(advice)}" + (f" ({kept} is from before)" if kept else "")


def _load(folder: Path):
    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)


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
        with reading(folder, "the predecessor that was trained before"):
            return _load(folder)
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
        print(f"fine-tuning the predecessor, {depth(model)} layers", flush=True)
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    try:
        trainer.train()
        metrics = flatten(trainer.evaluate()) if args.do_eval else {}
    except FloatingPointError as error:
        raise UserError(_diverged(error, args, "--predecessor_learning_rate")) from error
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # as one that is loaded
    if setup.process_index == 0:
        how = f"{depth(model)} layers, fine-tuned"
        try:
            save_student(model, tokenizer, folder, card(args, task, model, how, metrics))
        except FloatingPointError as error:
            raise UserError(_diverged(error, args, "--predecessor_learning_rate")) from error
        if metrics:
            print(f"predecessor: {in_words(metrics)}", flush=True)
    return model


def _build_student(args, model):
    """(what the Trainer trains, weight pairs for DSKD or None)."""
    if args.method == "finetune" and not args.num_successor_layers:
        return model, None
    count = args.num_successor_layers or default_successor_layers(depth(model))
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


class _Job(NamedTuple):
    """What is to be trained.

    Attributes:
        model: the predecessor, or what trains itself.
        layers: how many encoder layers it has.
        student: what the Trainer trains.
        pairs: weight pairs for DSKD, or None.
        dskd: the loss, or None.
        inputs: hashes of the predecessor and of the data.
    """

    model: nn.Module
    layers: int
    student: nn.Module
    pairs: list | None
    dskd: DirectionSensitivityLoss | None
    inputs: dict[str, str]


def _assemble(args, task, tokenizer, model, datasets, setup) -> _Job:
    inputs = {"predecessor": weights_sha256(model), "data": sha256_of_sets(datasets)}
    if args.class_weights:
        weigh_classes(model, balanced_weights(datasets["train"].labels, len(task.labels)))
    layers = depth(model)
    student, pairs = _build_student(args, model)
    if student is not model:
        examples = datasets["train"]
        batch = collator(tokenizer)([examples[int(examples.lengths.argmax())], examples[0]])
        batch.pop("labels", None)
        check_export(student, _exported(student), batch)
    student.to(setup.device)
    model.to(setup.device)  # DSKD's teacher
    if args.torch_compile:
        compile_layers(student)
    dskd = build_loss(pairs, of_arguments(args), args.seed) if args.if_svd else None
    return _Job(model, layers, student, pairs, dskd, inputs)


def _train(args, task, tokenizer, model, datasets, job: _Job | None, claim: ClaimedFolder | None):
    output_dir = Path(args.output_dir)
    setup = training_arguments(args, output_dir)
    complete = claim.keep if claim else lambda: None
    if job is None:
        try:
            with handled(end_at_once):
                model = _finetune_predecessor(args, task, tokenizer, model, datasets, output_dir / "predecessor")
        except Stopped as stopped:
            if claim and not claim.has_earlier:  # else that one returns, and is not to be resumed with these settings
                stopped.saved = "the predecessor will train anew"
            raise
        complete()
        set_seed(args.seed)
        job = _assemble(args, task, tokenizer, model, datasets, setup)
    student, pairs, dskd = job.student, job.pairs, job.dskd
    theseus = student if isinstance(student, TheseusModel) else None
    best_on = f"eval_{'selection' if args.selection_split else task.dev_sets[0]}_{task.primary}"
    patience = PatienceCallback(best_on, args.patience) if args.patience else None
    checkpoint, passed = find_checkpoint(output_dir) if args.resume else (None, [])
    trainer = _trainer(
        args, task, tokenizer, student, datasets, setup, dskd=dskd, lambda_size=args.lambda_size if dskd else 0.0
    )
    circumstances = {"processes": setup.world_size, "training examples": len(datasets["train"]), **job.inputs}
    method_state = MethodStateCallback(
        dskd,
        theseus,
        trainer.totals,
        circumstances=circumstances,
        keep=args.save_total_limit,
        trainer=trainer,
        complete=complete,
    )
    trainer.add_callback(FollowOptimizerCallback(dskd, theseus))
    trainer.add_callback(method_state)
    replacing = None
    if theseus is not None:
        replacing = ReplacingCallback(theseus, plan=lambda steps: _schedule(args, steps))
        trainer.add_callback(replacing)

    log_lines = method_state.load(checkpoint) if checkpoint else None
    record = None
    if setup.process_index == 0:
        for line in passed:
            print(line, flush=True)
        step = _step(checkpoint) if checkpoint else None
        record = method_state.record = RunRecord(output_dir, vars(args), resume_step=step, resume_lines=log_lines)
        directions = ChoiceLog(output_dir, dskd, pairs, resume_step=step) if dskd else None
        trainer.add_callback(RecordCallback(record, directions))
        if not task.regression:
            trainer.add_callback(ConfusionCallback(output_dir, task, trainer.compute_metrics))
    layers = depth(_exported(student))
    how = method_in_words(args, layers)

    def save(folder: str, evaluation: dict[str, float]) -> None:
        export = _exported(student)
        save_student(export, tokenizer, output_dir / folder, card(args, task, export, how, evaluation))

    if args.do_eval:
        trainer.add_callback(BestStudentCallback(best_on, lambda metrics: save("student_best", flatten(metrics))))
    if patience:
        trainer.add_callback(patience)

    if record is not None:
        start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
        print(f"training: {how}" + (f", {start}" if args.resume else ""), flush=True)
        if job.layers != layers:
            print(layer_map(job.layers, layers, args.start), flush=True)
    with stop_requests() as request, _whole(checkpoint):
        stop = StopCallback(request)
        trainer.add_callback(stop)
        ended = checkpoint is not None and trainer.take_up_ended(checkpoint, patience)
        if not ended:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.signum:
        step = trainer.state.global_step
        raise Stopped(stop.signum, f"step {step} of {trainer.state.max_steps} is saved in checkpoint-{step}")
    totals = trainer.totals
    history = [line for line in trainer.state.log_history if best_on in line]
    if args.do_eval and not (history and history[-1]["step"] == trainer.state.global_step):
        trainer.evaluate()
        history = [line for line in trainer.state.log_history if best_on in line]
    export = _exported(student)
    smaller = layers != job.layers
    predecessor, cost = _predecessor(args, task, tokenizer, job, datasets) if smaller else ({}, None)
    if record is None:
        return export
    last = merged(trainer.state.log_history, trainer.state.global_step)
    save("student", last)
    best_step = max(history, key=lambda line: line[best_on])["step"] if history else None
    best = merged(trainer.state.log_history, best_step)
    if best and (output_dir / "student_best" / "config.json").exists():
        # written during that evaluation, when not all of its sets were known
        write_text(output_dir / "student_best" / "README.md", card(args, task, export, how, best))
    dev_metric = f"{task.dev_sets[0]}_{task.primary}"
    majority = majority_metric(task, datasets) if args.do_eval else None
    warnings = []
    if replacing and (ended_at := replacing.last(trainer.state)) < 1:
        warnings.append(f"the student never ran alone: the probability of replacing ended at {ended_at:.3f}")
    if dskd and not dskd.choices:
        warnings.append("no directions were chosen in the whole run: lower --svd_steps")
    if trainer.compute_metrics.classes == 1:
        warnings.append("the student predicts one class alone")
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
        predecessor_evaluation=predecessor,
        majority=majority,
        layers=layers,
        parameters=sum(p.numel() for p in export.parameters()),
        steps=trainer.state.global_step,
        wall_seconds=totals["seconds"],
        throughput=totals["examples"] / max(totals["seconds"] - totals["evaluation_seconds"], 1e-9),
        throughput_unit="examples/s",
        warnings=warnings,
    )
    if args.do_eval:
        print(f"last: {in_words(last)}")
        print(f"best on {result['best_chosen_on']} (step {best_step}): {in_words(best)}")
    rows = [
        ("predecessor", predecessor.get(dev_metric), *cost) if smaller else None,
        ("majority", majority, "", "") if args.do_eval else None,
        ("student, last", last.get(dev_metric), *_cost(export, tokenizer, datasets)),
        ("student, best", best.get(dev_metric), "", "") if best else None,
    ]
    print(summary(dev_metric, [row for row in rows if row]))
    if warnings:
        print(f"warning: {'; '.join(warnings)}")
    print(next_steps(output_dir), flush=True)
    return export


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextmanager
def _whole(checkpoint: Path | None) -> Iterator[None]:
    """What a checkpoint that fits its manifest does not give the Trainer is said in one line."""
    try:
        yield
    except (KeyError, EOFError, pickle.UnpicklingError) as error:
        if checkpoint is None:
            raise
        raise UserError(f"--resume: {checkpoint} cannot be continued: {error}") from error


def _schedule(args, steps: int) -> Callable[[int], float]:
    """The replacing probability; without a slope it reaches 1 after 60% of the steps."""
    slope = args.scheduler_linear_k
    if slope is None:
        slope = (1 - args.replacing_rate) / (0.6 * steps)
    return replacing_schedule(args.scheduler_type, args.replacing_rate, slope, args.steps_for_replacing)


def _predecessor(args, task, tokenizer, job: _Job, datasets) -> tuple[dict[str, float], tuple[int, float]]:
    """(metrics, cost) of the student's teacher, which training has left as it was; all processes take part."""
    # a Theseus model has taken the layers over
    with job.student.predecessor() if isinstance(job.student, TheseusModel) else nullcontext():
        metrics = {}
        if args.do_eval:
            setup = training_arguments(args, Path(args.output_dir), report_to=[], eval_strategy="no")
            trainer = _trainer(args, task, tokenizer, job.model, datasets, setup)
            trainer.remove_callback(PrinterCallback)
            metrics = flatten(trainer.evaluate())
        return metrics, _cost(job.model, tokenizer, datasets)


@torch.no_grad()
def _cost(model, tokenizer, datasets) -> tuple[int, float]:
    """(parameters, milliseconds for one example on the device that the model is on, the median of some)."""
    device, example = next(model.parameters()).device, collator(tokenizer)([datasets["train"][0]])
    batch, seconds = {name: value.to(device) for name, value in example.items()}, []
    model.eval()
    for _ in range(6):
        start = time.perf_counter()
        float(model(**batch)["logits"].sum())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return sum(parameter.numel() for parameter in model.parameters()), 1000 * sorted(seconds)[3]


def _evaluate_only(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    metrics = flatten(trainer.evaluate())
    if setup.process_index == 0:
        if trainer.compute_metrics.classes == 1:
            print("warning: the model predicts one class alone")
        record_file = Path(args.output_dir) / "evaluation.json"
        write_json(record_file, {"model": args.model_name_or_path, "task": task.name, **metrics})
        print(f"{in_words(metrics)}\nwritten to {record_file}")


def _predict(args, task, tokenizer, model, datasets) -> None:
    setup = training_arguments(args, Path(args.output_dir), report_to=[])
    trainer = _trainer(args, task, tokenizer, model, datasets, setup)
    sets = [(task, name) for name in task.test_sets]
    sets += [(DIAGNOSTICS, name) for name in DIAGNOSTICS.test_sets if name in datasets]
    for task, name in sets:
        logits = first_output(trainer.predict(datasets[name]).predictions)
        if setup.process_index == 0:
            folder = Path(args.output_dir) / "predictions"
            print(f"written: {write_predictions(task, folder, logits, name)}")
            if args.probabilities:
                print(f"written: {write_probabilities(task, folder, logits, name)}")
