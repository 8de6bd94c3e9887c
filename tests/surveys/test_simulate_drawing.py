"""The simulated sky: profiles hold their light, arms their pitch, stars their seeing, noise its size, colours the formula."""

import itertools

import numpy as np
import pytest

from galaxydist.surveys.simulate import components, observation
from galaxydist.surveys.simulate.components import CENTRE, MARGIN, SIZE, Scene
from galaxydist.surveys.simulate.galaxy_types import LOOSE_PITCH, TIGHT_PITCH, draw_arms, draw_light
from galaxydist.surveys.simulate.random_draws import GALAXY, PIXELS, Draws, pixel_normals


def test_random_draws_are_reproducible_and_independent_of_chunk_size() -> None:
    draws = Draws(1, GALAXY, 2)
    assert [round(draws.uniform(), 6) for _ in range(3)] == [round(value, 6) for value in Draws(1, GALAXY, 2).uniforms(3)]
    long = Draws(1, GALAXY, 2).uniforms(1500)
    again = Draws(1, GALAXY, 2)
    assert np.array_equal(np.concatenate([again.uniforms(7), again.uniforms(1493)]), long)
    # Golden values: if they change, so does every simulated survey.
    assert long[[0, 1, 511, 512]].tolist() == [0.8611299952630873, 0.7706711222526322, 0.7275415674078095, 0.7487194462511325]
    draws = Draws(1, GALAXY, 2)
    assert draws.normal() == pytest.approx(1.085410216479377)
    assert (draws.integer(0, 9), draws.pick([1, 2, 3]), draws.poisson(4.2), draws.bernoulli(0.5)) == (7, 1, 4, False)
    assert pixel_normals((1, 3), 1, PIXELS, 2).tolist() == [pytest.approx([-0.0964773, -1.6789854, 0.2858688], rel=1e-6)]


def test_random_draws_have_normal_and_poisson_moments() -> None:
    draws = Draws(3, GALAXY, 0)
    normals = draws.normals(20_000)
    assert abs(normals.mean()) < 0.02
    assert abs(normals.std() - 1.0) < 0.02
    counts = [draws.poisson(4.2) for _ in range(4000)]
    assert abs(np.mean(counts) - 4.2) < 0.12
    assert abs(np.var(counts) - 4.2) < 0.4
    white = pixel_normals((200, 200), 1, 2)
    assert abs(float(white.std()) - 1.0) < 0.01


@pytest.mark.parametrize(("radius", "axis_ratio", "index"), [(8.0, 1.0, 1.0), (10.0, 0.5, 1.0), (6.0, 0.8, 2.5)])
def test_a_sersic_profile_has_unit_light_half_within_its_radius(radius: float, axis_ratio: float, index: float) -> None:
    y, x = np.mgrid[-250:251, -250:251].astype(np.float32)
    profile = components.sersic(x, y, radius, axis_ratio, index)
    assert profile.sum() == pytest.approx(1.0, abs=0.03)
    inside = x**2 + (y / axis_ratio) ** 2 < radius**2
    assert profile[inside].sum() / profile.sum() == pytest.approx(0.5, abs=0.03)


def test_edge_on_disc_bar_and_arc_have_unit_light() -> None:
    y, x = np.mgrid[-200:201, -200:201].astype(np.float32)
    assert components.edge_on_disc(x, y, 12.0, 4.0).sum() == pytest.approx(1.0, abs=0.06)
    assert components.bar(x, y, 20.0, 0.3).sum() == pytest.approx(1.0, abs=0.06)
    assert components.arc(x, y, radius=40.0, width=4.0, start=0.5, span=1.5).sum() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("pitch", [10.0, 25.0])
def test_arms_have_the_pitch_they_were_asked_for(pitch: float) -> None:
    y, x = np.mgrid[-100:101, -100:101].astype(np.float32)
    radius, theta = np.hypot(x, y) + 1e-3, np.arctan2(y, x)
    pattern = components.spiral_arms(theta, np.log(radius), num_arms=2, pitch=np.radians(pitch), phase=0.3, sharpness=1.5)
    assert pattern[(radius > 20) & (radius < 90)].mean() == pytest.approx(1.0, abs=0.03)
    # The pattern's m = 2 phase turns with ln r as 2 / tan(pitch).
    edges = np.geomspace(20, 90, 60)
    wave = pattern * np.exp(-2j * theta)
    phases = np.unwrap([np.angle(wave[(radius >= low) & (radius < high)].sum()) for low, high in itertools.pairwise(edges)])
    slope = np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), phases, 1)[0]
    assert np.degrees(np.arctan(2.0 / abs(slope))) == pytest.approx(pitch, rel=0.05)


def test_tight_spiral_arms_have_smaller_pitch_than_loose_ones() -> None:
    draws = Draws(1, GALAXY, 9)
    tight = [np.degrees(draw_arms(draws, tight=True).pitch) for _ in range(50)]
    loose = [np.degrees(draw_arms(draws, tight=False).pitch) for _ in range(50)]
    assert (
        TIGHT_PITCH[0]
        <= min(tight)
        <= max(tight)
        <= TIGHT_PITCH[1]
        < LOOSE_PITCH[0]
        <= min(loose)
        <= max(loose)
        <= LOOSE_PITCH[1]
    )


def test_a_star_has_the_seeing_of_its_band() -> None:
    scene = Scene(observation.DECAM_PIXEL)
    scene.add_points(np.array([0.5]), np.array([0.5]), np.ones((1, 3), np.float32))
    blurred = observation.blur(scene.light_CHW, observation.SEEING, observation.DECAM_PIXEL)
    middle = round(CENTRE + 0.5)
    for band, fwhm in enumerate(observation.SEEING):
        row = blurred[band, middle]
        assert blurred[band].sum() == pytest.approx(1.0, abs=1e-3)
        half = np.interp(0.5 * row[middle], row[middle : middle + 15][::-1], np.arange(15)[::-1])
        assert 2.0 * half * observation.DECAM_PIXEL == pytest.approx(fwhm, rel=0.03)


def test_sky_noise_has_the_configured_deviation_in_each_band() -> None:
    scene = Scene(observation.DECAM_PIXEL)
    ratios = []
    for row in range(60):
        noisy = observation.add_noise(scene.light_CHW, Draws(1, 1, row), observation.DECAM_PIXEL, 1, row)
        assert noisy.shape == (3, SIZE, SIZE)
        ratios.append(noisy.std(axis=(1, 2)) / np.array(observation.NOISE))
    assert np.median(ratios, axis=0) == pytest.approx([1.0, 1.0, 1.0], abs=0.1)


def test_stretch_matches_the_arcsinh_formula_of_the_legacy_viewer() -> None:
    black = observation.stretch(np.zeros((3, 2, 2), np.float32))
    assert black == pytest.approx(np.arcsinh(0.6) / np.sqrt(20.0))
    # 0.1 nanomaggies in r alone: x = (0.03, 0.37, 0.03), I = 0.4300 / 3.
    fluxes = np.array([0.0, 0.1, 0.0], np.float32)[:, None, None]
    intensity = 0.43 / 3
    gain = np.arcsinh(20 * intensity) / (np.sqrt(20.0) * intensity)
    assert observation.stretch(fluxes)[0, 0] == pytest.approx([0.03 * gain, min(0.37 * gain, 1.0), 0.03 * gain])
    assert np.all(observation.stretch(np.full((3, 1, 1), 100.0, np.float32)) == 1.0)


def test_few_simulated_galaxies_have_the_coarse_pixel_scale_and_all_fit_the_image() -> None:
    lights = [draw_light(Draws(1, GALAXY, row), label) for label in range(10) for row in range(200)]
    assert {light.pixel_scale for light in lights} == {0.262, 0.524}
    for light in lights:  # beyond a half-light radius of 48 fine pixels
        assert (light.pixel_scale == 0.524) == (light.radius * light.pixel_scale > 48 * 0.262)
    assert max(light.radius for light in lights) * 2 < SIZE / 2 + MARGIN
    assert np.mean([light.pixel_scale > 0.3 for light in lights]) < 0.1


def test_round_galaxies_are_redder_than_loose_spirals_and_redden_with_redshift() -> None:
    round_ones = [draw_light(Draws(2, GALAXY, row), 2) for row in range(400)]
    loose_ones = [draw_light(Draws(2, GALAXY, row), 7) for row in range(400)]
    assert np.median([light.green_red for light in round_ones]) > np.median([light.green_red for light in loose_ones]) + 0.15
    near, far = (np.mean([x.green_red for x in round_ones if (x.redshift > 0.1) == side]) for side in (False, True))
    assert far > near
