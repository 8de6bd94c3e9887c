"""Licences of data sets and weights: common names, non-commercial ones, redistribution of images, names on the Hub.

A licence is text: an SPDX identifier, or the name or text of another licence. A text that is not recognised permits nothing. This
decides what the package shows and copies by itself, and is no legal advice.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galaxydist.surveys.data_origin import DataOrigin

# Identifiers of licences of data and weights on the Hub (docs/hub/repositories-licenses.md of huggingface/hub-docs).
_HUB_ID = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause|-3-clause-clear)?|isc|mpl-2\.0|zlib|unlicense|wtfpl|ncsa|postgresql|epl-[12]\.0|afl-3\.0"
    r"|a?gpl-3\.0|gpl(-2\.0)?|lgpl(-2\.1|-3\.0)?|eupl-1\.1|openrail|odc-by|odbl|pddl|c-uda|etalab-2\.0"
    r"|cdla-(sharing-1\.0|permissive-[12]\.0)|cc|cc0-1\.0|cc-by-(2\.[05]|[34]\.0)|cc-by-sa-[34]\.0|cc-by-nc-[234]\.0"
    r"|cc-by-nd-4\.0|cc-by-nc-nd-[34]\.0|cc-by-nc-sa-[234]\.0"
)
_ALIASES = {
    "apache": "apache-2.0",
    "apache-license-2.0": "apache-2.0",
    "cc0": "cc0-1.0",
    "mit-license": "mit",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
}
_CC_PAGE = re.compile(
    r"(?:https?://)?creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/(zero)/1\.0)\S*", re.IGNORECASE
)
_NON_COMMERCIAL = re.compile(r"\bNC\b|\bnon-?\s?commercial|\b(research|academic)( use| purposes)? only\b", re.IGNORECASE)
# Licences under which images may be passed on; Creative Commons only without ND (no derivatives: a thumbnail is one).
_REDISTRIBUTABLE = re.compile(
    r"cc-by(-nc)?(-sa)?(-\d\.\d)?|cc0-1\.0|public-domain|mit|apache-2\.0|bsd(-[23]-clause)?|isc|odc-by|odbl|pddl|unlicense|cdla-permissive-[12]\.0"
)
# Licences that ask for nothing but their own text or nothing at all, then those that ask for attribution, then share-alike ones.
_BY_STRICTNESS = (
    re.compile(r"cc0-1\.0|public-domain|mit|apache-2\.0|bsd.*|isc|pddl|unlicense|zlib|wtfpl|ncsa|postgresql"),
    re.compile(r"cc-by(-\d\.\d)?|odc-by|cdla-permissive-[12]\.0|etalab-2\.0"),
    re.compile(r"cc-by-sa(-\d\.\d)?|odbl|cdla-sharing-1\.0"),
)


def spdx(licence: str) -> str:
    """Return a licence as SPDX writes it where it is a common one: ``cc-by-4.0`` and ``CC BY 4.0`` as ``CC-BY-4.0``."""
    page = _CC_PAGE.fullmatch(licence.strip())
    if page is not None:
        return "CC0-1.0" if page[3] else f"CC-{page[1]}-{page[2]}".upper()
    words = re.sub(r"[\s_-]+", "-", licence.strip())
    if re.fullmatch(r"cc-?(by|0)[\w.-]*|mit", words, re.IGNORECASE):
        return words.upper()
    return licence.strip()


def is_non_commercial(licence: str | None) -> bool:
    """Return True if a licence's name or text says that it is for non-commercial use only."""
    return bool(_NON_COMMERCIAL.search(licence or ""))


def may_redistribute_images(origin: "DataOrigin | None") -> bool:
    """Return True if the licence of a data set is one under which its images may be passed on, with its name and its citation.

    Those are CC0, the public domain, CC-BY with or without SA and NC, and permissive licences of software and of data. Licences
    without derivatives, others and unknown ones are not. A non-commercial one binds whoever takes the images from here.
    """
    return origin is not None and bool(_REDISTRIBUTABLE.fullmatch(hub_id(origin.licence)))


def hub_id(licence: str | None) -> str:
    """Return a licence in the Hub's spelling, in lower case with hyphens, whether the Hub knows it or not; '' for None."""
    words = re.sub(r"[\s_-]+", "-", spdx(licence or "").lower())
    return _ALIASES.get(words, words)


def hub_fields(licence: str | None, link: str | None = None) -> dict[str, str]:
    """Return the fields of a model card's header that name a licence, by a name of its own if the Hub does not know it.

    Args:
        licence: None: unknown.
        link: page of a licence that the Hub does not know.
    """
    if licence is None:
        return {"license": "unknown"}
    known = hub_id(licence)
    if _HUB_ID.fullmatch(known):
        return {"license": known}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")[:64] or "see-the-card"
    return {"license": "other", "license_name": name} | ({"license_link": link} if link else {})


def model_licence(licences: Sequence[str | None]) -> str | None:
    """Return the strictest of the licences that a model's weights rest on; None if it is not known.

    A non-commercial one comes first, then an unknown one, then one that is not recognised, share-alike, attribution, permissive.

    Args:
        licences: of the training data, and of the weights that the training started from, if there were any; None: unknown.
    """
    return max(licences, key=_strictness, default=None)


def _strictness(licence: str | None) -> int:
    if licence is None:
        return len(_BY_STRICTNESS) + 1
    if is_non_commercial(licence):
        return len(_BY_STRICTNESS) + 2
    known = hub_id(licence)
    return next((rank for rank, pattern in enumerate(_BY_STRICTNESS) if pattern.fullmatch(known)), len(_BY_STRICTNESS))
