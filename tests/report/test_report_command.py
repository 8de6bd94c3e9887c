"""The report of many runs: what stands in its page and tables, and what becomes of runs that cannot be reported."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cli.main import main
from galaxydist.evaluation.text_table import hours_text
from galaxydist.report.collect import ZOOBOT_NOTE, ReportData, collect, cost_of, read_facts
from galaxydist.report.finished_runs import read_finished_runs
from galaxydist.report.page import render_report
from galaxydist.report.tables import escape_latex, p_text, settings_of, signed
from tests.helpers.report_runs import BATCH_SIZE, write_calibration, write_gallery_of, write_logs, write_sweep
from tests.helpers.trial_folders import STEP, write_trial

PROVENANCE = {"command": "galaxydist report runs", "version": "1.2.3", "versions": "numpy 2"}


class Page(HTMLParser):
    """The ids of the sections, their text, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "path", "use", "circle", "rect", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attributes)["id"] or ""
            self.text[self._section] = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.text[self._section] += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A simulated sweep, the real data set with one recipe in two regimes, and what can go wrong."""
    root = tmp_path_factory.mktemp("runs")
    simulated = write_sweep(root / "simulated", models=("resnet18", "custom_cnn"))
    write_gallery_of(simulated[0])
    runs = [run.path for run in simulated]
    runs += [run.path for run in write_sweep(root / "real", models=("vit", "reference/vit"), dataset="galaxy10_decals")]
    runs.append(write_trial(root / "half", ["recipe=vgg16", "seed=7"], finished=False).path)
    runs.append(write_trial(root / "bare", ["recipe=vgg16"], keep_predictions=False, validation=None).path)
    (root / "empty").mkdir()
    return collect([*runs, root / "empty"])


@pytest.fixture(scope="module")
def texts(results: ReportData) -> dict[str, str]:
    return render_report(results, PROVENANCE)


@pytest.fixture(scope="module")
def html(texts: dict[str, str]) -> str:
    return texts[".html"]


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_report_page_compares_only_the_real_data_set_with_published_values(results: ReportData, page: Page) -> None:
    assert [found.table.dataset for found in results.datasets] == ["galaxy10_decals", "simulated"]
    real, simulated = page.text["matrix"].split("\nsimulated\n")
    assert "published 0.7638" in real and "published" in real and "not run" in real
    assert not re.search(r"published \d", simulated)
    assert "not the real Galaxy10 DECaLS" in simulated


def test_report_has_rows_and_claims_for_reference_and_own_recipes(results: ReportData) -> None:
    labels = [row.label for row in results.datasets[0].table.rows if row.display == "ViT"]
    assert labels == ["ViT (reference)", "ViT"]
    assert set(results.datasets[0].claims) == {"reference", "own"}
    assert results.datasets[1].claims == {}, "simulated galaxies have no published claims"


def test_report_page_has_all_sections_with_their_content(page: Page) -> None:
    wanted = ["matrix", "claims", "ranking", "curves", "classes", "confusion", "calibration"]
    wanted += ["gallery", "pairs", "ensembles", "cost", "runs"]
    assert list(page.text) == [*wanted, "notes", "provenance"]
    assert all(len(text.split()) > 10 for name, text in page.text.items() if name != "notes")
    assert "galaxydist report runs" in page.text["provenance"] and "1.2.3" in page.text["provenance"]
    assert "Device hours" in page.text["cost"] and "share" in page.text["cost"]
    assert "0.080" in page.text["calibration"] and "1.250" in page.text["calibration"]
    assert "launch.py recipe=vit" in page.text["runs"] and "train.batch_size=64" in page.text["runs"]


def test_report_page_shows_every_claim_with_a_verdict(results: ReportData, page: Page) -> None:
    for answers in results.datasets[0].claims.values():
        for one in answers:
            assert one.statement in page.text["claims"]
    verdicts = re.findall(r"\b(supported|contradicted|undecided)\b", page.text["claims"])
    assert len(verdicts) >= 6 * 3  # reference recipes, own recipes, published numbers


def test_report_page_notes_runs_that_are_left_out(results: ReportData, page: Page) -> None:
    notes = page.text["notes"]
    assert re.search(r"half: left out: the run has not finished", notes)
    assert re.search(r"empty is not a run folder", notes)
    assert re.search(r"bare: kept no predictions on original.*galaxydist evaluate [^\n]+bare\b", notes)
    assert (results.num_given, results.num_runs) == (19, 17)


def test_report_without_any_finished_run_exits_with_2_and_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trial(tmp_path / "runs" / "half", ["recipe=vgg16"], finished=False)
    assert main(["report", "half"]) == 2
    error = capsys.readouterr().err
    assert "the run has not finished" in error and "it continues" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_report_refuses_wrong_folders_and_output_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    for arguments, words in (
        (["gone"], "no such folder"),
        (["nothing"], "contains no run"),
        (["nothing", "-o", "nothing"], "is a folder"),
        (["nothing", "-o", "page.pdf"], "page.html"),
    ):
        assert main(["report", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nothing"]


def test_report_of_a_sweep_file_writes_3_files_and_lists_trials_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text("grid: {recipe: [demo], seed: [0, 1]}\nroot: runs/two\n")
    from galaxydist.cluster.sweep import read_sweep, resolve

    first = resolve(read_sweep(tmp_path / "two.yaml"))[0]
    write_trial(first.run_dir, ["recipe=demo", "seed=0"], dataset="simulated", accuracy={"original": 0.5})
    assert main(["report", "two.yaml", "-o", "out/two.html"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"two.html", "two.md", "two.tex"}
    output = capsys.readouterr().out
    assert "not started. Start it: galaxydist sweep two.yaml" in output and "1 run on simulated; 1 more" in output


def test_report_page_loads_no_external_resource_and_no_script(html: str) -> None:
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)
    assert "<script" not in html and "@import" not in html


def test_report_page_shows_existing_galleries_and_the_commands_for_missing_ones(results: ReportData, html: str) -> None:
    shown = Page(html).text["gallery"]
    best = {facts.run.run_dir: judged for found in results.datasets for _, facts, judged in found.best_on_own()}
    with_one = [run_dir for run_dir in best if (run_dir / "evaluation" / "test-gallery.json").exists()]
    assert len(best) > 4 and len(with_one) == 1
    for run_dir, judged in best.items():
        is_missing = judged.predictions_path is not None and run_dir not in with_one
        assert (f"galaxydist gallery {shlex.quote(str(run_dir))}" in shown) == is_missing
    assert f"{with_one[0].name}, trained and tested on original" in shown
    assert "Most confident mistakes. What the sheet of mistakes shows." in shown and "Least certain galaxies." in shown
    assert html.count('src="data:image/jpeg;base64,') == 2


def test_a_gallery_that_cannot_be_made_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_trial(tmp_path / "runs" / "a", ["recipe=vit"])
    assert main(["report", str(tmp_path / "runs"), "--gallery", "-o", str(tmp_path / "page.html")]) == 0
    assert f"note: {run.path}: no gallery: " in capsys.readouterr().out
    assert "no gallery: " in Page((tmp_path / "page.html").read_text()).text["notes"]


def test_report_page_shows_accuracy_without_validation_galaxies(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "run", ["recipe=vgg16"], accuracy={"original": 0.5, "balanced": 0.5}, num_galaxies=200)
    assert "Without the galaxies" not in render_report(collect([run.path]), PROVENANCE)[".html"]
    path = run.evaluation_dir / "test.json"
    content = read_json(path)
    write_json(path, content | {"without_validation": {"count": 168, "accuracy": 0.5119, "loss": None}})
    shown = Page(render_report(collect([run.path]), PROVENANCE)[".html"]).text["matrix"]
    assert "Without the galaxies" in shown and "32 of 200" in shown and "51.19" in shown


def test_report_escapes_text_of_runs_in_html_markdown_and_latex(tmp_path: Path) -> None:
    names = ("<b>disturbed", "a|b", "c_d%", "e&f")
    run = write_trial(tmp_path / "a<i>b", ["recipe=vit"], dataset="<simulated>", class_names=names, accuracy={"original": 0.5})
    texts = render_report(collect([run.path]), PROVENANCE)
    html = texts[".html"]
    assert "<b>disturbed" not in html and "a<i>b" not in html and "<simulated>" not in html
    assert r"a\|b" in texts[".md"]
    assert r"c d\%" in texts[".tex"]


def test_report_markdown_tables_have_equal_columns_in_every_row(texts: dict[str, str]) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", texts[".md"], re.MULTILINE)
    assert len(blocks) > 10
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_report_latex_tables_have_equal_columns_in_every_row(texts: dict[str, str]) -> None:
    text = texts[".tex"]
    tables = re.findall(r"\\begin\{tabular\}\{([^\n]*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) > 10 and text.count(r"\begin{") == text.count(r"\end{")
    for columns, body in tables:
        width = len(re.sub(r"p\{.*?\}\}?", "p", columns))
        for line in body.splitlines():
            if line.endswith(r"\\"):
                spans = sum(int(span) - 1 for span in re.findall(r"\\multicolumn\{(\d)\}", line))
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == width, line
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels)
    assert re.search(r"ViT & .*\n\\quad published & 0\.7638 \(", text)


@given(st.text(alphabet=r"ab\&%$#_{}~^<>|±− ", max_size=20))
def test_latex_escape_leaves_no_special_character(text: str) -> None:
    plain = re.sub(
        r"\\textbackslash\{\}|\\textasciitilde\{\}|\\textasciicircum\{\}|\\textbar\{\}|\$[^$]+\$|\\[&%$#_{}]",
        "",
        escape_latex(text),
    )
    assert not set(plain) & set(r"\&%$#_{}^<>|±−")


def test_cost_of_a_run_multiplies_hours_by_devices(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "run", ["recipe=vit"], validation=None)
    write_logs(run, 0.5, devices=4)
    cost = cost_of(run.timing.read(), BATCH_SIZE)
    assert cost is not None and (cost.devices, cost.kind) == (4, "CPU")
    assert cost.hours == pytest.approx(STEP * BATCH_SIZE / 400 / 3600)
    assert cost.device_hours == pytest.approx(4 * cost.hours)
    assert cost_of([], BATCH_SIZE) is None and cost_of([{"step": 5}], BATCH_SIZE) is None


def test_damaged_timing_log_is_noted_and_calibration_is_kept(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "run", ["recipe=vit"])
    write_calibration(run)
    run.timing.path.write_text("nonsense\n")
    (trial,), _ = read_finished_runs([run.path])
    facts = read_facts(trial)
    assert facts.cost is None and len(facts.notes) == 1 and "timing.jsonl" in facts.notes[0]
    assert facts.calibration["ece"] == 0.08


def test_command_shown_for_a_run_resolves_to_the_same_result_hash(tmp_path: Path) -> None:
    from galaxydist.recipe.identity import result_hash
    from galaxydist.recipe.resolve import load_recipe

    given_arguments = ["recipe=reference/vit", "seed=3", "optim.lr=0.002", "data.variant=balanced", "resume.force=[seed]"]
    run = write_trial(tmp_path / "run", given_arguments, accuracy={"balanced": 0.5})
    (trial,), _ = read_finished_runs([run.path])
    command = read_facts(trial).command
    again = load_recipe(command.split()[3:]).recipe
    assert result_hash(again) == result_hash(load_recipe(given_arguments).recipe) and again.data.variant == "balanced"
    assert "resume" not in command


def test_report_ranking_uses_validation_not_test_accuracy(tmp_path: Path) -> None:
    runs = [
        write_trial(tmp_path / "good-test", ["recipe=vit"], accuracy={"original": 0.9}, validation=0.4, dataset="simulated"),
        write_trial(tmp_path / "good-val", ["recipe=resnet18"], accuracy={"original": 0.3}, validation=0.6, dataset="simulated"),
    ]
    ((ranked, unranked),) = collect([run.path for run in runs]).datasets[0].rankings
    assert [run.run_dir.name for run in ranked] == ["good-val", "good-test"] and unranked == []


@pytest.mark.parametrize(("dataset", "is_flagged"), [("galaxy10_decals", True), ("simulated", False)])
def test_zoobot_is_flagged_where_its_votes_made_the_labels(dataset: str, is_flagged: bool, tmp_path: Path) -> None:
    name = "hf-hub:mwalmsley/zoobot-encoder-convnext_nano"
    run = write_trial(tmp_path / "run", ["recipe=resnet18", f"model.name={name}"], dataset=dataset, accuracy={"original": 0.5})
    assert (ZOOBOT_NOTE in collect([run.path]).notes) == is_flagged


def test_rows_of_one_recipe_are_labelled_with_the_settings_that_differ(tmp_path: Path) -> None:
    for number, more in enumerate(([], ["optim.lr=0.5"])):
        write_trial(tmp_path / str(number), ["recipe=resnet18", *more], dataset="simulated", accuracy={"original": 0.5})
    found = collect(sorted(tmp_path.iterdir())).datasets[0]
    assert sorted(settings_of(found).values()) == ["optim.lr=0.02", "optim.lr=0.5"]


def test_report_on_own_data_shows_only_its_runs_without_published_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"dataset": "my_survey", "class_names": ("spiral", "merger"), "accuracy": {"original": 0.5}, "num_galaxies": 60}
    runs = {
        "first try": ["recipe=resnet18"],
        "lower rate": ["recipe=resnet18", "optim.lr=0.0005", "tracker.name=wandb", "train.log_every=7"],
        "small/net": ["recipe=custom_cnn"],
        "other/net": ["recipe=d4_cnn"],
        "seed 0": ["recipe=vgg16"],
        "seed 1": ["recipe=vgg16", "seed=1"],
    }
    for name, arguments in runs.items():
        run = write_trial(tmp_path / "runs" / name, arguments, **own)  # type: ignore[arg-type]
        path = run.evaluation_dir / "test.json"
        write_json(path, read_json(path) | {"intervals": {"accuracy": [0.41, 0.59], "macro_f1": [0.4, 0.6], "loss": None}})
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")]) == 0
    html, markdown, latex = ((tmp_path / f"page.{ending}").read_text() for ending in ("html", "md", "tex"))
    found = collect([tmp_path / "runs" / name for name in runs]).datasets[0]
    assert {row.label for row in found.table.rows} == {
        *("first try", "lower rate", "VGG16"),
        *(str(tmp_path / "runs" / name) for name in ("small/net", "other/net")),  # two folders of one name
    }
    assert "claims" not in Page(html).text
    for text in (html, markdown, latex, capsys.readouterr().out):
        assert not re.search("published|not run|Galaxy10|balanced</th>|on balanced|ViT|ResNet50", text.split("</style>")[-1])
    # Only what changes numbers tells lines apart.
    assert set(settings_of(found).values()) == {"optim.lr=0.0005", "optim.lr=0.02"}
    content = read_json(tmp_path / "runs" / "seed 1" / "evaluation" / "test.json")
    accuracy, balanced, f1 = (f"{content[name]:.3f}" for name in ("accuracy", "balanced_accuracy", "macro_f1"))
    numbers = [f"{accuracy} [0.410, 0.590]", balanced, f"{f1} [0.400, 0.600]", f"{content['loss']:.3f}"]
    assert f"| seed 1 | VGG16 | original | original | 1 | 60 | {' | '.join(numbers)} |" in markdown
    assert f"seed 1 & VGG16 & original & original & 1 & 60 & {' & '.join(numbers)} \\\\" in latex
    assert numbers[0] in Page(html).text["matrix"]


def test_numbers_p_values_and_hours_are_formatted_for_the_report() -> None:
    assert (signed(0.0121), signed(-0.5), signed(-0.0001)) == ("+0.012", "−0.500", "0.000")
    assert (p_text(0.0004), p_text(0.0164)) == ("p < 0.001", "p = 0.016")
    assert (hours_text(1.25), hours_text(0.5), hours_text(0.001)) == ("1.2 h", "30.0 min", "4 s")
