"""Text with its tokens colored by a number, as HTML that nothing in the text can break out of."""

from collections.abc import Sequence
from html import escape

_POSITIVE, _NEGATIVE = "42,157,143", "231,111,81"


def highlight(tokens: Sequence[str], values: Sequence[float], largest: float) -> str:
    """One span per token: green where its value is positive, red where negative, full at `largest`; values on hover."""
    spans = []
    for token, value in zip(tokens, values, strict=True):
        strength = min(abs(value) / largest, 1.0) if largest > 0 else 0.0
        color = _POSITIVE if value >= 0 else _NEGATIVE
        text = escape(token).replace("\n", "&#8629;\n") or "&empty;"
        spans.append(f'<span style="background:rgba({color},{strength:.2f})" title="{value:.4g}">{text}</span>')
    return f'<span style="white-space:pre-wrap">{"".join(spans)}</span>'
