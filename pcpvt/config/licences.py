"""Licences as a model card on the Hugging Face hub names them (the identifiers of its documentation, "Licenses")."""

import difflib
import re
from typing import NamedTuple

_IDENTIFIERS = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 "
    "lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl "
    "postgresql unlicense wtfpl zlib"
)
IDENTIFIERS = frozenset(_IDENTIFIERS.split())
_OTHER = re.compile(r"([A-Za-z0-9][\w .+-]*)=(https?://[^\s\"'<>]+)")  # NAME=URL


class Licence(NamedTuple):
    """The licence fields of a model card."""

    identifier: str  # of IDENTIFIERS, or "other"
    name: str = ""  # of another licence
    link: str = ""  # to its text


def parse(text: str) -> Licence | None:
    """An identifier in any case, or `NAME=URL` for another licence; None for anything else."""
    text = text.strip()
    if text.lower() in IDENTIFIERS:
        return Licence(text.lower())
    other = _OTHER.fullmatch(text)
    return Licence("other", other[1].strip(), other[2]) if other else None


def check(value: str) -> str:
    """What is wrong with `config.export.license`; empty when nothing is, or when it is not set."""
    if not value or parse(value):
        return ""
    near = difflib.get_close_matches(value.lower().replace(" ", "-"), sorted(IDENTIFIERS), 1)
    hint = f"did you mean {near[0]}?" if near else "give one such as apache-2.0, or NAME=URL of another licence"
    return f"{value!r} is no licence that the hub knows: {hint}"
