"""DSKD's settings as both programs take them, each told once. Imports no torch, so that --help is quick.

`SETTINGS` is the one table: the flags of the GLUE program, the keys DSKD.* of the vision program, the checks of both,
the labels of reports and the table in docs/method.md come from it. `common/svd_loss.py` makes the loss of the values.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.run.errors import UserError
from common.run.numbers import Number

_CHOOSING = ("own", "update", "spectrum")  # bases that choose directions
_ALL = (*_CHOOSING, "curvature")


@dataclass(frozen=True)
class Setting:
    """One setting of the DSKD loss.

    Attributes:
        name: in the code.
        flag, key: of the GLUE program, and of the vision program's block DSKD.
        glue, cifar: the two defaults.
        valid: the words to choose from, or the range of a number.
        help: what it is.
        why: of defaults that differ, or that are not the library's.
        part: whose argument of that name it is: the "reading"'s, the "loss"'s; "" where it decides what is made.
        bases: the bases that have it; with the others it has no effect.
        quiet: whether a YAML file may set it where it has no effect.
        unset: the vision program's word for None.
    """

    name: str
    flag: str
    key: str
    glue: Any
    cifar: Any
    valid: tuple[str, ...] | Number
    help: str
    why: str = ""
    part: str = ""
    bases: tuple[str, ...] = _ALL
    quiet: bool = False
    unset: Any = None

    @property
    def dest(self) -> str:
        """The attribute of the GLUE program's arguments."""
        return self.flag.removeprefix("--")

    def allows(self, value: Any) -> bool:
        if self.unset is not None and value == self.unset:
            return True
        return value in self.valid if isinstance(self.valid, tuple) else self.valid.holds(value)

    @property
    def expected(self) -> str:
        words = _or(self.valid) if isinstance(self.valid, tuple) else str(self.valid)
        return words if self.unset is None else f"{self.unset:g} (none) or {words}"


HELD_STEPS = 10  # the default of GLUE, where it is no more than SVD_STEPS

SETTINGS = (
    Setting(
        "weight", "--lambda_size", "LAMBDA", 0.1, 0.2, Number(float, 0), "weight of the DSKD loss", "the release's"
    ),
    Setting(
        *("rank", "--rank_size", "RANK", 32, 0, Number(int, 0)),
        "directions per matrix (0: all)",
        "the release's: 32 of a BERT matrix's 768, all of a convolution's 16 to 64",
        part="reading",
        bases=_CHOOSING,
    ),
    Setting(
        *("svd_steps", "--svd_steps", "SVD_STEPS", 100, 100, Number(int, 1)),
        "optimizer steps between choices of directions",
        "the release's",
        part="loss",
    ),
    Setting(
        *("grad_steps", "--grad_steps", "GRAD_STEPS", None, 1, Number(int, 1)),
        "optimizer steps for which a gradient of the DSKD loss is held (1, with a drift and a smoothing of 0: exact "
        f"in every step; GLUE's default: {HELD_STEPS}, or SVD_STEPS where that is less)",
        "exact on CIFAR; on GLUE a decomposition of BERT's matrices costs too much for every step, and the learning "
        "rate is small enough to hold a gradient for some steps (docs/performance.md)",
        part="loss",
    ),
    Setting(
        *("drift", "--drift", "DRIFT", 0.0, 0.0, Number(float, 0)),
        "after GRAD_STEPS steps, fewer than SVD_STEPS, hold the gradient on while no matrix has moved by more than "
        "this share of its norm (0: never)",
        part="loss",
    ),
    Setting(
        *("smoothing", "--smoothing", "SMOOTHING", 0.0, 0.0, Number(float, 0)),
        "of the gradient between close singular values (docs/method.md; 0: exact)",
        part="reading",
        bases=("own",),
    ),
    Setting(
        *("basis", "--basis", "BASIS", "own", "own", _ALL),
        "what is compared: own, each network along its own singular directions (the paper's); update, both along those "
        "of the update; spectrum, singular values alone, for pairs of unequal shape; curvature, our anchor, the whole "
        "distance, weighted by mean products of gradients, which has no rank, driver, alpha, span, smoothing",
    ),
    Setting(
        *("driver", "--svd_driver", "DRIVER", "randomized", "gram", ("gram", "svd", "randomized")),
        "decomposition: gram, eigenvectors of W^T W; svd; randomized, of the updates, all else as gram",
        "randomized pays for matrices that are large beside the rank",
        part="reading",
        bases=_CHOOSING,
        quiet=True,
    ),
    Setting(
        *("control", "--direction", "DIRECTION", "sensitive", "sensitive"),
        ("sensitive", "plain", "random", "shuffled", "shrink", "released", "ewc"),
        "sensitive is DSKD; the others are controls: plain (W_s - W_t) and random have a gradient of the same norm; "
        "ewc, with basis curvature, has the diagonal of the Fisher matrix in place of its factors; "
        "shuffled is DSKD towards the teacher's matrices with rows and columns shuffled, shrink towards zeros, without "
        "a teacher; released has the truncated gradient of the authors' release",
    ),
    Setting(
        *("alpha", "--alpha", "ALPHA", None, -1.0, Number(float, 0, 1)),
        "blend of gradient (0) and curvature (1) in the score of a direction, the same in all steps (by default the "
        "progress, from 0 to 1)",
        bases=_CHOOSING,
        unset=-1.0,
    ),
    Setting(
        *("score", "--score", "SCORE", "sensitivity", "sensitivity"),
        ("sensitivity", "tempered", "magnitude", "random"),
        "what directions are chosen by: sensitivity; tempered, with the root of its curvature; magnitude, their "
        "singular value; random, the sensitivities dealt out at random",
    ),
    Setting(
        *("span", "--span", "SPAN", "step", "step", ("step", "interval")),
        "the update that is decomposed: of one step, or of the interval since the last choice of directions",
        part="reading",
        bases=_CHOOSING,
    ),
    Setting(
        *("memory", "--memory", "MEMORY", 0.95, 0.95, Number(float, 0, 0.9999)),
        "share of curvature's mean products that stays when a gradient is added; 0.95 to the power of SVD_STEPS "
        "remembers as many steps whatever SVD_STEPS is",
        part="reading",
        bases=("curvature",),
    ),
    Setting(
        *("factors", "--factors", "FACTORS", "full", "full", ("full", "diagonal")),
        "full, both mean products of curvature, m^2 + n^2 numbers for m x n weights; diagonal, of the larger one the "
        "diagonal alone",
        part="reading",
        bases=("curvature",),
    ),
)


class Conflict(NamedTuple):
    """A setting that cannot be as it is, because of another one."""

    name: str
    because: tuple[str, str]  # the other setting and its value, or the value that it would need
    only: tuple[str, ...] = ()  # values that are possible; none: the setting has no effect at all
    needs: bool = False  # whether `because` is what is missing


def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
    """Of values by name, all settings that cannot be combined with others, whatever they are set to."""
    basis, control, score = values["basis"], values["control"], values["score"]
    if score == "magnitude":
        yield Conflict("alpha", ("score", score))
    for setting in SETTINGS:
        if basis not in setting.bases:
            yield Conflict(setting.name, ("basis", basis))
    if basis == "curvature" and score not in ("sensitivity", "random"):
        yield Conflict("score", ("basis", basis), ("sensitivity", "random"))
    if basis == "spectrum" and control == "plain":  # whose difference W_s - W_t asks for equal shapes
        yield Conflict("control", ("basis", basis), ("sensitive", "random", "shuffled", "shrink"))
    if control == "released":
        yield Conflict("smoothing", ("control", control))
        if basis != "own":
            yield Conflict("control", ("basis", "own"), needs=True)
    if control == "ewc":
        if basis != "curvature":
            yield Conflict("control", ("basis", "curvature"), needs=True)
        elif score != "sensitivity":
            yield Conflict("score", ("control", control), ("sensitivity",))
        yield Conflict("factors", ("control", control))


def by_name(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings by name, from the flags' names or the keys of either program; defaults are the record's own."""
    found = {}
    for setting in SETTINGS:
        for key in (setting.dest, setting.key):
            if key in record:
                value = record[key]
                found[setting.name] = None if setting.unset is not None and value == setting.unset else value
    return found


def label(values: Mapping[str, Any]) -> str:
    """What a run's DSKD is, in a word or two: its basis, and its control."""
    control = values.get("control", "sensitive")
    return " ".join([str(values.get("basis", "own")), *([] if control == "sensitive" else [str(control)])])


# The GLUE program
def add_flags(group: argparse._ArgumentGroup) -> None:
    for setting in SETTINGS:
        kind = {"choices": setting.valid} if isinstance(setting.valid, tuple) else {"type": setting.valid}
        group.add_argument(setting.flag, default=setting.glue, help=setting.help, **kind)


def of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The values by name."""
    return {setting.name: getattr(args, setting.dest) for setting in SETTINGS}


def check_flags(args: argparse.Namespace, given: Mapping[str, str | None]) -> None:
    """Refuse flags that cannot be combined.

    given: attribute -> the flag as the user wrote it, or None.

    Raises:
        UserError: a flag that contradicts another one, or would have no effect.
    """
    settings = {setting.name: setting for setting in SETTINGS}
    for name, (other, value), only, needs in conflicts(of_arguments(args)):
        flag, because = given[settings[name].dest], f"{settings[other].flag} {value}"
        if needs:
            raise UserError(f"{settings[name].flag} {getattr(args, settings[name].dest)} needs {because}")
        if only and getattr(args, settings[name].dest) not in only:
            raise UserError(f"{settings[name].flag} {getattr(args, settings[name].dest)} has no meaning with {because}")
        if flag and not only:
            raise UserError(f"{flag} has no effect with {because}")


def resolve_flags(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags.

    Raises:
        UserError: a drift without effect.
    """
    if args.basis == "curvature":  # all directions, without a decomposition
        args.rank_size = 0
    args.grad_steps = args.grad_steps or min(HELD_STEPS, args.svd_steps)
    if args.drift > 0 and args.grad_steps >= args.svd_steps:
        raise UserError(
            f"--drift has no effect unless --grad_steps is less than --svd_steps ({args.svd_steps}): directions are "
            "chosen anew before a gradient could be held on"
        )


# The vision program
def of_keys(block: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name, of the block DSKD."""
    return by_name({setting.key: block[setting.key] for setting in SETTINGS})


def key_checks(block: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """(key, whether its value is valid, what would be) of the block DSKD: each by itself, then with the others."""
    for setting in SETTINGS:
        yield f"DSKD.{setting.key}", setting.allows(block[setting.key]), setting.expected
    order = {setting.name: place for place, setting in enumerate(SETTINGS)}
    settings = {setting.name: setting for setting in SETTINGS}
    for name, (other, value), only, needs in sorted(conflicts(of_keys(block)), key=lambda each: order[each.name]):
        setting, because = settings[name], f"DSKD.{settings[other].key} {value}"
        if needs:
            yield f"DSKD.{setting.key}", False, f"another one, or {because}"
        elif not setting.quiet:
            only = only or (setting.cifar,)
            yield f"DSKD.{setting.key}", block[setting.key] in only, f"{_or(only)} with {because}"


def settings_table() -> str:
    """All settings in Markdown, for docs/method.md."""
    head = "| flag | key `DSKD.` | GLUE | CIFAR | what it is |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(
        f"| `{s.flag}` | `{s.key}` | {_shown(s.glue, s)} | {_shown(s.cifar, s)} | {_sentence(s)} |\n" for s in SETTINGS
    )


def _sentence(setting: Setting) -> str:
    text = setting.help[0].upper() + setting.help[1:] + "."
    return text + (f" Defaults: {setting.why}." if setting.why else "")


def _shown(value: Any, setting: Setting) -> str:
    return "" if value is None or value == setting.unset else f"{value}"


def _or(words: tuple[Any, ...]) -> str:
    *others, last = map(str, words)
    return f"{', '.join(others)} or {last}" if others else last
