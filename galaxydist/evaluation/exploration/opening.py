"""From what the user names to a population: a manifest, a URL, an HDF5 file or a folder of pictures."""

from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.evaluation.exploration.population import Population
from galaxydist.evaluation.exploration.shard_source import shard_population
from galaxydist.evaluation.exploration.survey_source import survey_population
from galaxydist.shards.manifest import MANIFEST_NAME, Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.object_store import is_url
from galaxydist.shards.remote.open import open_shards
from galaxydist.surveys.survey_sources import open_survey


def open_population(location: str, variant: str | None, cache: CacheConfig, classes: str | None = None) -> Population:
    """Open a data set to look at.

    Args:
        location: manifest.json, its folder or its URL; an HDF5 file in Galaxy10's schema; a folder of pictures.
        variant: ``original`` or ``balanced``; ``original`` where None. Shards have one variant: another one is refused.
        cache: where the columns of shards in a store are kept.
        classes: ``galaxy10``: a folder's classes are Galaxy10's.

    Raises:
        UserError: nothing there, nothing that can be used, or no galaxies in it.
    """
    path = Path(location)
    if is_url(location) or path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file():
        population = shard_population(_checked(open_shards(location, cache), variant))
    elif not path.exists():
        raise UserError(
            f"there is no {location}; give a manifest.json of shards (or its folder or URL), an HDF5 file in Galaxy10's schema, "
            "or a folder with a folder of pictures for each class"
        )
    else:
        population = survey_population(open_survey(path, variant or "original", classes=classes), path)
    if not len(population):
        raise UserError(f"{location} has no galaxies in any split; there is nothing to look at, make the data set anew")
    return population


def _checked(manifest: Manifest, variant: str | None) -> Manifest:
    if variant not in (None, manifest.variant):
        raise UserError(
            f"{manifest.location} holds the {manifest.variant} variant, not {variant}; "
            "leave out --variant, or give the other variant's manifest"
        )
    return manifest
