"""`python -m dskd doctor`: what of this machine the method and the programs can use, and how to mend the rest."""

import sys

from .doctor import examine


def main(words: list[str]) -> int:
    if words != ["doctor"]:
        print("usage: python -m dskd doctor", file=sys.stderr)
        return 2
    findings = examine()
    for finding in findings:
        print(finding)
    return int(any(finding.state == "fault" for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
