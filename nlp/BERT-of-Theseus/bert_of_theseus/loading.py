"""Data, tokenizer and model of a run, with what can be wrong about them said in one line."""

import argparse
import re

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from bert_of_theseus.data import load_diagnostics, load_task_data, random_subset, selection_split
from bert_of_theseus.modeling import SUPPORTED, encoder_layers, last_of_group
from bert_of_theseus.tasks import Task, custom_task, get_task
from common.run.errors import UserError

# what only the encoder has; heads of other tasks may be left over
_BODY = re.compile(r"(^|\.)(embeddings|encoder|transformer|layers)\.")
_LARGEST = 2_000_000_000


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
    if args.do_predict and task.name == "MNLI":
        data |= load_diagnostics(args.data_dir, args.cache_dir)
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
    where = {"cache_dir": args.cache_dir, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        _check_sizes(config)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(f"{config.model_type} is no text classifier of transformers ({SUPPORTED} are supported).")
        named = config.id2label or {}
        tokenizer = AutoTokenizer.from_pretrained(name, **where, **lower)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes one up where there is none
            raise ValueError("there is no tokenizer.")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, **where, num_labels=task.num_outputs, output_loading_info=True, ignore_mismatched_sizes=True, **labels
        )
    except Exception as error:  # damaged files fail in as many ways as there are libraries that read them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if isinstance(error, SafetensorError):
            reason = f"its weights are cut off, or the pointer of Git LFS to them ({reason})."
        elif not isinstance(error, OSError | ValueError):
            reason = f"one of its files is damaged, or not what it should be ({type(error).__name__}: {reason})."
        raise UserError(
            f"--model_name_or_path {name} cannot be loaded: {reason} Give a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that can be downloaded."
        ) from error
    if hasattr(model.base_model, "set_attention_type"):
        # BigBird's blocks are for long texts; it leaves them for good with the first short batch, and unlike in each
        # process. Full attention has the same weights
        model.base_model.set_attention_type("original_full")
        model.config.attention_type = "original_full"
    # a model of another task may name that one's, by which transformers would choose the loss
    model.config.problem_type = "regression" if task.regression else "single_label_classification"
    trains_classifier = args.finetune_predecessor or (args.do_train and args.method == "finetune")
    fresh = _fresh_classifier(args, task, model, loading, trains_classifier)
    if fresh:
        if args.label_map:
            raise UserError(f"--label_map: {name} has no classifier for {task.name} whose labels could be mapped")
    elif not task.regression:
        _fit_labels(args, task, model, [str(named[i]) for i in sorted(named)], trains_classifier)
    if args.do_lower_case and tokenizer.tokenize("Read THE Text") != tokenizer.tokenize("read the text"):
        raise UserError(f"--do_lower_case has no effect on the tokenizer of {name}, which tells cases apart")
    if makes_student(args):
        check_layers(args, len(encoder_layers(model)))
    if fresh and not trains_classifier:
        print(
            f"warning: {name} is not fine-tuned on {task.name} (its classifier is newly initialised), so there is "
            "nothing to compress yet; --finetune_predecessor trains it first",
            flush=True,
        )
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--model_name_or_path {name}: {key} has values that are not finite; the model is broken")
    return tokenizer, model.float()  # a checkpoint in half precision would otherwise be trained in it


def _check_sizes(config) -> None:
    """Sizes that a damaged config.json can claim, and that would be allocated or counted up to."""
    for key, value in config.to_dict().items():
        limit = 10_000 if key.startswith(("num_", "n_")) else 10**8
        if type(value) is int and abs(value) > limit:
            raise ValueError(f"config.json: {key} is {value:.3g}, at most {limit:,} is possible.")


def _fresh_classifier(args, task: Task, model, loading: dict, trains_classifier: bool) -> bool:
    """Whether the classifier is newly initialised; all else must have come from the file, and all of it (UserError)."""
    name, kind = args.model_name_or_path, type(model).__name__
    shapes = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in loading["mismatched_keys"]}
    if wrong := sorted(key for key in shapes if not key.startswith("classifier")):
        theirs, ours = shapes[wrong[0]]
        raise UserError(
            f"--model_name_or_path {name}: {wrong[0]} has the shape {theirs}, by its config.json it is {ours}; "
            "the two files are not of one model"
        )
    missing = set(loading["missing_keys"]) - shapes.keys()
    classifier = {key for key, _ in model.named_parameters() if key.startswith("classifier")}
    unmade = sorted(missing - classifier)
    if classifier <= missing:  # a pretrained encoder: all of its head may be new, and its pooler
        body = f"{model.base_model_prefix}."
        unmade = [key for key in unmade if key.startswith(body) and not re.search(r"(^|\.)pooler\.", key)]
    elif not shapes:
        unmade += sorted(missing & classifier)
    left = sorted(key for key in loading["unexpected_keys"] if _BODY.search(key) and not key.endswith("_ids"))
    if unmade or left:
        words = [f"it has no {_some(unmade)}"] if unmade else []
        words += [f"there is no place for {_some(left)}"] if left else []
        raise UserError(f"--model_name_or_path {name}: its weights do not fit {kind}: {'; '.join(words)}")
    if shapes and not trains_classifier:
        raise UserError(
            f"--model_name_or_path {name}: its classifier does not have the {task.num_outputs} output(s) of "
            f"{task.name}; give a model fine-tuned on that task, or a pretrained one, or train its classifier anew "
            "with --finetune_predecessor or --method finetune"
        )
    if shapes:
        print(
            f"note: the classifier of {name} is of another size; {', '.join(sorted(shapes))} are initialised anew, "
            f"with {task.num_outputs} output(s), and trained",
            flush=True,
        )
    return bool(shapes) or bool(classifier & missing)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _fit_labels(args, task: Task, model, named: list[str], trains_classifier: bool) -> None:
    """See that the model's outputs are the data's classes, in their order, by the names of both.

    With --label_map the classifier is put into the order of the data.

    Raises:
        UserError: the names contradict each other, or the map.
    """
    name = args.model_name_or_path
    if args.label_map:
        _permute_classifier(model, [named.index(each) for each in _mapped(args.label_map, task, named)])
        return
    ours = [label.lower() for label in named]
    if trains_classifier and sorted(ours) != sorted(label.lower() for label in task.labels):
        return
    if all(re.fullmatch(r"label_\d+", label) for label in ours):  # transformers' own, that say nothing
        return
    known = [[label.lower() for label in labels] for labels in (task.labels, task.words) if labels]
    if ours in known:
        return
    for expected in known:
        if sorted(ours) == sorted(expected):
            raise UserError(
                f"--model_name_or_path {name} has its labels in the order {', '.join(ours)}, {task.name} in the order "
                f"{', '.join(expected)}; reorder its classifier by --label_map with the model's names in the data's "
                "order, or give a model fine-tuned by this script"
            )
    raise UserError(
        f"--model_name_or_path {name} calls its classes {', '.join(named)}, the data {', '.join(task.labels)}; say "
        "which is which: --label_map and the model's names in the data's order, or DATA=MODEL pairs"
    )


def _mapped(words: list[str], task: Task, named: list[str]) -> list[str]:
    """The model's names in the order of the data's labels, from either form of --label_map."""
    both = f"the data has {', '.join(task.labels)}, the model {', '.join(named)}"
    if all("=" in word for word in words) and not set(words) <= set(named):
        pairs = dict(word.split("=", 1) for word in words)
        if sorted(pairs) != sorted(task.labels):
            raise UserError(f"--label_map {' '.join(words)} does not name every label of the data once: {both}")
        words = [pairs[label] for label in task.labels]
    if sorted(words) != sorted(named):
        raise UserError(f"--label_map {' '.join(words)} does not name every label of the model once: {both}")
    return list(words)


def _permute_classifier(model, order: list[int]) -> None:
    """Output i becomes the one that was at `order[i]`."""
    last = [module for module in model.classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.copy_(last.weight[order].clone())
        if last.bias is not None:
            last.bias.copy_(last.bias[order].clone())


def check_inputs(args: argparse.Namespace, tokenizer, model, datasets: dict) -> None:
    """Try one batch of every set, before an earlier run is replaced (UserError); leaves random states as they are."""
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model_name_or_path {args.model_name_or_path}: its tokenizer has no pad token for batches")
    vocabulary = model.get_input_embeddings().num_embeddings
    for name, dataset in datasets.items():
        largest = max(dataset.largest_id, tokenizer.pad_token_id)
        if largest >= vocabulary:
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: its tokenizer makes the token {largest} of the "
                f"{name} set, its vocabulary has {vocabulary}; the two are not of one model"
            )
        longest = int(dataset.lengths.argmax())
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                was, outputs = model.training, model.eval()(**_batch(tokenizer, [dataset[longest], dataset[0]]))
                model.train(was)
        except Exception as error:
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path} does not take a batch of the {name} set: "
                f"{type(error).__name__}: {error}"
            ) from error
        logits = outputs["logits"]
        if not (logits.square() if logits.shape[-1] == 1 else logits).isfinite().all():  # regression squares them
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: its outputs on the {name} set are not finite, or too "
                "large for a squared error; the model is broken"
            )


def _batch(tokenizer, examples: list[dict]) -> dict:
    return DataCollatorWithPadding(tokenizer)(examples)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that libraries answer with a traceback or by hanging (UserError)."""
    for name, value in vars(args).items():
        if name != "seed" and type(value) is int and value > _LARGEST:
            raise UserError(f"--{name} {value:.3g} is too large; at most {_LARGEST:,} is possible")


def check_length(args: argparse.Namespace, data: dict) -> None:
    """Refuse epochs of more steps than a run can end with (UserError)."""
    if not args.do_train:
        return
    batches = len(data["train"]) / args.per_gpu_train_batch_size / args.gradient_accumulation_steps
    for name in ("num_train_epochs", "predecessor_num_train_epochs"):
        if (steps := batches * getattr(args, name)) > _LARGEST:
            raise UserError(
                f"--{name} {getattr(args, name):g} are {steps:.3g} optimizer steps; at most {_LARGEST:,} are possible"
            )


def makes_student(args: argparse.Namespace) -> bool:
    """Whether the run makes a student of the model's layers, rather than train or use it as it is."""
    return args.do_train and (args.method != "finetune" or bool(args.num_successor_layers))


def check_layers(args: argparse.Namespace, layers: int) -> None:
    """Refuse a number of student layers that the method cannot make, or with which it is another one (UserError)."""
    count = args.num_successor_layers
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
    # RoBERTa counts positions from the one after its padding's
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    positions -= 0 if padding is None else padding + 1
    if args.max_seq_length > positions:
        raise UserError(f"--max_seq_length {args.max_seq_length}: the model takes {positions} tokens at most")
    return args.max_seq_length
