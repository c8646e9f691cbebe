"""Admission: whom to take, decided at the door from counts and from a predicted wait.

Owns the live requests as far as the door needs them (how much each brings, whether it waits or runs), the bounds of
the queue, and the prediction of when a new one would be in a step. Pure decisions: time comes in as an argument;
knows nothing of clocks, randomness, HTTP, text, or of how the scheduler decides.

The prediction takes the engine for a fluid. K sequences fit at once: as many as there are rows, and as many as the KV
pool holds of the mean live one, half-way through its output. A step of K decoding rows takes t_K, so a token of
output costs t_K / K, a token of a prompt what the step times say, one that is scored as much more as the engine says, and
work(r) is that sum over what r still lacks.
While fewer than K run or wait ahead, a new one waits for the prompts ahead of it and for nothing else. Otherwise it
waits for a row, behind W others that do. The K that run have anything between none and all of their output left,
evenly spread: half of it on average, and of the one that leaves first 1 / K of the whole; so the first row is free
after 2 work(running) / K. From then on rows become free as fast as work is done, one for each of the W. So the wait
is 2 work(running) / K + the work of those who wait ahead.

Ahead is who has a lower or equal priority number; of another tenant with the same one, no more than that tenant's
fair share, which is as much as waits of one's own. Everyone that runs keeps its row. Output to come is the least of
max_tokens and the running mean of actual outputs. What this leaves out (prompts found in the prefix cache, chunks
beside decoding rows, ageing) is learnt as one factor: the running mean of actual over predicted waits.
"""

from dataclasses import dataclass

from jilju.engine.step_times import Coefficients, num_pairs
from jilju.errors import Overloaded, ShedReason

FIRST_MEAN_OUTPUT = 256.0  # tokens, until answers have ended
OUTPUT_WEIGHT = 1 / 32  # of the newest answer in the running mean
RECOUNT_ABOVE = 0.05  # relative change of that mean at which all live requests are counted anew with it
STALE_ABOVE = 0.25  # relative change of the mean since a prediction, at which nothing is learnt of it
CORRECTION_WEIGHT = 1 / 32
CORRECTION_MIN, CORRECTION_MAX = 0.25, 4.0
LEARN_ABOVE_NS = 20_000_000  # shorter waits are a step or two: noise
OVERFLOW = 2  # the queue holds at most this many times its bounds, however many tenants take their share


@dataclass(slots=True)
class _Live:
    num_prompt_tokens: int
    num_scored_tokens: int  # of them: those whose logprobs are asked for
    max_tokens: int | None  # None: the rest of the context
    priority: int
    tenant: str
    admitted_ns: int
    num_tokens: int = 0
    expected_tokens: int = 0  # of output, in all
    mean_output: float = 0.0  # that its prediction was made with
    raw_ns: float = 0.0  # predicted wait without the learnt factor
    predicted_ns: int = 0
    is_running: bool = False
    is_timed: bool = False  # its first step is known

    @property
    def left_tokens(self) -> int:
        """Of output; one that went on for longer than expected may end with any token."""
        return max(self.expected_tokens - self.num_tokens, min(self.expected_tokens, 1))


@dataclass(slots=True)
class _Sums:
    num: int = 0
    prompt_tokens: int = 0
    scored_tokens: int = 0  # of them
    prompt_pairs: int = 0  # query-key pairs
    expected_tokens: int = 0
    left_tokens: int = 0

    def add(self, live: _Live, sign: int) -> None:
        self.num += sign
        self.prompt_tokens += sign * live.num_prompt_tokens
        self.scored_tokens += sign * live.num_scored_tokens
        self.prompt_pairs += sign * num_pairs(0, live.num_prompt_tokens)
        self.expected_tokens += sign * live.expected_tokens
        self.left_tokens += sign * live.left_tokens

    @property
    def size(self) -> int:
        """Tokens that they will hold: what shares of tenants are measured in."""
        return self.prompt_tokens + self.expected_tokens


class Admission:
    """`max_requests` and `max_pools` times the KV pool's tokens (of prompts) may wait."""

    def __init__(self, max_requests: int = 1024, max_pools: float = 4.0):
        self.max_requests, self.max_pools = max_requests, max_pools
        self.mean_output = FIRST_MEAN_OUTPUT
        self.correction = 1.0
        self._coefficients: Coefficients = (0.0, 0.0, 0.0)
        self._score_work = 0.0
        self._max_rows = self._pool_tokens = 0
        self._live: dict[str, _Live] = {}
        self._counted_mean = self.mean_output  # what `expected_tokens` were made with
        self._groups: dict[tuple[int, str], _Sums] = {}  # of who waits, by priority and tenant; none of them empty
        self._waiting = _Sums()
        self._running = _Sums()

    @property
    def num_waiting(self) -> int:
        return self._waiting.num

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.prompt_tokens

    @property
    def num_running(self) -> int:
        return self._running.num

    def update(self, coefficients: Coefficients, max_rows: int, pool_tokens: int, score_work: float) -> None:
        """What the engine says of itself: its step times (ns), its room, and what scoring a token of a prompt adds to it, in
        tokens. Comes before the first check."""
        self._coefficients, self._max_rows, self._pool_tokens = coefficients, max_rows, pool_tokens
        self._score_work = score_work

    def max_waiting_tokens(self) -> int:
        return int(self.max_pools * self._pool_tokens)

    # ---- the door --------------------------------------------------------------------------------------------------

    def check_queue(self, *, num_prompt_tokens: int, num_sequences: int = 1, tenant: str = "") -> None:
        """Raise Overloaded if that many more would be more than may wait.

        A tenant that has less than an even share of the queue is not refused for what others filled it with. Prompts
        that look longer than the whole pool pass: they cannot be run, and whoever counts their tokens says so at once.
        """
        assert self._pool_tokens > 0, "update() comes before the first check"
        more = num_prompt_tokens if num_prompt_tokens <= num_sequences * self._pool_tokens else 0
        waiting, limits = self._waiting, (self.max_requests, self.max_waiting_tokens())
        if waiting.num + num_sequences <= limits[0] and waiting.prompt_tokens + more <= limits[1]:
            return
        shares = len({name for _, name in self._groups} | {tenant})
        own = [sums for (_, name), sums in self._groups.items() if name == tenant]
        num, tokens = sum(sums.num for sums in own), sum(sums.prompt_tokens for sums in own)
        if self._is_beyond(waiting.num, num, num_sequences, limits[0], shares):
            raise self._shed("queue_requests", f"{waiting.num} requests wait and {limits[0]} are the most", tenant)
        if more and self._is_beyond(waiting.prompt_tokens, tokens, more, limits[1], shares):
            message = (
                f"prompts of {waiting.prompt_tokens} tokens wait, this one has about {more}, {limits[1]} are the most"
            )
            raise self._shed("queue_tokens", message, tenant)

    def check(
        self,
        now_ns: int,
        *,
        num_prompt_tokens: int,
        max_tokens: int | None,
        num_scored_tokens: int = 0,
        num_sequences: int = 1,
        priority: int = 0,
        tenant: str = "",
        deadline_ns: int = 0,
        queue_deadline_ns: int = 0,
    ) -> int:
        """The predicted wait (ns) of the last of these sequences until its first step. Raises Overloaded.

        The prompts are of `num_prompt_tokens` together, the logprobs of so many are asked for; deadlines are moments, 0 for none.
        """
        self.check_queue(num_prompt_tokens=num_prompt_tokens, num_sequences=num_sequences, tenant=tenant)
        before = _Sums()  # the call's own, ahead of its last
        if num_sequences > 1:
            each, scored = num_prompt_tokens // num_sequences, num_scored_tokens // num_sequences
            one = _Live(each, scored, max_tokens, priority, tenant, now_ns, expected_tokens=self._expected(max_tokens))
            before.add(one, num_sequences - 1)
        wait_ns = int(self.correction * self._raw_ns(priority, tenant, before))
        limits = [limit for limit in (queue_deadline_ns, deadline_ns) if limit]
        if wait_ns and limits and now_ns + wait_ns > min(limits):
            allowed_s = max(0, min(limits) - now_ns) / 1e9
            message = f"the wait would be some {wait_ns / 1e9:.1f} s and {allowed_s:.1f} s of it are allowed"
            raise _overloaded("predicted_wait", message, wait_ns)
        return wait_ns

    def predicted_wait_ns(self, priority: int = 0, tenant: str = "") -> int:
        """Of one that would come now."""
        return int(self.correction * self._raw_ns(priority, tenant, _Sums()))

    def predicted_start_ns(self, request_id: str) -> int | None:
        """As was predicted when it was taken; None: it is not live, or runs."""
        live = self._live.get(request_id)
        return None if live is None or live.is_running else live.admitted_ns + live.predicted_ns

    # ---- what becomes of requests ----------------------------------------------------------------------------------

    def admitted(
        self,
        request_id: str,
        now_ns: int,
        *,
        num_prompt_tokens: int,
        max_tokens: int | None,
        num_scored_tokens: int = 0,
        priority: int = 0,
        tenant: str = "",
    ) -> None:
        """It waits from now on. Said again of one that waits, better numbers take the place of the first.

        The prompt is what it brings itself: a sequence that shares that of a sibling brings one token.
        """
        if (before := self._live.pop(request_id, None)) is not None:
            assert not before.is_running, f"{request_id} runs already"
            self._count(before, -1)
        live = _Live(num_prompt_tokens, num_scored_tokens, max_tokens, priority, tenant, now_ns)
        live.expected_tokens = self._expected(max_tokens)
        live.mean_output = self._counted_mean
        live.raw_ns = self._raw_ns(priority, tenant, _Sums())
        live.predicted_ns = int(self.correction * live.raw_ns)
        self._live[request_id] = live
        self._count(live, 1)

    def started(self, request_id: str, at_ns: int) -> int | None:
        """Its first step began at that moment, which may be told later. Returns predicted minus actual wait, once."""
        live = self._find(request_id)
        self._run(live)
        if live.is_timed:
            return None
        live.is_timed = True
        actual_ns = max(0, at_ns - live.admitted_ns)
        self._learn(live, actual_ns)
        return live.predicted_ns - actual_ns

    def token(self, request_id: str) -> None:
        """It made a token; the first one says that it runs."""
        live = self._find(request_id)
        self._run(live)
        left = live.left_tokens
        live.num_tokens += 1
        self._running.left_tokens += live.left_tokens - left

    def ended(self, request_id: str, now_ns: int, num_output_tokens: int | None) -> None:
        """Whoever is not live is ignored. None: it did not come to an end of its own, which says nothing of lengths.

        One that ended while it waited, later than its first step was promised, would have waited for longer still. It
        is taken for twice as long: if only those were learnt from who were served in time, the factor would fall until
        many are not.
        """
        live = self._live.pop(request_id, None)
        if live is None:
            return
        self._count(live, -1)
        waited_ns = now_ns - live.admitted_ns
        if not live.is_running and waited_ns > live.predicted_ns:
            self._learn(live, 2 * waited_ns)
        # One that was cut by its own max_tokens says only that it would have been at least so long.
        is_cut = num_output_tokens is not None and live.max_tokens is not None and num_output_tokens >= live.max_tokens
        if num_output_tokens is not None and (not is_cut or num_output_tokens > self.mean_output):
            self.mean_output += OUTPUT_WEIGHT * (num_output_tokens - self.mean_output)
            if abs(self.mean_output - self._counted_mean) > RECOUNT_ABOVE * self._counted_mean:
                self._recount()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _raw_ns(self, priority: int, tenant: str, before: _Sums) -> float:
        """The wait behind all that are ahead and `before`, without the learnt factor."""
        own = self._groups.get((priority, tenant))
        own_size = before.size + (own.size if own is not None else 0)
        num, tokens = float(before.num), self._prefill_work(before)
        pairs, left = float(before.prompt_pairs), float(before.left_tokens)
        for (other_priority, other_tenant), sums in self._groups.items():
            if other_priority > priority:
                continue
            share = 1.0
            if other_priority == priority and other_tenant != tenant:
                share = min(1.0, own_size / max(1, sums.size))
            num += share * sums.num
            tokens += share * self._prefill_work(sums)
            pairs += share * sums.prompt_pairs
            left += share * sums.left_tokens
        base, per_token, per_pair = self._coefficients
        prefill_ns = per_token * tokens + per_pair * pairs
        mean = self._mean_size()
        num_rows = max(1, min(self._max_rows, int(self._pool_tokens / mean)))
        if self._running.num + num < num_rows:
            return prefill_ns
        token_ns = base / num_rows + per_token + per_pair * mean
        return token_ns * (2 * self._running.left_tokens / num_rows + left) + prefill_ns

    def _prefill_work(self, sums: _Sums) -> float:
        """Tokens of prompts, with what scoring them adds."""
        return sums.prompt_tokens + self._score_work * sums.scored_tokens

    def _learn(self, live: _Live, actual_ns: int) -> None:
        """Not from what was predicted with another mean output: that is mended already."""
        is_of_today = abs(live.mean_output - self._counted_mean) <= STALE_ABOVE * self._counted_mean
        if is_of_today and live.raw_ns > 0 and max(live.raw_ns, actual_ns) > LEARN_ABOVE_NS:
            ratio = min(max(actual_ns / live.raw_ns, CORRECTION_MIN), CORRECTION_MAX)
            self.correction += CORRECTION_WEIGHT * (ratio - self.correction)

    def _mean_size(self) -> float:
        """Tokens that a live sequence holds, half-way through its output."""
        waiting, running = self._waiting, self._running
        tokens = waiting.prompt_tokens + running.prompt_tokens + (waiting.expected_tokens + running.expected_tokens) / 2
        return max(1.0, tokens / max(1, waiting.num + running.num))

    def _expected(self, max_tokens: int | None) -> int:
        mean = max(1, round(self._counted_mean))
        return mean if max_tokens is None else min(max_tokens, mean)

    def _run(self, live: _Live) -> None:
        if not live.is_running:
            self._count(live, -1)
            live.is_running = True
            self._count(live, 1)

    def _count(self, live: _Live, sign: int) -> None:
        if live.is_running:
            self._running.add(live, sign)
            return
        group = live.priority, live.tenant
        sums = self._groups.setdefault(group, _Sums())
        sums.add(live, sign)
        self._waiting.add(live, sign)
        if sums.num == 0:
            del self._groups[group]

    def _recount(self) -> None:
        """All sums from the live requests, with the mean output as it is now."""
        self._counted_mean = self.mean_output
        self._groups, self._waiting, self._running = {}, _Sums(), _Sums()
        for live in self._live.values():
            live.expected_tokens = self._expected(live.max_tokens)
            self._count(live, 1)

    def _find(self, request_id: str) -> _Live:
        live = self._live.get(request_id)
        assert live is not None, f"{request_id} is not live"
        return live

    @staticmethod
    def _is_beyond(waiting: int, own: int, more: int, limit: int, shares: int) -> bool:
        return waiting + more > limit and (own + more > limit / shares or waiting + more > OVERFLOW * limit)

    def _shed(self, reason: ShedReason, message: str, tenant: str) -> Overloaded:
        return _overloaded(reason, message, self.predicted_wait_ns(tenant=tenant))


def _overloaded(reason: ShedReason, message: str, wait_ns: int) -> Overloaded:
    return Overloaded(
        f"{message}; try again later", reason=reason, predicted_wait_ns=wait_ns, retry_after_s=wait_ns / 1e9
    )
