"""The command line: every flag, grouped and explained; wrong or contradictory ones are refused. Imports no torch."""

import argparse
from collections.abc import Sequence

from bert_of_theseus.tasks import get_task
from common.run.errors import Parser, UserError
from common.run.numbers import Number
from common.settings import SETTINGS, add_flags, check_flags, resolve_flags

_ONLY_WITH_THESEUS = ("replacing_rate", "scheduler_type", "scheduler_linear_k", "steps_for_replacing")
_ONLY_WITH_KD = ("kd_alpha", "kd_temperature")
_ONLY_WITH_PREDECESSOR = ("predecessor_num_train_epochs", "predecessor_learning_rate")
_ONLY_WITH_CUSTOM = ("train_file", "dev_file", "test_file", "text_columns", "label_column", "regression")
_TRAINING_GROUPS = ("method", "DSKD", "training", "evaluation, checkpoints and logs")
_ALSO_WITHOUT_TRAINING = ("per_gpu_eval_batch_size", "seed", "fp16", "bf16", "disable_tqdm")


class _Formatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        spoken_of = not any(action.default is silent for silent in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if spoken_of else action.help


def build_parser() -> argparse.ArgumentParser:
    """The parser of `run_glue_SVD_losslayer.py`."""
    parser = Parser(
        description="Compress a BERT on a GLUE task by replacing groups of its layers (BERT-of-Theseus), with or "
        "without DSKD, the Direction Sensitivity-based Knowledge Distillation loss.",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )

    what = parser.add_argument_group("what to do (at least one)")
    what.add_argument("--do_train", action="store_true", help="train, and save the result in OUTPUT_DIR/student")
    what.add_argument("--do_eval", action="store_true", help="report the metrics of the dev set(s)")
    what.add_argument("--do_predict", action="store_true", help="write the test set(s) in the GLUE server's format")
    what.add_argument("--probabilities", action="store_true", help="with --do_predict: every class's, in another file")

    io = parser.add_argument_group("model, task and folders")
    io.add_argument("--model_name_or_path", required=True, metavar="M", help="the predecessor: folder or hub name")
    io.add_argument("--task_name", required=True, help="CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI or custom")
    io.add_argument("--data_dir", help="folder with the task's original TSV files; without it, the hub's copy is read")
    io.add_argument("--output_dir", required=True, help="where results, checkpoints and the student go")
    io.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier run in OUTPUT_DIR")
    io.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR from its last checkpoint")
    io.add_argument(
        "--label_map",
        nargs="+",
        metavar="LABEL",
        help="what the model calls the labels of the data: its names in the order of the data's, or DATA=MODEL pairs",
    )
    io.add_argument("--cache_dir", help="where downloads from the hub are kept")

    custom = parser.add_argument_group("data of your own (--task_name custom)")
    custom.add_argument("--train_file", help="TSV, CSV or JSONL file with a header; its labels become the classes")
    custom.add_argument("--dev_file", help="file to evaluate on")
    custom.add_argument("--test_file", help="file to predict")
    custom.add_argument("--text_columns", nargs="+", metavar="COLUMN", help="one column of text, or two for pairs")
    custom.add_argument("--label_column", help="column with the class or, with --regression, the score")
    custom.add_argument("--regression", action="store_true", help="labels are numbers to predict")

    text = parser.add_argument_group("text")
    text.add_argument("--do_lower_case", action="store_true", help="lower-case all text (default: as the model's own)")
    text.add_argument("--max_seq_length", type=Number(int, 3), default=128, help="tokens per example at most")
    text.add_argument(
        "--pad_to_max_length",
        action="store_true",
        help="pad every example to MAX_SEQ_LENGTH and shuffle freely, as the original recipe does, instead of batches "
        "of similar length padded to their longest",
    )

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=("theseus", "finetune", "kd", "pkd"),
        default="theseus",
        help="theseus: module replacing; finetune: the model itself, or some of its layers; kd, pkd: some of its "
        "layers with the model's logits, and for pkd its hidden states, as targets",
    )
    method.add_argument(
        "--num_successor_layers",
        type=Number(int, 1),
        help="layers of the student (default: half of the model's; all of them for finetune)",
    )
    method.add_argument(
        "--start",
        choices=("first", "paired"),
        default="first",
        help="which of the model's layers the student's start as: first, its first ones; paired, the last ones of the "
        "groups that a layer of the student stands for, with which DSKD pairs them",
    )
    method.add_argument(
        "--replacing_rate", type=_probability, default=0.3, help="probability of replacing at the start"
    )
    method.add_argument("--scheduler_type", choices=("constant", "linear"), default="linear", help="its schedule")
    method.add_argument(
        "--scheduler_linear_k",
        type=Number(float, 0),
        help="its growth per step (default: the probability reaches 1 after 60%% of the training)",
    )
    method.add_argument(
        "--steps_for_replacing",
        type=Number(int, 0),
        default=0,
        help="with --scheduler_type constant: steps after which all modules are replaced (0: never)",
    )
    method.add_argument("--kd_alpha", type=_probability, default=0.5, help="kd, pkd: weight of the logits, 1 - task's")
    method.add_argument("--kd_temperature", type=_positive, default=10.0, help="kd, pkd: temperature of the softmaxes")
    method.add_argument("--pkd_beta", type=_positive, default=100.0, help="pkd: weight of the hidden states")
    method.add_argument(
        "--finetune_predecessor", action="store_true", help="first train the model itself on the task (all layers)"
    )
    method.add_argument("--predecessor_num_train_epochs", type=_positive, default=3.0, help="epochs of that")
    method.add_argument("--predecessor_learning_rate", type=_positive, default=2e-5, help="learning rate of that")

    dskd = parser.add_argument_group("DSKD")
    dskd.add_argument(
        "--if_svd",
        "--ifsvd",
        nargs="?",
        const=True,
        default=False,
        type=_boolean,
        metavar="true|false",
        help="add the DSKD loss (bare, or with true or false)",
    )
    add_flags(dskd)

    train = parser.add_argument_group("training")
    train.add_argument("--learning_rate", type=_positive, default=5e-5, help="peak learning rate of AdamW")
    train.add_argument("--num_train_epochs", type=_positive, default=3.0, help="passes over the training set")
    train.add_argument("--max_steps", type=Number(int, 1), help="stop after so many optimizer steps instead")
    train.add_argument("--max_train_samples", type=Number(int, 1), help="train on so many examples only, drawn by SEED")
    train.add_argument("--per_gpu_train_batch_size", type=Number(int, 1), default=32, help="examples per device")
    train.add_argument("--per_gpu_eval_batch_size", type=Number(int, 1), default=32, help="examples per device")
    train.add_argument(
        "--gradient_accumulation_steps", type=Number(int, 1), default=1, help="batches per optimizer step"
    )
    train.add_argument(
        "--class_weights",
        choices=("balanced",),
        help="balanced: the loss of a class weighs as N / (classes * its examples), for skewed training sets",
    )
    train.add_argument("--weight_decay", type=Number(float, 0), default=0.0, help="AdamW's, not on biases and norms")
    train.add_argument("--adam_epsilon", type=_positive, default=1e-8, help="AdamW's epsilon")
    train.add_argument("--max_grad_norm", type=Number(float, 0), default=1.0, help="clipping (0: none)")
    train.add_argument("--warmup_steps", type=Number(int, 0), default=0, help="steps of linear warm-up")
    train.add_argument("--seed", type=_seed, default=42, help="seed of everything random")
    train.add_argument("--fp16", action="store_true", help="float16 mixed precision with loss scaling (needs a GPU)")
    train.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    train.add_argument("--torch_compile", action="store_true", help="compile the encoder layers")

    report = parser.add_argument_group("evaluation, checkpoints and logs")
    report.add_argument("--evaluate_during_training", action="store_true", help="evaluate every EVAL_STEPS steps, too")
    report.add_argument("--eval_steps", type=Number(int, 1), help="default: SAVE_STEPS")
    report.add_argument("--save_steps", type=Number(int, 1), default=500, help="steps between checkpoints")
    report.add_argument("--save_total_limit", type=Number(int, 1), default=2, help="checkpoints to keep")
    report.add_argument("--logging_steps", type=Number(int, 1), default=10, help="steps between log lines")
    report.add_argument(
        "--selection_split",
        type=_fraction,
        metavar="FRACTION",
        help="carve this share from the training set to choose the best checkpoint on, instead of the dev set",
    )
    report.add_argument(
        "--patience",
        type=Number(int, 1),
        metavar="N",
        help="stop after N evaluations without a better one (on the selection split, if there is one)",
    )
    report.add_argument("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="log sink")
    report.add_argument("--disable_tqdm", action="store_true", help="no progress bars")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check a command line.

    Raises:
        UserError: an unknown flag or task, a value out of range, flags that contradict each other or would have no
            effect.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    words = {word.split("=", 1)[0] for word in argv}
    given = {action.dest: next(iter(words & set(action.option_strings)), None) for action in parser._actions}

    def refuse(names: Sequence[str], reason: str) -> None:
        for name in names:
            if given[name]:
                raise UserError(f"{given[name]} {reason}")

    if not args.output_dir.strip():
        raise UserError("--output_dir is empty; give a folder, . for the present one")
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
    is_custom = args.task_name.lower() == "custom"
    is_regression = args.regression if is_custom else get_task(args.task_name).regression
    if is_custom:
        refuse(("data_dir",), "is for GLUE tasks; --task_name custom takes --train_file, --dev_file and --test_file")
        missing = [name for name in ("text_columns", "label_column") if not given[name]]
        missing += ["train_file"] if args.do_train and not args.train_file else []
        missing += ["dev_file"] if args.do_eval and not args.dev_file else []
        missing += ["test_file"] if args.do_predict and not args.test_file else []
        if missing:
            raise UserError(f"--task_name custom needs --{missing[0]}")
    else:
        refuse(_ONLY_WITH_CUSTOM, "needs --task_name custom")
    if not args.do_train:
        groups = [group for group in parser._action_groups if group.title in _TRAINING_GROUPS]
        names = [action.dest for group in groups for action in group._group_actions]
        names = [name for name in names if name not in _ALSO_WITHOUT_TRAINING]
        refuse(("resume", "overwrite_output_dir", *names), "needs --do_train")
    if not args.do_eval:
        refuse(("dev_file",), "needs --do_eval")
    if not args.do_predict:
        refuse(("test_file", "probabilities"), "needs --do_predict")
    if not (args.do_eval or args.do_predict):
        refuse(("per_gpu_eval_batch_size",), "needs --do_eval or --do_predict")
    if not args.if_svd:
        refuse([setting.dest for setting in SETTINGS], "needs --ifsvd")
    check_flags(args, given)
    if args.method != "theseus":
        refuse(_ONLY_WITH_THESEUS, f"has no effect with --method {args.method}")
    if args.method not in ("kd", "pkd"):
        refuse(_ONLY_WITH_KD, f"has no effect with --method {args.method}")
    if args.method != "pkd":
        refuse(("pkd_beta",), f"has no effect with --method {args.method}")
    if is_regression:
        refuse(("kd_temperature",), "has no effect on a regression, whose targets have no softmax")
        refuse(("label_map", "class_weights", "probabilities"), "has no effect on a regression, which has no classes")
    if args.method == "finetune" and args.if_svd and not args.num_successor_layers:
        raise UserError(
            "--ifsvd with --method finetune needs --num_successor_layers: a student smaller than its teacher"
        )
    if args.method == "finetune" and not args.num_successor_layers:
        refuse(("start",), "needs --num_successor_layers: without it --method finetune trains all layers")
    if not args.finetune_predecessor:
        refuse(_ONLY_WITH_PREDECESSOR, "needs --finetune_predecessor")
    if args.scheduler_type == "constant":
        refuse(("scheduler_linear_k",), "needs --scheduler_type linear")
    else:
        refuse(("steps_for_replacing",), "needs --scheduler_type constant")
    if args.max_steps and given["num_train_epochs"]:
        raise UserError("give --num_train_epochs or --max_steps, not both")
    if args.fp16 and args.bf16:
        raise UserError("give --fp16 or --bf16, not both")
    if args.resume and args.overwrite_output_dir:
        raise UserError("--resume continues the run that --overwrite_output_dir would replace; give one of them")
    if not args.evaluate_during_training:
        refuse(("eval_steps",), "needs --evaluate_during_training")
        refuse(("selection_split",), "needs --evaluate_during_training: without it there is one model to choose from")
        refuse(("patience",), "needs --evaluate_during_training")
    if args.evaluate_during_training and not args.do_eval:
        raise UserError("--evaluate_during_training needs --do_eval")
    args.eval_steps = args.eval_steps or args.save_steps
    resolve_flags(args)
    return args


def _seed(text: str) -> int:
    value = Number(int, 0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed below 2^32")
    return value


def _number_between(lowest: float, highest: float, *, with_highest: bool, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not lowest < value or not (value <= highest if with_highest else value < highest):
        bounds = f"above {lowest:g} and {'up to' if with_highest else 'below'} {highest:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
    return value


def _positive(text: str) -> float:
    return _number_between(0, float("inf"), with_highest=False, text=text)


def _probability(text: str) -> float:
    return _number_between(0, 1, with_highest=True, text=text)


def _fraction(text: str) -> float:
    return _number_between(0, 1, with_highest=False, text=text)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]
