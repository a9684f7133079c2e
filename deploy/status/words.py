"""Numbers as people read them in a terminal; `words.js` says the same on the page. Pure."""

NOTHING = "–"


def amount(value: float | None) -> str:
    """Four digits, then a suffix: 8,412, 31.2k, 4.10M."""
    if value is None:
        return NOTHING
    if abs(value) < 10 and value != int(value):
        return f"{value:.1f}"
    if abs(value) < 1e4:
        return f"{value:,.0f}"
    scale, suffix = (1e3, "k") if value < 1e6 else (1e6, "M") if value < 1e9 else (1e9, "G")
    scaled = value / scale
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{suffix}"


def latency(milliseconds: float | None) -> str:
    if milliseconds is None:
        return NOTHING
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.{1 if milliseconds >= 1e4 else 2}f} s"
    return f"{milliseconds:.{1 if milliseconds < 10 else 0}f} ms"


def percent(part: float | None) -> str:
    """part: 0 to 1."""
    if part is None:
        return NOTHING
    return f"{100 * part:.{1 if 0 < part < 0.1 else 0}f} %"


def share(part: float, whole: float) -> str:
    return percent(part / whole if whole else None)


def duration(seconds: float) -> str:
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 1440 else f"{minutes // 1440} d {minutes % 1440 // 60} h"


def restarts(epoch: int) -> str:
    """What the number of a scheduler's life says."""
    return "never restarted" if epoch == 0 else "restarted once" if epoch == 1 else f"restarted {epoch:,} times"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
