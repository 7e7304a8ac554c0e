"""The report in a real browser: nothing overflows, dark mode is dark, tokens can be coloured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf.monitoring.records import append_eval
from rlhf.monitoring.report.comparison import write_comparison
from rlhf.monitoring.report.summary import write_report
from rlhf.monitoring.run_folder import RunFolder
from tests.monitoring.test_report import evaluation, step

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DARK = "--blink-settings=preferredColorScheme=0"
PROBE = """<!doctype html><meta charset="utf-8"><style>body { margin: 0 }</style>
<iframe id="page" src="PAGE" width="WIDTH" height="800" style="border: 0"></iframe>
<script>
const frame = document.getElementById('page');
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll('details').forEach(d => d.open = true);
  const seen = e => getComputedStyle(e), body = seen(page.body);
  const token = page.querySelector('.tokens .u');
  const painted = [];
  for (const id of ['by-advantage', 'by-entropy', 'by-nothing']) {
    const choice = page.getElementById(id);
    if (!choice) continue;
    choice.click();
    painted.push(seen(token).backgroundColor);
  }
  const found = {
    width: root.clientWidth, needed: root.scrollWidth, background: body.backgroundColor, color: body.color,
    figures: page.querySelectorAll('svg').length, painted,
    outside: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('file:')),
    empty: [...page.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 50).length,
  };
  document.body.replaceChildren(JSON.stringify(found));
};
</script>"""

pytestmark = pytest.mark.browser
if CHROMIUM is None and "REQUIRE_BROWSER" not in os.environ:
    pytestmark = [pytest.mark.browser, pytest.mark.skip(reason="no Chromium here: apt-get install chromium")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


def make_run(folder: Path, level: float = 0.1) -> RunFolder:
    """A run with everything that a page shows: steps, evaluations, completions with long words and lines."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    entries = []
    for n in range(1, 9):
        times = {
            "time/step": 9.0,
            "time/rollout": 5.0,
            "time/reward": 0.5,
            "time/learn": 3.0,
            "time/sync": 0.2,
        }
        solved = {f"budget/solved_{b}": 0.2 for b in ("0", "0_20", "20_80", "80_100", "100")}
        more = {"reward/mean": level * n, "kl/ref": 0.01 * n, "entropy": 2 - 0.1 * n, "length/mean": 40.0 - n}
        entries.append(step(n, **times, **solved, **more))
    run.metrics.write_text("".join(json.dumps(e) + "\n" for e in entries))
    run.samples.write_text("".join(json.dumps(group(n)) + "\n" for n in range(1, 9)))
    run.config.write_text(f"run_dir: {folder}\nlearner:\n  lr: {level}\nlong: {'x' * 300}\n")
    for n in (0, 4, 8):
        append_eval(run, evaluation(n, min(1.0, 0.1 + level * n)))
    write_report(run)
    return run


def group(number: int) -> dict[str, Any]:
    tokens = ["Sev", "en", " <b>", "is", " right", "!" * 120, "\n", "So", " 7", "<|im_end|>"]
    completions = [
        {
            "text": "".join(tokens[:-1]),
            "reward": float(k % 2),
            "objectives": {"right": float(k % 2), "short": 0.25},
            "finish_reason": "length" if k == 3 else "stop",
            "num_tokens": 10 + number * k,
            "tokens": tokens,
            "advantage": 1.0 if k % 2 else -1.0,
            "entropy": [0.1 * i for i in range(10)],
        }
        for k in range(4)
    ]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4? " * 20}]
    return {
        "step": number,
        "prompt_id": f"train.jsonl:{number}",
        "prompt": prompt,
        "completions": completions,
    }


def chromium(*arguments: str, folder: Path) -> str:
    assert CHROMIUM is not None, "REQUIRE_BROWSER is set, and there is no Chromium"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder}/profile", "--allow-file-access-from-files", "--no-first-run"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def look(page: Path, folder: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """What the browser measures of a page in a frame of the given width."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)))
    options = [DARK] if dark else []
    said = chromium("--virtual-time-budget=20000", *options, "--dump-dom", probe.as_uri(), folder=folder)
    found = re.search(r"<body>(\{.*\})", said)
    assert found, said[-2000:]
    return json.loads(found[1])


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / (3 * 255)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)], ids=["wide-light", "narrow-dark"])
def test_the_report_of_a_run(run: RunFolder, tmp_path: Path, width: int, dark: bool) -> None:
    seen = look(run.report, tmp_path, width=width, dark=dark)
    assert seen["needed"] <= seen["width"], "it sticks out sideways"
    assert seen["outside"] == [] and seen["figures"] >= 8 and seen["empty"] == 0
    assert (brightness(seen["background"]) < 0.3) == dark and (brightness(seen["color"]) > 0.7) == dark
    assert len(set(seen["painted"])) == 3, "each choice paints the tokens otherwise"


def test_a_comparison_of_runs(run: RunFolder, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", level=0.05)
    write_comparison([run.path, other.path], tmp_path / "both.html")
    seen = look(tmp_path / "both.html", tmp_path, width=360, dark=False)
    assert seen["needed"] <= seen["width"] and seen["figures"] >= 6 and seen["outside"] == []


def test_it_can_be_looked_at_as_a_picture(run: RunFolder, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium(f"--screenshot={picture}", "--window-size=1200,2000", run.report.as_uri(), folder=tmp_path)
    from PIL import Image

    with Image.open(picture) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None and len(colors) > 100, "it is blank"
