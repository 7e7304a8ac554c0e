"""Pages that are written by `make docs` are what the code says now; links in all pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import errors, files, settings
from tests.pages.errors import Bench, Said
from tests.pages.wrong_inputs import WRONG, Wrong

ROOT = Path(__file__).parents[2]
AGAIN = "is not what the code says: run `make docs` and look at what changed"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.title.replace(" ", "_") for wrong in WRONG])
def test_a_wrong_input_is_told_in_a_sentence_before_weights_are_loaded(wrong: Wrong, bench: Bench) -> None:
    said = bench.try_one(wrong.command, wrong.prepare)
    assert said.status == 2 and "Traceback" not in said.text, said.text
    assert said.text.startswith(f"rlhf {wrong.command.split()[1]}: ") and len(said.text) < 800, said.text
    shown = errors.block(wrong.title, wrong.given, wrong.command, said.text)
    assert shown in (ROOT / "docs" / "errors.md").read_text(), f"docs/errors.md {AGAIN}\n{shown}"


def test_the_page_of_errors_has_them_all_and_no_others() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    assert len({wrong.title for wrong in WRONG}) == len(WRONG) >= 50
    told = dict(re.findall(r"^\*\*(.+?)\*\*.*?^\$ [^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert set(told) == {wrong.title for wrong in WRONG}, f"docs/errors.md {AGAIN}"
    assert errors.render({title: Said(2, text) for title, text in told.items()}) == page, (
        f"docs/errors.md {AGAIN}"
    )


def test_the_page_of_settings_is_the_config_tree() -> None:
    assert settings.undocumented() == [], "a setting without a docstring"
    assert settings.render() == (ROOT / "docs" / "settings.md").read_text(), f"docs/settings.md {AGAIN}"


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), (
                f"{page.name} links to {target}; there are {sorted(anchors(file))}"
            )


# of whoever reads the page: a run, a file of their own
THEIRS = ("RUN/", "ADDER/", "runs/", "path/", "my/")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./-])[\w.-]+(?:/[\w.-]+)+\.(?:py|yaml)\b", page.read_text()))
    ours = {name for name in named if not name.startswith(THEIRS)}
    folders = (ROOT, page.parent, ROOT / "rollout")
    assert sorted(name for name in ours if not any((folder / name).exists() for folder in folders)) == []


def test_the_tree_of_the_readme_has_every_folder_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2].split("```")[1]
    named = re.findall(r"^(?:  )?(\w+)/ ", tree, re.MULTILINE)
    inside = [
        path.name for path in (ROOT / "rlhf").iterdir() if path.is_dir() and (path / "__init__.py").is_file()
    ]
    assert sorted(named) == sorted(["rlhf", *{*inside, "algos", "kernels", "rollout", "configs"}])


def test_the_architecture_names_every_file() -> None:
    assert files.render() == files.PAGE.read_text(), f"docs/architecture.md {AGAIN}"


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index or f"(docs/{page.name})" in readme, (
            page.name
        )
