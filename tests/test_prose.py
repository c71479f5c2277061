"""The words of documentation, docstrings and messages: phrases that no native writer uses, and debris of formatting.

Spelling, British spellings included, is checked by codespell in `.ci/run` and `nox -s lint`; see pyproject.toml. A line
that must break a rule here has `prose: ignore` in a comment.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "tl_neuron_circuits").rglob("*.py*"))

UNITS = "row|column|number|file|run|call|forward|backward|tensor|entry|score|line|page|bar|map|key"
PER = "hook point|row|prompt|layer|target|file|node|pair|position|token|feature|neuron|step"
PHRASES = {
    rf"\b(one|a) ({UNITS}) an? ({PER})\b": "per",
    r"\bgo(es|ing)? on from\b": "resume, continue from",
    r"(?<!there )\b(is|are) no (?!longer|more|less|better|\w+er\b|such\b)[a-z]+(,|:|;|\.$|\. )": "is not a",
    r"\b(it|its?) is at fault\b": "name what is wrong",
    r"\bgot (others|another)\b": "say what came",
    r"\bmoves? neither\b": "does not change",
    r"\b(declares? floors|floors only)\b": "lower bounds",
    r"\bof (ours|yours)\b": "of this package; your own",
    r"\bsomething else than\b": "anything other than",
    r"\bbut for\b": "except",
    r"\b(gives?|of|into|in|least|has|after|than) so many\b": "that many",
    r"\bwhat(ever)? it likes\b": "anything",
    r"(?<=[,;] )not so\b": "unlike",
    r"\bthe one of the\b": "that of",
    r"\b(of|over|by) which one (can|may|has)\b": "you",
    r"\b(information|software|training|research|evidence)s\b": "no plural",
    r"\ballows? to [a-z]+": "lets you",
    r"\bas good as possible\b": "as well as",
    r"(?-i:\b(CLAIMS\d|TODO|FIXME|TBD)\b)": "what belongs here",
    r"\bmake(s)? sense to [a-z]+ that\b": "",
}


def phrases(text: str) -> list[str]:
    """What the table above finds in a text, with what to write."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if "prose: ignore" not in line:
            for pattern, better in PHRASES.items():
                found += [f"{number}: '{match[0]}' -> {better}" for match in re.finditer(pattern, line, re.IGNORECASE)]
    return found


def words(path: Path) -> str:
    """A file's text; of a page, without its code and tables' rules."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return text
    return re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)


def messages(source: str) -> Iterator[tuple[int, str]]:
    """The texts of whatever a module raises or warns, `{}` for values, and their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = [value for value in ast.walk(node.exc) if isinstance(value, ast.Constant | ast.JoinedStr)]
            inside = {id(piece) for part in parts if isinstance(part, ast.JoinedStr) for piece in ast.walk(part)}
            inside -= {id(part) for part in parts if isinstance(part, ast.JoinedStr)}
            for part in parts:
                if isinstance(part, ast.JoinedStr):
                    yield part.lineno, "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in part.values)
                elif isinstance(part.value, str) and id(part) not in inside:
                    yield part.lineno, part.value


DEBRIS = (
    r"\S  \S",
    r"[\w}] ,",
    r"[\w}] \.( |$)",
    r"[a-z)][.;,:][A-Z][a-z]+ ",
    r"\.\.(?!\.)(?<!\.\.\.) ",
    r"\)[a-z]{2,} ",
    r",,|;;",
)


def debris(text: str) -> list[str]:
    """Traces of a message put together wrongly: two spaces, a space before a comma, none after a period."""
    return [match[0] for pattern in DEBRIS if (match := re.search(pattern, text))]


def split_strings(source: str) -> list[int]:
    """Lines with two strings side by side, which a formatter left where one would do."""
    found, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if before is not None and token.type == before.type == tokenize.STRING and token.start[0] == before.end[0]:
            found.append(token.start[0])
        before = token
    return found


def test_pages_docstrings_and_messages_use_idioms() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in [*PAGES, *MODULES] for line in phrases(words(path))]
    assert not found, "\n".join(found)


def test_messages_are_put_together_right() -> None:
    found = []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        found += [f"{name}:{line}: {piece!r}" for line, text in messages(source) for piece in debris(text)]
        found += [f"{name}:{line}: two strings on one line" for line in split_strings(source)]
    assert not found, "\n".join(found)


def test_the_rules_find_what_they_are_for() -> None:
    wrong = "One row a hook point. Going on from where it stopped: a str is no dictionary: it is at fault, got others."
    assert len(phrases(wrong)) == 5
    assert phrases("There is no dictionary. It is no longer there. One row per hook point.") == []
    assert phrases("a directory of ours  <!-- prose: ignore -->") == []
    source = 'raise ValueError(f"expected  {a} ,got{b}.Add it")\nx = "a " "b"'
    ((_, text),) = messages(source)
    assert text == "expected  {} ,got{}.Add it" and len(debris(text)) >= 2
    assert split_strings(source) == [2]
