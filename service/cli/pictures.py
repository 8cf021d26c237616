"""Pictures inside a terminal: JPEG or PNG bytes come in, escape sequences that show them go out.

There are two protocols: kitty's, which Ghostty understands too, and iTerm2's, which WezTerm understands too. A terminal
is recognized by its environment, because asking it would swallow the user's typing. For `spray generate --previews`.
"""

import base64
import os
import sys
from collections.abc import Callable

from workers.model.media import as_png

CHUNK = 4096
"""The most characters of base64 in one of kitty's commands."""

ROWS = 12
"""Lines of the terminal that a picture takes."""

NO_PREVIEWS = (
    "no previews: standard error is no terminal that shows pictures (kitty, Ghostty, iTerm2 or WezTerm, outside tmux "
    "and screen)"
)

Shown = Callable[[bytes], str]


def shown_by_terminal() -> Shown | None:
    """The function that shows a picture in the terminal at standard error; None if the terminal cannot."""
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if not sys.stderr.isatty() or "TMUX" in os.environ or term.startswith(("screen", "tmux")):
        return None
    if term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return for_kitty
    if program in ("iTerm.app", "WezTerm") or os.environ.get("LC_TERMINAL") == "iTerm2":
        return for_iterm
    return None


def for_kitty(picture: bytes) -> str:
    """Kitty's command to show a picture here, in as many parts as needed. Kitty takes only PNG."""
    text = base64.b64encode(as_png(picture)).decode()
    parts = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    first = f"a=T,f=100,r={ROWS},q=2,"  # transmit and show; PNG; its height; say nothing back
    commands = (
        f"\x1b_G{'' if number else first}m={int(number < len(parts) - 1)};{part}\x1b\\"
        for number, part in enumerate(parts)
    )
    return "".join(commands) + "\n"


def for_iterm(picture: bytes) -> str:
    """iTerm2's command to show a picture here."""
    text = base64.b64encode(picture).decode()
    return f"\x1b]1337;File=inline=1;size={len(picture)};height={ROWS};preserveAspectRatio=1:{text}\a\n"
