"""Escape names and texts of files for Markdown, and read them back."""

import re


def plain(text: str) -> str:
    """Escape a text for Markdown, so that names make no HTML, no link, no column and no line of their own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
    return re.sub(r"(!?)\[(?=[^\]]*\]\()", r"\1\\[", text).replace("\n", "&#10;")


def as_plain(text: str) -> str:
    """Return the text that `plain` escaped."""
    text = text.replace("\\|", "|").replace("\\[", "[")
    return text.replace("&#10;", "\n").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
