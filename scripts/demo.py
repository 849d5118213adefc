"""The whole story in some minutes on two CPU cores: compress a text encoder and distil an image classifier.

python scripts/demo.py                                     text and images, nothing but a package registry needed
python scripts/demo.py --task RTE --data_dir glue/RTE      the text half on a GLUE task of your own copy
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import _paths  # noqa: F401
import pandas as pd

from common import ROOT
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable
from common.torchvision_repair import repair_torchvision
from scripts.lib.demo.materials import fetch_encoder, fetch_text
from scripts.lib.demo.report import image_latency, plot, read_result, size_mb, text_latency, write_table
from scripts.lib.tables.render import spread_text

TEXT_SCRIPT = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
IMAGE_SCRIPT = ROOT / "cv" / "train_svd.py"
SENTENCES = 2500
IMAGE_SEEDS = (1, 2, 3)
TEXT_RUNS = {  # folder -> what it is, flags
    "predecessor": ("predecessor, 6 layers", ["--method", "finetune"]),
    "control": ("first 3 layers, fine-tuned", ["--method", "finetune", "--num_successor_layers", "3"]),
    "theseus": ("Theseus, 3 layers", []),
    "theseus_dskd": ("Theseus + DSKD, 3 layers", ["--ifsvd", "--svd_steps", "50"]),
}
IMAGE_RUNS = {  # config -> what it is
    "vanilla": "ResNet8 alone",
    "kd": "ResNet8, KD",
    "kd_dskd": "ResNet8, KD + DSKD",
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="default: outputs/demo")
    parser.add_argument("--task", help="a GLUE task for the text half, instead of rated movie-review sentences")
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
    text_rows, text_values, student = text_half(args)
    image_rows, image_values = image_half(args.output_dir)
    tables = [
        write_table(args.output_dir / "text.md", "Text: 6-layer encoder to 3 layers, one seed", text_rows),
        write_table(args.output_dir / "images.md", f"Images: 150 digits, {len(IMAGE_SEEDS)} seeds", image_rows),
    ]
    metric = read_result(args.output_dir / "theseus")["metric"]
    panels = [("Text", f"dev {metric}", text_values), ("Images", "test top-1, %", image_values)]
    plot(args.output_dir, panels, args.output_dir / "theseus_dskd")
    print("\n" + "\n".join(tables))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; plot: {shown(args.output_dir / 'demo.png')}")
    print(f'student: AutoModelForSequenceClassification.from_pretrained("{shown(student)}")')


def text_half(args: argparse.Namespace) -> tuple[list[dict], dict[str, list[float]], Path]:
    """Fine-tune, compress with and without DSKD; rows of the table, metric per run, folder of the student."""
    downloads = args.output_dir / "downloads"
    model = args.model or fetch_encoder(downloads)
    if args.task:
        data = ["--task_name", args.task, "--data_dir", args.data_dir]
        texts = ["The committee has not yet decided whether the plan will be carried out this year."] * 30
    else:
        train, dev = fetch_text(downloads, SENTENCES)
        data = ["--task_name", "custom", "--regression", "--text_columns", "text", "--label_column", "valence"]
        data += ["--train_file", train, "--dev_file", dev]
        texts = [line.split("\t")[0] for line in dev.read_text(encoding="utf-8").splitlines()[1:31]]
    common = ["--do_train", "--do_eval", "--learning_rate", "5e-5", "--num_train_epochs", "3", "--seed", "1"]
    common += ["--per_gpu_train_batch_size", "32", "--save_steps", "100000", "--report_to", "none"]
    rows, values = [], {}
    for name, (label, flags) in TEXT_RUNS.items():
        source = args.output_dir / "predecessor" / "student" if name.startswith("theseus") else model
        # the probability of replacing reaches 1 after some 60% of the steps
        schedule = ["--scheduler_linear_k", "0.006"] if name.startswith("theseus") else []
        folder = args.output_dir / name
        files = ["--model_name_or_path", source, "--output_dir", folder, "--overwrite_output_dir"]
        launch(label, [TEXT_SCRIPT, *files, *data, *common, *flags, *schedule])
        result = read_result(folder)
        rows.append(
            {
                "run": label,
                f"dev {result['metric']}": f"{result['last']:.3f}",
                "parameters": f"{result['parameters'] / 1e6:.1f} M",
                "size": f"{size_mb(folder / 'student'):.0f} MB",
                "latency": f"{text_latency(folder / 'student', texts):.1f} ms",
            }
        )
        values[label] = [result["last"]]
    return rows, values, folder / "student"


def image_half(output_dir: Path) -> tuple[list[dict], dict[str, list[float]]]:
    """Teacher (all images), student alone, KD, KD + DSKD (few) on digits; rows of the table, top-1 per run and seed."""
    teacher = output_dir / "images" / "teacher"
    runs = [("teacher", "ResNet20 on all images, the teacher", (1,))]
    runs += [(config, label, IMAGE_SEEDS) for config, label in IMAGE_RUNS.items()]
    rows, values = [], {}
    for config, label, seeds in runs:
        results = []
        for seed in seeds:
            folder = teacher if config == "teacher" else output_dir / "images" / f"{config}_seed{seed}"
            overrides = ["OUTPUT_DIR", folder, "SOLVER.SEED", seed, "LOG.PROGRESS", "false", "LOG.TRACKERS", "[]"]
            if config != "teacher":
                overrides += ["DISTILLER.TEACHER_CKPT", teacher / "student"]
            command = [IMAGE_SCRIPT, "--cfg", f"configs/demo/{config}.yaml", "--overwrite", *overrides]
            launch(f"{label}, seed {seed}", command, threads=1)  # such small images gain nothing from a second
            results.append(read_result(folder))
        accuracy = pd.Series([result["last"] for result in results])
        rows.append(
            {
                "run": label,
                "test top-1, %": spread_text(accuracy.mean(), accuracy.std()),
                "parameters": f"{results[0]['parameters'] / 1e6:.2f} M",
                "size": f"{size_mb(folder / 'student'):.2f} MB",
                "latency": f"{image_latency(folder / 'student'):.1f} ms",
            }
        )
        if config != "teacher":
            values[label] = accuracy.tolist()
    return rows, values


def launch(label: str, command: list, threads: int | None = None) -> None:
    """Run one of the two scripts as a user would; its output goes to the terminal."""
    words = [str(word) for word in command]
    print(f"\n== {label}\n$ {shlex.join(['python', *(shown(word) for word in words)])}", flush=True)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads)) if threads else None
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment)
    if done.returncode:
        raise UserError(f"{label} failed (exit code {done.returncode}); its output is above")


def shown(path: Path | str) -> str:
    """A path as seen from the repository's root, where it lies inside."""
    text = str(path)
    return text.removeprefix(f"{ROOT}/")


if __name__ == "__main__":
    run_cli(main)
