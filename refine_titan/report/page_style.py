"""The style sheet of a page. Colours are light or dark as the reader's system asks, and light in print."""

# Number of colours of curves and bars: `.series0`, `.stroke0`, `.key0` and so on.
SERIES = 10

LIGHT = {
    "bg": "#fcfcfb",
    "card": "#fff",
    "text": "#1c2128",
    "muted": "#59626e",
    "line": "#e3e6ea",
    "axis": "#9aa3ad",
    "s0": "#2a67b7",
    "s1": "#c9601a",
    "s2": "#18836f",
    "s3": "#8250b4",
    "s4": "#a33a58",
    "s5": "#6a6f12",
    "s6": "#0f7f9c",
    "s7": "#b23a9a",
    "s8": "#6b4f3a",
    "s9": "#4a5463",
    "hot": "#1d5aa6",
    "cold": "#e7eef7",
    "onhot": "#fff",
    "bad": "#b3261e",
    "differs": "#fde3df",
    "shade": "#0003",
}
DARK = LIGHT | {
    "bg": "#14171b",
    "card": "#1b1f25",
    "text": "#e7e9ed",
    "muted": "#9ba5b1",
    "line": "#2d333b",
    "axis": "#66707c",
    "s0": "#6fa8f5",
    "s1": "#f0a061",
    "s2": "#5cc9b0",
    "s3": "#bf97ec",
    "s4": "#ea86a2",
    "s5": "#c6ca5b",
    "s6": "#62c6e2",
    "s7": "#ee8fd9",
    "s8": "#c8a88d",
    "s9": "#a9b4c2",
    "hot": "#7db4ff",
    "cold": "#212a36",
    "onhot": "#0d1520",
    "bad": "#ff8a80",
    "differs": "#5a2420",
    "shade": "#000a",
}
PRINT = LIGHT | {"bg": "#fff", "text": "#000", "muted": "#444", "line": "#ccc", "axis": "#777"}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


# The style of a chart's marks, in a page and in a file of its own.
CHART_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--text);
  font-variant-numeric: tabular-nums; }
.tick { fill: var(--muted); font-size: 11px; }
.cell { font-size: 11px; }
.onhot { fill: var(--onhot); }
.grid { stroke: var(--line); }
.zero { stroke: var(--axis); }
.whisker { stroke: var(--text); stroke-width: 1.2; fill: none; opacity: .9; }
.hit { fill: transparent; }
.hot { fill: var(--hot); }
.cold { fill: var(--cold); }
.hollow { fill: none; stroke: var(--line); stroke-dasharray: 2 2; }
.bar { opacity: .8; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1.4; opacity: .8; }
.faint { stroke-width: 1; opacity: .35; }
.band { opacity: .2; }
""" + "".join(f".series{i} {{ fill: var(--s{i}); }}\n.stroke{i} {{ stroke: var(--s{i}); }}\n" for i in range(SERIES))

_PAGE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 8px; }
h3 { font-size: 14px; margin: 20px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 12px; max-width: 72ch; overflow-wrap: anywhere; }
.headline { font-size: 17px; line-height: 1.4; max-width: 60ch; margin-top: 18px; }
li { overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.path { color: var(--muted); overflow-wrap: anywhere; }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { margin-right: 14px; white-space: nowrap; }
a { color: var(--s0); }
.warning { border-left: 3px solid var(--bad); padding: 6px 12px; background: var(--card); margin: 10px 0;
  overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 12.5px; display: block; }
dl { display: grid; grid-template-columns: fit-content(58%) 1fr; gap: 3px 18px; margin: 0; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
/* A shadow at the right says that there is more; it lies at the table's end and scrolls out of sight there. */
.scroll { overflow-x: auto; max-width: 100%; background: linear-gradient(90deg, transparent, var(--bg) 70%) 100% 0 / 40px 100%
  no-repeat local, linear-gradient(90deg, transparent, var(--shade)) 100% 0 / 14px 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child, .left { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; z-index: 1; background: var(--bg); }
td.strong { font-weight: 600; }
td.ns { color: var(--muted); }
figure { margin: 14px 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 13px; margin-bottom: 4px; overflow-wrap: anywhere; }
figure details { font-size: 12.5px; margin: 2px 0 0; }
svg { display: block; max-width: 100%; height: auto; }
.narrow { display: none; }
.panels { display: flex; flex-wrap: wrap; gap: 4px 30px; }
.panels figure { margin: 8px 0; flex: 0 1 auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0 8px; font-size: 13px; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.ramp { display: inline-block; width: 120px; height: 10px; border-radius: 3px; background: linear-gradient(90deg, var(--cold),
  var(--hot)); margin: 0 8px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 8px 0 14px; font-size: 14px; }
select, input, button { font: inherit; padding: 3px 6px; max-width: 100%; color: var(--text); background: var(--card);
  border: 1px solid var(--axis); border-radius: 5px; }
input[type=number] { width: 6.5em; }
input[type=search] { width: 12em; }
button { padding: 3px 10px; cursor: pointer; }
button:disabled { color: var(--axis); border-color: var(--line); cursor: default; }
.pager { position: sticky; top: 0; z-index: 2; background: var(--bg); padding: 6px 0; margin: 0 0 6px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 0 0 10px; }
article header { font-size: 13px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 2px 14px; overflow-wrap: anywhere;
  }
article header b { color: var(--text); }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 12.5px/1.45 ui-monospace,
  "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; max-height: 26em; overflow-y: auto; }
.pair { display: grid; grid-template-columns: 84px 1fr; gap: 2px 10px; }
.pair > span { color: var(--muted); font-size: 13px; padding-top: 6px; }
.pair > * { min-width: 0; }
.tokens { --bg: var(--card); margin-top: 6px; }
.tokens td { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; text-align: left;
  white-space: pre; padding: 2px 6px; border-left: 1px solid var(--line); unicode-bidi: isolate; }
.tokens td:last-child { border-right: 1px solid var(--line); }
.tokens td, .tokens td:first-child { position: static; background: none; }
.tokens th { text-align: left; min-width: 78px; padding: 2px 8px 2px 0; font-weight: 400; font-size: 13px; }
.tokens td.differs { background: var(--differs); font-weight: 600; text-decoration: underline 2px var(--bad); }
.tokens td.id { color: var(--muted); }
details { margin: 8px 0; }
details summary { cursor: pointer; color: var(--muted); }
[hidden] { display: none !important; }
@media (max-width: 600px) {
  main { padding: 20px 14px 48px; }
  h2 { margin-top: 32px; }
  .broad { display: none; }
  .narrow { display: block; }
  th:first-child, td:first-child { white-space: normal; overflow-wrap: break-word; min-width: 128px; max-width: 42vw; padding-right: 8px;
    border-right: 1px solid var(--line); }
  th:nth-child(2), td:nth-child(2) { padding-left: 8px; }
  .tokens th:first-child { min-width: 62px; border-right: 0; }
  .tokens td:nth-child(2) { padding-left: 6px; }
  .pager { gap: 6px; }
  .pair { grid-template-columns: 1fr; }
  .pair > pre { margin-top: 0; }
  .controls label { flex: 1 1 auto; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, article, tr { break-inside: avoid; }
  h2, h3, figcaption, .legend { break-after: avoid; }
  svg { max-height: 85vh; }
  .panels { display: block; }
  .panels figure { display: inline-block; width: 47%; vertical-align: top; }
  pre { max-height: none; }
  .controls, .pager, nav, figure details { display: none; }
  .broad { display: block; }
  .narrow { display: none; }
  .scroll { overflow: visible; background: none; }
}
"""

STYLE = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
    + _PAGE
    + f"@media print {{ :root {{ color-scheme: light; {_variables(PRINT)} }} }}\n"
    + "".join(f".key{i} {{ background: var(--s{i}); }}\n" for i in range(SERIES))
    # Rules of charts hold inside them only: a table's cell may have the class of a mark.
    + "".join(f"svg {rule}\n" for rule in CHART_STYLE.replace("\n  ", " ").strip().splitlines())
)
