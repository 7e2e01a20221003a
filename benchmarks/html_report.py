"""A run as one HTML file: the figures as tables, the plots as inline SVG. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from loraplex.benchmarks.charts import PLOT_STYLE, Axis, Series, bars, dots, lines
from loraplex.benchmarks.drive import Run, Sample
from loraplex.benchmarks.measures import Figures, Objective, Spread

MOST_POINTS = 2000
"""Of a cloud or a curve: more make a file slow to open and no different to look at."""

MOST_ADAPTERS = 60
"""Shown one by one; the JSON has all."""

STYLE = (
    PLOT_STYLE
    + """
:root { --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  padding: 0 1rem; max-width: 1360px; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { color: var(--dim); margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; color: var(--dim); } th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 500; margin-bottom: .3rem; } svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
"""
)


def render(settings: Mapping[str, str], run: Run, figures: Figures, objective: Objective, warmup: float = 0.0) -> str:
    """The page. `settings`: what was run, against what; shown as given."""
    samples = [sample for sample in run.samples if sample.due >= warmup]
    title = f"{figures.tokens_per_second:,.0f} tokens/s, {figures.requests_per_second:,.2f} requests/s"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(name)}: {escape(value)}</p>" for name, value in settings.items()),
        "<h2>Figures</h2>",
        _table(("", "value"), _headline(figures, objective)),
        "<h2>Times</h2>",
        f'<div class="wide">{_times(figures)}</div>',
        *_errors(figures),
        "<h2>Plots</h2>",
        f'<div class="plots">{_plots(samples, figures)}</div>',
        "<h2>Adapters</h2>",
        f'<div class="wide">{_adapters(figures)}</div>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head = f'<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return f"<!doctype html>\n{head}<body>{''.join(parts)}</body></html>\n"


def ms(seconds: float) -> str:
    """As a person reads it."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _headline(figures: Figures, objective: Objective) -> list[tuple[str, str]]:
    return [
        ("requests, failed", f"{figures.requests:,}, {figures.failed:,}"),
        ("seconds", f"{figures.seconds:.1f}"),
        ("tokens of prompts, of answers", f"{figures.prompt_tokens:,}, {figures.tokens:,}"),
        ("requests/s", f"{figures.requests_per_second:.3f}"),
        ("tokens/s", f"{figures.tokens_per_second:.1f}"),
        (f"within the objective ({objective})", f"{figures.attained:.1%}"),
        ("goodput, requests/s", f"{figures.goodput:.3f}"),
        ("fairness of service, of speed (Jain)", f"{figures.fair_service:.3f}, {figures.fair_speed:.3f}"),
    ]


def spreads(figures: Figures) -> dict[str, Spread]:
    """By the name a reader sees."""
    return {
        "first token": figures.first,
        "per token": figures.per_token,
        "between parts": figures.between,
        "whole answer": figures.whole,
        "send lag": figures.lag,
    }


def _times(figures: Figures) -> str:
    rows = [
        (name, *(ms(value) for value in (s.mean, s.p50, s.p90, s.p95, s.p99, s.most)))
        for name, s in spreads(figures).items()
    ]
    return _table(("", "mean", "p50", "p90", "p95", "p99", "most"), rows)


def _errors(figures: Figures) -> list[str]:
    if not figures.errors:
        return []
    return ["<h2>Errors</h2>", _table(("", "requests"), [(text, f"{n:,}") for text, n in figures.errors.items()])]


def _plots(samples: Sequence[Sample], figures: Figures) -> str:
    answered = [sample for sample in samples if sample.ok]
    named = {
        "Times to the first token and to the whole answer: share of requests that took no longer": lines(
            [
                Series("first token", _cumulative([sample.first for sample in answered])),
                Series("whole answer", _cumulative([sample.whole for sample in answered])),
            ],
            Axis("time", log=True, show=ms),
            Axis("share", show=lambda value: f"{value:.0%}"),
        ),
        "Gaps between the parts of an answer": lines(
            [Series("gap", _cumulative([gap for sample in answered for gap in sample.gaps]))],
            Axis("time", log=True, show=ms),
            Axis("share", show=lambda value: f"{value:.0%}"),
        ),
        "First token, by when the request was due": dots(
            [Series("first token", _thinned([(sample.due, sample.first) for sample in answered]))],
            Axis("seconds into the run"),
            Axis("time", show=ms),
        ),
        "Requests due and ended, per second": lines(
            [
                Series("due", _rates([sample.due for sample in samples])),
                Series("ended", _rates([sample.ended for sample in answered])),
            ],
            Axis("seconds into the run"),
            Axis("requests/s"),
        ),
    }
    shown = figures.adapters[:MOST_ADAPTERS]
    if len(shown) > 1:
        names = [each.model for each in shown]
        named["Requests of the busiest adapters"] = bars(
            names, [float(each.requests) for each in shown], Axis("requests")
        )
        named["Mean time to their first token"] = bars(names, [each.first for each in shown], Axis("time", show=ms))
    figure = "<figure><figcaption>{}</figcaption>{}</figure>"
    return "".join(figure.format(escape(caption), plot) for caption, plot in named.items())


def _cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    return _thinned([(value, (number + 1) / len(ordered)) for number, value in enumerate(ordered)])


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(points) // MOST_POINTS)
    return [*points[:: max(1, every)], *points[-1:]]


def _rates(times: Sequence[float]) -> list[tuple[float, float]]:
    """Events per second, in up to 60 spans of the run."""
    if not times:
        return []
    span = max(1.0, max(times) / 60)
    counts = [0] * (int(max(times) / span) + 1)
    for time in times:
        counts[int(time / span)] += 1
    return [((number + 0.5) * span, count / span) for number, count in enumerate(counts)]


def _adapters(figures: Figures) -> str:
    rows = [
        (
            each.model,
            f"{each.requests:,}",
            f"{each.failed:,}",
            f"{each.tokens:,}",
            ms(each.first),
            f"{each.speed:.1f}",
            f"{each.attained:.0%}",
        )
        for each in figures.adapters[:MOST_ADAPTERS]
    ]
    heads = (
        "model",
        "requests",
        "failed",
        "tokens",
        "first token, mean",
        "tokens/s of waiting",
        "within the objective",
    )
    rest = len(figures.adapters) - len(rows)
    return _table(heads, rows) + (f"<p>and {rest:,} more</p>" if rest > 0 else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
