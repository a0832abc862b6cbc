#!/usr/bin/env python3
"""Draws what bench_strategies or dattn bench wrote: one SVG each for scaling, efficiency and phases.

    bench/plot.py FILE.json|FILE.csv [--out DIR] [--ranks N]
    bench/plot.py FILE.jsonl [--tokens N] [--mask M] [--dtype D] [--out DIR] [--ranks N]

Of rows of dattn bench those are drawn that have these tokens, mask and dtype, the first row's
where they are not given; all else must be equal but strategy and ranks.

scaling.svg     seconds over ranks, both logarithmic, with the ideal measured beside them
efficiency.svg  percent of the ideal (all ranks busy) over ranks; where the ideal was left out,
                the rate of a rank over that of one rank alone
phases.svg      for N ranks [the most there are]: compute, exposed wait and the rest, stacked

A panel for each pass. Needs nothing but Python; writes the files and prints their names.
"""
import argparse
import csv
import json
import math
import pathlib
import sys
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which colour-blind readers tell apart, and two more.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
           "#7b3f00", "#5d3a9b"]
MARKS = ["circle", "square", "triangle", "diamond"]
PHASES = [("compute_seconds", "compute", "#0072b2"), ("exposed_seconds", "exposed wait", "#d55e00"),
          ("other_seconds", "other", "#999999")]
PANEL_WIDTH, PANEL_HEIGHT = 430, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 70, 56  # margins of a panel
LEGEND_WIDTH = 150
LINE = 18  # of text


def read(file):
    """The rows that were measured, with numbers as numbers and None where there is no figure."""
    text = pathlib.Path(file).read_text(encoding="utf-8")
    if text.startswith('{"bench":1,'):
        return [row for line in text.splitlines() for row in rows_of_sweep(json.loads(line))]
    if text.lstrip().startswith("{"):
        rows = json.loads(text)["rows"]
    else:
        rows = [dict(row) for row in csv.DictReader(text.splitlines())]
    words = {"strategy", "partition", "mesh", "mask", "pass", "refused"}
    for row in rows:
        for name, value in row.items():
            if value == "":
                row[name] = None
            elif isinstance(value, str) and name not in words:
                row[name] = float(value) if any(c in value for c in ".en") else int(value)
    return [row for row in rows if row["refused"] is None]


def rows_of_sweep(line):
    """The passes of one line of dattn bench, in the columns of bench_strategies."""
    if line["exit"] != 0:
        return
    asked, resolved = line["asked"], line["resolved"]
    for name in ("forward", "backward"):
        if name not in line:
            continue
        part, seconds = line[name], line[name]["seconds"]["median"]
        yield {"strategy": resolved["strategy"], "partition": resolved["partition"],
               "mesh": resolved["mesh"], "ranks": line["ranks"], "threads": resolved["threads"],
               "tokens": asked["tokens"], "heads": asked["heads"], "kv_heads": asked["kv_heads"],
               "d": asked["head_dim"], "mask": asked["mask"], "dtype": asked["dtype"],
               "pass": name, "seconds": seconds, "repeats": asked["repeat"],
               "compute_seconds": part["phases"]["compute"]["avg"],
               "exposed_seconds": part["phases"]["wait"]["avg"],
               "other_seconds": max(0.0, seconds - part["phases"]["compute"]["avg"]
                                    - part["phases"]["wait"]["avg"]),
               "ideal_busy_seconds": None, "of_ideal_busy": None, "efficiency": None,
               "gflops": part["gflops"]}


def pick(rows, tokens, mask, dtype):
    """Of rows of a sweep those that can be drawn together, with their efficiency."""
    if not rows or "dtype" not in rows[0]:
        return rows
    want = {"tokens": tokens or rows[0]["tokens"], "mask": mask or rows[0]["mask"],
            "dtype": dtype or rows[0]["dtype"]}
    rows = [row for row in rows if all(row[name] == value for name, value in want.items())]
    last = {(row["strategy"], row["ranks"], row["pass"]): row for row in rows}  # measured again
    rows = sorted(last.values(), key=lambda row: row["ranks"])
    for row in rows:
        alone = max((r["gflops"] for r in rows if r["ranks"] == 1 and r["pass"] == row["pass"]),
                    default=None)
        row["efficiency"] = row["gflops"] / alone / row["ranks"] if alone else None
    return rows


def count(text):
    """8K is 8192."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:].upper(), 1)
    return int(text[:-1] if unit > 1 else text) * unit


class Drawing:
    """Elements of one SVG, and where its panels lie."""

    def __init__(self, panels, title, subtitle):
        self.width = panels * (LEFT + PANEL_WIDTH + RIGHT) + LEGEND_WIDTH
        self.height = TOP + PANEL_HEIGHT + BOTTOM
        self.parts = []
        self.text(LEFT, 22, title, size=16, weight="bold")
        self.text(LEFT, 40, subtitle, colour="#555555")

    def add(self, element, **attributes):
        words = "".join(f' {name.replace("_", "-")}="{escape(str(value), {chr(34): "&quot;"})}"'
                        for name, value in attributes.items())
        self.parts.append(f"<{element}{words}/>")

    def text(self, x, y, words, size=12, anchor="start", colour="#000000", weight="normal", turn=0):
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
                          f'fill="{colour}" font-weight="{weight}"{turned}>{escape(words)}</text>')

    def line(self, x1, y1, x2, y2, colour="#000000", width=1.0, dash=None):
        more = {"stroke_dasharray": dash} if dash else {}
        self.add("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}",
                 stroke=colour, stroke_width=width, **more)

    def box(self, x, y, width, height, colour, outline="none"):
        self.add("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}",
                 fill=colour, stroke=outline)

    def path(self, points, colour, dash=None):
        more = {"stroke_dasharray": dash} if dash else {}
        self.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none",
                 stroke=colour, stroke_width=2, **more)

    def mark(self, x, y, number, colour):
        kind = MARKS[number % len(MARKS)]
        if kind == "circle":
            self.add("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, fill=colour)
            return
        corners = {"square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
                   "triangle": [(0, -5), (5, 4), (-5, 4)],
                   "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)]}[kind]
        self.add("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners),
                 fill=colour)

    def legend(self, entries):
        """entries: (label, draw) where draw(x, y) draws the sample that ends at x + 24."""
        x = self.width - LEGEND_WIDTH + 8
        for i, (label, draw) in enumerate(entries):
            y = TOP + 10 + i * LINE
            draw(x, y - 4)
            self.text(x + 30, y, label)

    def write(self, file):
        body = "\n".join(self.parts)
        file.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif">\n'
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n',
            encoding="utf-8")
        print(file)


class Scale:
    """Maps values to a stretch of pixels, linearly or by logarithm."""

    def __init__(self, low, high, begin, end, logarithmic):
        self.low, self.high, self.logarithmic = low, high, logarithmic
        self.begin, self.end = begin, end

    def __call__(self, value):
        at = math.log if self.logarithmic else float
        span = at(self.high) - at(self.low)
        share = (at(value) - at(self.low)) / span if span else 0.5
        return self.begin + share * (self.end - self.begin)


def round_step(span, ticks):
    """A step of 1, 2 or 5 times a power of ten that makes at most so many ticks."""
    power = 10.0 ** math.floor(math.log10(span / ticks))
    return next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= ticks)


def linear_ticks(high):
    step = round_step(high, 6)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Round numbers in [low, high]: over some decades powers of ten, then also 2 and 5 times
    those; within one, multiples of one step."""
    if high / low < 10:
        step = round_step(high - low, 6)
        return [step * i for i in range(math.ceil(low / step), int(high / step + 1e-9) + 1)]
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0 ** p for p in powers for m in factors]
    return [tick for tick in ticks if low <= tick <= high]


def seconds_text(value):
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if value >= size * 0.9995 or unit == "ns":
            return f"{value / size:.3g} {unit}" if value else "0"
    return ""


class Panel:
    """Axes with ticks, grid and labels at place `number` of a drawing."""

    def __init__(self, drawing, number, title, x_label, y_label):
        self.drawing = drawing
        self.left = number * (LEFT + PANEL_WIDTH + RIGHT) + LEFT
        self.right = self.left + PANEL_WIDTH
        self.top, self.bottom = TOP, TOP + PANEL_HEIGHT
        drawing.text((self.left + self.right) / 2, TOP - 10, title, size=13, anchor="middle",
                     weight="bold")
        drawing.text((self.left + self.right) / 2, self.bottom + 44, x_label, anchor="middle")
        drawing.text(self.left - 56, (self.top + self.bottom) / 2, y_label, anchor="middle", turn=-90)
        drawing.box(self.left, self.top, PANEL_WIDTH, PANEL_HEIGHT, "none", "#000000")

    def y_ticks(self, scale, ticks, words):
        for tick in ticks:
            y = scale(tick)
            self.drawing.line(self.left, y, self.right, y, "#dddddd")
            self.drawing.line(self.left - 4, y, self.left, y)
            self.drawing.text(self.left - 7, y + 4, words(tick), size=11, anchor="end")

    def x_ticks(self, scale, ticks):
        for tick in ticks:
            x = scale(tick)
            self.drawing.line(x, self.top, x, self.bottom, "#eeeeee")
            self.drawing.line(x, self.bottom, x, self.bottom + 4)
            self.drawing.text(x, self.bottom + 18, str(tick), size=11, anchor="middle")


def unique(values):
    return list(dict.fromkeys(values))


def style_of(rows):
    """Colour number of each strategy, the same in all drawings of a file."""
    return {name: i for i, name in enumerate(unique(row["strategy"] for row in rows))}


def legend_of(drawing, styles, more=()):
    entries = []
    for name, i in styles.items():
        colour = COLOURS[i % len(COLOURS)]

        def draw(x, y, i=i, colour=colour):
            drawing.line(x, y, x + 24, y, colour, 2)
            drawing.mark(x + 12, y, i, colour)

        entries.append((name, draw))
    drawing.legend([*entries, *more])


def subtitle_of(rows):
    row = rows[-1]
    tokens = unique(r["tokens"] for r in rows)
    mask = row["mask"] if len(row["mask"]) <= 40 else row["mask"][:37] + "..."
    many = f"{tokens[0]} tokens" if len(tokens) == 1 else f"{min(tokens)} to {max(tokens)} tokens"
    return (f"{many}, heads {row['heads']}:{row['kv_heads']}, d {row['d']}, mask {mask}, "
            f"{row['threads']} thread{'s' if row['threads'] > 1 else ''} a rank, median of "
            f"{row['repeats']}")


def ranks_scale(rows, panel):
    ranks = sorted(unique(row["ranks"] for row in rows))
    low, high = (ranks[0], ranks[-1]) if len(ranks) > 1 else (ranks[0] / 2, ranks[0] * 2)
    scale = Scale(low, high, panel.left + 24, panel.right - 24, True)
    panel.x_ticks(scale, ranks)
    return scale


def curves(panel, rows, styles, x, y, value):
    for name, i in styles.items():
        points = [(x(row["ranks"]), y(value(row))) for row in rows
                  if row["strategy"] == name and value(row) is not None]
        colour = COLOURS[i % len(COLOURS)]
        panel.drawing.path(points, colour)
        for point in points:
            panel.drawing.mark(*point, i, colour)


def draw_scaling(rows, passes, file):
    drawing = Drawing(len(passes), "Scaling", subtitle_of(rows))
    styles = style_of(rows)
    for number, name in enumerate(passes):
        mine = [row for row in rows if row["pass"] == name]
        # Partitions have ideals of their own; the line is the best of them.
        ideal = {}
        for row in mine:
            if row["ideal_busy_seconds"] is not None:
                best = ideal.get(row["ranks"], math.inf)
                ideal[row["ranks"]] = min(best, row["ideal_busy_seconds"])
        panel = Panel(drawing, number, name, "ranks", "time (slowest rank)")
        values = [row["seconds"] for row in mine] + list(ideal.values())
        low, high = min(values) / 1.2, max(values) * 1.2
        y = Scale(low, high, panel.bottom, panel.top, True)
        panel.y_ticks(y, log_ticks(low, high), seconds_text)
        x = ranks_scale(mine, panel)
        drawing.path([(x(p), y(ideal[p])) for p in sorted(ideal)], "#444444", "6 4")
        curves(panel, mine, styles, x, y, lambda row: row["seconds"])
    dashed = ("ideal (busy)", lambda a, b: drawing.line(a, b, a + 24, b, "#444444", 2, "6 4"))
    legend_of(drawing, styles, [dashed])
    drawing.write(file)


def draw_efficiency(rows, passes, file):
    measured = all(row["of_ideal_busy"] is not None for row in rows)
    column = "of_ideal_busy" if measured else "efficiency"
    what = "percent of ideal (busy)" if measured else "percent of one rank's rate"
    drawing = Drawing(len(passes), "Efficiency", subtitle_of(rows))
    styles = style_of(rows)

    def value(row):
        return None if row[column] is None else 100 * row[column]

    for number, name in enumerate(passes):
        mine = [row for row in rows if row["pass"] == name]
        panel = Panel(drawing, number, name, "ranks", what)
        high = max([105.0, *(value(row) * 1.05 for row in mine if value(row) is not None)])
        y = Scale(0, high, panel.bottom, panel.top, False)
        panel.y_ticks(y, linear_ticks(high), lambda tick: f"{tick:g}")
        x = ranks_scale(mine, panel)
        drawing.line(panel.left, y(100), panel.right, y(100), "#444444", 2, "6 4")
        curves(panel, mine, styles, x, y, value)
    legend_of(drawing, styles)
    drawing.write(file)


def draw_phases(rows, passes, ranks, file):
    rows = [row for row in rows if row["ranks"] == ranks]
    drawing = Drawing(len(passes), f"Phases on {ranks} rank{'s' if ranks > 1 else ''}",
                      subtitle_of(rows) + "; means over ranks")
    for number, name in enumerate(passes):
        mine = [row for row in rows if row["pass"] == name]
        ideals = [row["ideal_busy_seconds"] for row in mine if row["ideal_busy_seconds"] is not None]
        panel = Panel(drawing, number, name, "strategy", "time (seconds)")
        high = max(row["seconds"] for row in mine) * 1.1
        high = max([high, *(1.05 * ideal for ideal in ideals)])
        y = Scale(0, high, panel.bottom, panel.top, False)
        panel.y_ticks(y, linear_ticks(high), lambda tick: f"{tick:g}")
        pitch = PANEL_WIDTH / len(mine)
        for i, row in enumerate(mine):
            middle = panel.left + (i + 0.5) * pitch
            below = 0.0
            for phase, _, colour in PHASES:
                above = below + row[phase]
                drawing.box(middle - 0.3 * pitch, y(above), 0.6 * pitch, y(below) - y(above), colour)
                below = above
            drawing.text(middle, y(below) - 5, seconds_text(row["seconds"]), size=10, anchor="middle")
            drawing.text(middle, panel.bottom + 16, row["strategy"], size=11, anchor="middle")
            drawing.text(middle, panel.bottom + 28, row["partition"], size=9, anchor="middle",
                         colour="#555555")
            if row["ideal_busy_seconds"] is not None:
                at = y(row["ideal_busy_seconds"])
                drawing.line(middle - 0.4 * pitch, at, middle + 0.4 * pitch, at, "#000000", 2, "4 3")
    entries = [(label, lambda x, y, colour=colour: drawing.box(x, y - 6, 24, 12, colour))
               for _, label, colour in PHASES]
    entries.append(("ideal (busy)", lambda a, b: drawing.line(a, b, a + 24, b, "#000000", 2, "4 3")))
    drawing.legend(entries)
    drawing.write(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="JSON or CSV of bench_strategies, or JSON lines of dattn bench")
    parser.add_argument("--out", default=".", help="folder for the SVG files; made if missing")
    parser.add_argument("--ranks", type=int, help="of phases.svg")
    parser.add_argument("--tokens", type=count, help="of dattn bench's rows, e.g. 8K")
    parser.add_argument("--mask", help="likewise")
    parser.add_argument("--dtype", help="likewise")
    arguments = parser.parse_args()
    try:
        rows = pick(read(arguments.file), arguments.tokens, arguments.mask, arguments.dtype)
        if not rows:
            sys.exit(f"plot.py: {arguments.file} has no row that was measured")
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"plot.py: {arguments.file} is no report of bench_strategies or dattn bench: {error!r}")
    ranks = arguments.ranks or max(row["ranks"] for row in rows)
    if all(row["ranks"] != ranks for row in rows):
        sys.exit(f"plot.py: --ranks: nothing was measured on {ranks}")
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    passes = unique(row["pass"] for row in rows)
    draw_scaling(rows, passes, out / "scaling.svg")
    draw_efficiency(rows, passes, out / "efficiency.svg")
    draw_phases(rows, passes, ranks, out / "phases.svg")


if __name__ == "__main__":
    main()
