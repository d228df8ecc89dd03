"""What may stand in the shell command by which Triton's Python backend starts a stub.

It puts the stub's path, a model's folder and the names of its instances into ``bash -c "exec …"`` as they are: a blank
makes two words, of which the stub waits for ever for the wrong one, and ``$(…)`` is carried out. Quotes would not help,
as the words are read again as names. So nothing of that kind gets there: folders are served through links with plain
names, and a model whose own name is not plain is refused, before the start with advice, later by a guard in the shell's
place.
"""

from __future__ import annotations

import re
import shlex

# In ASCII what no shell gives a meaning, anywhere in a word; beyond it everything but blanks.
PLAIN = re.compile(r"[A-Za-z0-9_./@%+=:,\-\u0080-\U0010ffff]*")
BLANK = re.compile(r"\s")
# Of a config.pbtxt: its instance groups' names are the instances'; no other name of a served model needs special ones.
# Strings that follow each other are one.
NAME_FIELD = re.compile(r"""\bname\s*:(?P<strings>(?:\s*(?:"[^"\n]*"|'[^'\n]*'))+)""")
STRING = re.compile(r"""(?P<quote>["'])(?P<text>[^\n]*?)(?P=quote)""")

ADVICE = "letters, digits and . _ - @ % + = : , are taken as they are"


def is_plain(text: str) -> bool:
    """True if a shell takes ``text`` as one word that means itself."""
    return PLAIN.fullmatch(text) is not None and BLANK.search(text) is None


def special_names(config_pbtxt: str) -> list[str]:
    """Names in a config.pbtxt that a shell would not take as they are."""
    lines = (line for line in config_pbtxt.splitlines() if not line.lstrip().startswith("#"))
    fields = NAME_FIELD.finditer("\n".join(lines))
    names = ["".join(string["text"] for string in STRING.finditer(field["strings"])) for field in fields]
    return [name for name in names if not is_plain(name)]


# The command has eleven words, "exec" and the stub's ten. One that begins with "source" activates an environment that a
# model's config names, and is left alone.
GUARD = r"""#!/bin/sh
case "$2" in
*/STUB\ *)
    words=$(set -f; set -- $2; echo $#)
    special=no
    case "$2" in *[][\$\`\"\'\\\;\&\|\<\>\(\)\{\}\*\?\!\#\~\^]*) special=yes;; esac
    case "$2" in source\ *) ;; *)
        if [ "$words" != 11 ] || [ $special = yes ]; then
            echo "flashserve: error: not started, as a name in it is no plain word for a shell:$2" >&2
            exit 1
        fi;;
    esac;;
esac
exec BASH_PATH "$@"
"""


def guard_script(bash: str, stub: str) -> str:
    """A program to stand before ``bash`` on PATH: it starts stubs only where each word means itself."""
    return GUARD.replace("STUB", stub).replace("BASH_PATH", shlex.quote(bash))
