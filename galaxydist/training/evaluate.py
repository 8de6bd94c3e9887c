"""The exact evaluation of a run: a checkpoint's weights on a split, as JSON, figures and a table."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from galaxydist.errors import UserError
from galaxydist.evaluation.report import read_evaluation, render_table, write_evaluation
from galaxydist.models.build import build_model
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.paths import data_root
from galaxydist.recipe.schema import Recipe
from galaxydist.runs import checkpoints
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.training.data import build_augment, find_manifest, has_split
from galaxydist.training.state import evaluation_weights
from galaxydist.training.validation import evaluate_split
from galaxydist.training.world import World, enter_world, leave_world
