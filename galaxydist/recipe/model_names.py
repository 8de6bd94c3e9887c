"""Names of models in a recipe: this package's architectures, timm's, repositories of a hub, local folders and own functions.

Only the form of a name is checked here, since timm takes seconds to import.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

NAMED_MODELS = (
    "custom_cnn",
    "d4_cnn",
    "resnet18",
    "resnet26",
    "resnet50",
    "vgg16",
    "vgg19",
    "vit",
    "vit_scratch",
    "reference_vgg16",
    "reference_vgg19",
    "reference_cnn",
    "reference_vit",
)
# An environment variable: code that a run folder names may be run.
TRUST_VARIABLE = "GALAXYDIST_TRUST_CODE"
ModelKind = Literal["named", "timm", "hf-hub", "local-dir", "function"]

_WORD = r"[A-Za-z_][A-Za-z0-9_]*"
# Kind -> pattern with the groups ``name`` and, where the kind has one, ``version``.
_PATTERNS: dict[ModelKind, re.Pattern[str]] = {
    "timm": re.compile(r"timm/(?P<name>[A-Za-z0-9_]+)(?:\.(?P<version>[A-Za-z0-9_]+))?"),
    "hf-hub": re.compile(
        r"hf-hub:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<version>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
    ),
    "local-dir": re.compile(r"local-dir:(?P<name>[^\0]+)"),
    "function": re.compile(rf"(?P<name>{_WORD}(?:\.{_WORD})*):(?P<version>{_WORD})"),
}
FORMS = "timm/NAME[.TAG], hf-hub:OWNER/NAME[@REVISION], local-dir:FOLDER or package.module:function"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A parsed ``model.name``.

    Args:
        kind: ``named`` for an architecture of this package.
        name: of the architecture, repository (``OWNER/NAME``), folder or module.
        version: tag of timm's weights, revision of the repository (None: its newest), or name of the function.
    """

    kind: ModelKind
    name: str
    version: str | None = None

    @property
    def file_name(self) -> str:
        """The model as a file or folder name in the folder of weights, unique for each timm tag and repository revision."""
        if self.kind == "hf-hub":
            revision = f"@{self.version.replace('/', '--')}" if self.version else ""
            return f"{self.name.replace('/', '--')}{revision}"
        return self.name if self.version is None else f"{self.name}.{self.version}"


def parse_model_name(text: str) -> ModelReference:
    """Parse a ``model.name``.

    Raises:
        ValueError: the text has none of the forms; the message has the likely correction.
    """
    if text in NAMED_MODELS:
        return ModelReference("named", text)
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(text):
            return ModelReference(kind, **match.groupdict())
    close = get_close_matches(text, NAMED_MODELS, n=1)
    if close:
        hint = f"; did you mean {close[0]}?"
    elif re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", text):
        hint = f"; timm's models are written timm/{text}."
    elif re.fullmatch(r"[^/:\s]+/[^/:\s]+", text):
        hint = f"; repositories of the Hugging Face hub are written hf-hub:{text}."
    else:
        hint = "."
    raise ValueError(f"there is no such model{hint} A model is one of {', '.join(NAMED_MODELS)}; {FORMS}")


def check_model_name(text: str) -> str:
    """Return a ``model.name`` of a known form; raise ``ValueError`` like ``parse_model_name``."""
    parse_model_name(text)
    return text
