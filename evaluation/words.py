"""How figures and tables are written for people: percent, points, intervals, p values, aligned columns.

Accuracies and probabilities come as fractions and are written in percent. A difference of two is written in points,
with its sign. Whatever rounds to zero is written without a minus: 0.0, or +0.0. Pure functions.
"""

from collections.abc import Sequence

from training.metrics import mean_and_deviation


def percent(fraction: float) -> str:
    # float: in single precision 100 times a fraction may end on the other side of a half. z: a zero has no minus.
    return f"{100 * float(fraction):z.1f}"


def percent_and_deviation(mean: float, deviation: float) -> str:
    return f"{percent(mean)} +- {percent(deviation)}"


def percent_of_runs(fractions: Sequence[float]) -> str:
    """The mean over runs and their standard deviation; a single run has none."""
    mean, deviation = mean_and_deviation(fractions)
    return percent_and_deviation(mean, deviation) if len(fractions) > 1 else percent(mean)


def points(difference: float) -> str:
    return f"{100 * float(difference):+z.1f}"


def points_range(ends: tuple[float, float]) -> str:
    """An interval of a difference."""
    return f"[{points(ends[0])}, {points(ends[1])}]"


def written_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def on_these_classes(over_classes: tuple[float, float]) -> str:
    """What a verdict adds where the interval over classes holds 0: with other classes there may be no difference."""
    return " on these classes" if over_classes[0] <= 0 <= over_classes[1] else ""


def lay_out(lines: Sequence[Sequence[str]]) -> str:
    """Lines of fields as a text whose columns are aligned."""
    widths = [max(map(len, fields)) for fields in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
