"""Texts of special tokens inside other text: finding them, and breaking them where they must stay text.

Owns the search for the longest of many texts at a place, and the guard that keeps a user's text from becoming a control token.
Knows nothing of templates, ids or files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence


def longest_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """One group that matches the longest of `texts` that begins at a place: a tree of common beginnings, so that a place
    costs its matching characters and not a try of every text. None if there are no texts."""
    ordered = sorted(texts)
    return re.compile(f"({_tree(ordered, 0)})") if ordered else None


def _tree(ordered: list[str], start: int) -> str:
    """Pattern for the rest, from `start`, of sorted texts that agree before it."""
    first, last = ordered[0], ordered[-1]
    end = start
    while end < len(first) and end < len(last) and first[end] == last[end]:
        end += 1
    stem = re.escape(first[start:end])
    ends_here = len(first) == end
    longer = ordered[1:] if ends_here else ordered
    if not longer:
        return stem
    groups: dict[str, list[str]] = {}
    for text in longer:
        groups.setdefault(text[end], []).append(text)
    # characters with the same rest share it: <unused0> to <unused6241> are a dozen branches, not six thousand
    chars_before: dict[str, str] = {}
    for char, group in groups.items():
        rest = _tree(group, end + 1)
        chars_before[rest] = chars_before.get(rest, "") + char
    branches = "|".join(f"[{re.escape(chars)}]{rest}" for rest, chars in chars_before.items())
    return f"{stem}(?:{branches}){'?' if ends_here else ''}"


class SpecialGuard:
    """Puts a mark into a text that could take part in a special token once it stands among others. It could in four ways: by
    holding one whole, by ending with the beginning of one, by beginning with the end of one, or by lying within one."""

    def __init__(self, specials: Mapping[str, int]):
        self.specials = specials
        self._any = longest_of(specials)
        # every place where one begins, overlapping ones too; the mark goes behind its first character
        self._begins = re.compile(f"(?={self._any.pattern})(.)", re.DOTALL) if self._any else None
        self._heads = {text[:end] for text in specials for end in range(1, len(text))}
        self._tails = {text[start:] for text in specials for start in range(1, len(text))}
        self._longest = max(map(len, specials), default=0)

    def split(self, text: str) -> Sequence[str]:
        """Plain text and special tokens' texts in turn, plain first and last."""
        return self._any.split(text) if self._any else (text,)

    def guarded(self, text: str, mark: str) -> str:
        lengths = range(1, min(len(text), self._longest) + 1)
        begins_one = any(text[-length:] in self._heads for length in lengths)
        ends_one = any(text[:length] in self._tails for length in lengths)
        within_one = 0 < len(text) < self._longest and any(text in special for special in self.specials)
        return (mark if ends_one or within_one else "") + self.broken(text, mark) + (mark if begins_one else "")

    def broken(self, text: str, mark: str) -> str:
        """Only the first way: texts that the special tokens' own do not stand in are unchanged."""
        return self._begins.sub(lambda match: match[2] + mark, text) if self._begins else text
