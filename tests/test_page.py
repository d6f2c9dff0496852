"""The HTML report: what it holds, what it refuses, and that a browser shows it."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import jetplane as jp
from jetplane import cli
from jetplane.errors import RunFolderError
from jetplane.experiments import environment, page, store
from jetplane.experiments.config import Config
from jetplane.experiments.train import Run, optimizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's dependencies

METHODS = {"sgd": {}, "fgd": {"k": 2, "lr": 0.05}, "fomoh-kd": {"k": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three methods, a second seed, one that diverged in its third epoch, at once and one that was stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in METHODS.items():
        Run(Config(method=name, epochs=3, **settings), folder / name).train()
    Run(Config(method="sgd", epochs=3, seed=1), folder / "sgd <b>& more").train()
    Run(Config(method="sgd", lr=1e38, epochs=3), folder / "at once").train()

    later = Run(Config(method="fgd", k=3, epochs=5), folder / "later")

    def spoil(row):
        if row["epoch"] == 2:
            with torch.no_grad():
                next(later.model.parameters()).fill_(torch.nan)

    assert later.train(on_epoch=spoil)["status"] == "diverged"

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(Config(model="mlp", epochs=2), folder / "stopped").train(on_epoch=stop)
    return folder


class Text(HTMLParser):
    """The text of the page outside scripts and styles, and the addresses that tags name."""

    def __init__(self, content: str):
        super().__init__()
        self.pieces, self.addresses, self.tags = [], [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.pieces.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.pieces))


def test_the_page_holds_curves_results_and_settings(runs, tmp_path):
    out = tmp_path / "deep" / "report.html"
    done = CliRunner().invoke(cli.app, ["report", str(runs), "--out", str(out)])
    assert done.exit_code == 0, done.output
    content = out.read_text()
    shown = Text(content)
    assert shown.addresses == []  # it loads nothing
    assert content.count('class="plotly-graph-div"') == 2 and content.count("plotly.js v") == 1
    assert "logreg on digits" in shown.text and "mlp on digits" in shown.text
    assert "diverged after 2 of 5 epochs" in shown.text and "diverged after 0 of 3 epochs" in shown.text
    assert "stopped after 1 of 2 epochs" in shown.text
    last = store.read_rows(runs / "fgd" / "metrics.jsonl")[-1]
    assert f"{last['test_loss']:.3f}" in shown.text and f"{100 * last['test_accuracy']:.1f} %" in shown.text
    assert torch.__version__ in shown.text and "weight decay" in shown.text
    assert "sgd <b>& more" in shown.text and "b" not in shown.tags


def test_a_folder_in_two_arguments_is_shown_once(runs):
    assert [run.folder.name for run in page.find([runs / "sgd", runs])].count("sgd") == 1


def test_seeds_share_a_curve_and_names_share_a_style(runs):
    found = page.find([runs])
    problems = {"logreg": [run for run in found if run.config.model == "logreg"], "again": found}
    styled = page._styled({name: page._curves(chosen) for name, chosen in problems.items()})
    [sgd] = [curve for curve in styled["logreg"] if curve.name == "SGD, backprop, lr 0.5"]
    assert {run.config.seed for run in sgd.runs} == {0, 1}
    looks = {curve.name: (curve.colour, curve.dash) for curve in styled["again"]}
    assert len(set(looks.values())) == len(looks)
    assert all(looks[curve.name] == (curve.colour, curve.dash) for curve in styled["logreg"])


def test_the_switch_sets_every_trace(runs):
    found = [run for run in page.find([runs]) if run.config.model == "logreg"]
    [pairs] = page._styled({"": page._curves(found)}).values()
    figure = page._figure(pairs, page._short([run.folder for run in found]))
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["Epochs", "Seconds", "Forward passes"]
    for button in buttons:
        restyle, relayout = button.args
        assert [len(x) for x in restyle["x"]] == [len(trace.y) for trace in figure.data]
        assert relayout["xaxis3.title.text"]
    passes = {3 * 3, 3 * 5, 3 * 9, 2 * 7}  # epochs times what an epoch takes: sgd, fgd, fomoh-kd, the diverged one
    assert {x[-1] for x in buttons[2].args[0]["x"]} == passes
    assert all(axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3))
    crosses = [trace for trace in figure.data if trace.marker.symbol == "x"]
    assert len(crosses) == 3 and all(len(trace.x) == 1 and "diverged" in trace.name for trace in crosses)


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(RunFolderError, match="no such folder"):
            page.find([tmp_path / "nowhere"])
        with pytest.raises(RunFolderError, match="holds no run"):
            page.find([tmp_path])

    def test_all_that_is_wrong_is_named(self, tmp_path):
        for name in ("begun", "half", "words", "result"):
            (tmp_path / name).mkdir()
            Config().save(tmp_path / name / "config.json")
        (tmp_path / "half" / "config.json").write_text('{"data": "dig')
        (tmp_path / "words" / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": "small"}\n')
        (tmp_path / "result" / "result.json").write_text("{")
        with pytest.raises(RunFolderError) as error:
            page.find([tmp_path])
        for name, what in {
            "begun": "nothing to show", "half": "not the configuration", "words": "other content",
            "result": "cannot be read",
        }.items():  # fmt: skip
            assert re.search(rf"{name}\b[^;]*{what}", str(error.value)), name

    def test_a_page_that_cannot_be_written(self, runs, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="cannot be written"):
            page.write(page.find([runs]), tmp_path / "file" / "report.html")

    def test_hostile_settings(self, tmp_path):
        config = tmp_path / "config.json"
        Config().save(config)
        config.write_text(config.read_text().replace("0.3", '"</script>"'))
        with pytest.raises(RunFolderError, match="lr must be a number"):
            page.find([tmp_path])


class TestEnvironment:
    def test_is_recorded_at_the_start_and_when_a_run_goes_on(self, tmp_path):
        def stop(row):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Run(Config(epochs=2), tmp_path / "run").train(on_epoch=stop)
        known = json.loads((tmp_path / "run" / "environment.json").read_text())
        assert known["torch"] == torch.__version__ and known["threads"] == torch.get_num_threads()
        assert known["cpu"] and known["python"] and known["date"].endswith("+00:00") and known["resumed"] == []
        Run.resume(tmp_path / "run").train()
        Run.resume(tmp_path / "run").train()  # nothing is left to do
        after = environment.read(tmp_path / "run")
        assert after is not None and after | {"resumed": []} == known
        assert [start["epoch"] for start in after["resumed"]] == [1]
        [run] = page.find([tmp_path])
        assert "Resumed after epoch 1" in page.render([run])

    @pytest.mark.parametrize("content", [None, "{", "[]"])
    def test_a_report_without_it(self, content, runs, tmp_path):
        shutil.copytree(runs / "sgd", tmp_path / "run")
        path = tmp_path / "run" / "environment.json"
        path.unlink() if content is None else path.write_text(content)
        assert "not recorded" in page.render(page.find([tmp_path]))


@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
@pytest.mark.parametrize(
    "config",
    [*(Config(method=m, k=k) for m in ("fgd", "fomoh", "fomoh-kd") for k in (1, 4)), Config(method="fomoh-bp")],
    ids=lambda c: c.label,
)
def test_forward_passes_count_the_products_of_a_step(config):
    width, layers = 256, 12
    model = torch.nn.Sequential(
        *(m for _ in range(layers) for m in (torch.nn.Linear(width, width, bias=False), torch.nn.Tanh()))
    )
    x = torch.randn(512, width)  # smaller batches do without interpolation, whose sums would cost as much as they spare

    def products(run):
        with torch.profiler.profile(with_flops=True, record_shapes=True) as seen:
            run()
        events = [e for e in seen.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")]
        # What passes a dispatch mode is seen before it and behind it.
        events = [e for e in events if "PythonDispatchMode" not in {child.name for child in e.cpu_children}]
        return sum(added_up(e) if e.name == "aten::addmm_" else e.flops for e in events)

    def added_up(event):  # the profiler has no count for it
        (rows, inner), columns = event.input_shapes[1], event.input_shapes[2][1]
        return 2 * rows * inner * columns

    def loss():
        return model(x).square().mean()

    opt = optimizer(config, model)
    assert isinstance(opt, jp.optim.base.PlaneOptimizer)
    opt.audit = "never"  # which is done once
    ratio = products(lambda: opt.step(loss)) / products(loss)
    assert 0.85 < ratio / config.forward_passes <= 1  # the first layer costs less


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("JETPLANE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_it(width, runs, tmp_path):
    from playwright import sync_api as playwright

    browser_path = chromium()
    if browser_path is None:
        pytest.skip("no Chromium is installed; JETPLANE_CHROMIUM names one")
    out = tmp_path / "report.html"
    page.write(page.find([runs]), out)
    messages, requests = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(out.as_uri())
        tab.wait_for_selector("#curves-1 .legend")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
        first = tab.locator("#curves-0")

        def state():
            title = first.locator(".x3title").text_content()
            lines = [path.get_attribute("d") for path in first.locator(".scatterlayer .js-line").all()]
            return title, lines

        seen = {"epochs": state()[1]}
        assert len(seen["epochs"]) == 15  # five runs with curves, three panels
        for button, title in (("Seconds", "seconds of training"), ("Forward passes", "forward-pass equivalents")):
            first.locator(".updatemenu-button", has_text=button).click(timeout=5000)
            tab.wait_for_function(
                "title => document.querySelector('#curves-0 .x3title').textContent.startsWith(title)", arg=title
            )
            seen[title] = state()[1]
        first.locator(".updatemenu-button", has_text="Epochs").click(timeout=5000)
        tab.wait_for_function("document.querySelector('#curves-0 .x3title').textContent == 'epochs'")
        assert state()[1] == seen["epochs"]
        assert len({tuple(lines) for lines in seen.values()}) == 3
        tab.locator("details").first.locator("summary").click()
        assert tab.locator("details[open] td").first.is_visible()
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert Path(out).stat().st_size < 10e6
