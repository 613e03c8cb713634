"""Write the parts of the documentation that the package itself knows: a hook of mkdocs.

`<!-- names: load sample -->` becomes the reference of these public names. `<!-- verbs -->` becomes the help of every
verb. Formulas become MathML, so that a page needs nothing from another host.
"""

import contextlib
import html
import io
import os
import re
import sys

from latex2mathml.converter import convert

import dyndit
from dyndit import _HOME
from dyndit.cli import VERBS, main

NAMES = re.compile(r"<!-- names: (.*?) -->")
VERBS_MARK = "<!-- verbs -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:analysis|dyndit|recipes|tests)/[^)]*\)")
CODE = re.compile(r"`[^`\n]+`")
SETTINGS = re.compile(r"^\| settings\..*$", re.M)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Fill the marks of a page. Raises KeyError for a name that is not public, ValueError for one left out."""
    if VERBS_MARK in markdown:
        markdown = markdown.replace(VERBS_MARK, "\n\n".join(map(verb_section, VERBS)))
    if asked := [name for mark in NAMES.findall(markdown) for name in mark.split()]:
        if sorted(asked) != sorted(dyndit.__all__):
            raise ValueError(f"{page}: names {sorted(set(asked) ^ set(dyndit.__all__))} not once on the page")
        markdown = NAMES.sub(lambda mark: "\n\n".join(map(name_section, mark[1].split())), markdown)
    markdown = markdown.replace('title="slow"', 'title="takes a while"')
    markdown = OUTSIDE.sub(r"\1", markdown)  # sources lie beside the site, not in it
    markdown = CODE.sub(lambda span: span[0].replace(r"\|", "|"), markdown)  # GitHub needs the backslash in tables
    # Lists of a report's manifest, such as [12, 6] [8, 4], would be read as links.
    return SETTINGS.sub(lambda line: line[0].replace("[", r"\["), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Replace each formula by MathML. One on a line of its own scrolls where the window is narrow."""

    def drawn(found: re.Match[str]) -> str:
        if found[2] == "(":
            return convert(html.unescape(found[3]), display="inline")
        return f'<div style="overflow-x:auto">{convert(html.unescape(found[3]), display="block")}</div>'

    return FORMULA.sub(drawn, content)


def name_section(name: str) -> str:
    """Return the mark that mkdocstrings replaces by the reference of a public name."""
    home = _HOME[name]
    place = home if home.startswith("analysis") else f"dyndit.{home}"  # in a checkout `analysis` lies at the top
    return f"::: {place}.{name}\n    options:\n      heading: dyndit.{name}\n      toc_label: {name}"


def verb_section(verb: str) -> str:
    """Return a heading and the help that `dyndit VERB --help` prints."""
    return f"## dyndit {verb}\n\n```text\n{help_of(verb)}\n```"


def help_of(verb: str) -> str:
    """Run `dyndit VERB --help` in this process, 80 columns wide and without colours."""
    printed = io.StringIO()
    kept = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS="80", NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([verb, "--help"])
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


if __name__ == "__main__":
    print(help_of(sys.argv[1]))
