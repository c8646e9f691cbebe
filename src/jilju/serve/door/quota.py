"""Quotas: how many tokens a key may use in a minute and in a day.

Owns one bucket per quota, which fills continuously. A call is charged when it is taken, for what it may use, and settled when
it ends, by what it used. Until then its charge takes room in the bucket, so that nothing is given back that has been filled
up meanwhile: in any time t, however chosen, calls use at most the quota and what comes in during t, if none uses more than it
was charged. What one uses beyond that is a debt, which others wait for. Knows nothing of HTTP, or of how tokens are counted.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jilju.clock import Clock
from jilju.config import ApiKey
from jilju.errors import RateLimitExceeded
from jilju.serve.ledger import Call, LedgerListener

UNSAID_TOKENS = 256  # charged for an answer that may take the rest of the context
PERIOD_NS: Mapping[str, int] = MappingProxyType({"minute": 60 * 10**9, "day": 86_400 * 10**9})


def tokens_to_charge(num_prompt_tokens: int, max_tokens: int | None, num_sequences: int) -> int:
    """What a call may use: its prompts, and what each of its sequences was allowed to make (None: the rest of the context)."""
    return num_prompt_tokens + num_sequences * (UNSAID_TOKENS if max_tokens is None else max_tokens)


def tokens_used(call: Call) -> int:
    """Of a call that has ended: nothing where it did not run. One that was cut tells no times, and is taken to have run."""
    has_run = call.num_output_tokens > 0 or any(times.scheduled_ns for times in call.times)
    was_cut = call.state == "client_cancelled" and call.num_sequences > 0
    return call.num_prompt_tokens + call.num_output_tokens if has_run or was_cut else 0


@dataclass(slots=True, eq=False)
class Bucket:
    """Whole numbers throughout: a level is tokens times `period_ns`, of which each ns brings `quota`.

    Invariant: level + held <= quota * period_ns.
    """

    quota: int
    period_ns: int
    at_ns: int  # up to which it was filled
    level: int = field(init=False)  # below 0: a debt
    held: int = 0  # of calls that are not settled

    def __post_init__(self) -> None:
        self.level = self.quota * self.period_ns

    def wait_ns(self, num_tokens: int, now_ns: int) -> int:
        """Until so many can be taken; 0: now. More than the quota can be taken when it is full, and leaves a debt."""
        self._fill(now_ns)
        missing = min(num_tokens, self.quota) * self.period_ns - self.level
        return max(0, -(-missing // self.quota))

    def take(self, num_tokens: int) -> None:
        self.level -= num_tokens * self.period_ns
        self.held += num_tokens * self.period_ns

    def settle(self, num_charged: int, num_used: int, now_ns: int) -> None:
        self._fill(now_ns)
        self.held -= num_charged * self.period_ns
        self.level += (num_charged - num_used) * self.period_ns

    def resize(self, quota: int, now_ns: int) -> None:
        """Another quota from now on; what was used counts on."""
        self._fill(now_ns)
        self.level += (quota - self.quota) * self.period_ns
        self.quota = quota

    def _fill(self, now_ns: int) -> None:
        room = self.quota * self.period_ns - self.level - self.held
        self.level += min((now_ns - self.at_ns) * self.quota, room)
        self.at_ns = now_ns


class Quotas(LedgerListener):
    """The buckets of all keys. A ledger listener: a call that ends is settled."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._buckets: dict[str, dict[str, Bucket]] = {}  # by key's name and period
        self._charges: dict[str, tuple[int, list[Bucket]]] = {}  # by id of a live call

    def charge(self, call: Call, key: ApiKey | None, num_tokens: int) -> None:
        """Once a call. Raises RateLimitExceeded, and charges nothing then."""
        assert call.id not in self._charges, f"call {call.id} is charged once"
        buckets = self._buckets_of(key)
        if key is None or not buckets:
            return
        now_ns = self._clock.now_ns()
        waits = {period: bucket.wait_ns(num_tokens, now_ns) for period, bucket in buckets.items()}
        period = max(waits, key=lambda name: waits[name])
        if waits[period]:
            bucket = buckets[period]
            left = max(0, bucket.level // bucket.period_ns)
            raise RateLimitExceeded(
                f"the key {key.name} may use {bucket.quota} tokens a {period}, {left} are left, and this call may use "
                f"{num_tokens}; wait {waits[period] / 1e9:.1f} s, or ask for fewer with max_tokens",
                retry_after_s=waits[period] / 1e9,
            )
        for bucket in buckets.values():
            bucket.take(num_tokens)
        self._charges[call.id] = (num_tokens, list(buckets.values()))

    def keep(self, keys: Collection[ApiKey]) -> None:
        """The keys are these from now on: buckets of others are dropped."""
        for gone in self._buckets.keys() - {key.name for key in keys}:
            del self._buckets[gone]

    def on_end(self, call: Call) -> None:
        num_charged, buckets = self._charges.pop(call.id, (0, []))
        for bucket in buckets:
            bucket.settle(num_charged, tokens_used(call), self._clock.now_ns())

    def _buckets_of(self, key: ApiKey | None) -> dict[str, Bucket]:
        if key is None:
            return {}
        now_ns, buckets = self._clock.now_ns(), self._buckets.setdefault(key.name, {})
        for period, quota in (("minute", key.tokens_per_minute), ("day", key.tokens_per_day)):
            bucket = buckets.get(period)
            if quota is None:
                buckets.pop(period, None)
            elif bucket is None:
                buckets[period] = Bucket(quota, PERIOD_NS[period], now_ns)
            elif bucket.quota != quota:
                bucket.resize(quota, now_ns)
        return buckets
