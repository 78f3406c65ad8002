#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what afd-plan --plot FILE asks for: afd_plan_plot.py KIND FILE < result.json

One picture per command. Lines differ by marker and dash as well as by colour, and areas by hatching,
so that a picture can be read in grey. Needs matplotlib.
"""
import json
import sys

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
except ImportError:
    sys.exit("afd_plan_plot.py: matplotlib is not installed (pip install matplotlib, or python3-matplotlib)")

# Okabe and Ito's colours, told apart by all readers and, in this order, by their grey.
BLACK, ORANGE, BLUE, GREEN, RED, GREY = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#999999"
matplotlib.rcParams.update({
    "figure.figsize": (8, 4.8), "figure.dpi": 110, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "svg.hashsalt": "afd-plan", "legend.frameon": False})


def legend_above(axes, handles, columns):
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.02), ncol=columns)


def column(rows, key):
    return [float("nan") if row[key] is None else row[key] for row in rows]


def draw_bracket(axes, rows):
    """The band between both closed forms; where they agree it is a line."""
    r = column(rows, "r")
    low, high = column(rows, "throughput_gaussian"), column(rows, "throughput_mean_field")
    axes.fill_between(r, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(r, high, color=BLUE, linestyle="-", label="closed form, mean load (upper)")
    axes.plot(r, low, color=BLUE, linestyle="--", label="closed form, lock step (lower)")
    axes.set_xlabel("r: attention workers per FFN")
    axes.set_ylabel("tokens per time and cost")
    axes.set_ylim(bottom=0)


def mark_best(axes, r, text):
    if r:
        axes.axvline(r, color=BLACK, linestyle=":", linewidth=1.2)
        axes.text(r, axes.get_ylim()[1], f" {text}", ha="left", va="top")


def draw_size(figure, result):
    axes = figure.subplots()
    draw_bracket(axes, result["curve"])
    mark_best(axes, result["r"], f"best r = {result['r']}")
    idle = axes.twinx()
    idle.grid(False)
    idle.spines["right"].set_visible(True)
    idle.plot(column(result["curve"], "r"), column(result["curve"], "idle_a"), color=ORANGE, marker="^", markersize=4,
              markevery=2, linewidth=1, label="attention idle (right)")
    idle.plot(column(result["curve"], "r"), column(result["curve"], "idle_f"), color=RED, marker="v", markersize=4,
              markevery=2, linewidth=1, label="FFN idle (right)")
    idle.set_ylim(0, 1)
    idle.set_ylabel("share of the cycle")
    legend_above(axes, axes.get_lines()[:2] + idle.get_lines(), 2)


def draw_simulate(figure, result):
    axes = figure.subplots()
    rows = result["curve"]
    draw_bracket(axes, rows)
    points = axes.errorbar(column(rows, "r"), column(rows, "throughput"), yerr=column(rows, "ci95"), color=BLACK, marker="o",
                  markersize=4, linestyle="none", capsize=2, label="simulation, 95 % interval")
    mark_best(axes, result["r"], f"best r = {result['r']}, closed form {result['closed_form']['r']}")
    legend_above(axes, [*axes.get_lines()[:2], points], 2)


def draw_timeline(figure, result):
    axes = figure.subplots()
    spans = result["timeline"]
    lanes = sorted({span["lane"] for span in spans})
    shades = ["#f0e0b0", "#7fb0d8", "#2f6f5f", "#d9d9d9", "#b07090", "#505050"]
    hatches = ["", "///", "...", "xxx", "\\\\\\", "++"]
    workers = sorted({span["worker"] for span in spans if span["stage"] == "attention"})[:6]
    names = [f"attention {w}" for w in workers] + ["to the FFN", "FFN", "to attention"]
    for span in spans:
        if span["stage"] == "attention":
            if span["worker"] not in workers:
                continue
            place = workers.index(span["worker"])
        else:
            place = len(workers) + (1 if span["stage"] == "ffn" else 2 * span["worker"])
        lane = lanes.index(span["lane"])
        width = span["end"] - span["start"]
        axes.barh(place, width, left=span["start"], height=0.7, color=shades[lane % 6], hatch=hatches[lane % 6],
                  edgecolor=BLACK, linewidth=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time")
    axes.set_xlim(0, max(span["end"] for span in spans))
    axes.grid(axis="y", visible=False)
    legend_above(axes, [Patch(facecolor=shades[i % 6], hatch=hatches[i % 6], edgecolor=BLACK, label=f"lane {lane}")
                        for i, lane in enumerate(lanes)], 6)


REGIONS = {"scale_up": ("scale-up bound", "#ffffff", ""), "stable_intensity": ("stable intensity", "#f0f0f0", ""),
           "scale_out": ("scale-out bound", "#e0e0e0", ""), "max_intensity": ("maximum intensity", "#cdcdcd", "")}


def shade_regions(axes, rows):
    """Each region from its first N_F on, as a band behind the lines."""
    starts = []
    for row in rows:
        if not starts or starts[-1][1] != row["region"]:
            starts.append((row["ffn_nodes"], row["region"]))
    patches = []
    for i, (start, region) in enumerate(starts):
        end = starts[i + 1][0] if i + 1 < len(starts) else rows[-1]["ffn_nodes"]
        name, colour, hatch = REGIONS[region]
        axes.axvspan(start, end, facecolor=colour, hatch=hatch, edgecolor="#f8f8f8", linewidth=0, zorder=0)
        patches.append(Patch(facecolor=colour, hatch=hatch, edgecolor=GREY, label=name))
    return patches


def draw_roofline(figure, result):
    if "sweep" not in result:
        sys.exit("afd_plan_plot.py: imbalance alone has no picture; give a model and a device")
    axes = figure.subplots()
    rows = result["sweep"]
    nodes = column(rows, "ffn_nodes")
    patches = shade_regions(axes, rows)
    axes.plot(nodes, column(rows, "hfu"), color=BLUE, marker="o", markersize=4, label="HFU")
    axes.plot(nodes, column(rows, "ofu"), color=ORANGE, linestyle="--", marker="s", markersize=3, linewidth=2,
              label="OFU: operators while they run")
    axes.plot(nodes, column(rows, "temporal_sparsity"), color=RED, linestyle="-.", label="share of the budget in which they run")
    axes.axhline(result["ep_hfu"], color=GREEN, linestyle=":", linewidth=2, label="HFU of large-scale EP")
    if result["dead_zone_from"]:
        axes.axvline(result["dead_zone_from"], color=BLACK, linestyle=":", linewidth=1.2)
        axes.text(result["dead_zone_from"], 1.02, " dead zone from here", ha="left", va="bottom")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlim(nodes[0], nodes[-1])
    axes.set_ylim(0, 1.12)
    axes.grid(False)
    axes.set_xlabel("N_F: nodes of the FFN side")
    axes.set_ylabel("share of the peak")
    legend_above(axes, axes.get_lines()[:4] + patches, 2)


def draw_stages(figure, rows, name, value, unit):
    axes = figure.subplots()
    hatches = ["", "///", "...", "xxx", "\\\\\\"]
    bars = axes.barh([row[name] for row in rows], column(rows, value), color=BLUE, edgecolor=BLACK, alpha=0.8)
    for i, bar in enumerate(bars):
        bar.set_hatch(hatches[i % 5])
    for bar, row in zip(bars, rows):  # beside the picture, where no line crosses them
        axes.text(1.01, bar.get_y() + bar.get_height() / 2, f"{row[value]:.3g}", va="center", transform=axes.get_yaxis_transform())
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    return axes


def draw_report(figure, result):
    axes = draw_stages(figure, result["stages"], "stage", "ms", "ms of a step, one lane")
    axes.set_xlim(right=1.05 * max([result["cycle_ms"], *column(result["stages"], "ms")]))
    cycle = axes.axvline(result["cycle_ms"], color=RED, linestyle="--", label=f"cycle {result['cycle_ms']:.3g} ms")
    figure.suptitle(f"{result['model']}: {result['verdict']} ({result['speedup_per_device']:.2f}x per device), "
                    f"bound by {result['bottleneck']}", fontsize=11)
    legend_above(axes, [cycle], 1)


def draw_published(figure, result):
    axes = figure.subplots()
    rows = [row for row in result["published"] if row["unit"] == "x"]
    at = range(len(rows))
    printed = axes.bar([i - 0.2 for i in at], column(rows, "reproduced"), 0.4, color=ORANGE, edgecolor=BLACK, hatch="///",
                       label="as published")
    corrected = axes.bar([i + 0.2 for i in at], column(rows, "corrected"), 0.4, color=BLUE, edgecolor=BLACK,
                         label="corrected, per device")
    axes.bar_label(printed, fmt="%.2f")
    axes.bar_label(corrected, fmt="%.2f")
    axes.axhline(1, color=BLACK, linestyle=":")
    axes.set_yscale("log")
    axes.set_xticks(list(at), [row["name"].split(", ")[1] for row in rows])
    axes.set_ylabel("speed-up")
    axes.legend(loc="upper left")


def draw_calibrate(figure, result):
    stages = [s for s in ("attention", "ffn", "exchange") if any(row["stage"] == s for row in result["times"])]
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        rows = [row for row in result["times"] if row["stage"] == stage]
        x = [row["rows"] * (row["context"] or 1) for row in rows]
        points = [(a, row) for a, row in sorted(zip(x, rows), key=lambda pair: pair[0])]
        for fitted, marker, colour in ((True, "o", BLACK), (False, "x", GREY)):
            some = [(a, row["us"]) for a, row in points if row["fitted"] == fitted]
            if some:
                axes.plot(*zip(*some), linestyle="none", marker=marker, color=colour, label="fitted" if fitted else "not fitted")
        line = [(a, row["fit_us"]) for a, row in points if row["fitted"]]
        axes.plot(*zip(*line), color=BLUE)
        axes.set_title(f"{stage}, R² {result['r2'].get(stage, float('nan')):.3f}", fontsize=11)
        axes.set_xlabel("KV positions" if stage == "attention" else "rows")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("µs of a layer")


DRAW = {"size": draw_size, "simulate": draw_simulate, "timeline": draw_timeline, "roofline": draw_roofline,
        "report": draw_report, "published": draw_published, "calibrate": draw_calibrate}


def main():
    kind, path = sys.argv[1:]
    result = json.load(sys.stdin)
    figure = pyplot.figure(layout="constrained")
    DRAW[kind](figure, result)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    main()
