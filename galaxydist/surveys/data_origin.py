"""Origin of a data set: its licence, citation, revision and address, stated by the user or the source, or known by name.

A licence, of data or of weights, is text: an SPDX identifier, or the name or text of another licence. A text that is not
recognised permits nothing. This decides what the package shows and copies by itself, and is no legal advice.

Sources of the known origins: their records on Zenodo and the pages in ``DataOrigin.url``; the acknowledgements in
henrysky/Galaxy10; the loader of MultimodalUniverse's gz10; the cards of mwalmsley/gz_desi and mwalmsley/gz_evo on the Hugging
Face Hub.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from galaxydist.errors import UserError

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


# Lengths of the texts of an origin: they stand in every manifest, which is read whole.
MAX_LENGTH = 20_000


@dataclass(frozen=True)
class DataOrigin:
    """Licence and source of a data set; None where unknown.

    Args:
        licence: SPDX identifier, or the name or text of another licence.
        citation: works to cite, as text or BibTeX.
        revision: version of the source: a commit, a data release, a record's version.
        url: address of the source.
    """

    licence: str | None = None
    citation: str | None = None
    revision: str | None = None
    url: str | None = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the origin in a manifest or a run; keys of later versions are ignored.

        Raises:
            TypeError: a value is not text.
        """
        known = {field.name: plain.get(field.name) for field in fields(cls)}
        if wrong := [name for name, value in known.items() if not isinstance(value, str | None)]:
            raise TypeError(f"{wrong[0]} is not text")
        return cls(**known)

    def to_dict(self) -> dict[str, str]:
        """Return the values that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, other: "DataOrigin | None") -> "DataOrigin":
        """Return this origin, completed by another one where it is unknown."""
        return DataOrigin(**{**(other or DataOrigin()).to_dict(), **self.to_dict()})

    @property
    def is_known(self) -> bool:
        """True if anything is known."""
        return self != DataOrigin()

    @property
    def is_non_commercial(self) -> bool:
        """True if the licence's name says that the data are for non-commercial use only."""
        return is_non_commercial(self.licence)

    def describe(self) -> dict[str, str]:
        """Return one line of text for each known value, by its name; a non-commercial licence is called that."""
        lines = {name: " ".join(value.split()) for name, value in self.to_dict().items()}
        if self.is_non_commercial:
            lines["licence"] += " (non-commercial use only)"
        return lines


_GALAXY_ZOO = "labels: Galaxy Zoo (Lintott et al. 2008, MNRAS 389, 1179; Lintott et al. 2011, MNRAS 410, 166)"
_GZ_DECALS = "Walmsley et al. 2022, MNRAS 509, 3966, doi:10.1093/mnras/stab2093"
_LEGACY = (
    "images: DESI Legacy Imaging Surveys (Dey et al. 2019, AJ 157, 168, doi:10.3847/1538-3881/ab089d; acknowledgement: "
    "https://www.legacysurvey.org/acknowledgment)"
)
_GALAXY10 = f"Galaxy10 DECaLS (Leung & Bovy, doi:10.5281/zenodo.10845026); {_GALAXY_ZOO}; {_GZ_DECALS}; {_LEGACY}"

# Known data sets by name, without regard to capitals and separators; first the names of this package's own commands.
_KNOWN: dict[tuple[str, ...], DataOrigin] = {
    ("galaxy10_decals",): DataOrigin("CC-BY-4.0", _GALAXY10, url="https://astronn.readthedocs.io/en/latest/galaxy10.html"),
    ("simulated",): DataOrigin("MIT", "drawn by galaxydist's simulator: no observed galaxies"),
    ("gz2", "galaxy_zoo_2"): DataOrigin(
        "CC-BY-4.0",
        "Willett et al. 2013, MNRAS 435, 2835, doi:10.1093/mnras/stt1458; Hart et al. 2016, MNRAS 461, 3663, "
        "doi:10.1093/mnras/stw1588; images: Sloan Digital Sky Survey (York et al. 2000, AJ 120, 1579, doi:10.1086/301513)",
        url="https://data.galaxyzoo.org",
    ),
    ("gz_decals", "galaxy_zoo_decals", "gz_decals_5"): DataOrigin(
        "CC-BY-4.0", f"{_GZ_DECALS}; {_LEGACY}", url="https://doi.org/10.5281/zenodo.4573248"
    ),
    ("gz_desi", "galaxy_zoo_desi"): DataOrigin(
        "CC-BY-NC-SA-4.0",
        f"Walmsley et al. 2023, MNRAS 526, 4768, doi:10.1093/mnras/stad2919; {_LEGACY}",
        url="https://huggingface.co/datasets/mwalmsley/gz_desi",
    ),
    ("gz_evo", "galaxy_zoo_evo"): DataOrigin(
        "CC-BY-NC-SA-4.0",
        "Galaxy Zoo Evo: 1 million human-annotated images of galaxies (Walmsley et al. 2025); Walmsley et al. 2024, "
        "arXiv:2404.02973",
        url="https://huggingface.co/datasets/mwalmsley/gz_evo",
    ),
    ("gz10", "mmu_gz10", "multimodal_universe_gz10"): DataOrigin(
        "MIT",
        f"The Multimodal Universe Collaboration 2024, arXiv:2412.02527; {_GALAXY10}",
        url="https://huggingface.co/datasets/MultimodalUniverse/gz10",
    ),
}


def known_origin(dataset: str) -> DataOrigin | None:
    """Return the origin of a data set that is known by its name; a fold of it has the same."""
    for names, origin in _KNOWN.items():
        if any(re.fullmatch(rf"{_letters(name)}(fold\d+of\d+)?", _letters(dataset)) for name in names):
            return origin
    return None


def is_simulated(dataset: str) -> bool:
    """Return True for a data set of this package's simulator, which has no observed galaxies."""
    return known_origin(dataset) is not None and known_origin(dataset) == known_origin("simulated")


def is_galaxy10(dataset: str) -> bool:
    """Return True for Galaxy10 DECaLS, by its name here or in the Multimodal Universe."""
    return known_origin(dataset) is not None and known_origin(dataset) in (known_origin("galaxy10_decals"), known_origin("gz10"))


# Layer of the Legacy Surveys' viewer from which the images of data sets were cut: henrysky/Galaxy10's downloader asks for
# layer=dr8, whose present name is ls-dr8, at 0.262 arcsec/pixel.
_LAYERS = {"galaxy10_decals": "ls-dr8", "gz10": "ls-dr8", "mmu_gz10": "ls-dr8", "multimodal_universe_gz10": "ls-dr8"}


def legacy_layer(dataset: str) -> str | None:
    """Return the layer of the Legacy Surveys' viewer that a known data set's images were cut from; None for others."""
    found = (layer for name, layer in _LAYERS.items() if re.fullmatch(rf"{_letters(name)}(fold\d+of\d+)?", _letters(dataset)))
    return next(found, None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def origin_of(survey: object, stated: DataOrigin | None = None) -> DataOrigin | None:
    """Return the origin of a survey; None if nothing is known.

    The user's own statement comes first, then the source's (``survey.origin``, where a survey has it), then what is known of a
    data set of this name.

    Args:
        survey: with a ``name`` and perhaps an ``origin``.
        stated: the user's statement.
    """
    own = getattr(survey, "origin", None)
    origin = (stated or DataOrigin()).over(own).over(known_origin(str(getattr(survey, "name", ""))))
    return origin if origin.is_known else None


def state_origin(licence: str | None, citation: str | None, revision: str | None) -> DataOrigin | None:
    """Return the origin that a user states; None if nothing was given.

    Raises:
        UserError: a text is empty, too long, or not valid Unicode.
    """
    given = {"licence": licence, "citation": citation, "revision": revision}
    texts = {name: text.strip() for name, text in given.items() if text is not None}
    for name, text in texts.items():
        if not text or len(text) > MAX_LENGTH:
            raise UserError(f"--{name} has {len(text)} characters: give 1 to {MAX_LENGTH:,}, or leave it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"--{name} is not valid Unicode: {text!r}") from None
    if not texts:
        return None
    return DataOrigin(**texts | ({"licence": spdx(texts["licence"])} if licence is not None else {}))
