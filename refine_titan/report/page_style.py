"""The style sheet and the script of a page. Colours are light or dark as the reader's system asks, and light in print."""

# Number of colours of curves and bars: `.series0`, `.stroke0`, `.key0` and so on.
SERIES = 6

STYLE = """
:root { color-scheme: light dark; --bg: #fcfcfb; --card: #fff; --text: #1c2128; --muted: #59626e; --line: #e3e6ea;
  --axis: #9aa3ad; --s0: #2a67b7; --s1: #c9601a; --s2: #18836f; --s3: #8250b4; --s4: #a33a58; --s5: #6a6f12; --hot: #1d5aa6;
  --cold: #e7eef7; --onhot: #fff; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171b; --card: #1b1f25; --text: #e7e9ed; --muted: #9ba5b1; --line: #2d333b; --axis: #66707c; --s0: #6fa8f5;
    --s1: #f0a061; --s2: #5cc9b0; --s3: #bf97ec; --s4: #ea86a2; --s5: #c6ca5b; --hot: #7db4ff; --cold: #212a36;
    --onhot: #0d1520; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 8px; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 6px 0 12px; max-width: 72ch; }
.muted { color: var(--muted); }
.path { color: var(--muted); overflow-wrap: anywhere; }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { margin-right: 14px; white-space: nowrap; }
a { color: var(--s0); }
.warning { border-left: 3px solid var(--bad); padding: 6px 12px; background: var(--card); margin: 10px 0;
  overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 10px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 12.5px; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child, .left { text-align: left; }
td.strong { font-weight: 600; }
td.ns { color: var(--muted); }
svg { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide svg { min-width: 640px; }
.panels { display: flex; flex-wrap: wrap; gap: 18px 30px; }
.maps svg { margin-bottom: 14px; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--text);
  font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--muted); font-size: 11px; }
svg .panel { font-weight: 600; font-size: 13px; }
svg .cell { font-size: 11px; }
svg .onhot { fill: var(--onhot); }
svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--axis); }
svg .whisker { stroke: var(--text); stroke-width: 1.2; fill: none; opacity: .9; }
svg .hit { fill: transparent; }
svg .hot { fill: var(--hot); }
svg .cold { fill: var(--cold); }
svg .hollow { fill: none; stroke: var(--line); stroke-dasharray: 2 2; }
svg .bar { opacity: .8; }
svg [class^=stroke] { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .thin { stroke-width: 1.4; opacity: .8; }
svg .faint { stroke-width: 1; opacity: .35; }
svg .band { opacity: .2; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0 8px; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.ramp { display: inline-block; width: 120px; height: 10px; border-radius: 3px; background: linear-gradient(90deg, var(--cold),
  var(--hot)); margin: 0 8px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 8px 0 14px; }
select { font: inherit; padding: 3px 6px; max-width: 100%; color: var(--text); background: var(--card);
  border: 1px solid var(--axis); border-radius: 5px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 0 0 10px; }
article header { font-size: 13px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 2px 14px; overflow-wrap: anywhere;
  }
article header b { color: var(--text); }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 12.5px/1.45 ui-monospace,
  "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; max-height: 26em; overflow-y: auto; }
.pair { display: grid; grid-template-columns: 84px 1fr; gap: 2px 10px; }
.pair > span { color: var(--muted); font-size: 13px; padding-top: 6px; }
.pair > * { min-width: 0; }
details { margin: 8px 0; }
details summary { cursor: pointer; color: var(--muted); }
[hidden] { display: none !important; }
@media print {
  :root { color-scheme: light; --bg: #fff; --card: #fff; --text: #000; --muted: #444; --line: #ccc; --axis: #777;
    --s0: #2a67b7; --s1: #c9601a; --s2: #18836f; --s3: #8250b4; --s4: #a33a58; --s5: #6a6f12; --hot: #1d5aa6; --cold: #e7eef7;
    --onhot: #fff; --bad: #b3261e; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section, svg, article, tr { break-inside: avoid; }
  section.long { break-inside: auto; }
  h2, h3 { break-after: avoid; }
  pre { max-height: none; }
  .controls, nav { display: none; }
  .scroll, .wide { overflow: visible; }
  .wide svg { min-width: 0; }
}
""" + "".join(
    f"svg .series{i} {{ fill: var(--s{i}); }} svg .stroke{i} {{ stroke: var(--s{i}); }} .key{i} {{ background: var(--s{i}); }}\n"
    for i in range(SERIES)
)

# Shows the answers of one task. A browser without scripts shows all answers.
SCRIPT = """
for (const box of document.querySelectorAll("[data-filter]")) {
  const [task, kind] = box.querySelectorAll("select"), count = box.querySelector("output");
  const show = () => {
    let shown = 0;
    for (const card of box.querySelectorAll("article")) {
      const fits = (!task.value || card.dataset.task === task.value) && (!kind.value || card.dataset.kind === kind.value);
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + " shown";
  };
  task.selectedIndex = Math.min(1, task.options.length - 1);
  task.onchange = kind.onchange = show;
  box.querySelector(".controls").hidden = false;
  show();
}
"""
