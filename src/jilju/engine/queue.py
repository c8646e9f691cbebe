"""The waiting queue: who waits, and whose turn is next.

Owns the order of turns: priorities with ageing, within a priority a fair share for each tenant, within a tenant first come,
first served. Knows nothing of blocks or steps: who is next may not fit, and then the scheduler decides whom to try instead.

Ageing: the head of a priority is due at its arrival plus AGEING_NS for each unit of its priority, and the priority whose head
is due first has the turn. So one unit of priority is worth a second of waiting, and nobody waits for ever.

Fair shares are those of start-time fair queueing (Goyal, Vin and Cheng, 1996): a sequence that comes is tagged with the
priority's virtual time or the end of its tenant's last tag, whichever is later; turns go by tags, and the virtual time is the
tag of who had the last turn. A tag is as long as the sequence's prompt and what is expected of its output; at its end what it
did not use is given back to its tenant. With one tenant that is the order of arrival.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from jilju.engine.sequence import Sequence

AGEING_NS = 10**9  # of waiting are worth one unit of priority
CHARGED_OUTPUT = 256  # tokens at most: most answers end before their max_tokens, which may be all the context

_Entry = tuple[int, int, Sequence]  # tag, number, who


class _Class:
    """The sequences of one priority, in the order of their turns, and what tenants were charged."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.virtual_time = 0
        self.tag_ends: dict[str, int] = {}  # by tenant

    def tag(self, sequence: Sequence) -> int:
        tag = max(self.virtual_time, self.tag_ends.get(sequence.tenant, 0))
        self.tag_ends[sequence.tenant] = tag + charge(sequence)
        return tag


class WaitingQueue:
    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}  # by priority; there are 201 at most, and they remember
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Sequence]:
        for priority in sorted(self._classes):
            for _, _, sequence in self._classes[priority].entries:
                yield sequence

    def push(self, sequence: Sequence) -> None:
        """A new sequence gets its tag; one that had its turn before has its old place, ahead of all that came later."""
        members = self._classes.setdefault(sequence.priority, _Class())
        if sequence.tag < 0:
            sequence.tag = members.tag(sequence)
        insort(members.entries, (sequence.tag, sequence.number, sequence))
        self._num += 1

    def remove(self, sequence: Sequence) -> None:
        members = self._classes[sequence.priority]
        index = bisect_left(members.entries, (sequence.tag, sequence.number))
        assert members.entries[index][2] is sequence, f"{sequence.id} is not where its tag says"
        del members.entries[index]
        self._num -= 1

    def take(self, sequence: Sequence) -> None:
        """It has its turn now."""
        members = self._classes[sequence.priority]
        members.virtual_time = max(members.virtual_time, sequence.tag)
        self.remove(sequence)

    def ended(self, sequence: Sequence) -> None:
        """It is no more: its tenant gets back what it was charged and did not use, or pays what it used beyond that."""
        if sequence.tag >= 0:
            used = sequence.num_tokens if sequence.num_steps else 0
            self._classes[sequence.priority].tag_ends[sequence.tenant] += used - charge(sequence)

    def next_turns(self, count: int) -> list[Sequence]:
        """The first `count` in the order of their turns."""
        waiting = [self._classes[priority].entries for priority in sorted(self._classes)]
        waiting = [entries for entries in waiting if entries]
        if len(waiting) == 1:
            return [entry[2] for entry in waiting[0][:count]]
        merged = heapq.merge(*waiting, key=lambda entry: due_ns(entry[2]))  # compares the heads
        return [entry[2] for entry in islice(merged, count)]


def charge(sequence: Sequence) -> int:
    """Tokens that its tenant is charged when it comes."""
    return sequence.num_prompt_tokens + min(sequence.request.params.max_tokens, CHARGED_OUTPUT)


def due_ns(sequence: Sequence) -> int:
    return sequence.arrival_ns + sequence.priority * AGEING_NS
