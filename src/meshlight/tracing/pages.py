"""A few plain pages for people: search, a list of traces, a trace as a waterfall. No scripts, no bundles.

Everything that comes from a span is escaped; the pages load nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import datetime
from html import escape
from urllib.parse import urlencode

from aiohttp import web

from meshlight.tracing import analysis
from meshlight.tracing.adjusters import adjust, children
from meshlight.tracing.api_v3 import summary
from meshlight.tracing.model import LogRecord, Span, Trace, text
from meshlight.tracing.query import BadQuery, Traces, parse_query, parse_trace_id

STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b7dd8;--bad:#c62828;--dim:#888}
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:76rem}
a{color:inherit}h1{font-size:1.15rem}form{display:flex;flex-wrap:wrap;gap:.5rem;margin:1rem 0}
input,select,button{font:inherit;padding:.25rem .5rem}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.3rem .5rem;border-bottom:1px solid var(--line);vertical-align:top}
.bad{color:var(--bad)}.dim{color:var(--dim)}.track{position:relative;height:.9rem;background:#8881}
.bar{position:absolute;top:0;bottom:0;min-width:2px;background:var(--bar)}.bar.bad{background:var(--bad)}
.bar.hot{outline:2px solid #e6a000}code{font-size:.9em}details summary{cursor:pointer}
@media(max-width:40rem){.wide{display:none}}
"""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
MAX_SPANS = 2000


def page(title: str, body: str, status: int = 200) -> web.Response:
    """A whole page."""
    html = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1><a href=/search>Meshlight tracing</a></h1>{body}"
    )
    return web.Response(
        text=html, status=status, content_type="text/html", headers={"Content-Security-Policy": POLICY}
    )


def duration(nanoseconds: int) -> str:
    """For people."""
    if nanoseconds >= 10**9:
        return f"{nanoseconds / 10**9:.2f} s"
    return f"{nanoseconds / 10**6:.2f} ms" if nanoseconds >= 10**6 else f"{nanoseconds / 1000:.0f} µs"


def moment(nanoseconds: int) -> str:
    """A time in UTC."""
    return datetime.datetime.fromtimestamp(nanoseconds / 10**9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[
        :-3
    ]


def add_pages(app: web.Application, traces: Traces) -> None:
    """`/`, `/search`, `/trace/{id}`, `/dependencies`."""
    pages = _Pages(traces)
    app.router.add_get("/", pages.search)
    app.router.add_get("/search", pages.search)
    app.router.add_get("/trace/{id}", pages.trace)
    app.router.add_get("/dependencies", pages.dependencies)


class _Pages:
    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    async def search(self, request: web.Request) -> web.Response:
        services = await self._traces.services()
        given = request.query
        try:
            query = parse_query(given, self._traces.now())
        except BadQuery as error:
            return page("Search", _form(services, given) + f"<p class=bad>{escape(str(error))}</p>", 400)
        found = await self._traces.store.find(query)
        return page("Search", _form(services, given) + _list(found))

    async def trace(self, request: web.Request) -> web.Response:
        identity = parse_trace_id(request.match_info["id"])
        found = await self._traces.store.get([identity]) if identity else []
        if not identity or not found:
            return page("Not found", "<p class=bad>There is no such trace.</p>", 404)
        flows = await self._traces.store.flows_of(identity)
        folded = request.query.get("fold") == "1"
        body = await asyncio.to_thread(_waterfall, found[0], flows, folded)
        return page(identity.hex(), body)

    async def dependencies(self, _: web.Request) -> web.Response:
        now = self._traces.now()
        found = await self._traces.store.dependencies(now - 86400 * 10**9, now)
        rows = "".join(f"<tr><td>{escape(p)}<td>{escape(c)}<td>{n}" for (p, c), n in found.most_common())
        return page(
            "Dependencies", f"<p>Calls of the last day.<table><tr><th>Caller<th>Called<th>Calls{rows}</table>"
        )


def _form(services: list[str], given: object) -> str:
    def value(name: str) -> str:
        found = given.get(name, "")  # type: ignore[attr-defined]
        return escape(str(found), quote=True)

    chosen = value("service")
    options = "".join(
        f"<option{' selected' if escape(s, quote=True) == chosen else ''}>{escape(s)}</option>"
        for s in services
    )
    shown = (
        ("operation", "operation", "Operation", 20),
        ("tags", '{"error":"true"}', "Tags", 20),
        ("text", "text anywhere", "Text", 16),
        ("minDuration", "at least 10ms", "Shortest duration", 12),
        ("lookback", "lookback 1h", "Lookback", 12),
    )
    select = f"<select name=service aria-label=Service><option value=''>any service</option>{options}</select>"
    fields = [select] + [
        f"<input name={name} placeholder='{escape(hint, quote=True)}' aria-label='{label}' size={size} "
        f"value='{value(name)}'>"
        for name, hint, label, size in shown
    ]
    return f"<form action=/search>{''.join(fields)}<button>Find traces</button></form>"


def _list(found: list[Trace]) -> str:
    if not found:
        return "<p>No traces. Send spans to port 4317, 4318 or 9411, or look further back.</p>"
    rows = []
    for trace in found:
        line = summary(trace)
        start, end = int(line["minStartTimeUnixNano"]), int(line["maxEndTimeUnixNano"])
        errors = f"<span class=bad>{line['errorSpanCount']} failed</span>" if line["errorSpanCount"] else ""
        services = ", ".join(f"{s['name']} ({s['spanCount']})" for s in line["services"][:12])
        rows.append(
            f"<tr><td><a href=/trace/{line['traceId']}>{escape(line['rootServiceName'])}: "
            f"{escape(line['rootOperationName'])}</a><br><code class=dim>{line['traceId']}</code>"
            f"<td class=wide>{escape(services)}<td>{line['spanCount']} spans {errors}"
            f"<td>{duration(end - start)}<td class=wide>{moment(start)}"
        )
    head = "<tr><th>Trace<th class=wide>Services<th>Spans<th>Duration<th class=wide>Start (UTC)"
    return f"<table>{head}{''.join(rows)}</table>"


def _waterfall(trace: Trace, flows: list[LogRecord], folded: bool) -> str:
    spans = adjust(trace)
    if folded:
        spans = analysis.fold_mesh_hops(spans)
    begin = min(s.start for s in spans)
    total = max(1, max(s.end for s in spans) - begin)
    hot = {id(s.span) for s in analysis.critical_path(spans)}
    rows: list[str] = []
    for span, depth in ordered(spans):
        if len(rows) == MAX_SPANS:
            rows.append(f"<tr><td colspan=3 class=dim>… {len(spans) - MAX_SPANS} more spans: see the JSON")
            break
        left, width = (span.start - begin) / total * 100, span.duration / total * 100
        kind = " bad" if span.failed else ""
        kind += " hot" if id(span) in hot else ""
        rows.append(
            f"<tr><td style='padding-left:{min(depth, 20) * 0.8 + 0.5}rem'><details>"
            f"<summary>{escape(span.service)}"
            f" <span class=dim>{escape(span.name)}</span></summary>{_details(span)}</details>"
            f"<td style='width:45%'><div class=track>"
            f"<div class='bar{kind}' style='left:{left:.2f}%;width:{width:.2f}%'></div></div>"
            f"<td>{duration(span.duration)}"
        )
    identity = spans[0].trace_id.hex()
    switch = urlencode({} if folded else {"fold": "1"})
    links = (
        f"<p>{len(spans)} spans, {duration(total)}, {moment(begin)} UTC · <a href='?{switch}'>"
        f"{'show' if folded else 'fold'} mesh hops</a> · <a href=/api/traces/{identity}>JSON</a> · "
        f"<span class=dim>outlined: critical path</span>"
    )
    return f"{links}<table>{''.join(rows)}</table>{_flows(flows)}"


def ordered(spans: Trace) -> list[tuple[Span, int]]:
    """Spans in the order of a waterfall, with their depth; no recursion, for deep traces."""
    below = children(spans)
    todo = [(span, 0) for span in reversed(below.get(b"", []))]
    found: list[tuple[Span, int]] = []
    seen: set[int] = set()
    while todo:
        span, depth = todo.pop()
        if id(span) in seen:
            continue
        seen.add(id(span))
        found.append((span, depth))
        todo += [(child, depth + 1) for child in reversed(below.get(span.span_id, []))]
    # Spans in a cycle of parents hang below nothing.
    return found + [(span, 0) for span in spans if id(span) not in seen]


def _details(span: Span) -> str:
    pairs = {**span.attributes, **({"status": span.status_message} if span.status_message else {})}
    rows = "".join(f"<tr><td>{escape(k)}<td>{escape(text(v)[:2000])}" for k, v in pairs.items())
    rows += "".join(
        f"<tr><td class=dim>{escape(k)}<td>{escape(text(v)[:2000])}"
        for k, v in span.resource.attributes.items()
    )
    for event in span.events[:50]:
        fields = ", ".join(f"{k}={text(v)[:500]}" for k, v in event.attributes.items())
        rows += f"<tr><td>+{duration(event.time - span.start)}<td>{escape(event.name)} {escape(fields)}"
    warnings = "".join(f"<p class=bad>{escape(w)}</p>" for w in span.warnings)
    return f"{warnings}<table>{rows}</table>"


def _flows(flows: list[LogRecord]) -> str:
    if not flows:
        return ""
    shown = (
        "reporter", "http.request.method", "url.path", "http.response.status_code", "policy.verdict",
        "policy.name", "http.route", "upstream.attempts",
    )  # fmt: skip
    rows = ""
    for record in sorted(flows, key=lambda r: r.time)[:200]:
        kind = " class=bad" if record.attributes.get("policy.verdict") == "deny" else ""
        cells = "".join(f"<td>{escape(text(record.attributes.get(name, '')))}" for name in shown)
        rows += f"<tr{kind}>{cells}"
    heads = ("Reporter", "Method", "Path", "Code", "Verdict", "Policy", "Route", "Attempts")
    return f"<h2>Mesh decisions</h2><table><tr>{''.join(f'<th>{h}' for h in heads)}{rows}</table>"
