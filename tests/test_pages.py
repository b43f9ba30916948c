"""What README and docs state about the code is true: commands, links, names, and messages."""

from __future__ import annotations

import re
import shlex

import pytest
from pages import PAGES, ROOT

import efficientnet_ns
from efficientnet_ns.config import preemption
from efficientnet_ns.files import standard_output

COMMAND = re.compile(r"^python3? -m efficientnet_ns\.(\w+)((?:.*\\\n)*.*)$", re.MULTILINE)
COMMANDS = [
    pytest.param(program, arguments, id=f"{page}-{number}-{program}")
    for page, text in PAGES.items()
    for number, (program, arguments) in enumerate(COMMAND.findall(text))
    if program != "serving"  # The client has no absl flags.
]
LINK = re.compile(r"\]\((?!http)([\w./-]*)(?:#([\w-]*))?\)")


def anchors(text: str) -> set[str]:
    """Returns the anchors of all headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        # The site generates this page from every program's --helpfull.
        assert path.exists() or path.name == "flags.md", target
        if anchor:
            assert anchor in anchors(path.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("program, arguments", COMMANDS)
def test_commands_have_flags_that_exist(program, arguments, entry_flags):
    entry_flags(program, shlex.split(arguments.replace("\\\n", " "), comments=True))


def test_commands_were_found():
    found = {param.values[0] for param in COMMANDS}
    assert {"main", "filter_unlabel", "noisy_student", "export_model"} <= found
    assert len(COMMANDS) > 30


def test_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 1200


def test_differences_link_to_their_modules():
    """A comment `Differs (<number>)` marks each difference in its module."""
    text = PAGES["docs/differences.md"]
    links = re.findall(r"^(\d+)\. .*?\(\.\./(efficientnet_ns/[^)#]+)\)", text, re.M | re.S)
    marks = [
        (number, str(path.relative_to(ROOT)))
        for path in (ROOT / "efficientnet_ns").rglob("*.py")
        for number in re.findall(r"Differs \((\d+)\)", path.read_text())
    ]
    assert len(links) > 5
    assert links == sorted(marks, key=lambda mark: int(mark[0]))


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    listed = set(re.findall(r"(\w+\.md)$", navigation, re.MULTILINE))
    assert listed - {"flags.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_every_public_name_is_documented():
    documented = re.findall(
        r"^::: efficientnet_ns\.([\w.]+)\.(\w+)$", PAGES["docs/python.md"], re.M
    )
    assert sorted(name for _, name in documented) == efficientnet_ns.__all__
    for module, name in documented:
        source = ROOT.joinpath("efficientnet_ns", *module.split(".")).with_suffix(".py")
        assert re.search(rf"^(def |class )?{name}\b", source.read_text(), re.MULTILINE), name


def test_files_that_the_code_names_are_described():
    """Covers the files that users find in folders, such as `review.html`."""
    foreign = {"config.json", "dataset_info.json", "imagenet_classes.txt", "labels.txt"}
    named = {
        name
        for path in (ROOT / "efficientnet_ns").rglob("*.py")
        for name in re.findall(
            r'"([a-z_]+\.(?:jsonl?|csv|html|parquet|png|txt))"', path.read_text()
        )
    }
    assert len(named) > 20
    page = PAGES["docs/files.md"]
    stems = {name.split(".")[0] for name in re.findall(r"`[^`]*?(\w+\.\w+)`", page)}
    assert {n for n in named if n.split(".")[0] not in stems} <= foreign


def test_variables_that_are_read_are_described():
    page = set(re.findall(r"`([A-Z_]+)`", PAGES["docs/environment.md"]))
    read = set()
    for path in (ROOT / "efficientnet_ns").rglob("*.py"):
        read |= set(re.findall(r'environ(?:\.\w+\(|\[)"([A-Z_]+)"', path.read_text()))
    for path in (ROOT / "tpu_scripts").rglob("*.sh"):
        read |= set(re.findall(r"\$\{([A-Z_]+):[-?]", path.read_text()))
    assert {"TF_CONFIG", "TMPDIR", "TPU_NAME"} <= read
    assert not read - page


def test_exit_codes_are_described():
    codes = set(re.findall(r"^\| (\d+) \|", PAGES["docs/environment.md"], re.MULTILINE))
    constants = (preemption.EXIT_CODE, standard_output.UNREAD)
    assert codes == {"0", "1", "2", *map(str, constants)}


@pytest.mark.parametrize("page", ["docs/serving.md", "efficientnet_ns/serving/model_card.md"])
def test_signatures_are_described(page):
    source = (ROOT / "efficientnet_ns/serving/signatures.py").read_text()
    names = set(re.findall(r'^ +"(\w+)": \(self\._\w+, "\w+"', source, re.MULTILINE))
    names |= set(re.findall(r'"(\w+)": ', source.split("def _described")[1].split("def ")[0]))
    assert {"serving_default", "top_probabilities", "valid"} <= names
    assert names <= set(re.findall(r"`(\w+)`", (ROOT / page).read_text()))


def test_troubleshooting_quotes_messages_of_the_code():
    """The text between two `…` of a quoted message must be part of a message."""
    code = "\n".join(path.read_text() for path in (ROOT / "efficientnet_ns").rglob("*.py"))
    messages = re.sub(r'"\s*\n\s*f?"', "", code)
    quoted = re.findall(r"^\*\*`([^`]*…[^`]*)`", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 8
    for message in quoted:
        for part in message.split("…"):
            assert part.strip() in messages, message
