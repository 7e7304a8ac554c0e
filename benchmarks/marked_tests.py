"""Runs the tests marked `gpu` and counts them, plainly or under compute-sanitizer.

Under the sanitizer only tests of kernels run that write over their input: there a race (found by
`racecheck`) or a write out of bounds (found by `memcheck`) would be hidden.

Run: `python -m benchmarks.marked_tests --out FILE.json [--sanitizer memcheck]`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.pieces import ROOT, UNAVAILABLE

IN_PLACE = ["tests/kernels/test_gpu.py", "-k", "same_bits or scan"]


def main() -> None:
    parser = argparse.ArgumentParser(description="The tests marked gpu.")
    parser.add_argument("--sanitizer", choices=("memcheck", "racecheck"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", f"--junitxml={report}"]
        if options.sanitizer:
            tool = shutil.which("compute-sanitizer")
            if tool is None:
                print("compute-sanitizer was not found on the PATH; it comes with the CUDA toolkit")  # noqa: T201
                sys.exit(UNAVAILABLE)
            watch = [tool, "--tool", options.sanitizer, "--error-exitcode", "1", "--target-processes", "all"]
            command = [*watch, *command, *IN_PLACE]
        else:
            command.append("tests")
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for suite in suites:
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    print(counts)  # noqa: T201
    options.out.write_text(json.dumps({"sanitizer": options.sanitizer, **counts}, indent=1) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
