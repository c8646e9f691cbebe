"""Regexes of callers, looked at before anything compiles them.

Owns the bounds on length, nesting and states, and the refusal of what the automaton has no form for or would read in another
way than the caller's language does. Every step looks at a character once. Knows nothing of grammars or schemas.
"""

import re

from jilju.errors import GrammarTooComplex, InvalidGrammar

MAX_REGEX_BYTES = 4096
MAX_REGEX_DEPTH = 128
MAX_REGEX_STATES = 20_000  # positions once every counted repetition is written out

LOOKAROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
GROUP_HEAD = re.compile(r"\(\?(?:P?<[A-Za-z_][A-Za-z0-9_]*>|[imsuxU-]*:)")
FLAGS = re.compile(r"\(\?[imsuxU-]+\)")
COUNTED = re.compile(r"\{(\d+)(,?)(\d*)\}")
BACKREFERENCE = re.compile(r"\\(?:[1-9]|k[<{'])|\(\?P=")


def check_regex(pattern: str, where: str) -> None:
    """Raises InvalidGrammar or GrammarTooComplex; `where` says whose pattern it is. Syntax beyond that is left to the compiler."""
    if (size := len(pattern.encode())) > MAX_REGEX_BYTES:
        raise GrammarTooComplex(f"{where} has {size} bytes; allowed: at most {MAX_REGEX_BYTES}")
    states = [0]  # of each open group, the outermost first
    last = 0  # of the item that a repetition would repeat
    at = 0
    while at < len(pattern):
        match pattern[at]:
            case "\\":
                if at + 1 == len(pattern):
                    raise InvalidGrammar(f"{where} ends in a lone backslash; write \\\\ for the character")
                if BACKREFERENCE.match(pattern, at):
                    raise InvalidGrammar(
                        f"{where} refers back to a group, which no automaton can follow; leave that out"
                    )
                at, last = at + 2, 1
                states[-1] += last
            case "[":
                at, last = _end_of_class(pattern, at, where), 1
                states[-1] += last
            case "(":
                if LOOKAROUND.match(pattern, at):
                    raise InvalidGrammar(f"{where} looks around, which no automaton can do; write what may stand there")
                if BACKREFERENCE.match(pattern, at):
                    raise InvalidGrammar(
                        f"{where} refers back to a group, which no automaton can follow; leave that out"
                    )
                if flags := FLAGS.match(pattern, at):
                    at = flags.end()
                    continue
                head = GROUP_HEAD.match(pattern, at)
                at = head.end() if head else at + 1
                states.append(0)
                if len(states) > MAX_REGEX_DEPTH:
                    raise GrammarTooComplex(f"{where} nests groups more than {MAX_REGEX_DEPTH} deep")
            case ")":
                if len(states) == 1:
                    raise InvalidGrammar(f"{where} closes a group that was not opened; write \\) for the character")
                last = states.pop()
                states[-1] += last
                at += 1
            case "{" if counted := COUNTED.match(pattern, at):
                times = int(counted[3] or counted[1])
                states[-1] += last * (times - 1)
                last *= times
                at = counted.end()
            case "*" | "+" | "?":
                at += 1
            case _:  # an alternative counts as one, too
                at, last = at + 1, 1
                states[-1] += last
        if states[-1] > MAX_REGEX_STATES:
            raise GrammarTooComplex(
                f"{where} repeats its parts to more than {MAX_REGEX_STATES} positions; lower its counts"
            )
    if len(states) > 1:
        raise InvalidGrammar(f"{where} has a group without its ); write \\( for the character")


def _end_of_class(pattern: str, at: int, where: str) -> int:
    """Behind a class. Languages differ on what an unescaped bracket or a doubled operator in it means, so both are refused."""
    at += 2 if pattern.startswith("[^", at) else 1
    if pattern.startswith("]", at):
        raise InvalidGrammar(f"{where} has a class that begins with ]; write \\] for the character")
    while at < len(pattern):
        if pattern[at] == "]":
            return at + 1
        if pattern[at] == "[" or pattern[at : at + 2] in ("&&", "--", "~~"):
            raise InvalidGrammar(
                f"{where} has an unescaped {pattern[at]} in a class; write \\{pattern[at]} for the character"
            )
        at += 2 if pattern[at] == "\\" else 1
    raise InvalidGrammar(f"{where} has a class without its ]")
