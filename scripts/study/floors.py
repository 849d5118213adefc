"""The tests on the lowest versions that setup.py declares, in an environment of their own.

    python scripts/study/floors.py [--folder DIR] [--with torch==2.13.0] [tests and flags of pytest]

`--with` gives other versions than the lowest, where those cannot be had for this Python or processor.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("ruff", "mypy")  # they look at the sources, and differ from version to version in what they find


def floors(text: str) -> dict[str, str]:
    """Package name -> lowest version, of a setup.py."""
    return {name: version for name, version in re.findall(r'"([\w-]+)>=([\d.]+)[^"]*"', text) if name not in LEFT_OUT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the environment; one that is there is used again")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="NAME==VERSION")
    args, words = parser.parse_known_args()
    pins = floors((ROOT / "setup.py").read_text(encoding="utf-8"))
    pins |= dict(each.split("==") for each in args.others)
    folder = args.folder or Path(mkdtemp(prefix="floors"))
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    print(f"{folder}: " + " ".join(f"{name}=={version}" for name, version in pins.items()), flush=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *(f"{n}=={v}" for n, v in pins.items())], check=True)
    sys.exit(subprocess.run([python, "-m", "pytest", *words], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
