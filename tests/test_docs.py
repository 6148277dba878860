"""The commands of README.md and docs/ as a person types them, in macOS's zsh too; and those of GitHub's workflow."""

import os
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from slowft.cli.main import slowft as command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"    (?:slowft|python|pip|cat|curl|source|scripts/\S+|\.venv/\S+|mlx\S+) ?")


def commands(page: str) -> list[str]:
    """Lines of its indented blocks that are for a shell; one that goes on in the next line with that."""
    joined = re.sub(r" \\\n +", " ", page)
    return [line.strip() for line in joined.splitlines() if SHELL.match(line)]


def breaks_in_zsh(line: str) -> str | None:
    """Why, if it does."""
    if any(word.startswith("#") for word in shlex.split(line)):
        return "zsh hands comments to the command, unless it runs a file"
    quoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
    if re.search(r"[][*?(){}]", quoted):
        return "zsh takes an unquoted [, * or ? for names of files, and finds none"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_work_in_zsh_and_parse(page):
    for line in commands(page.read_text("utf-8")):
        assert (why := breaks_in_zsh(line)) is None, f"{page.name}: {line}: {why}"
        words = shlex.split(line.partition(" > ")[0])
        words = words[words.index("--") + 1 :] if "--" in words else words  # mlx.launch ... -- slowft ...
        if Path(words[0]).name == "slowft":
            parse(command, words[1:])


def parse(one: click.Command, words: list[str]) -> None:
    """Raises click's exceptions."""
    while isinstance(one, click.Group) and (inner := one.get_command(None, words[0])) is not None:
        one, words = inner, words[1:]
    one.make_context(one.name, list(words)).close()


def test_readmes_commands_are_found():
    found = commands(PAGES[0].read_text("utf-8"))
    assert {"scripts/demo", "scripts/test", ".venv/bin/slowft doctor", "slowft data make recipe.yaml"} <= set(found)
    assert any(line.startswith("mlx.launch") and line.endswith("--batch-size 8") for line in found)


def test_comments_and_unquoted_brackets_break_in_zsh():
    assert breaks_in_zsh("slowft data make --example > recipe.yaml    # every field")
    assert breaks_in_zsh("pip install slowft[bench]") and breaks_in_zsh("slowft score --data *.jsonl")
    assert breaks_in_zsh("""pip install 'slowft[bench]' --prompt "Why? # how?" """) is None


def test_extras_are_quoted_everywhere():
    sources = [path for folder in ("slowft", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for place in [*PAGES, *sources]:
        for found in re.findall(r"pip install [^`\n]*\[", place.read_text("utf-8")):
            assert re.search(r"""['"][^'" ]*\[$""", found), f"{place.name}: {found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_named_are_there(page):
    for name in re.findall(r"(?:scripts|benchmarks)/[\w./-]*\w", page.read_text("utf-8")):
        assert list(ROOT.glob(f"{name}*")), f"{page.name} names {name}"


def test_the_workflow_runs_what_is_there_and_keeps_what_doctor_says_before_the_tests():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))
    jobs = workflow["jobs"]
    assert jobs["mac"]["runs-on"] == ["self-hosted", "macOS", "ARM64"] and "workflow_dispatch" in jobs["mac"]["if"]
    for job in jobs.values():
        lines = [step["run"] for step in job["steps"] if "run" in step]
        doctor = next(line for line in lines if " doctor " in line)
        assert lines.index("scripts/setup") < lines.index(doctor) < lines.index("scripts/demo") < len(lines) - 1
        assert lines[-1] == "scripts/test"
        kept = [step["with"]["path"] for step in job["steps"] if step.get("uses", "").startswith("actions/upload")]
        assert kept == [doctor.partition(" > ")[2]]
        for line in lines:
            words = shlex.split(line.partition(" > ")[0])
            if words[0] == ".venv/bin/slowft":
                parse(command, words[1:])
            elif words[0] != "cat":
                assert os.access(ROOT / words[0], os.X_OK), line
