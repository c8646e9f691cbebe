"""The bill: whose time the machine's time was, and with it money and energy.

A fold over the event log as it grows: every ns since its beginning is of one request, or of one of the operator's lines, so
that requests + lines = uptime, exactly. A step's time is split over its rows by what drives each op, scaled to what was
measured. Time is lived in full by every row of a step and paid for once: the time ledger and the bill differ by design.

The operator's lines: `load` while no engine is ready; `idle` while none has work; `host` between steps while one has, which is
nobody's work in particular; `failed` for steps that raised or died with their engine, and for rows that nobody asked for any
more; `recompute` for tokens that were computed before. Knows nothing of calls and keys but the names that it is told.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from jilju.account.energy import Meter
from jilju.account.frame import Cost, Energy, MachineTime
from jilju.account.step_model import StepModel
from jilju.engine.events import StepRecord, iter_rows

Line = Literal["idle", "load", "failed", "recompute", "host"]
LINES: tuple[Line, ...] = get_args(Line)
READING_NS = 10**9  # between two readings of the energy counters, at least
HOUR_NS = 3600 * 10**9
CURRENCY = "USD"


def no_faults() -> int:
    return 0


class Paid(NamedTuple):
    """What somebody has to pay for."""

    machine_ns: int
    joules: float | None  # None: this machine tells of none

    def cost(self, price_per_hour: float | None) -> float | None:
        return None if price_per_hour is None else self.machine_ns * price_per_hour / HOUR_NS


class _Account:
    __slots__ = ("computed", "joules", "key", "ns", "unread_ns")

    def __init__(self, key: str = ""):
        self.key = key
        self.ns = 0
        self.unread_ns = 0  # of them, since the energy was last read
        self.joules = 0.0
        self.computed = 0  # of a request: tokens, at most, so far


class Bill:
    """Listens to the log's steps (`on_step`) and watches what is between them.

    `make_model` is called with the first step; `num_faults` says how many steps have raised.
    """

    def __init__(
        self,
        begin_ns: int,
        make_model: Callable[[], StepModel],
        meter: Meter | None = None,
        *,
        num_faults: Callable[[], int] = no_faults,
        is_ready: bool = False,
    ):
        self.begin_ns = begin_ns
        self._until_ns = begin_ns  # accounted for
        self._make_model = make_model
        self._model: StepModel | None = None
        self._open: dict[int, _Account] = {}  # by the request's number
        self._inside: set[int] = set()  # numbers in the engine's care
        self._keys: dict[str, _Account] = {}  # of requests that were closed
        self._lines: dict[Line, _Account] = {line: _Account() for line in LINES}
        self._is_ready = is_ready
        self._last_step_id = 0
        self._count_faults = num_faults
        self._num_faults = 0  # whose time is accounted for
        self._energy = _Energy(meter, begin_ns)

    # ---- what happens --------------------------------------------------------------------------------------------

    def on_enter(self, number: int, tenant: str, at_ns: int) -> None:
        if not self._inside:
            self._pass(at_ns, self._line())
            self._energy.read(at_ns)
        self._inside.add(number)
        self._open.setdefault(number, _Account(tenant))

    def on_leave(self, number: int, at_ns: int) -> None:
        if self._inside == {number}:
            line, num_faults = self._line(), self._count_faults()
            self._pass(at_ns, "failed" if line == "host" and num_faults > self._num_faults else line)
            self._num_faults = num_faults
        self._inside.discard(number)

    def on_engine(self, is_ready: bool, at_ns: int) -> None:
        """The step that an engine died in is lost."""
        line = self._line()
        self._pass(at_ns, "failed" if line == "host" and not is_ready else line)
        self._energy.read(at_ns)
        self._is_ready = is_ready
        self._last_step_id = 0

    def on_step(self, step: StepRecord) -> None:
        line = self._line()
        if step.step_id > self._last_step_id + 1:  # steps are numbered without gaps: one that raised has no record
            line = "failed" if line == "host" else line
            if not step.is_rerun:  # until then parts of it may go on to raise
                self._num_faults = self._count_faults()
        self._pass(step.begin_ns, line)
        self._last_step_id = step.step_id
        self._is_ready = True
        took_ns = step.end_ns - self._until_ns
        if took_ns > 0:
            self._until_ns = step.end_ns
            self._share(took_ns, list(iter_rows(step.rows)), step.num_logits)
        if self._energy.is_due(step.end_ns):
            self._energy.read(step.end_ns)

    def _share(self, ns: int, rows: Sequence[tuple[int, int, int, int]], num_logits: int) -> None:
        if not rows:
            self._charge(self._lines["failed"], ns)
            return
        if self._model is None:
            self._model = self._make_model()
        shares = [ns] if len(rows) == 1 else split(ns, self._model.rows_ns([row[1:] for row in rows], num_logits))
        for (number, start, count, _), share in zip(rows, shares, strict=True):
            account = self._open.get(number)
            if account is None:  # its request was given up while the engine did not listen
                self._charge(self._lines["failed"], share)
                continue
            end = start + count
            if start < account.computed:
                again = share * (min(end, account.computed) - start) // count
                self._charge(self._lines["recompute"], again)
                share -= again
            if end > account.computed:
                account.computed = end
            self._charge(account, share)

    def _line(self) -> Line:
        """Whose the time is in which there is no step."""
        return "load" if not self._is_ready else "host" if self._inside else "idle"

    def _pass(self, until_ns: int, line: Line) -> None:
        if until_ns > self._until_ns:
            self._charge(self._lines[line], until_ns - self._until_ns)
            self._until_ns = until_ns

    def _charge(self, account: _Account, ns: int) -> None:
        """Every ns goes through here once."""
        account.ns += ns
        self._energy.note(account, ns)

    # ---- what is asked -------------------------------------------------------------------------------------------

    def is_final(self, numbers: Iterable[int]) -> bool:
        """Nothing more will be charged to these requests."""
        return self._inside.isdisjoint(numbers)

    def paid(self, numbers: Iterable[int]) -> Paid:
        """What requests that are not closed have come to."""
        accounts = [account for number in numbers if (account := self._open.get(number)) is not None]
        joules = [self._energy.joules_of(account) for account in accounts]
        total = None if self._energy.source is None else sum([part or 0.0 for part in joules])
        return Paid(sum([account.ns for account in accounts]), total)

    def close(self, numbers: Iterable[int]) -> Paid:
        """Requests have ended: what they come to goes into the sum of their key, and is told for the last time."""
        numbers = list(numbers)
        for number in numbers:
            if (account := self._open.get(number)) is not None:
                self._energy.close(account)
        paid = self.paid(numbers)
        for number in numbers:
            if (account := self._open.pop(number, None)) is not None:
                of_key = self._keys.setdefault(account.key, _Account())
                of_key.ns += account.ns
                of_key.joules += account.joules
        return paid

    def sums(self, now_ns: int, *, is_settled: bool = False) -> "Sums":
        """Whose the time was up to now; that since the last step counts as `host` until the next is known.

        `is_settled`: without that, so that no sum ever gets smaller.
        """
        line = self._line()
        if line != "host":  # no step is under way
            self._pass(now_ns, line)
            self._energy.read(now_ns)
        joules_of = self._energy.joules_of
        keys: dict[str, tuple[int, float]] = {}
        for key, account in [*self._keys.items(), *((account.key, account) for account in self._open.values())]:
            ns, joules = keys.get(key, (0, 0.0))
            keys[key] = (ns + account.ns, joules + (joules_of(account) or 0.0))
        is_metered = self._energy.source is not None
        lines = {line: Paid(account.ns, joules_of(account)) for line, account in self._lines.items()}
        until_ns = self._until_ns if is_settled else max(now_ns, self._until_ns)
        if until_ns > self._until_ns:
            host = lines["host"]
            lines["host"] = Paid(host.machine_ns + until_ns - self._until_ns, host.joules)
        by_key = {key: Paid(ns, joules if is_metered else None) for key, (ns, joules) in keys.items()}
        return Sums(until_ns - self.begin_ns, by_key, lines, self._energy.source)


class Sums(NamedTuple):
    """A bill at one moment: by_key and lines sum to uptime_ns."""

    uptime_ns: int
    by_key: dict[str, Paid]  # of requests, ended or not; "" where there is no key
    lines: dict[Line, Paid]
    energy_source: str | None  # None: nothing is known of energy

    @property
    def requests(self) -> Paid:
        paid = self.by_key.values()
        joules = None if self.energy_source is None else sum([of_key.joules or 0.0 for of_key in paid])
        return Paid(sum([of_key.machine_ns for of_key in paid]), joules)


def make_cost(sums: Sums, price_per_hour: float | None, num_output_tokens: int) -> Cost:
    """With the sums of all keys: who shows it leaves out those that the viewer may not see."""
    requests = sums.requests.machine_ns
    seconds: dict[str, float] = {"total": sums.uptime_ns / 1e9, "requests": requests / 1e9}
    for line, paid in sums.lines.items():
        seconds[line] = paid.machine_ns / 1e9
    by_key = {key: paid.machine_ns / 1e9 for key, paid in sums.by_key.items()}
    per_million = requests / 1e9 / num_output_tokens * 1e6 if num_output_tokens else None
    price_per_s = (price_per_hour or 0.0) / 3600
    return Cost(
        currency=CURRENCY,
        price_per_hour=price_per_hour or 0.0,
        is_default=price_per_hour is None,
        machine_s=MachineTime(**seconds, by_key=by_key, per_million_output_tokens=per_million),
        **{name: value * price_per_s for name, value in seconds.items()},
        by_key={key: value * price_per_s for key, value in by_key.items()},
        per_million_output_tokens=None if per_million is None else per_million * price_per_s,
    )


def make_energy(sums: Sums, num_output_tokens: int) -> Energy | None:
    if sums.energy_source is None:
        return None
    requests = sums.requests.joules or 0.0
    of_lines = {line: paid.joules or 0.0 for line, paid in sums.lines.items()}
    return Energy(
        source=sums.energy_source,
        joules=requests + sum(of_lines.values()),
        requests_joules=requests,
        idle_joules=of_lines["idle"],
        joules_per_output_token=requests / num_output_tokens if num_output_tokens else None,
    )


class _Energy:
    """Energy follows time: what was used between two readings is shared out over the time that was charged between them.

    Who is closed between two readings pays by the power of the last ones, and the others get what is left; if that is less than
    nothing it is carried on. So the accounts sum to what was read, but for what is carried.
    """

    def __init__(self, meter: Meter | None, now_ns: int):
        self.source = None if meter is None else meter.source
        self._watts = None if meter is None else meter.watts
        self._meter = meter if self._watts is None else None
        self._read_uj = 0 if self._meter is None else self._meter.read_uj() or 0
        self._read_ns = now_ns
        self._power = 0.0  # between the last two readings, joules a ns
        self._unread: list[_Account] = []  # with time since the last reading
        self._left = 0.0  # joules that are nobody's yet; below 0: that were charged ahead

    def note(self, account: _Account, ns: int) -> None:
        if self._meter is not None:
            if not account.unread_ns:
                self._unread.append(account)
            account.unread_ns += ns

    def is_due(self, now_ns: int) -> bool:
        return self._meter is not None and now_ns - self._read_ns >= READING_NS

    def read(self, now_ns: int) -> None:
        if self._meter is None or not self.is_due(now_ns):
            return
        read_uj = self._meter.read_uj()
        if read_uj is None:  # what was counted so far stays
            self._meter = None
            return
        used = (read_uj - self._read_uj) / 1e6
        self._power = used / (now_ns - self._read_ns)
        self._left += used
        unread_ns = sum([account.unread_ns for account in self._unread])
        if unread_ns and self._left > 0:
            each, self._left = self._left / unread_ns, 0.0
            for account in self._unread:
                account.joules += account.unread_ns * each
        for account in self._unread:
            account.unread_ns = 0
        self._unread.clear()
        self._read_uj, self._read_ns = read_uj, now_ns

    def close(self, account: _Account) -> None:
        """Its account is read for the last time."""
        if self._watts is not None:
            account.joules = account.ns * self._watts / 1e9
        elif self._meter is not None:
            ahead = account.unread_ns * self._power
            account.joules += ahead
            self._left -= ahead
            account.unread_ns = 0

    def joules_of(self, account: _Account) -> float | None:
        if self.source is None:
            return None
        return account.joules if self._watts is None else account.ns * self._watts / 1e9


def split(ns: int, weights: Sequence[float]) -> list[int]:
    """`ns` in proportion to the weights, whole and exact: the largest remainders are rounded up."""
    scale = ns / sum(weights)
    wanted = [weight * scale for weight in weights]
    shares = [int(share) for share in wanted]
    rest = ns - sum(shares)
    if rest:
        for index in sorted(range(len(shares)), key=lambda i: shares[i] - wanted[i])[:rest]:
            shares[index] += 1
    return shares
