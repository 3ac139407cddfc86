"""Comparisons: real cells in processes of their own, and what is refused before any is trained."""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from matplotlib.figure import Figure

from rosa.bench.grid.cell import Kind
from rosa.bench.grid.compare import compare
from rosa.bench.grid.executors import EXECUTORS
from rosa.bench.grid.grid import HALF_DECADES, Cell, Variant, make_grid
from rosa.bench.report.pictures import _spectra
from rosa.bench.report.results import read_comparison
from rosa.bench.report.tables import table_rows
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.storage.record import Record, read_record
from rosa.errors import UserError
from tests.helpers import Here, fails, run, write_csv
from tests.models import save_with_tokenizer, tiny_bert

METHODS = "rosa+resample_every=3,head,rosa+target_modules=nope"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[object]:
    folder = tmp_path_factory.mktemp("files")
    base = save_with_tokenizer(tiny_bert(), folder / "base")
    train, validation = write_csv(folder / "t.csv", 120), write_csv(folder / "v.csv", 40)
    data = ["--train", train, "--validation", validation]
    return ["--model", base, *data, "--epochs", 2, "--batch-size", 8]


@pytest.fixture(scope="module")
def comparison(files, tmp_path_factory) -> tuple[Path, list[object]]:
    """Two methods that train and one that cannot."""
    output = tmp_path_factory.mktemp("runs") / "cmp"
    grid = ["--methods", METHODS, "--ranks", 2, "--lrs", "1e-6,1e-2", "--seeds", "0,1"]
    command = ["compare", *files, *grid, "--jobs", 2, "--output", output]
    with pytest.raises(SystemExit):
        run(*command)
    return output, command


def test_every_rate_is_tried_with_one_seed_and_the_best_with_the_others(comparison):
    output, _ = comparison
    for method in ("rosa+resample_every=3-r2", "head"):
        tuned = {
            lr: runs.read_json(output / f"{method}-lr{lr}-s0" / "metrics.json")
            for lr in ("1e-06", "0.01")
        }
        best = max(tuned, key=lambda lr: (tuned[lr]["accuracy"], -tuned[lr]["eval_loss"]))
        others = [p.name for p in output.glob(f"{method}-lr*-s1")]
        assert others == [f"{method}-lr{best}-s1"]
    record = runs.read_json(output / "rosa+resample_every=3-r2-lr0.01-s0" / "metrics.json")
    assert record["validation_examples"] == 12  # a tenth of the training data
    assert record["test_examples"] == 40  # the validation file, which nothing is chosen on
    assert record["resamples"] == (record["steps"] - 1) // 3
    assert not list(output.glob("*/checkpoints"))


def test_a_failed_cell_is_reported_and_the_rest_goes_on(comparison, capsys):
    output, command = comparison
    shared = runs.read_json(output / "comparison.json")
    runs.write_json(output / "comparison.json", {**shared, "split": "B"})  # one that is no more
    failed = sorted(p.parent.name for p in output.glob("*/error.txt"))
    assert failed == [f"rosa+target_modules=nope-r2-lr{lr}-s0" for lr in ("0.01", "1e-06")]
    before = {p: p.stat().st_mtime_ns for p in output.glob("*/metrics.json")}
    message = fails(capsys, *command)  # the same again: only what failed is tried again
    assert "2 cells failed" in message
    assert "nope" in message
    assert before == {p: p.stat().st_mtime_ns for p in output.glob("*/metrics.json")}


def test_the_report_holds_the_runs_numbers_and_needs_no_other_file(comparison, tmp_path, capsys):
    output, _ = comparison
    run("report", output, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert "failed: rosa+target_modules=nope" in printed
    with (tmp_path / "report.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for method in ("rosa+resample_every=3", "head"):
        rank = "-r2" if rows[method]["rank"] else ""
        found = output.glob(f"{method}{rank}-lr{float(rows[method]['lr']):g}-s*/metrics.json")
        scores = [json.loads(p.read_text())["test_accuracy"] for p in found]
        assert len(scores) == int(rows[method]["seeds"]) == 2
        assert float(rows[method]["score"]) == pytest.approx(sum(scores) / 2)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 8
    assert not any(word in page for word in ("http://", "https://", "<script", "<link"))
    assert "| head |" in (tmp_path / "report.md").read_text()


def test_the_rank_of_the_change_grows_by_every_resample(comparison):
    output, _ = comparison
    history = runs.read_json(output / "rosa+resample_every=3-r2-lr0.01-s0" / "history.json")
    first, last = (set(e["ranks"].values()) for e in history["changes"]["epochs"])
    assert max(first) > 4  # more than one round of rank 2 can do
    assert max(last) >= max(first)


def test_a_comparison_of_a_version_with_fewer_settings_goes_on(comparison, capsys):
    output, command = comparison
    whole = runs.read_json(output / "comparison.json")
    some = ("set", "beta", "target_parameters")
    runs.write_json(output / "comparison.json", {k: v for k, v in whole.items() if k not in some})
    assert "other settings" not in fails(capsys, *command)  # two of its cells cannot train
    assert runs.read_json(output / "comparison.json") == whole


def test_another_comparisons_folder_is_not_written_to(comparison, files, tmp_path, capsys):
    output, command = comparison
    with FileLock(output / ".lock"):
        assert "another comparison is writing" in fails(capsys, *command)
    other = [*command, "--max-length", 16]
    assert "other settings: max_length (128 there, 16 here)" in fails(capsys, *other)
    (tmp_path / "notes.txt").write_text("mine")
    assert "not a comparison's" in fails(capsys, "compare", *files, "--output", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "rosa,lorra"], "unknown method 'lorra'; there are: rosa, lora"),
        (["--methods", ""], "no methods"),
        (["--methods", "head", "--ranks", "2"], "none of the methods has a rank"),
        (["--seeds", ""], "no seeds"),
        (["--seeds", "0,0"], "seeds has one twice"),
        (["--seeds", "a"], "--seeds takes whole numbers"),
        (["--ranks", "0"], "rank must be a positive integer"),
        (["--lrs", "x"], "'x' are not numbers"),
        (["--lrs", "full=1e-5"], "'full' is none of the methods compared"),
        (["--lrs", "-1"], "lr must be positive"),
        (["--lrs", "1e-3", "--lrs", "1e-4"], "--lrs 1e-4: all others had rates before"),
        (["--lrs", "rosa=1", "--lrs", "rosa=2"], "rosa had rates before: name them together"),
        (["--methods", "rosa+train=x.csv"], "the same data: train is no setting of one of them"),
        (["--methods", "rosa,lora+limit_train=9"], "limit_train is no setting of one of them"),
        (["--methods", "rosa,lora+model=x"], "model is no setting of one of them"),
        (["--methods", "lora+directions=svd"], "directions is ROSA's, and means nothing to"),
        (["--methods", "rosa+colour=red"], "'colour=red' is not setting=value"),
        (["--methods", "rosa+first_draw=few"], "first_draw takes int | None, got 'few'"),
        (["--methods", "rosa+directions=up"], "directions must be one of"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--task", "colla"], "unknown task 'colla'"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(files, tmp_path, arguments, message, capsys):
    if "--task" in arguments:
        files = files[:2]
    text = fails(capsys, "compare", *files, *arguments, "--output", tmp_path / "out")
    assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["t.csv", "v.csv"])
def test_a_comparison_goes_on_with_the_same_data_alone(files, tmp_path, which, monkeypatch, capsys):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    folder = tmp_path / "data"
    folder.mkdir()
    train, validation = write_csv(folder / "t.csv", 60), write_csv(folder / "v.csv", 20)
    data = ["--train", train, "--validation", validation, "--steps", 1, "--batch-size", 8]
    command = ["compare", *files[:2], *data, "--methods", "head", "--lrs", "1e-3", "--seeds", 0]
    command += ["--output", tmp_path / "out"]
    run(*command)
    before = (tmp_path / "out" / "comparison.json").read_text()
    path = folder / which
    old = path.read_text()
    path.write_text("\n".join(old.splitlines()[:-1]))
    message = fails(capsys, *command, "--methods", "head,lora")
    assert f"{which} has changed, come or gone since it was begun" in message
    assert (tmp_path / "out" / "comparison.json").read_text() == before
    path.write_text(old)
    run(*command)
    said = capsys.readouterr().out
    assert "1 cells, 1 of them finished before" in said
    assert "no other rate was tried of head" in said


@pytest.mark.parametrize("beside", ["", "settings.json", "comparison.json"])
@pytest.mark.parametrize("how", ["changed", "gone", "come"])
def test_a_comparison_goes_on_with_the_same_folder_of_data_alone(
    tmp_path, how, beside, monkeypatch
):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    data = tmp_path / "data"
    (data / "CoLA").mkdir(parents=True)
    for name in ("CoLA/train.tsv", "CoLA/dev.tsv", "b.txt"):
        (data / name).write_text("some")
    if beside:  # of another program, by its names and what is in them
        (data / "CoLA" / beside).write_text('{"colour": "red"}' if how == "gone" else "not JSON")
    base = RunSettings(model="m", output=data / "runs", task="cola", data=data)
    grid = make_grid(["full"], [], ["1e-3"], [0])
    assert not compare(base, grid, kind=by_distance(1e-3))
    assert not compare(base, grid, kind=by_distance(1e-3))
    (data / "listing").write_text("a file browser's")
    assert not compare(base, grid, kind=by_distance(1e-3))
    if how == "changed":
        (data / "CoLA" / "dev.tsv").write_text("other")
    elif how == "gone":
        (data / "CoLA" / "dev.tsv").unlink()
    else:
        (data / "CoLA" / "more.tsv").write_text("some")
    named = "more.tsv" if how == "come" else "dev.tsv"
    with pytest.raises(UserError, match=f"{named} has changed, come or gone"):
        compare(base, grid, kind=by_distance(1e-3))


def test_what_runs_leave_in_a_folder_of_data_is_no_data(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("some")
    grid = make_grid(["full"], [], ["1e-3"], [0])
    for i, data in enumerate((Path("data"), tmp_path / "data")):
        for output in (f"data/runs/a{i}", f"data/runs/b{i}", f"data/runs/a{i}"):
            base = RunSettings(model="m", output=Path(output), task="cola", data=data)
            assert not compare(base, grid, kind=by_distance(1e-3))


@pytest.mark.parametrize(
    "option", ["max_length=10", "loss_on=all", "packing=true", "chat_template=a.jinja", "task=rte"]
)
def test_methods_are_scored_on_the_same_texts(option):
    with pytest.raises(UserError, match="on one model and the same data"):
        Variant.parse(f"rosa+{option}")


def test_a_report_names_what_was_asked_for_and_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)

    def stopped(settings, variant, told):
        if settings.method == "full":
            raise KeyboardInterrupt
        return by_distance(1e-3).train(settings, variant, told)

    grid = make_grid(["lora", "full"], [2], ["1e-3,1e-2"], [0, 1])
    base = RunSettings(model="m", output=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(base, grid, kind=Kind(lambda base: None, stopped))
    found = read_comparison(tmp_path)
    assert [row.method for row in found.rows] == ["lora"]
    assert found.unfinished == ["full-lr0.001-s0", "full-lr0.01-s0"]
    assert not {"planned", "digests"} & found.settings.keys()
    compare(base, grid, kind=by_distance(1e-3))
    assert not read_comparison(tmp_path).unfinished


def test_what_is_not_a_comparison_makes_no_report(tmp_path, capsys):
    assert "not a comparison's folder" in fails(capsys, "report", tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    assert "has no finished run yet" in fails(capsys, "report", tmp_path)


def test_a_variant_holds_its_own_settings_and_rates():
    grid = make_grid(
        ["rosa", "rosa+moments=keep+first_draw=5", "full"], [2, 4], ["1e-3", "full=1e-5,3e-5"], [0]
    )
    _, variant, full = grid.variants
    assert variant.options == {"moments": "keep", "first_draw": 5}
    assert grid.rates(variant) == (1e-3,)
    assert grid.rates(full) == (1e-5, 3e-5)
    assert [rank for _, rank in grid.groups()] == [2, 4, 2, 4, None]
    assert make_grid(["full"], [], [], [0]).rates(full) == (1.5e-5, 5e-5, 1.5e-4)
    cell = Cell(Variant.parse("rosa+moments=keep"), 2, 1e-3, 0)
    assert cell.name == "rosa+moments=keep-r2-lr0.001-s0"


def test_a_rate_at_the_edge_of_the_grid_is_marked(comparison):
    rows = {row["method"]: row for row in table_rows(read_comparison(comparison[0]))}
    assert rows["head"]["at_edge"]


VARIANTS = [
    "rosa",
    "lora",
    "head",
    "rosa+moments=keep",
    "rosa+target_modules=a-lr0.1:b-r8",
    "rosa+target_modules=x-r2",
    "full+target_modules=layer.1.out-lr",
    "head+report_to=my-rNone",
    "lora+report_to=a b:c",
    "rosa+deepspeed=/home/someone/x-lr1/data",
    "rosa+deepspeed=C++.csv",
    "head+report_to=owner/name-lr2-s0",
]


def by_distance(best: float, fails_at: float = math.inf) -> Kind:
    """Cells whose loss is the distance of their rate from the best one."""

    def train(settings, variant, told):
        if settings.lr >= fails_at:
            raise UserError("diverged")
        loss = abs(math.log(settings.lr / best))
        values: dict[str, Any] = {f.name: 1 for f in fields(Record)}
        values |= {"variant": variant, "method": settings.method, "rank": settings.rank}
        values |= {"lr": settings.lr, "seed": settings.seed, "metric": "loss", "reported": "loss"}
        record = Record(**{**values, "scores": {"loss": loss, "eval_loss": loss}})
        settings.output.mkdir()
        runs.write_json(settings.output / runs.HISTORY, {})
        record.write(settings.output)
        return record

    return Kind(lambda base: None, train)


@pytest.mark.parametrize("best", [2e-5, 1e-4, 1e-3, 2e-3, 0.1])
def test_a_search_goes_on_until_the_best_rate_has_neighbours(tmp_path, monkeypatch, best):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    base = RunSettings(model="m", output=tmp_path)
    grid = make_grid(["rosa", "full"], [2, 4], ["1e-3,2e-3"], [0, 1])
    assert not compare(base, grid, kind=by_distance(best), widen=True)
    for row in read_comparison(tmp_path).rows:
        assert not row.at_edge
        assert len(row.records) == 2
        assert abs(math.log(row.lr / best)) <= math.log(3) / 2 + 0.1  # the nearest there is
        tried = {r.lr for r in read_comparison(tmp_path).cells.values() if r.method == row.method}
        assert len(tried) <= 8


def test_a_search_ends_where_a_rate_fails_and_where_there_are_no_more(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    grid = make_grid(["full"], [], ["1e-3,3e-3"], [0])
    base = RunSettings(model="m", output=tmp_path / "fails")
    failures = compare(base, grid, kind=by_distance(1.0, fails_at=0.1), widen=True)
    assert [*failures] == ["full-lr0.1-s0"]
    (row,) = read_comparison(tmp_path / "fails").rows
    assert (row.lr, row.at_edge) == (0.03, False)
    base = RunSettings(model="m", output=tmp_path / "ends")
    compare(base, grid, kind=by_distance(1e-20), widen=True)
    (row,) = read_comparison(tmp_path / "ends").rows
    assert row.lr == HALF_DECADES[0]
    assert row.at_edge


def test_a_settled_row_trains_its_seeds_while_others_look_for_a_rate(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    made: list[str] = []
    kind = by_distance(3e-3)
    grid = make_grid(["full", "head"], [], ["full=1e-3,3e-3,1e-2", "head=1e-4,3e-4"], [0, 1])

    def train(settings, variant, told):
        made.append(settings.output.name)
        return kind.train(settings, variant, told)

    assert not compare(
        RunSettings(model="m", output=tmp_path), grid, kind=Kind(kind.check, train), widen=True
    )
    assert made.index("full-lr0.003-s1") < made.index("head-lr0.003-s0")
    assert "head-lr0.003-s1" in made
    assert len(set(made)) == len(made)


def test_rates_are_chosen_with_one_seed_in_every_call(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    base = RunSettings(model="m", output=tmp_path)
    compare(base, make_grid(["full"], [], ["1e-3,3e-3"], [0]), kind=by_distance(1e-3))
    more = make_grid(["full"], [], ["1e-3,3e-3"], [1, 2])
    with pytest.raises(UserError, match="with seed 0: give it as the first"):
        compare(base, more, kind=by_distance(3e-3))
    assert len(read_comparison(tmp_path).cells) == 2
    compare(base, make_grid(["full"], [], ["1e-3,3e-3"], [0, 1, 2]), kind=by_distance(3e-3))
    assert len(read_comparison(tmp_path).rows[0].records) == 3


def test_a_search_is_made_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    base = RunSettings(model="m", output=tmp_path)
    compare(base, make_grid(["full"], [], ["1e-3,3e-3"], [0]), kind=by_distance(1.0))
    assert {r.lr for r in read_comparison(tmp_path).cells.values()} == {1e-3, 3e-3}


@pytest.mark.parametrize("text", [v for v in VARIANTS if v != "rosa+deepspeed=C++.csv"])
def test_a_cells_folder_is_one_folder_and_its_own(tmp_path, text):
    names = {
        Cell(Variant.parse(text), rank, rate, seed).name
        for rank in (2, None) for rate in (0.1, 0.01) for seed in (0, 1)
    }  # fmt: skip
    assert len(names) == 8
    for name in names:
        (tmp_path / name).mkdir()
    assert {p.name for p in tmp_path.iterdir()} == names


def write_comparison(folder: Path, variants: list[str], model: str, told: bool) -> Path:
    """Finished cells of each variant at ranks 2 and 8 and two rates; records may lack the name."""
    folder.mkdir()
    settings = {"model": model, "task": "cola", "train": None, "data": "/home/someone/d/cola"}
    runs.write_json(folder / "comparison.json", settings)
    for text in variants:
        for rank, rate in itertools.product((2, 8), (0.1, 0.01)):
            name = text.replace("/", "%2F")
            place = folder / f"{name}-r{rank}-lr{rate:g}-s0"
            place.mkdir()
            known: dict[str, Any] = {f.name: 1 for f in fields(Record)}
            known |= {"variant": text, "method": text.split("+")[0], "rank": rank, "lr": rate}
            known |= {"metric": "accuracy", "reported": "accuracy"}
            record = Record(**known | {"scores": {"eval_loss": 1.0, "accuracy": rate}})
            record.write(place)
            if not told:
                values = runs.read_json(place / "metrics.json")
                del values["variant"]
                runs.write_json(place / "metrics.json", values)
            runs.write_json(place / "history.json", {"steps": [], "epochs": []})
    return folder


def test_a_record_says_its_variant_whatever_its_folder_is_called(tmp_path):
    folder = write_comparison(tmp_path / "cmp", VARIANTS, "roberta-base", told=True)
    for number, place in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        place.rename(folder / f"cell-lr{number}-r8")
    rows = read_comparison(folder).rows
    assert len(rows) == 2 * len(VARIANTS)
    assert {(r.method, r.rank) for r in rows} == {
        (text.replace("/home/someone/x-lr1/data", "x-lr1/data"), rank)
        for text in VARIANTS
        for rank in (2, 8)
    }
    assert all(row.lr == 0.1 and row.at_edge for row in rows)


def test_records_that_do_not_say_it_are_read_by_their_folders_name(tmp_path):
    variants = [text for text in VARIANTS if "/" not in text]
    told, silent = (
        write_comparison(tmp_path / name, variants, "roberta-base", told=name == "told")
        for name in ("told", "silent")
    )
    assert table_rows(read_comparison(told)) == table_rows(read_comparison(silent))


def test_a_record_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path):
    (place,) = list(
        write_comparison(tmp_path / "cmp", ["lora"], "x", told=True).glob("*-r2-lr0.1*")
    )
    record = read_record(place)
    assert record.scores == {"eval_loss": 1.0, "accuracy": 0.1}
    record.write(place)
    assert read_record(place) == record
    values = runs.read_json(place / "metrics.json")
    del values["steps"], values["seed"]
    runs.write_json(place / "metrics.json", values)
    with pytest.raises(UserError, match=r"metrics.json lacks seed, steps: the file is damaged"):
        read_record(place)


def test_a_report_of_methods_that_change_other_layers_shows_what_most_change(tmp_path):
    folder = write_comparison(tmp_path / "cmp", ["rosa", "lora", "full"], "x", told=True)
    for place in folder.iterdir():
        if place.is_dir():
            layers = {"a.q"} if place.name.startswith("rosa") else {"a.q", "a.k"}
            one = {"weight": [2.0, 1.0], "change": [0.1, 0.01]}
            spectra = dict.fromkeys({"b"} if place.name.startswith("lora") else layers, one)
            changes = {"spectra": spectra, "ranks": []}
            runs.write_json(place / "history.json", {"steps": [], "epochs": [], "changes": changes})
    run("report", folder)
    axes = Figure().subplots()
    _spectra(axes, read_comparison(folder).rows)
    assert axes.get_title() == "a.q"
    assert len(axes.lines) == 1 + 4  # the weight's, and of ROSA and full fine-tuning at two ranks


def test_a_report_tells_nothing_of_where_files_lie(tmp_path):
    hidden = tmp_path / "sentiment-roberta" / "model"
    folder = write_comparison(tmp_path / "cmp", VARIANTS, str(hidden), told=True)
    (folder / "rosa+data=%2Fhome%2Fsomeone%2Fgone-r2-lr1-s0").mkdir()
    (folder / "rosa+data=%2Fhome%2Fsomeone%2Fgone-r2-lr1-s0" / "error.txt").write_text("")
    run("report", folder, "--output", tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        text = path.read_text()
        assert str(tmp_path) not in text, path
        assert "home/someone" not in text, path
        assert "home%2F" not in text, path
    assert "cola, sentiment-roberta" in (tmp_path / "out" / "report.html").read_text()


def test_the_comparisons_records_say_their_variants(comparison):
    output, _ = comparison
    for place in output.glob("*/metrics.json"):
        record = runs.read_json(place)
        assert place.parent.name.startswith(record["variant"] + "-")
        assert {"method", "lr", "seed"} <= record.keys()
        assert ("rank" in record) == (record["method"] == "rosa")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("roberta-base", "roberta-base"),
        ("FacebookAI/roberta-base", "FacebookAI/roberta-base"),
        ("/data/my-roberta", "my-roberta"),
        ("/data/my-roberta/model", "my-roberta"),
        ("/data/my-roberta/checkpoint-100", "my-roberta"),
        ("/data/my-roberta/checkpoints/checkpoint-100/", "my-roberta"),
        ("/data/my-roberta/final_model", "my-roberta"),
        ("/data/sst2/adapter", "sst2"),
        ("/x/hub/models--FacebookAI--xlm-roberta/snapshots/e73636d4f797", "FacebookAI/xlm-roberta"),
        ("/x/hub/models--gpt2/snapshots/607a30d783df", "gpt2"),
        ("/data/bert-tiny/snapshots/0a1b2c3d4e5f", "bert-tiny"),
        ("/data/bert-tiny/v2", "bert-tiny"),
        ("/model", "model"),
        ("../somewhere/my-roberta", "my-roberta"),
    ],
)
def test_a_models_name_is_for_people(path, name):
    assert models.model_name(path) == name


def test_a_folder_is_not_called_by_what_it_was_made_from(tmp_path, monkeypatch):
    place = tmp_path / "abc" / "model"
    place.mkdir(parents=True)
    (place / "config.json").write_text('{"_name_or_path": "FacebookAI/roberta-large"}')
    (place / "README.md").write_text("---\nbase_model: owner/other\n---\ntext")
    assert models.model_name(str(place)) == "abc"
    monkeypatch.chdir(place)
    assert models.model_name(".") == "abc"
