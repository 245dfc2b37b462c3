"""Pictures of measurements."""

from types import ModuleType


def svg_pyplot() -> ModuleType:
    """matplotlib.pyplot, to draw SVG files without a screen. Raises ImportError without matplotlib (extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Words as words: smaller, and the same bytes in every run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "based"})
    return pyplot
