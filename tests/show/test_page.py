"""The HTML report: well-formed, self-contained, complete, and safe against what users can name."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from prunecli.show import plots
from prunecli.show.page import report_page
from prunecli.show.rates_page import rates_page
from prunecli.values.learning_rate import Candidate, FinetuneSituation, LRReport, Rule
from prunecli.values.report import LatencyReport, LayerReport, Report, VerifyReport
from toys import sample_rates
from toys import sample_report as sample

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Strict(HTMLParser):
    """Fails on tags that do not close in order; collects text, tags and whatever would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in LOADING and not (value or "").startswith("#")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def page(report: Report | None = None, **options: object) -> str:
    options = {"jacobians": sample.jacobians(), "recipe": "model: a & b\n"} | options
    return report_page(report or sample.report(), sample.plan(), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full() -> str:
    return page()


def test_it_is_well_formed_and_loads_nothing(full):
    found = parsed(full)
    assert found.loads == []
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "image"}
    assert not re.search(r"@import|url\((?!#)", full)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", full))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of languages


def test_it_says_the_result_and_every_stage(full):
    text = "\n".join(parsed(full).text)
    title = re.search(r"<title>(.*?)</title>", full)
    assert title
    assert title[1].startswith("cifar_resnet20 now has 141.3 k parameters")
    for word in (
        "dense",
        "pruned",
        "recovered",
        "fine-tuned",
        "91.50 %",
        "89.92 %",
        "20.58 M",
        "573.53 kB",
        "12.6 min",
    ):
        assert word in text
    assert "asked 20.61 M, reached 20.58 M" in text
    assert "A tenth of the base" in text
    assert "left out: held-out loss" in text
    assert "reloads in a fresh process" in text
    assert "model: a & b" in text
    assert full.count("<svg") == 6  # stages, Jacobian, fine-tuning, widths, losses, weight spectra


def test_names_and_warnings_are_escaped(full):
    assert "<script>" not in full
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in full
    assert "&lt;fc &amp; [b]head[/b]&gt;" in full  # a layer's name, inside a plot
    hostile = page(sample.report(model='"><b onload=x>$\\frac$'))
    parsed(hostile)
    assert "<b onload" not in hostile


def test_every_text_of_a_report_is_escaped():
    bad = "<script>alert('\"&amp;')</script>"
    (stage, *others), dropped = sample.stages(), sample.report().recovery[1]
    lr = LRReport(
        recommended=0.01,
        rule=bad,
        inputs=FinetuneSituation.model_construct(optimizer=bad),
        rules=(Rule(name=bad, lr=0.01, reason=bad, source=bad),),
        candidates=(Candidate(name=bad, lr=0.1, taken=True, reason=bad),),
    )
    hostile = sample.report(
        model=bad,
        stages=(stage.model_copy(update={"notes": (bad,)}), *others),
        recovery=(dropped.model_copy(update={"rule": bad}),),
        lr=lr,
        latency=LatencyReport(device=bad, batch=1, base_ms=4.0, final_ms=2.5, ratio=1.6, noise=0.03),
        warnings=(bad,),
        versions={bad: bad},
    )
    html = page(hostile, recipe=bad)
    found = parsed(html)
    assert "script" not in found.tags
    shown = {"title": 2, "note": 1, "recovery": 1, "rate": 6, "latency": 1, "warning": 1, "versions": 2, "recipe": 1}
    assert "\n".join(found.text).count(bad) == sum(shown.values())


def test_the_same_report_gives_the_same_bytes(full):
    assert page() == full


def test_ids_of_one_plot_do_not_catch_references_of_another(full):
    for svg in re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL):
        wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert wanted <= set(parsed(svg).ids)
    clips = re.findall(r'<clipPath id="([^"]+)">', full)
    assert len(clips) == len(set(clips))


def test_without_data_spectra_or_training_the_page_still_stands():
    stages = tuple(
        stage.model_copy(update={"top1": None, "top5": None, "loss": None, "jsv": None})
        for stage in sample.stages()[:2]
    )
    bare = sample.report(
        stages=stages, layers=(), recovery=(), lr=None, finetune=None, verify=None, target=None, warnings=()
    )
    html = page(bare, jacobians=None, recipe="")
    text = "\n".join(parsed(html).text)
    assert "its accuracy was not measured" in text
    assert "The Jacobian spectrum was not measured" in text
    assert "What to know first" not in text
    assert "Fine-tuning" not in text
    assert html.count("<svg") == 2


def test_ranges_stand_in_for_values_and_zeros_are_counted():
    stage = sample.stages()[0]
    assert stage.jsv
    with_zeros = plots.jacobian_plot([stage], {"dense": [0.0, 0.0, 1.0, 2.0]})
    assert "2 are zero" in with_zeros
    assert "are zero" not in plots.jacobian_plot(sample.stages(), {})
    dead = stage.model_copy(update={"jsv": sample.summary(0.0, 0.0, 0.0, None)})
    assert "4 are zero" in plots.jacobian_plot([dead], {"dense": [0.0] * 4})


def test_large_nets_are_capped_and_it_is_said():
    layers = tuple(
        LayerReport(
            name=f"stages.{place}.blocks.{place}.attention.projection.with.a.long.name",
            out_before=2048,
            out_after=1024,
            sv_before=tuple(float(2048 - k) for k in range(2048)),
            sv_after=tuple(float(1024 - k) for k in range(1024)),
        )
        for place in range(90)
    )
    html = page(sample.report(layers=layers))
    text = "\n".join(parsed(html).text)
    assert f"First {plots.WIDTHS_SHOWN} of 90 narrowed layers" in text
    assert f"First {plots.SPECTRA_SHOWN} of 90 layers" in text
    assert len(html) < 1_000_000


def test_failed_checks_and_latency_are_shown():
    failed = sample.report(
        verify=VerifyReport(reload_max_abs_diff=0.5, classes_equal=False, ok=False),
        latency=LatencyReport(device="cpu", batch=1, base_ms=4.0, final_ms=2.5, ratio=1.6, noise=0.03),
    )
    text = "\n".join(parsed(page(failed)).text)
    assert "FAILED to reload" in text
    assert "4 ms → 2.5 ms on cpu, batch 1 (x1.60" in text


@pytest.mark.parametrize(("name", "limit"), [("short", 10), ("a" * 20 + "conv1", 10)])
def test_long_names_keep_their_end(name, limit):
    found = plots.short(name, limit)
    assert len(found) <= limit
    assert found[-5:] == name[-5:]


def test_phases_before_the_cut_have_their_plots_and_count_as_training():
    grow, push = sample.phases()
    html = page(sample.report(phases=(grow, push), total_epochs=41.5))
    text = " ".join("\n".join(parsed(html).text).split())
    assert html.count("<svg") == 8
    assert "Before the plan" in text
    assert "channels that leave are pushed towards zero: 12,000 steps = 31 epochs at LR 0.001" in text
    assert "norm of pushed channels 16.2 → 0; Gram loss 0.394 → 0" in text
    assert "42 epochs of training in all, the phase before the cut included" in text
    for title in ("factor λ", "cross-entropy", "Gram loss", "norm of the pushed channels"):
        assert f">{title}<" in html
    lonely = push.model_copy(update={"history": push.history[:1]})  # a phase shorter than an epoch and without growth
    parsed(page(sample.report(phases=(lonely,))))


def test_the_page_of_measured_rates_says_what_was_found():
    found = sample_rates.measured()
    html = rates_page(found, recipe="model: a & b\n")
    read = parsed(html)
    text = "\n".join(read.text)
    assert read.loads == []
    assert "script" not in read.tags
    assert html.count("<svg") == 1
    for sentence in (*found.verdicts, *found.warnings, "model: a & b"):
        assert sentence in text
    for rate in sample_rates.RATES:
        assert text.count(f"{rate:g}") >= 4  # a row of each arm, and the axis
    assert {"no recovery", "orthp+bn", "lstsq+bn", "dense model", "recommended rate"} <= set(read.text)
    assert rates_page(found, recipe="model: a & b\n") == html
    bad = "<script>alert('\"&amp;')</script>"
    hostile = found.model_copy(update={"model": bad, "verdicts": (bad,), "versions": {bad: bad}})
    assert "script" not in parsed(rates_page(hostile, recipe=bad)).tags
