"""Data, tokenizer and model of a run, with what can be wrong about them said in one line."""

import argparse

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from bert_of_theseus.data import load_task_data, random_subset, selection_split
from bert_of_theseus.modeling import encoder_layers, last_of_group
from bert_of_theseus.tasks import Task, custom_task, get_task
from common.run.errors import UserError


def load_data(args: argparse.Namespace) -> tuple[dict, Task]:
    """(set name -> examples, the task with its labels) of what the command line asks for."""
    custom = args.task_name.lower() == "custom"
    task = custom_task(args.text_columns, args.label_column, args.regression) if custom else get_task(args.task_name)
    sets = []
    sets += ["train"] if args.do_train else []
    sets += task.dev_sets if args.do_eval else []
    sets += task.test_sets if args.do_predict else []
    files = {"train_file": args.train_file, "dev_file": args.dev_file, "test_file": args.test_file} if custom else {}
    data = load_task_data(task, args.data_dir, sets=sets, cache_dir=args.cache_dir, **files)
    task = next(iter(data.values())).task
    if args.selection_split:
        data["train"], data["selection"] = selection_split(data["train"], args.selection_split, args.seed)
    if args.max_train_samples:
        data["train"] = random_subset(data["train"], args.max_train_samples, args.seed)
    return data, task


def load_model(args: argparse.Namespace, task: Task):
    """Tokenizer and model from a folder or the hub."""
    name = args.model_name_or_path
    lower = {"do_lower_case": True} if args.do_lower_case else {}
    labels = {} if task.regression else {"id2label": dict(enumerate(task.labels))}
    if labels:
        labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
    try:
        named = AutoConfig.from_pretrained(name, cache_dir=args.cache_dir).id2label or {}
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=args.cache_dir, **lower)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes one up where there is none
            raise ValueError("there is no tokenizer.")
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
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, SafetensorError):
            reason = f"its weights are cut off, or the pointer of Git LFS to them ({reason})."
        raise UserError(
            f"--model_name_or_path {name} cannot be loaded: {reason} Give a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that can be downloaded."
        ) from error
    # a model of another task may name that one's, by which transformers would choose the loss
    model.config.problem_type = "regression" if task.regression else "single_label_classification"
    order = [str(named[i]).lower() for i in sorted(named)]
    expected = [label.lower() for label in task.labels]
    if order != expected and sorted(order) == sorted(expected):
        raise UserError(
            f"--model_name_or_path {name} has its labels in the order {', '.join(order)}, {task.name} in the order "
            f"{', '.join(expected)}; reorder its classifier, or give a model fine-tuned by this script"
        )
    if args.do_lower_case and tokenizer.tokenize("Read THE Text") != tokenizer.tokenize("read the text"):
        raise UserError(f"--do_lower_case has no effect on the tokenizer of {name}, which tells cases apart")
    check_layers(args, len(encoder_layers(model)))
    fresh = [key for key in loading["missing_keys"] if key.startswith("classifier")]
    trains_classifier = args.finetune_predecessor or (args.do_train and args.method == "finetune")
    if fresh and not trains_classifier:
        print(
            f"warning: {name} is not fine-tuned on {task.name} (its classifier is newly initialised), so there is "
            "nothing to compress yet; --finetune_predecessor trains it first",
            flush=True,
        )
    return tokenizer, model.float()  # a checkpoint in half precision would otherwise be trained in it


def check_layers(args: argparse.Namespace, layers: int) -> None:
    """Refuse a number of student layers that the method cannot make, or with which it is another one (UserError)."""
    count = args.num_successor_layers
    if not args.do_train or (args.method == "finetune" and not count):
        return
    if args.method != "finetune" or args.if_svd or args.start == "paired":
        try:
            last_of_group(layers, count or default_successor_layers(layers))
        except UserError as error:
            raise UserError(f"--num_successor_layers: {error}") from None
    elif count > layers:
        raise UserError(f"--num_successor_layers {count}: the model has {layers} layers")
    if args.method == "pkd" and (count or default_successor_layers(layers)) == 1:
        raise UserError("--method pkd with one student layer has no hidden states to compare; it would be --method kd")


def default_successor_layers(layers: int) -> int:
    """The default number of student layers."""
    return max(layers // 2, 1)


def max_length(args: argparse.Namespace, model) -> int:
    """`--max_seq_length`, if the model takes so many tokens (UserError otherwise)."""
    positions = getattr(model.config, "max_position_embeddings", args.max_seq_length)
    if args.max_seq_length > positions:
        raise UserError(f"--max_seq_length {args.max_seq_length}: the model takes {positions} tokens at most")
    return args.max_seq_length
