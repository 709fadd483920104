"""Draws docs/images/one_pass.svg: how a ReFINE step reads a sequence, in the true proportions of the debug run.

    python tools/draw_architecture.py

Lengths come from train_configs/debug_midtrain.toml. A token has the same width everywhere but under the magnifier, which says how
many times wider it is there.
"""

import argparse
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "train_configs" / "debug_midtrain.toml"
TARGET = REPOSITORY / "docs" / "images" / "one_pass.svg"

# Documents and positions of step 17 of the debug run with --data.min_document_tokens 1000 (without it a sequence is one document), with the
# standard library of Python 3.11.7.
DOCUMENTS = (0, 1688, 4096)
STARTS = (334, 683, 1413, 1868, 2178, 2921, 3218, 3881)
MAGNIFIED = 4  # index of the rollout under the magnifier

SETTINGS = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
TOKENS, STRIDE = SETTINGS["training"]["seq_len"], SETTINGS["refine"]["snapshot_stride"]
CHUNKS, LENGTH = SETTINGS["refine"]["num_chunks"], SETTINGS["refine"]["rollout_length"]

WIDTH, MARGIN = 1120, 48
SCALE = (WIDTH - 2 * MARGIN) / TOKENS  # width of a token
CELL = 16  # width of a token under the magnifier

# Class: property, colour in light mode, colour in dark mode.
COLOURS = {
    "paper": ("fill", "#ffffff", "#0d1117"),
    "frame": ("stroke", "#d1d9e0", "#3d444d"),
    "ink": ("fill", "#1f2328", "#f0f6fc"),
    "soft": ("fill", "#59636e", "#9198a1"),
    "line": ("stroke", "#59636e", "#9198a1"),
    "even": ("fill", "#b6cfee", "#2f5488"),
    "odd": ("fill", "#8fb3e2", "#1f3c66"),
    "lens": ("fill", "#eef2f7", "#161d27"),
    "snapshot": ("stroke", "#8250df", "#b98bff"),
    "snapshot-text": ("fill", "#6639ba", "#c9a5ff"),
    "replay": ("fill", "#f2c866", "#8a6411"),
    "replay-text": ("fill", "#7d5200", "#e3b341"),
    "rollout": ("fill", "#cf222e", "#ff6a69"),
    "rollout-line": ("stroke", "#cf222e", "#ff6a69"),
    "rollout-text": ("fill", "#a40e26", "#ff8f8a"),
    "cell": ("stroke", "#ffffff", "#0d1117"),
}


def document_start(start: int) -> int:
    """First token of the document that a rollout at `start` continues."""
    return max(begin for begin in DOCUMENTS[:-1] if begin < start)


def snapshots() -> list[int]:
    """Positions of the kept states: every `STRIDE` tokens of each document, as `SnapshotBank.boundaries`."""
    return [r for begin, end in zip(DOCUMENTS, DOCUMENTS[1:]) for r in range(begin + STRIDE, end, STRIDE)]


def last_snapshot(start: int) -> int:
    """Where the replay of a rollout at `start` begins, as `SnapshotBank.boundary_before`."""
    begin = document_start(start)
    return begin + (start - 1 - begin) // STRIDE * STRIDE


def replayed(start: int) -> int:
    """Tokens between the last snapshot and the last token of the prefix."""
    return start - 1 - last_snapshot(start)


def prefix_tokens() -> int:
    """Tokens of all prefixes together."""
    return sum(start - document_start(start) for start in STARTS)


def x(token: int) -> float:
    return MARGIN + token * SCALE


def rect(style: str, left: float, top: float, width: float, height: float, radius: float = 0) -> str:
    rounded = f' rx="{radius:g}"' if radius else ""
    return f'<rect class="{style}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"{rounded}/>'


def line(style: str, x1: float, y1: float, x2: float, y2: float, width: float = 1.25, more: str = "") -> str:
    return f'<line class="{style}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke-width="{width:g}"{more}/>'


def text(style: str, left: float, top: float, words: str, size: int = 15, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{left:g}" y="{top:g}" font-size="{size}"{at}{weight}>{escape(words)}</text>'


def bracket(style: str, left: float, right: float, top: float) -> str:
    """A line under a range, with its ends turned up."""
    return f'<path class="{style}" d="M{left:g} {top - 5:g}V{top:g}H{right:g}V{top - 5:g}" fill="none" stroke-width="1.25"/>'


def trunk(top: float, height: float) -> Iterator[str]:
    """The sequence, a shade for each document."""
    for number, (begin, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:])):
        yield rect("odd" if number % 2 else "even", x(begin), top, (end - begin) * SCALE, height)


def one_pass(top: float) -> Iterator[str]:
    """The sequence with its snapshots, and the rollouts at their positions."""
    bar, height = top + 82, 32
    yield text("ink", MARGIN, top, "Here: the sequence is read once", 21, bold=True)
    yield text("soft", MARGIN, top + 26, f"{TOKENS:,} tokens in {len(DOCUMENTS) - 1} documents, one shade each.")
    yield line("snapshot", MARGIN + 385, top + 13, MARGIN + 385, top + 28, 2)
    yield text("soft", MARGIN + 395, top + 26, f"snapshot: the states of all layers, every {STRIDE} tokens")
    yield line("rollout-line", MARGIN + 830, top + 13, MARGIN + 830, top + 28, LENGTH * SCALE)
    yield text("soft", MARGIN + 840, top + 26, f"rollout: {LENGTH} tokens")
    for chunk in range(CHUNKS):
        size = TOKENS // CHUNKS
        yield text("soft", x(chunk * size + size // 2), bar - 12, f"chunk {chunk + 1}", 13, "middle")
        if chunk:
            yield line("line", x(chunk * size), bar - 24, x(chunk * size), bar - 4, 1)
    yield from trunk(bar, height)
    for r in snapshots():
        yield line("snapshot", x(r), bar + height - 6, x(r), bar + height + 6)
    for i, start in enumerate(STARTS):
        yield rect("rollout", x(start), bar + height, LENGTH * SCALE, 34)
        if i != MAGNIFIED:  # the magnifier says where it is
            yield text("rollout-text", x(start), bar + height + 50, f"{start:,}", 13, "middle")


def magnifier(trunk_top: float, top: float) -> Iterator[str]:
    """One rollout with its replay, wide enough to count tokens."""
    start = STARTS[MAGNIFIED]
    taken, end = last_snapshot(start), start + LENGTH
    shown = int((WIDTH - 2 * MARGIN - 32) // CELL)
    begin = taken - (shown - (end - taken)) // 2
    left, right = MARGIN, WIDTH - MARGIN
    height, cell, upper, lower = 222, 24, top + 62, top + 114
    shade = "odd" if DOCUMENTS.index(document_start(start)) % 2 else "even"

    def at(token: int) -> float:
        return left + 16 + (token - begin) * CELL

    lens_left, lens_right, lens_top, lens_bottom = x(begin), x(begin + shown), trunk_top - 4, trunk_top + 82
    outline = f"M{lens_left:g} {lens_bottom:g}L{left} {top:g}V{top + height:g}H{right}V{top:g}L{lens_right:g} {lens_bottom:g}"
    yield f'<path class="lens" d="{outline}Z"/>'
    yield f'<path class="frame" d="{outline}" fill="none"/>'
    lens = f'x="{lens_left:g}" y="{lens_top:g}" width="{lens_right - lens_left:g}" height="{lens_bottom - lens_top:g}"'
    yield f'<rect class="line" {lens} rx="3" fill="none"/>'
    yield text("ink", left + 16, top + 28, f"Magnified {CELL / SCALE:g} times: the rollout at position {start:,}", 16, bold=True)

    for token in range(begin, begin + shown):
        yield rect(f"{shade} cell", at(token), upper, CELL, cell)
    for token in range(taken, start - 1):
        yield rect("replay cell", at(token), lower, CELL, cell)
    yield rect(f"{shade} cell", at(start - 1), lower, CELL, cell)
    for token in range(start, end):
        yield rect("rollout cell", at(token), lower, CELL, cell)
    yield f'<rect class="line" x="{at(start):g}" y="{upper:g}" width="{LENGTH * CELL}" height="{cell}" fill="none" stroke-width="2"/>'
    yield text("soft", at(begin), upper - 8, "tokens of the document", 14)
    yield text("ink", at(start), upper - 8, "the true tokens", 14)
    middle = at(start) + LENGTH * CELL / 2
    yield line("line", middle, upper + cell + 3, middle, lower - 3, 1.5, ' marker-start="url(#tip)" marker-end="url(#tip)"')
    yield text("ink", middle - 12, upper + cell + 19, "the reward compares the two", 14, "end")

    under = lower + cell
    yield line("snapshot", at(taken), upper - 2, at(taken), under + 26, 3)
    yield text("snapshot-text", at(taken), under + 42, f"snapshot at {taken:,}", 14, "middle")
    yield bracket("line", at(taken) + 4, at(start - 1) - 2, under + 10)
    words = f"replay: {replayed(start)} tokens are read again"
    yield text("replay-text", (at(taken) + at(start - 1)) / 2, under + 28, words, 14, "middle")
    yield text("rollout-text", at(start), under + 19, f"rollout: {LENGTH} sampled tokens", 14)
    last = at(start) - CELL / 2
    yield line("line", last, under + 2, last, under + 28, 1)
    yield text("soft", last, under + 42, "last token of the prefix", 14, "middle")
    words = "The policy loss sends its gradient from the rollout through replay and snapshot into every earlier token of the document."
    yield text("soft", left + 16, top + height - 14, words, 14)


def every_prefix(top: float) -> Iterator[str]:
    """The same rollouts, each after a forward over its own prefix."""
    yield text("ink", MARGIN, top, "The published code: every prefix is read again, from its document's beginning", 21, bold=True)
    for i, start in enumerate(STARTS):
        begin, y = document_start(start), top + 22 + 18 * i
        number = DOCUMENTS.index(begin)
        yield rect("odd" if number % 2 else "even", x(begin), y, (start - begin) * SCALE, 13)
        yield rect("rollout", x(start), y - 2, LENGTH * SCALE, 17)
        fits = x(start) + 90 < WIDTH - MARGIN
        side, style, anchor = (7, "soft", "start") if fits else (-7, "ink", "end")
        yield text(style, x(start) + side, y + 11, f"{start - begin:,} tokens", 12, anchor)


def description() -> str:
    """The drawing in words, for those who do not see it."""
    return (
        f"Above, a sequence of {TOKENS:,} tokens is read once. A snapshot of the model's states is kept every {STRIDE} tokens. "
        f"{len(STARTS)} rollouts of {LENGTH} tokens leave the sequence, one in each of its {CHUNKS} chunks; each starts from the last "
        f"snapshot before its position and reads fewer than {STRIDE} tokens again. Below, the published code: for each of the same "
        f"{len(STARTS)} rollouts the whole prefix is read from the beginning of its document: {prefix_tokens():,} tokens, three times."
    )


def render() -> str:
    """The file."""
    decoded, rescored = len(STARTS) * LENGTH, len(STARTS) * (LENGTH + 1)
    replays = sum(map(replayed, STARTS))
    total = TOKENS + replays + decoded + rescored
    once = f"{TOKENS:,} tokens of the sequence + {replays} replayed + {decoded} decoded + {rescored} rescored"
    again = f"{TOKENS:,} tokens of the sequence + 3 x {prefix_tokens():,} of prefixes, for rollouts, log-probabilities and update"
    height = 804
    parts = [
        rect("paper frame", 0.5, 0.5, WIDTH - 1, height - 1, 8),
        *magnifier(134, 252),
        *one_pass(46),
        text("ink", MARGIN, 508, f"{once} = {total:,} tokens through the model", 16),
        *every_prefix(570),
        text("ink", MARGIN, 774, f"{again} = {TOKENS + 3 * prefix_tokens():,} before padding", 16),
    ]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title description">
<title id="title">One sequence read once for all of its rollouts, beside every prefix read again</title>
<desc id="description">{escape(description())}</desc>
<style>
text {{ font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }}
{_styles(1)}
@media (prefers-color-scheme: dark) {{
{_styles(2)}
}}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse"
orient="auto-start-reverse">
<path class="soft" d="M0 0L8 4L0 8Z"/></marker></defs>
{body}
</svg>
"""


def _styles(mode: int) -> str:
    return "\n".join(f".{name} {{ {values[0]}: {values[mode]}; }}" for name, values in COLOURS.items())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
