"""The page: one file that needs nothing else, and asks for nothing.

A policy in the page itself forbids every request, so that opening a report tells nobody.  The order is that of a reader's
questions: which one should I take, how sure is that, on what text, where inside the model does it come from, what exactly was
compared.
Sections without data are left out, with a line that says why where a reader would look for them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence

from quantkit.evaluation import ArtifactEvaluation, Evaluation
from quantkit.report.charts import MANY, by_label, dot_plot, error_panels, layerless_errors, legend
from quantkit.report.glossary import GLOSSARY
from quantkit.report.golden_words import golden_findings
from quantkit.report.heat_maps import coverage_groups, coverage_map, lowest_routers, router_map
from quantkit.report.markup import Markup, element, join, key, line_key, typeset
from quantkit.report.size_chart import size_chart
from quantkit.report.style import SCRIPT, STYLE
from quantkit.report.tables import (
    answers_table,
    difference_table,
    fallback_list,
    golden_table,
    label_table,
    layerless_table,
    main_table,
    more_table,
    paragraphs,
    role_table,
    router_table,
)
from quantkit.report.words import PER_CENT, default_command, headline, listing, many, role, size, summary, text_facts

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)


def html_report(evaluation: Evaluation, title: str, command: Sequence[str] | None, content: dict[str, object]) -> str:
    """The whole page.  content: the evaluation as JSON-able data, from which recipes and fingerprints are shown."""
    parts = [
        _header(evaluation, title),
        _comparison(evaluation),
        _figures(evaluation),
        _texts(evaluation),
        _inside(evaluation),
        _golden(evaluation),
        _artifacts(evaluation, content),
        _method(evaluation, command, content),
        _glossary(),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    foot = element("footer", f"Made by quantkit. All intervals are {PER_CENT} intervals. The same figures are in report.json.")
    body = element("body", element("main", *parts, foot), element("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(heading: str, *content: str, lead: str = "") -> Markup:
    inner = [one for one in content if one]
    if not inner:
        return Markup("")
    return element("section", element("h2", heading), element("p", lead, class_="lead") if lead else "", *inner)


def _details(summary_text: str, *content: str) -> Markup:
    return element("details", element("summary", summary_text), *content)


def _figure(chart: str, caption: str) -> Markup:
    first, separator, rest = caption.partition(". ")
    text = [element("b", typeset(first + separator.strip())), typeset(f" {rest}") if rest else ""]
    return element("figure", element("figcaption", *text), chart)


def _header(evaluation: Evaluation, title: str) -> Markup:
    windows = f"{many(evaluation.windows, 'window')} of {evaluation.window:,} tokens"
    kicker = f"{title} · {windows}, convention {evaluation.convention}"
    findings = element("ul", *(element("li", typeset(line)) for line in summary(evaluation)), class_="findings")
    return element("header", element("p", typeset(kicker), class_="kicker"), element("h1", typeset(headline(evaluation))), findings)


def _comparison(evaluation: Evaluation) -> Markup:
    if len(evaluation.artifacts) < 2:
        return Markup("")  # one point shows nothing
    height = 380 + 9 * max(0, len(evaluation.artifacts) - 8)
    chart = join([size_chart(evaluation, 1072, 460), size_chart(evaluation, 358, height)], "\n")
    caption = "Divergence against size. Lower and further left is better. The dotted line joins the artifacts that no other beats "
    caption += f"in both. Bars are {PER_CENT} intervals; where none is seen, it is smaller than the sign."
    return _section("Size and closeness to the reference", legend(evaluation), _figure(chart, caption))


def _figures(evaluation: Evaluation) -> Markup:
    differences = ""
    if evaluation.differences:
        table = difference_table(evaluation)
        differences = (
            table if len(evaluation.differences) <= 15 else _details(f"All {len(evaluation.differences)} differences", table)
        )
    more = _details("More figures: standard errors, shift of the right token, time", more_table(evaluation))
    return _section("The figures", main_table(evaluation), more, differences)


def _texts(evaluation: Evaluation) -> Markup:
    parts = []
    for attribute, heading in (("languages", "language"), ("kinds", "kind")):
        groups = by_label(evaluation, attribute)
        if not groups:
            continue
        title = f"Mean KL divergence by {heading} of text"
        caption = f"{title}, nats, logarithmic. Most divergent first; bars are {PER_CENT} intervals."
        measured = (estimate for row in groups.values() for estimate in row if estimate is not None)
        if all(math.isnan(estimate.low) for estimate in measured):
            caption = f"{title}, nats, logarithmic. Most divergent first; no intervals, as with few windows of text."
        elif len(evaluation.artifacts) > MANY:
            caption = f"{title}, nats, logarithmic. Most divergent first. Press a name above to single it out."
        parts.append(_figure(dot_plot(evaluation, groups, title), caption))
        parts.append(_details(f"The figures by {heading}", label_table(evaluation, attribute, f"{title}. Below: top-1 agreement.")))
    lead = "Quantization does not harm all text alike. The average above may hide a language or a kind that suffers."
    return _section("On which text it differs", legend(evaluation) if parts else "", *parts, lead=lead)


def _inside(evaluation: Evaluation) -> Markup:
    parts: list[Markup] = []
    panels = error_panels(evaluation)
    if panels:
        columns = 3 if len(panels) % 3 == 0 else min(2, len(panels))
        drawn = (element("div", element("h3", role(name)[:1].upper() + role(name)[1:]), chart) for name, chart in panels)
        caption = "Weight error by layer and role, logarithmic. From each artifact's ledger; the same scale in all panels."
        parts += [
            legend(evaluation, line_key),
            _figure(element("div", *drawn, class_="panels", style=f"--columns:{columns}"), caption),
        ]
    outside = [(name, part, cell.relative_error, cell.worst) for name, part, cell in layerless_errors(evaluation)]
    if outside:
        parts.append(_details("Weight error outside of the layers", layerless_table(outside)))
    routers = router_map(evaluation)
    if routers is not None:
        caption = (
            "Router agreement by layer. Dark: many tokens go to another expert than in the reference. Empty: no experts there. "
            f"{lowest_routers(evaluation)} Point at a cell to see its figure."
        )
        parts += [_figure(routers, caption), _details("Mean and lowest agreement", router_table(evaluation))]
    for names, coverage in coverage_groups(evaluation):
        caption = f"Tokens that each expert received in the calibration of {listing(names)}. Rows are experts, columns layers. "
        caption += "Dark: calibrated on little text. Layers without experts are left out."
        parts.append(_figure(coverage_map(names, coverage), caption))
    silent = [own.name for own in evaluation.artifacts if not own.ledger]
    if silent:
        parts.append(element("p", f"No ledger: {listing(silent)}; weight errors are not known there.", class_="lead"))
    return _section("Inside the model", *parts)


def _golden(evaluation: Evaluation) -> Markup:
    if not evaluation.golden:
        return Markup("")
    answers = answers_table(evaluation)
    more = Markup("") if answers is None else _details("Questions that the models answer differently", answers)
    lead = (
        "Questions with known answers, all asked at once and answered token by token. Time and speed hold for this machine, and "
        "depend on what else it did."
    )
    return _section("Golden set", paragraphs(golden_findings(evaluation)), golden_table(evaluation), more, lead=lead)


def _artifacts(evaluation: Evaluation, content: dict[str, object]) -> Markup:
    records = content["artifacts"]
    assert isinstance(records, list)
    made = (_artifact(place, own, records[place]) for place, own in enumerate(evaluation.artifacts))
    lead = "What each artifact holds, the recipe it was made by, and what came out other than asked."
    return _section("What was compared", element("div", *made, class_="artifacts"), lead=lead)


def _artifact(place: int, own: ArtifactEvaluation, record: dict[str, object]) -> Markup:
    line = f"{own.format}, {size(own.bytes)}, {own.bits_per_weight:.2f} bits per weight. "
    fallbacks = fallback_list(own) if own.fallbacks else element("p", "Nothing was fallen back.")
    parts = [element("p", typeset(line), element("code", own.path)), fallbacks]
    if own.roles:
        parts.append(_details("Schemes by role", role_table(own)))
    if own.recipe is not None:
        parts.append(_details("Recipe", _json(record["recipe"])))
    if own.fingerprint:
        parts.append(_details("Fingerprint", _json(record["fingerprint"])))
    return element("div", element("h3", key(place), own.name), *parts, class_="artifact")


def _json(value: object) -> Markup:
    return element("pre", json.dumps(value, indent=2, ensure_ascii=False), tabindex="0")


def _method(evaluation: Evaluation, command: Sequence[str] | None, content: dict[str, object]) -> Markup:
    facts = [*text_facts(evaluation), *((name, value) for name, value in evaluation.environment.items())]
    rows = (element(tag, text) for name, value in facts for tag, text in (("dt", name), ("dd", value)))
    words = shlex.join(command if command is not None else default_command(evaluation))
    parts = [element("dl", *rows, class_="facts")]
    if evaluation.text:
        parts.append(_details("The whole record of the text", _json(content["text"])))
    if evaluation.reference_fingerprint:
        parts.append(_details("Fingerprint of the reference", _json(content["reference_fingerprint"])))
    again = join([element("h3", "To measure it again", style="margin-top:22px"), element("pre", words, tabindex="0")])
    return _section("How it was measured", *parts, again)


def _glossary() -> Markup:
    entries = (element("div", element("dt", typeset(name)), element("dd", typeset(text))) for name, text in GLOSSARY.items())
    return _section("What the figures mean", element("dl", *entries, class_="glossary"))
