"""``galaxydist bench order``: how well an epoch is shuffled, how fast a large one opens, which shards a job's nodes fetch."""

import json
import tempfile
from pathlib import Path
from typing import Any

from galaxydist.benchmarks.order_fetch import ADVICE, Job, default_choices, default_jobs, measure_fetches, print_fetches
from galaxydist.benchmarks.order_open import measure_opening, print_opening
from galaxydist.benchmarks.order_quality import galaxy10_store, measure_quality, print_quality, survey_store


def measure_order(*, quick: bool = False) -> list[dict[str, Any]]:
    """Print a table of each measurement and, last, a line of JSON each.

    Args:
        quick: smaller surveys: to see that it works, not to quote.

    Returns:
        What the lines of JSON hold.
    """
    results = []
    for store, batch_size in ((galaxy10_store(), 192), (galaxy10_store(), 64), (survey_store(60 if quick else 4000), 192)):
        results.append(measure_quality(store, batch_size))
        print_quality(results[-1])
    with tempfile.TemporaryDirectory(prefix="galaxydist-order-") as folder:
        large = {"num_shards": 1000, "repeats": 2, "num_batches": 20} if quick else {"num_shards": 100_000}
        results.append(measure_opening(Path(folder), shard_samples=10_000, **large))
    print_opening(results[-1])
    for job in [Job(10, 8, 300, 1000)] if quick else default_jobs():
        results.append(measure_fetches(job, default_choices(job.world_size)))
        print_fetches(results[-1])
    print(ADVICE)
    for result in results:
        print(json.dumps(result))
    return results
