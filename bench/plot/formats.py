"""What each format's bytes buy on the shipped vectors."""

from __future__ import annotations

from matplotlib import pyplot as plt

from bench.record import Row


def draw(kept: Row) -> plt.Figure:
    """Error of the encoding and of the logits over the bytes: a colour a format, a marker a vector."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    domains = list(dict.fromkeys(row["domain"] for row in kept["rows"]))
    formats = list(dict.fromkeys(row["format"] for row in kept["rows"]))
    markers = dict(zip(domains, "os^Dv", strict=False))
    for axis, key, what in ((left, "relative_error", "the deltas"), (right, "logit_error", "what changes the logits")):
        least = min(row[key] for row in kept["rows"] if row[key] > 1e-9) / 10  # stands for none at all
        for row in kept["rows"]:
            colour = plt.get_cmap("tab20")(formats.index(row["format"]))
            axis.plot(row["of_dense"], max(row[key], least), markers[row["domain"]], color=colour, markersize=5)
        axis.axhline(least, color="black", linewidth=0.5, linestyle=":")
        axis.annotate(
            "no error", (0.99, least), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
        )
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xlabel("bytes, of dense bfloat16")
        axis.set_title(f"relative error of {what}", fontsize=10)
    for number, text in enumerate(formats):
        right.plot([], [], "o", color=plt.get_cmap("tab20")(number), label=text)
    for domain, marker in markers.items():
        right.plot([], [], marker, color="gray", label=domain)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
