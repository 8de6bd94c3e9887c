"""CSV and FITS tables as other programs write them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from galaxydist.errors import UserError
from galaxydist.surveys.folder_scan import safe_name
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.survey_sources import open_survey
from galaxydist.surveys.table_columns import ColumnNames, find_columns, text_values
from galaxydist.surveys.tables.table_files import read_table, split_hdu
from tests.helpers.survey_files import write_image


def test_fits_table_is_read_in_native_order_without_padding_or_masked_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from astropy.io import fits

    columns = [
        fits.Column("OBJID", "K", array=np.array([587739505552785605, 2, -1]), null=-1),
        fits.Column("FLUX", "E", array=np.array([1.5, np.nan, 2.5], np.float32)),
        fits.Column("FILE", "12A", array=np.array(["a.jpg", "b c.jpg   ", ""])),
        fits.Column("IS_EDGE", "L", array=np.array([True, False, True])),
        fits.Column("COUNT", "I", bzero=32768, array=np.array([65535, 0, 7], np.uint16)),
        fits.Column("MAGS", "5E", array=np.zeros((3, 5), np.float32)),
    ]
    empty = fits.BinTableHDU.from_columns([fits.Column("X", "E", array=np.zeros(0))], name="EMPTY")
    full = fits.BinTableHDU.from_columns(columns, name="GALAXIES")
    other = fits.BinTableHDU.from_columns([fits.Column("Y", "J", array=np.arange(4))])
    fits.HDUList([fits.PrimaryHDU(), empty, full, other]).writeto(tmp_path / "t.fits")
    table = read_table(tmp_path / "t.fits")
    assert table.schema == pa.schema(
        {"OBJID": pa.int64(), "FLUX": pa.float32(), "FILE": pa.string(), "IS_EDGE": pa.bool_(), "COUNT": pa.uint16()}
    )
    assert table.column("OBJID").to_pylist() == [587739505552785605, 2, None]
    assert table.column("FILE").to_pylist() == ["a.jpg", "b c.jpg", ""] and table.column("COUNT").to_pylist() == [65535, 0, 7]
    assert "are not in the catalogue: MAGS" in caplog.text
    (tmp_path / "t.fits.gz").write_bytes(gzip.compress((tmp_path / "t.fits").read_bytes()))
    assert read_table(tmp_path / "t.fits.gz").equals(table)
    for hdu, names in (("3", ["Y"]), ("galaxies", table.column_names), ("EMPTY", ["X"])):
        path, found = split_hdu(f"{tmp_path}/t.fits[{hdu}]")
        assert read_table(Path(path), found).column_names == names
    (tmp_path / "t.csv").write_text("file,label\na,b\n")
    with pytest.raises(UserError, match=r"t.csv is no FITS table, so that it has no extension \[2\]"):
        read_table(tmp_path / "t.csv", "2")
    with pytest.raises(
        UserError, match=r"no table extension \[4\]; its tables are 1 \(EMPTY, 0 rows\), 2 \(GALAXIES, 3 rows\), 3 \("
    ):
        read_table(tmp_path / "t.fits", "4")


@pytest.mark.parametrize(("unit", "factor"), [("h", 15), ("hourangle", 15), ("rad", 180 / np.pi), ("deg", 1), (None, 1)])
def test_positions_of_a_fits_table_are_read_in_the_unit_of_their_column(tmp_path: Path, unit: str | None, factor: float) -> None:
    from astropy.io import fits

    ra, names = np.linspace(0, 6, 10), [f"{n}.png" for n in range(10)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, number)
    columns = [
        fits.Column("file", "8A", array=names),
        fits.Column("label", "J", array=np.arange(10) % 2),
        fits.Column("RA", "D", unit, array=ra),
        fits.Column("DEC", "D", "deg", array=-ra),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "t.fits")
    survey = open_survey(tmp_path / "t.fits")
    assert isinstance(survey, TableSurvey)
    np.testing.assert_allclose(survey.ra, ra * factor, rtol=1e-15)
    np.testing.assert_array_equal(survey.dec, -ra)


def test_json_lines_as_hugging_face_puts_them_beside_images_are_a_table(tmp_path: Path) -> None:
    lines = [{"file_name": f"{n}.png", "label": "ab"[n % 2], "size": n or None, "boxes": [[n]]} for n in range(10)]
    for number, line in enumerate(lines):
        write_image(tmp_path / str(line["file_name"]), number)
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    survey = open_survey(path)
    assert isinstance(survey, TableSurvey) and survey.class_names == ("a", "b") and survey.name == safe_name(tmp_path.name)
    assert survey.extras.column_names == ["source_id", "size", "file"] and survey.extras["size"].to_pylist() == [
        None,
        *range(1, 10),
    ]
    with pytest.raises(UserError, match=r"one folder of images for each class.* If metadata.jsonl lists the images"):
        open_survey(tmp_path)
    path.write_text("\n".join(json.dumps(line | {"objid": 1.2376e18 + 256 * number}) for number, line in enumerate(lines)))
    with pytest.raises(UserError, match=r"column 'objid': its ids are floating-point numbers .* the last ones are lost; store"):
        open_survey(path)
    path.write_text('{"file_name": "0.png", "label": "a"}\n{"file_name": 7, "label": "b"}')
    with pytest.raises(UserError, match=r"metadata.jsonl is not a table of JSON lines, one object for each row"):
        open_survey(path)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a;b\n+1,5;x\n+2,5e1;y,z\n", {"a": [1.5, 25.0], "b": ["x", "y,z"]}),
        ("#Table1\nobjID,ra\n1237,10.5\n", {"objID": [1237], "ra": [10.5]}),
        ("# ra,dec\n1,2\n", {"ra": [1], "dec": [2]}),
        ('a\tb\n"two\nlines"\t1\n', {"a": ["two\nlines"], "b": [1]}),
        ("a,b\r\n+5,TRUE\r\n,false\r\n", {"a": [5, None], "b": [True, False]}),
        ("a,b\n1_000,0x1F\n1,1\n", {"a": ["1_000", "1"], "b": ["0x1F", "1"]}),
        ("a, b\n NA , x \n 2.5 , NA \n", {"a": [None, 2.5], "b": ["x", "NA"]}),
        ("a,b\n,\n,\n", {"a": [None, None], "b": [None, None]}),
        ("\ufeffa,b\n1e400,007\n", {"a": [float("inf")], "b": ["007"]}),
        ("a,b\n", {"a": [], "b": []}),
    ],
)
def test_csv_cells_become_numbers_only_if_the_whole_column_does(
    tmp_path: Path, text: str, columns: dict[str, list[object]]
) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_table(tmp_path / "t.csv").to_pydict() == columns
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_table(tmp_path / "t.csv.gz").to_pydict() == columns


def test_numbers_have_the_shortest_text() -> None:
    for values, texts in (([2.0, None, -7.0], ["2", None, "-7"]), ([2.5, 2.0], ["2.5", "2"]), ([1e20, 2.0], ["1e+20", "2"])):
        assert text_values(pa.chunked_array([pa.array(values)])).to_pylist() == texts


def test_columns_are_found_by_usual_names_in_an_order_and_by_the_users_choice() -> None:
    zoobot = ["id_str", "iauname", "file_loc", "ra", "dec", "smooth", "GZ2_CLASS"]
    assert find_columns(zoobot, ColumnNames(), "t") == ColumnNames("file_loc", "GZ2_CLASS", "id_str", None, "ra", "dec")
    chosen = find_columns(zoobot, ColumnNames(id="IAUNAME", label="smooth", ra="none", dec="none"), "t")
    assert chosen == ColumnNames("file_loc", "smooth", "iauname")
    assert find_columns(["file", "class", "label", "ra"], ColumnNames(), "t", is_labelled=False) == ColumnNames("file")
    assert find_columns(["id", "file"], ColumnNames(file="id"), "t") == ColumnNames("id")
    with pytest.raises(UserError, match="two columns are named 'a'"):
        find_columns(["a", "b", "a"], ColumnNames(), "t")
