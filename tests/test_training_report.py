import math

import matplotlib.image
import numpy as np
import pytest
import yaml

from fastvae.training.report import measured, read_run, report, run_folder, sentence


def write_run(folder, rows, config=None):
    folder.mkdir(parents=True)
    columns = sorted({name for row in rows for name in row})
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def rows(epochs, information, units, start=0):
    for epoch in range(start, epochs):
        yield {"epoch": epoch, "step": 10 * epoch + 5, "train/loss_step": 100 - epoch, "train/gradient_norm_kl": 0.1 + epoch}
        yield {"epoch": epoch, "step": 10 * epoch + 9, "train/loss_epoch": 90 - epoch, "train/kl": 3.0}
        dimensions = {f"val/mu_variance_{d:03d}": float(d < units) for d in range(4)} | {
            f"val/kl_dimension_{d:03d}": 0.1 * d for d in range(4)
        }
        measures = {"val/mutual_information": information * (epoch + 1) / epochs, "val/active_units": units, "val/kl": 2.0}
        yield {"epoch": epoch, "step": 10 * epoch + 9, **dimensions, **measures, "val/logvar_min": -5, "val/logvar_max": 0}


def test_what_a_run_logged(tmp_path):
    run = read_run(write_run(tmp_path / "alpha1" / "version_0", list(rows(3, 6.0, 4))))
    assert run.name == "alpha1"
    assert run.curve("mutual_information") == ("val", [(0, 2.0), (1, 4.0), (2, 6.0)])
    assert run.curve("loss") == ("train", [(0, 90), (1, 89), (2, 88)])
    assert run.steps["train/loss_step"] == [(5, 100), (15, 99), (25, 98)]
    assert run.last("kl") == 2.0
    assert math.isnan(run.last("nothing"))
    np.testing.assert_allclose(run.dimensions("kl_dimension"), [0.3, 0.2, 0.1, 0])


def test_a_resumed_run_begins_with_the_one_before(tmp_path):
    before = write_run(tmp_path / "a" / "version_0", list(rows(3, 6.0, 4)))
    checkpoint = before / "checkpoints" / "step=19.ckpt"
    after = write_run(tmp_path / "a" / "version_1", list(rows(5, 9.0, 4, start=2)), {"ckpt_path": str(checkpoint)})
    run = read_run(after)
    assert [epoch for epoch, _ in run.curve("mutual_information")[1]] == [0, 1, 2, 3, 4]
    assert run.curve("mutual_information")[1][2] == (2, pytest.approx(9 * 3 / 5))


def test_the_newest_version_is_taken(tmp_path):
    for k in range(2):
        write_run(tmp_path / "a" / f"version_{k}", list(rows(1, 1.0, 1)))
    assert run_folder(str(tmp_path / "a")).name == "version_1"
    assert run_folder(str(tmp_path / "a" / "version_0")).name == "version_0"


def test_one_page_of_two_runs(tmp_path, capsys):
    for name, information, units in (("alpha1", 7.2, 4), ("beta4", 0.3, 1)):
        folder = write_run(tmp_path / name / "version_0", list(rows(3, information, units)))
        matplotlib.image.imsave(folder / "samples.png", np.random.default_rng(0).random((40, 50, 3)))
    report([str(tmp_path / "alpha1"), str(tmp_path / "beta4")], str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "alpha1: I(x; z) = 7.20 nats, 4 of 4 active units; beta4: I(x; z) = 0.30 nats, 1 of 4 active units" in page
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page
    assert "href" not in page
    picture = matplotlib.image.imread(tmp_path / "out" / "report.png")
    assert picture.shape[1] > 1000
    assert picture.std() > 0.01
    assert "Report: " in capsys.readouterr().out


def test_nothing_is_cut_off(tmp_path):
    names = [f"{name}_of_more_words_than_a_panel_is_wide_and_a_date_2026-11-27" for name in "abcde"]
    for name in names:
        folder = write_run(tmp_path / name / "version_0", list(rows(1, 7.2, 4)))
        matplotlib.image.imsave(folder / "latent.png", np.full((40, 100, 3), 0.5))
    report([str(tmp_path / name) for name in names], str(tmp_path))
    picture = matplotlib.image.imread(tmp_path / "report.png")[..., :3]
    assert all((edge == 1).all() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))


def test_a_run_that_logged_little(tmp_path):
    folder = write_run(tmp_path / "a<b" / "version_0", [{"epoch": 0, "step": 1, "train/loss_epoch": 3.0}])
    report([str(folder)])
    page = (folder / "report.html").read_text()
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert "nan" in sentence([read_run(folder)])


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ValueError, "runs must name one to 5 folders, got 0"),
        (["nowhere"], FileNotFoundError, r"runs must be folders of runs with a metrics.csv, got 'nowhere'"),
    ],
)
def test_error_sentences(runs, error, message):
    with pytest.raises(error, match=message):
        report(runs)


def test_a_log_that_is_no_log(tmp_path):
    folder = write_run(tmp_path / "a" / "version_0", [{"epoch": 0, "step": 1, "train/loss_epoch": "three"}])
    with pytest.raises(ValueError, match=r"metrics.csv must hold numbers, got could not convert string to float: 'three'"):
        report([str(folder)])


@pytest.mark.parametrize(
    "raw", [b"epoch,step,val/loss\n0,x,1\n", b"\x91\xff\x00", b"epoch,step\n0," + b"1" * 200_000 + b"\n", b"a\rb\x00\n\r1,2"]
)
def test_a_log_of_other_bytes(tmp_path, raw):
    folder = tmp_path / "a" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=r"metrics.csv must hold numbers, got"):
        report([str(folder)])


def test_numbers_of_a_test_keep_four_digits():
    results = {"test/loss": 377.0, "test/kl": 1.24, "test/active_units": 6.0, "test/mmd": 1234.0}
    lines = measured(results, standardised=True).splitlines()
    assert lines[1] == "Loss (nats, of the standardised data)"
    assert [line.split()[-1] for line in lines if line.startswith("  ")] == ["377.0", "1.240", "1234", "6"]
    assert measured(results).splitlines()[1] == "Loss (nats)"
