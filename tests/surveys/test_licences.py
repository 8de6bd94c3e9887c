"""Licences: common spellings, non-commercial ones, redistribution of images, and the fields of a model card."""

from collections.abc import Sequence

import pytest

from galaxydist.surveys.data_origin import (
    DataOrigin,
    hub_fields,
    is_non_commercial,
    known_origin,
    may_redistribute_images,
    model_licence,
    spdx,
)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("free for non-commercial use", True),
        ("Noncommercial", True),
        ("for academic research only", True),
        ("CC-BY-4.0", False),
        (None, False),
    ],
)
def test_a_non_commercial_licence_is_recognised(licence: str | None, expected: bool) -> None:
    assert is_non_commercial(licence) == DataOrigin(licence).is_non_commercial == expected


def test_licences_are_written_as_spdx_writes_them() -> None:
    names = {
        "cc-by-4.0": "CC-BY-4.0",
        " CC BY-NC SA 4.0": "CC-BY-NC-SA-4.0",
        "cc0-1.0": "CC0-1.0",
        "mit": "MIT",
        "https://creativecommons.org/licenses/by-nc/4.0/deed.en": "CC-BY-NC-4.0",
        "creativecommons.org/publicdomain/zero/1.0/": "CC0-1.0",
    }
    assert {name: spdx(name) for name in names} == names
    assert spdx("My own licence: ask me ") == "My own licence: ask me"


@pytest.mark.parametrize(
    ("licence", "is_allowed"),
    [
        *((name, True) for name in ("CC-BY-4.0", "cc by-nc-sa 4.0", "CC0", "MIT", "Public Domain", "apache-2.0")),
        *((name, False) for name in ("CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "CC-BY-4.0, but ask me first", "other", "", None)),
    ],
)
def test_images_are_passed_on_only_under_a_licence_that_is_known_to_allow_it(licence: str | None, is_allowed: bool) -> None:
    assert may_redistribute_images(DataOrigin(licence)) == is_allowed
    assert not may_redistribute_images(None)


def test_images_of_the_known_data_sets_may_be_passed_on() -> None:
    assert all(may_redistribute_images(known_origin(name)) for name in ("galaxy10_decals", "simulated", "gz2", "gz_desi", "gz10"))


@pytest.mark.parametrize(
    ("licences", "strictest"),
    [
        (["CC-BY-4.0"], "CC-BY-4.0"),
        (["CC-BY-4.0", "apache-2.0"], "CC-BY-4.0"),
        (["MIT", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["CC-BY-SA-4.0", "dinov3-license"], "dinov3-license"),
        (["MIT", None], None),
        ([None, "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        ([], None),
    ],
)
def test_the_licence_of_a_model_is_the_strictest_of_data_and_starting_weights(
    licences: Sequence[str | None], strictest: str | None
) -> None:
    assert model_licence(licences) == strictest


def test_fields_of_a_card_name_licences_as_the_hub_does() -> None:
    assert hub_fields("CC BY 4.0") == {"license": "cc-by-4.0"} and hub_fields("Apache") == {"license": "apache-2.0"}
    assert hub_fields(None) == {"license": "unknown"}
    link = "https://example.org/licence"
    assert hub_fields("Survey Licence (v2)", link) == {
        "license": "other",
        "license_name": "survey-licence-v2",
        "license_link": link,
    }
