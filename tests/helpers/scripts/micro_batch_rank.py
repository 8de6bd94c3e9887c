"""One rank of two whose memories differ, for the tests of micro-batches.

It writes ``FOLDER/RANK.json``: the micro-batch found for each pair of limits, and the sizes that were tried.
"""

import json
import os
from pathlib import Path

from galaxydist.distributed import init_distributed, shutdown_distributed
from galaxydist.errors import EveryRankError
from galaxydist.recipe.resolve import load_recipe
from galaxydist.training.micro_batch import find_micro_batch
from tests.helpers.scripts.limited_model import LimitedModel


def find_micro_batches(folder: Path, limits: list[tuple[int, int]]) -> None:
    world = init_distributed("no", os.environ)
    assert world.size == 2
    recipe = load_recipe(["recipe=custom_cnn", "train.batch_size=47", "data.image_size=16"]).recipe
    answers = []
    for pair in limits:
        model = LimitedModel(pair[world.rank])
        try:
            found: object = find_micro_batch(world, recipe, model, force=True)
        except EveryRankError as error:
            found = str(error)
        answers.append({"found": found, "sizes": model.sizes})
    (folder / f"{world.rank}.json").write_text(json.dumps(answers))
    shutdown_distributed()
