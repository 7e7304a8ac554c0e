"""`rlhf report`: writes the report page of one run again, or a page that compares several runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.monitoring.report.summary import closing_summary, write_report
from rlhf.monitoring.run_folder import RunFolder, RunFolderError


def run_report(folders: Sequence[str], out: str | None) -> Iterator[str]:
    """The lines to show.

    Raises RunFolderError when a folder holds no run or is named twice, or a file would be overwritten.
    """
    from rlhf.monitoring.report.comparison import read_run, write_comparison

    paths = [Path(folder).expanduser() for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunFolderError(f"the runs to compare must be different folders, got {' '.join(folders)}")
    for path in paths:
        read_run(path)
    if len(paths) == 1:
        if out is not None:
            raise RunFolderError(
                "--out is for comparisons; the page of one run is always RUN/report.html: leave --out away"
            )
        run = RunFolder(paths[0])
        write_report(run)
        yield closing_summary(run)
        return
    target = Path(out or "comparison.html").expanduser()
    write_comparison(paths, target)
    yield f"{len(paths)} runs compared in {target}"
