"""How pictures look: Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker."""

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, BLACK = "#0072B2", "#D55E00", "#CC79A7", "#000000"
COLORS = (VERMILLION, BLUE, SKY, GREEN, PURPLE, ORANGE, BLACK, YELLOW)  # in the order of use
MARKERS = "os^DvPX*"


def figure(width: float, height: float):
    """An empty figure of matplotlib, in inches; without pyplot, whose backend is the caller's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def styles(*names: str) -> dict[str, dict[str, str]]:
    """Keyword arguments of matplotlib for each name, at most eight. The first, which is to be noticed, is vermillion."""
    return {name: {"color": color, "marker": marker} for name, color, marker in zip(names, COLORS, MARKERS, strict=False)}
