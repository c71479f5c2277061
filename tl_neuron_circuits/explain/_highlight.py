"""Text with its tokens colored by a number, as HTML that nothing in the text can break out of."""

from collections.abc import Iterable, Sequence
from html import escape

_POSITIVE, _NEGATIVE = "42,157,143", "231,111,81"


def color_scale(values: Iterable[Sequence[float]]) -> float:
    """The largest |value| of any prompt's tokens except its first.

    Activations at BOS, or at whatever token comes first, are often far above all others: attention rests there.
    """
    return max((abs(value) for own in values for value in (own[1:] or own)), default=0.0)


def highlight(tokens: Sequence[str], values: Sequence[float], largest: float) -> str:
    """One span per token: green where its value is positive, red where negative, full at `largest`; values on hover.

    What is beyond the scale has no color.
    """
    spans = []
    for token, value in zip(tokens, values, strict=True):
        strength = abs(value) / largest if 0 < abs(value) <= largest else 0.0
        color = _POSITIVE if value >= 0 else _NEGATIVE
        text = escape(token).replace("\n", "&#8629;\n") or "&empty;"
        spans.append(f'<span style="background:rgba({color},{strength:.2f})" title="{value:.4g}">{text}</span>')
    return f'<span style="white-space:pre-wrap">{"".join(spans)}</span>'
