"""Places: what a call takes of the queue, roughly before its text is tokenized and exactly afterwards.

Owns the estimates of its sequences in admission, from the check until the call has ended. Knows nothing of prompts or answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jilju.clock import Clock
from jilju.engine.admission import Admission
from jilju.engine.request import Request
from jilju.serve.deadlines import Deadlines


@dataclass(frozen=True, slots=True)
class Places:
    """`take()` once, `settle()` when the tokens are known, `give_back()` in every case."""

    admission: Admission
    clock: Clock
    call_id: str
    priority: int
    tenant: str
    is_scored: bool  # the prompts' logprobs are asked for: each token of them costs more

    def ids(self, num_sequences: int) -> list[str]:
        return [f"{self.call_id}-{index}" for index in range(num_sequences)]

    def take(self, estimates: Sequence[int], num_sampled: int, asked: int | None, deadlines: Deadlines) -> list[str]:
        """Ids of the sequences: `num_sampled` of each prompt. Raises Overloaded, and takes nothing then."""
        ids, now_ns = self.ids(len(estimates) * num_sampled), self.clock.now_ns()
        num_tokens = sum(estimates)
        self.admission.check(
            now_ns,
            num_prompt_tokens=num_tokens,
            num_scored_tokens=num_tokens if self.is_scored else 0,
            max_tokens=asked,
            num_sequences=len(ids),
            deadline_ns=deadlines.total_ns,
            queue_deadline_ns=deadlines.queue_ns,
            priority=self.priority,
            tenant=self.tenant,
        )
        for index, request_id in enumerate(ids):
            is_first = index % num_sampled == 0
            self._admitted(request_id, estimates[index // num_sampled] if is_first else 1, is_first, asked, now_ns)
        return ids

    def settle(self, requests: Sequence[Request]) -> None:
        now_ns = self.clock.now_ns()
        for request in requests:
            is_first = not request.sibling_of
            count = request.num_prompt_tokens if is_first else 1
            self._admitted(request.id, count, is_first, request.params.max_tokens, now_ns)

    def give_back(self, ids: Sequence[str]) -> None:
        """Those that never reached the engine; of others it has an end already."""
        for request_id in ids:
            self.admission.ended(request_id, self.clock.now_ns(), None)

    def _admitted(self, request_id: str, num_tokens: int, is_first: bool, asked: int | None, now_ns: int) -> None:
        self.admission.admitted(
            request_id,
            now_ns,
            num_prompt_tokens=num_tokens,
            num_scored_tokens=num_tokens if self.is_scored and is_first else 0,
            max_tokens=asked,
            priority=self.priority,
            tenant=self.tenant,
        )
