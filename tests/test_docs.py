"""The documentation says what the code does: links, command lines, tables, Cases and JSON fields are compared."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from mmufuzz.campaign.expect import unmet
from mmufuzz.case import toml
from mmufuzz.case.model import MODES
from mmufuzz.case.validate import FLAGS
from mmufuzz.cli import corpus, doctor, explain, explore, fixes, fuzz, litmus, reduce, replay
from mmufuzz.cli.arguments import Parser
from mmufuzz.cli.main import main, parser
from mmufuzz.cli.status import Status
from mmufuzz.host.sites import SITE_NAMES
from mmufuzz.kvm.counters import BLOCKS, NEAR_MISSES, RETRIES
from mmufuzz.kvm.fixes import FIXES
from mmufuzz.kvm.marks import MARKS
from mmufuzz.run import run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
VERBS = (fuzz, replay, reduce, explain, explore, litmus, fixes, corpus, doctor)

LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(mmufuzz [^`]+)`")
COMMAND = re.compile(r"^\s*(?:\$ )?((?:mmufuzz|tox -e fuzz) .*)$")
SHELL = {"|", ">", ">>", "2>", "&&", ";", "<"}
MACHINE_PATHS = re.compile(r"(?<![\w./…])/(?:work|root|tmp|home|Users|mnt)/")
REGISTRIES = re.compile(r"\b(?:pypi|pythonhosted|npmjs|crates|docker|ghcr|quay)\.(?:org|com|io)\b|\bregistry\.")


def blocks(page: Path) -> list[str]:
    """Lines of ``page`` that are set as code: fenced, or indented by four."""
    lines = []
    fenced = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    return lines


def commands(page: Path) -> list[str]:
    """Command lines of mmufuzz that ``page`` shows, in blocks and in running text."""
    found = [match.group(1) for line in blocks(page) if (match := COMMAND.match(line))]
    # Output lines of explain and doctor may begin with the name of the verb that printed them.
    found = [command for command in found if not command.split()[1].endswith(":")]
    # A verb alone, in running text, is a mention.
    spans = [span for span in INLINE.findall(page.read_text()) if len(span.split()) > 2]
    return found + spans


def arguments(command: str) -> list[str]:
    """What the shell would hand to mmufuzz."""
    words = shlex.split(command, comments=True)
    for position, word in enumerate(words):
        if word in SHELL:
            words = words[:position]
            break
    if words[0] == "tox":
        return ["fuzz", *(words[words.index("--") + 1 :] if "--" in words else [])]
    return words[1:]


def outputs(page: Path) -> dict[str, list[str]]:
    """Lines that ``page`` shows below each command at a prompt, without their indentation."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in blocks(page):
        if line.lstrip().startswith("$ "):
            lines = found.setdefault(line.strip()[2:], [])
        else:
            lines.append(line.strip())
    return found


def table(page: Path, header: str) -> list[list[str]]:
    """Cells of the table in ``page`` whose header row begins with ``header``, without backquotes."""
    rows = []
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith(f"| {header} |"):
            inside = True
        elif inside and not line.startswith("|"):
            break
        elif inside and not line.startswith("|---"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split(" |")])
    return rows


def anchors(page: Path) -> list[str]:
    """Fragments that headings of ``page`` can be linked by."""
    found = []
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            text = line.lstrip("#").strip().lower().replace("`", "")
            found.append("".join(letter for letter in text if letter.isalnum() or letter in " -_").replace(" ", "-"))
    return found


def section(page: Path, heading: str) -> str:
    """The text of ``page`` below ``heading``, up to the next one of level two."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1]
    return text.split("\n## ", 1)[0]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_line_shown_parses(page: Path) -> None:
    for command in commands(page):
        try:
            parser().parse_args(arguments(command))
        except SystemExit as stop:
            assert stop.code == 0, command  # --help and --version


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_id_of_a_fix_on_a_command_line_exists(page: Path) -> None:
    names = {fix.id for fix in FIXES} | {fix.zoo for fix in FIXES}
    for command in commands(page):
        words = arguments(command)
        for option, value in pairwise(words):
            assert option not in ("--revert", "--apply") or value in names | {"ID"}, command


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*IDS, "CHANGELOG.md"])
def test_no_page_names_a_machine_path_or_a_registry(page: Path) -> None:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert not MACHINE_PATHS.search(line), f"line {number}: {line}"
        assert not REGISTRIES.search(line), f"line {number}: {line}"


def test_the_pages_show_commands_at_all() -> None:
    """A pattern that matches nothing would let every test above pass."""
    assert sum(len(commands(page)) for page in PAGES) > 50
    assert arguments("mmufuzz replay a.toml --times 2 | head  # twice") == ["replay", "a.toml", "--times", "2"]
    assert arguments("tox -e fuzz -- --time 1h") == ["fuzz", "--time", "1h"]


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(DOCS)})" in index


def test_the_table_of_fixes_is_the_one_declared() -> None:
    declared = [[fix.id, fix.title, fix.kernel, fix.zoo or "-", fix.shows] for fix in FIXES]
    assert table(DOCS / "reference" / "fixes.md", "id") == declared


def test_each_witness_of_a_fix_shows_the_finding_that_the_table_says() -> None:
    page = DOCS / "reference" / "fixes.md"
    shows = {fix.id: fix.shows for fix in FIXES}
    rows = table(page, "fix")
    assert rows
    for fix, link in rows:
        path = LINK.findall(link)[0]
        case = toml.load(page.parent / path)
        assert case.revert == (fix,)
        assert case.expect.kind == shows[fix]
        assert unmet(case, run(case)) == []


def test_the_table_of_sites_is_the_one_declared() -> None:
    rows = table(DOCS / "reference" / "sites-labels-deviations.md", "site")
    assert [row[0] for row in rows] == list(SITE_NAMES)


def test_the_table_of_marks_is_the_one_declared() -> None:
    rows = table(DOCS / "reference" / "sites-labels-deviations.md", "mark")
    assert [row[0] for row in rows] == list(MARKS)


def test_the_tables_of_counters_are_the_ones_declared() -> None:
    page = DOCS / "reference" / "counters.md"
    rows = table(page, "block")
    assert [(row[0], row[2]) for row in rows] == [(block.name, block.meaning) for block in BLOCKS]
    assert [len(row[1].split(", ")) for row in rows] == [len(block.axes) for block in BLOCKS]
    assert [row[0] for row in table(page, "decision")] == list(RETRIES)
    assert [row[0] for row in table(page, "near miss")] == list(NEAR_MISSES)


def test_the_exit_statuses_are_the_ones_declared() -> None:
    rows = table(DOCS / "reference" / "command-line.md", "status")
    assert [int(row[0]) for row in rows] == sorted(status.value for status in Status)


def test_the_page_of_litmus_tests_counts_those_of_the_corpus() -> None:
    count = len(list((ROOT / "corpus" / "litmus").glob("*.litmus")))
    text = (DOCS / "reference" / "litmus-tests.md").read_text()
    assert f"of {count} |" in text and f"The {count} tests" in text


def test_the_case_format_names_every_mode_and_flag() -> None:
    text = (DOCS / "reference" / "case-format.md").read_text()
    for name in (*MODES, *FLAGS):
        assert f"`{name}`" in text


def test_every_option_of_every_verb_is_in_the_reference() -> None:
    page = DOCS / "reference" / "command-line.md"
    shared = section(page, "Options that verbs share")
    verbs = Parser().add_subparsers()
    for module in VERBS:
        module.add_parser(verbs)
    for name, verb in verbs.choices.items():
        text = shared + section(page, f"`{name}`")
        for action in verb._actions:
            if action.help == argparse.SUPPRESS or "-h" in action.option_strings:
                continue
            for option in action.option_strings:
                assert re.search(rf"`{option}[ `]", text), f"{name} {option}"


def toml_blocks(page: Path) -> list[str]:
    """Whole Cases that ``page`` shows."""
    found = re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for text in found if text.startswith("format = ")]


def test_the_cases_shown_meet_their_expectations() -> None:
    shown = [text for page in PAGES for text in toml_blocks(page)]
    assert len(shown) >= 2
    for text in shown:
        case = toml.loads(text, "shown")
        outcome = run(case)
        assert unmet(case, outcome) == []
        # A schedule line whose label never comes up would teach nothing.
        assert set(case.schedule) <= set(outcome.schedule)


FINDING = str(ROOT / "corpus" / "regressions" / "write-pf-to-sp.toml")
JSON = [
    ("replay", ["replay", FINDING]),
    ("explain", ["explain", FINDING]),
    ("explore", ["explore", FINDING, "--bound", "0"]),
    ("reduce", ["reduce", FINDING, "--runs", "5", "-o", "OUT/small.toml"]),
    ("litmus", ["litmus", str(ROOT / "corpus" / "litmus" / "n6.litmus")]),
    ("fixes", ["fixes", "list"]),
    ("corpus", ["corpus", "stats", FINDING]),
    ("fuzz", ["fuzz", "--revert", "A4", "--engine", "random", "--seed", "1", "--cases", "5", "--no-coverage",
              "--corpus", "OUT/corpus", "--findings", "OUT/findings"]),
]  # fmt: skip


@pytest.mark.parametrize("verb, command", JSON, ids=[verb for verb, _ in JSON])
def test_every_field_of_the_json_is_in_the_reference(verb: str, command: list[str], tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    main([word.replace("OUT", str(tmp_path)) for word in command] + ["--json", str(target)])
    data = json.loads(target.read_text())
    rows = data if isinstance(data, list) else [data]
    fields = {field for row in rows for field in row}
    for row in rows:
        for finding in row.get("findings", []):
            fields.update(finding)
    assert fields
    text = section(DOCS / "reference" / "command-line.md", f"`{verb}`")
    for field in sorted(fields):
        assert f"`{field}`" in text, field


CAMPAIGNS = [ROOT / "README.md", DOCS / "tutorial" / "first-finding.md"]


@pytest.mark.parametrize("page", CAMPAIGNS, ids=["README", "tutorial"])
def test_the_campaign_shown_finds_the_case_that_is_explained(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the pages have it: what a campaign starts from, and what it knows, is in the checkout.
    monkeypatch.chdir(ROOT)
    shown = outputs(page)
    command = next(line for line in shown if line.startswith("mmufuzz fuzz ") and "--seed" in line)
    target = tmp_path / "result.json"
    places = ["--corpus", str(tmp_path / "corpus"), "--findings", str(tmp_path), "--json", str(target)]
    assert main([*arguments(command), "--no-coverage", *places]) == Status.FOUND
    result = json.loads(target.read_text())
    done = f"{result['cases']} cases, {result['schedules']} schedules in "
    assert any(line.startswith(done) for line in shown[command]), done
    sizes = [line.split(".toml: ")[1] for line in shown[command] if " deviations; after " in line]
    assert [size.rsplit(",", 1)[0] for size in sizes] == [
        f"{found['instructions']} instructions, {found['edits']} words, {found['deviations']} deviations; "
        f"after {found['found_after_cases']} cases"
        for found in result["findings"]
    ]

    explained = next(line for line in shown if line.startswith("mmufuzz explain "))
    (case,) = tmp_path.glob(Path(explained.split()[2]).name)
    capsys.readouterr()
    main(["explain", str(case)])
    real = iter([line.strip() for line in capsys.readouterr().out.splitlines()])
    for line in shown[explained]:
        assert line == "…" or line in real, line


@pytest.mark.parametrize("command", ["mmufuzz corpus stats", "mmufuzz corpus verify"])
def test_what_is_shown_of_the_corpus_is_true(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments(command)) == Status.CLEAN
    assert capsys.readouterr().out.splitlines() == outputs(DOCS / "how-to" / "run-nightly.md")[command]
