"""Data sets of fixed bytes, whose source hashes are known: they must stay, or old shards would count as another source's."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from galaxydist.surveys import galaxy10
from galaxydist.surveys.hdf5_schema import COLUMNS

METADATA = """file,id,split,label,ra,dec,row,redshift,conflicting,note
train/b/x.ppm,g-00001,train,1,10.5,-3.25,1,0.02,false,two words
train/b/y.ppm,g-00000,train,1,11.5,-3.25,0,,true,"[1, 2]"
val/a/v.ppm,g-00003,val,0,12.5,80,3,0.1,false,
train/a/z.ppm,g-00002,train,0,,,2,0.1,false,x
test/a/u.ppm,g-00005,test,0,13.5,80,5,0.1,false,x
test/b/w.ppm,g-00004,test,1,14.5,80,4,0.1,false,x
val/b/w2.ppm,g-00006,val,1,15.5,80,6,0.1,false,x
"""


def write_ppm(path: Path, seed: int) -> None:
    """An image whose bytes hang on no library: 4 x 4 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = bytes((seed * 37 + place * 11) % 256 for place in range(48))
    path.write_bytes(b"P6 4 4 255\n" + pixels)


def plain_folder(root: Path) -> Path:
    """Class folders alone, with folders in them and names that need another id."""
    for number in range(8):
        write_ppm(root / "class2" / f"{number}.ppm", number)
        write_ppm(root / "class10" / "part 1" / f"J22.{number}-00.4.PPM", 20 + number)
    return root


def split_folder(root: Path) -> Path:
    """Split folders, one of which is missing."""
    for number in range(9):
        for label, name in enumerate(("spiral", "élan")):
            write_ppm(root / "training" / name / f"{number}.ppm", number + 50 * label)
            write_ppm(root / "Test" / name / f"t{number}.ppm", 30 + number + 50 * label)
    return root


def exported_folder(root: Path) -> Path:
    """As `data export` writes it, and an image that came later."""
    for number, line in enumerate(METADATA.splitlines()[1:]):
        write_ppm(root / line.split(",")[0], number)
    write_ppm(root / "train" / "a" / "later.ppm", 99)
    (root / "metadata.csv").write_text(METADATA)
    (root / "dataset.json").write_text(
        json.dumps({"name": "mine", "variant": "original", "source_hash": "0" * 64, "num_galaxies": 7, "format": 1})
    )
    return root


def survey_file_hash(root: Path) -> str:
    """The hash of a survey file with these columns and bytes; HDF5 itself would write other bytes in another version."""
    path = root / "survey.h5"
    path.write_bytes(bytes(number % 251 for number in range(70_000)))
    columns = {name: np.arange(20).astype(dtype) for name, dtype in COLUMNS.items()}
    file = galaxy10.SurveyFile(path, columns, {"seed": 3, "survey": "simulated"}, 32)
    return galaxy10._source_hash(file, "simulated", np.arange(20, dtype=np.int8) % 3)


FOLDERS: dict[str, Callable[[Path], Path]] = {"plain": plain_folder, "splits": split_folder, "exported": exported_folder}
