"""The whole story in 4 minutes on two CPU cores: few images from a teacher, then the recipes on images and text.

python scripts/demo.py                                     nothing but a package registry needed
python scripts/demo.py --full                              more text, longer trainings, two more baselines
python scripts/demo.py --task RTE --data_dir glue/RTE      the text part on a GLUE task of your own copy
"""

import argparse
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _paths  # noqa: F401

from common import ROOT
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable
from common.torchvision_repair import repair_torchvision
from scripts.lib.demo.materials import fetch_encoder, fetch_text
from scripts.lib.demo.report import Part, plot, write_part
from scripts.lib.demo.runs import Run, launch, shown, stop_all

TEXT_SCRIPT = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
IMAGE_SCRIPT = ROOT / "cv" / "train_svd.py"
AT_ONCE = 2  # runs side by side, a thread each
FEW_SEEDS, SEEDS = (1, 2, 3, 4), (1, 2, 3)
FEW = {  # name -> what it is, words after --cfg
    "few_kd": ("KD", ("configs/demo/few.yaml",)),
    "few_dskd": ("KD + anchor (curvature)", ("configs/demo/few_dskd.yaml",)),
    "few_l2": ("KD + L2 towards the teacher", ("configs/demo/few_dskd.yaml", "DSKD.DIRECTION", "plain")),
    "few_maps": ("PRACTISE", ("configs/demo/few.yaml", "DISTILLER.TYPE", "practise", "PRACTISE.MAP_WEIGHT", 10)),
}
IMAGES = {
    "kd": ("KD", ("configs/demo/kd.yaml",)),
    "kd_dskd": ("KD + DSKD (own)", ("configs/demo/kd_dskd.yaml",)),
}
ALONE = {"vanilla": ("no teacher", ("configs/demo/vanilla.yaml",))}
TEXT = {  # name -> what it is, flags
    "theseus": ("Theseus", ()),
    "theseus_dskd": ("Theseus + DSKD (own)", ("--ifsvd", "--svd_steps", 25)),
}
FIRST_LAYERS = {"control": ("first 3 layers", ("--method", "finetune", "--num_successor_layers", 3))}
SENTENCES = {False: 1000, True: 2500}  # with --full: True
TEACHER_EPOCHS = {False: (12, "[8, 11]"), True: (40, "[25, 35]")}
STUDENT_EPOCHS = {False: 2, True: 3}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="default: outputs/demo")
    parser.add_argument("--full", action="store_true", help="longer trainings and more baselines")
    parser.add_argument("--task", help="a GLUE task for the text part, instead of rated movie-review sentences")
    parser.add_argument("--data_dir", type=Path, help="folder with the TSV files of that task")
    parser.add_argument("--model", help="another pretrained encoder of 6 layers: folder or hub name")
    args = parser.parse_args()
    if (args.task is None) != (args.data_dir is None):
        raise UserError("--task and --data_dir go together")
    check_writable("--output_dir", args.output_dir)
    # the two scripts run in the repository's root
    args.output_dir = args.output_dir.resolve()
    args.data_dir = args.data_dir and args.data_dir.resolve()
    args.model = str(Path(args.model).resolve()) if args.model and Path(args.model).exists() else args.model
    repair_torchvision()
    start = time.perf_counter()
    downloads = args.output_dir / "downloads"
    encoder = args.model or fetch_encoder(downloads)
    data, texts = text_data(args, downloads)

    images = [image_run(args, "teacher", ("configs/demo/teacher.yaml",), 1)]
    sentences = [text_run(args, "predecessor", encoder, data, ("--method", "finetune"), 1)]
    kinds = IMAGES | (ALONE if args.full else {})
    few = [image_run(args, name, words, seed) for name, (_, words) in FEW.items() for seed in FEW_SEEDS]
    many = [image_run(args, name, words, seed) for name, (_, words) in kinds.items() for seed in SEEDS]
    compressed = [text_run(args, n, encoder, data, words, seed) for n, (_, words) in TEXT.items() for seed in SEEDS]
    if args.full:
        compressed += [text_run(args, n, encoder, data, words, 1) for n, (_, words) in FIRST_LAYERS.items()]
    print(f"{2 + len(few + many + compressed)} runs, {AT_ONCE} at a time; each is shown when it has ended", flush=True)
    run_all((images, [*few, *many]), (sentences, compressed))

    parts = [
        Part("few", "Few images from a teacher: ResNet8, copied from its blocks, 20 images of digits a seed",
             "ResNet20, the teacher", images, {label: of_kind(few, name) for name, (label, _) in FEW.items()}),
        Part("images", "Images, the paper's method: ResNet8 from random weights, 150 images of digits",
             "ResNet20, the teacher", images, {label: of_kind(many, name) for name, (label, _) in kinds.items()}),
        Part("text", "Text, the paper's method: an encoder of 6 layers to 3",
             "6 layers, the teacher", sentences,
             {label: of_kind(compressed, name) for name, (label, _) in (TEXT | FIRST_LAYERS).items()}, texts),
    ]  # fmt: skip
    said = [write_part(args.output_dir, part) for part in parts]
    plot(args.output_dir, parts)
    print("\n" + "\n".join(said))
    minutes, busy = (time.perf_counter() - start) / 60, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / 60
    print(f"{minutes:.1f} minutes, {busy:.1f} of CPU; plot: {shown(args.output_dir / 'demo.png')}")
    print("Small, short runs, with settings that were not tuned on them. On digits, L2 towards the teacher and")
    print("PRACTISE do as well as the anchor (curvature); README.md says what larger runs found.")


def run_all(*groups: tuple[list[Run], list[Run]]) -> None:
    """Runs side by side; of each group the second list when the first has ended."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            first = [[pool.submit(launch, run) for run in teachers] for teachers, _ in groups]
            later = []
            for teachers, (_, students) in zip(first, groups, strict=True):
                for teacher in teachers:
                    teacher.result()
                later += [pool.submit(launch, run) for run in students]
            for student in later:
                student.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise


def of_kind(runs: list[Run], name: str) -> list[Run]:
    """The runs of a kind."""
    return [run for run in runs if run.name == name]


def image_run(args: argparse.Namespace, name: str, words: tuple, seed: int) -> Run:
    """A run on digits by a config of configs/demo/; students learn from the demo's teacher."""
    teacher = args.output_dir / "images" / "teacher"
    folder = teacher if name == "teacher" else teacher.parent / f"{name}_seed{seed}"
    command = [IMAGE_SCRIPT, "--cfg", words[0], "--overwrite", "OUTPUT_DIR", folder, "SOLVER.SEED", seed]
    command += ["SOLVER.EVAL_EPOCHS", 40, "LOG.PROGRESS", "false", "LOG.TRACKERS", "[]", *words[1:]]
    if name == "teacher":
        epochs, stages = TEACHER_EPOCHS[args.full]
        command += ["SOLVER.EPOCHS", epochs, "SOLVER.LR_DECAY_STAGES", stages]
    elif name not in ALONE:
        command += ["DISTILLER.TEACHER_CKPT", teacher / "student"]
    return Run(name, seed, folder, tuple(command))


def text_run(args: argparse.Namespace, name: str, encoder, data: list, flags: tuple, seed: int) -> Run:
    """A fine-tuning of the encoder, or a compression of the demo's predecessor."""
    predecessor = args.output_dir / "predecessor"
    theseus = name in TEXT
    folder = args.output_dir / (f"{name}_seed{seed}" if theseus else name)
    command = [TEXT_SCRIPT, "--model_name_or_path", predecessor / "student" if theseus else encoder]
    command += ["--output_dir", folder, "--overwrite_output_dir", *data, "--do_train", "--do_eval", "--seed", seed]
    command += ["--learning_rate", "5e-5", "--num_train_epochs", STUDENT_EPOCHS[args.full] if theseus else 3]
    command += ["--per_gpu_train_batch_size", 16 if theseus else 32, "--save_steps", 100000, "--report_to", "none"]
    return Run(name, seed, folder, (*command, "--disable_tqdm", *flags))


def text_data(args: argparse.Namespace, downloads: Path) -> tuple[list, list[str]]:
    """(flags that name the data, texts to measure latency with)."""
    if args.task:
        texts = ["The committee has not yet decided whether the plan will be carried out this year."] * 30
        return ["--task_name", args.task, "--data_dir", args.data_dir], texts
    train, dev = fetch_text(downloads, SENTENCES[args.full])
    data = ["--task_name", "custom", "--regression", "--text_columns", "text", "--label_column", "valence"]
    texts = [line.split("\t")[0] for line in dev.read_text(encoding="utf-8").splitlines()[1:31]]
    return [*data, "--train_file", train, "--dev_file", dev], texts


if __name__ == "__main__":
    run_cli(main)
