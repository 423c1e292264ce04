"""What a language model writes, as a prompt: plain characters, without decoration around it."""

from __future__ import annotations

import re

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u00a0\u202f\u2007\t", " "),
        "\ufffd": None,
    }
)
_FENCE = re.compile(r"^```\w*\s*\n(.*?)\n?```$", re.DOTALL)
# a line, and a heading, that only say what follows
_PREAMBLE = re.compile(r"^[^\n:]{0,80}\bprompt\b[^\n:]{0,40}:[*_]*[ \t]*\n+", re.IGNORECASE)
_LABEL = re.compile(r"^[#*_\s]*(?:enhanced |video |final )?prompt[*_]*\s*:[*_]*\s*", re.IGNORECASE)
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_DECORATION = re.compile(r"^[#>*\-\s]+")


def cleaned(text: str) -> str:
    """Without white space, markdown, a label and quotation marks around it, and with plain quotes and dashes in it.

    Empty where no letter or digit is left.
    """
    text = text.translate(_PLAIN)
    text = "".join(c for c in text if c.isprintable() or c == "\n").strip()
    text = _FENCE.sub(r"\1", _PREAMBLE.sub("", text).strip())
    text = _EMPHASIS.sub(r"\2", _LABEL.sub("", text))
    text = _unquoted(_DECORATION.sub("", text).strip())
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    return text if any(c.isalnum() for c in text) else ""


def _unquoted(text: str) -> str:
    """Without quotation marks around the whole; those of speech stay."""
    for mark in ('"', "'", "`"):
        if len(text) > 1 and text[0] == text[-1] == mark and mark not in text[1:-1]:
            return text[1:-1].strip()
    return text
