"""The waiting queue: who waits, and whose turn is next.

Owns the order of turns: priorities with ageing, within a priority a fair share for each tenant, within a tenant first come,
first served. Knows nothing of blocks or steps: who is next may not fit, and then the scheduler decides whom to try instead.

Ageing: the head of a priority is due at its arrival plus AGEING_NS for each unit of its priority, and the priority whose head
is due first has the turn. So one unit of priority is worth a second of waiting, and nobody waits for ever.

Fair shares are those of start-time fair queueing (Goyal, Vin and Cheng, 1996): a sequence that comes is tagged with the
priority's virtual time or the end of its tenant's last tag, whichever is later; turns go by tags, and the virtual time is the
tag of who had the last turn. The tag is as long as the tokens that the sequence may come to hold. With one tenant that is
the order of arrival.
"""

from bisect import bisect_left, insort

from jilju.engine.sequence import Sequence

AGEING_NS = 10**9  # of waiting are worth one unit of priority

_Entry = tuple[int, int, Sequence]  # tag, number, who


class _Class:
    """The sequences of one priority, in the order of their turns."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.virtual_time = 0
        self.tag_ends: dict[str, int] = {}  # by tenant

    def tag(self, sequence: Sequence) -> int:
        tag = max(self.virtual_time, self.tag_ends.get(sequence.tenant, 0))
        self.tag_ends[sequence.tenant] = tag + sequence.max_tokens
        return tag


class WaitingQueue:
    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}  # by priority, none of them empty
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self):  # type: ignore[no-untyped-def]
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
        if not members.entries:
            del self._classes[sequence.priority]

    def take(self, sequence: Sequence) -> None:
        """It has its turn now."""
        members = self._classes[sequence.priority]
        members.virtual_time = max(members.virtual_time, sequence.tag)
        self.remove(sequence)

    def next_turns(self, count: int) -> list[Sequence]:
        """The first `count` in the order of their turns."""
        if len(self._classes) == 1:
            (members,) = self._classes.values()
            return [entry[2] for entry in members.entries[:count]]
        turns: list[Sequence] = []
        places = dict.fromkeys(sorted(self._classes), 0)
        while places and len(turns) < count:
            priority = min(places, key=lambda p: due_ns(self._classes[p].entries[places[p]][2]))
            entries = self._classes[priority].entries
            turns.append(entries[places[priority]][2])
            places[priority] += 1
            if places[priority] == len(entries):
                del places[priority]
        return turns


def due_ns(sequence: Sequence) -> int:
    return sequence.arrival_ns + sequence.priority * AGEING_NS
