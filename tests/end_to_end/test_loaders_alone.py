"""The script of docs/others_shards.md: plain PyTorch over our shards and over foreign tars, exact and elastic."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.surveys.image_table import TableOptions
from galaxydist.surveys.tables.tar_scan import find_tars
from tests.helpers.foreign_tars import drawn_tars
from tests.helpers.forked_runs import run_forked

PAGE = Path(__file__).parents[2] / "docs" / "others_shards.md"


def run_script(folder: str, manifest: str, steps: int) -> None:
    """The script of the page, in double precision, as torchrun starts it."""
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sys.argv = ["loop.py", manifest, str(steps)]
    exec(compile(script, str(PAGE), "exec"), {"__name__": "__main__"})


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["our shards", "foreign tars"])
def test_the_script_of_the_page_stops_and_continues_on_another_number_of_processes(
    kind: str, blobs: Path, tmp_path: Path
) -> None:
    manifest = blobs
    if kind == "foreign tars":
        drawn_tars(tmp_path / "tars", 120, 30)
        manifest = index_tars(find_tars({None: str(tmp_path / "tars")}), tmp_path / "i", TableOptions("t"), IndexOptions()).path
    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    said = {}
    for name, parts in {"whole": [(1, 7)], "parts": [(2, 4), (1, 7)], "other": [(1, 3), (2, 7)]}.items():
        (tmp_path / name).mkdir()
        for size, steps in parts:
            environ = single if size == 1 else {}
            done = run_forked(run_script, str(tmp_path / name), str(manifest), steps, size=size, environ=environ)
            assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    weights = {name: torch.load(tmp_path / name / "loop.pt", weights_only=True)["net"] for name in said}
    for name in ("parts", "other"):
        differences = [(weights[name][key] - weights["whole"][key]).abs().max() for key in weights["whole"]]
        assert max(map(float, differences)) < 1e-9
    assert len(set(said.values())) == 1 and re.fullmatch(r"step 7: \d+ of \d+ test galaxies are right\n", said["whole"])
