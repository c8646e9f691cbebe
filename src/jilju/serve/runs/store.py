"""The run store: the newest runs of this server, within so many bytes.

Owns which runs are kept, and who may see which: a key sees its own. A ledger listener. Knows nothing of pages.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jilju.serve.generation import Choice
from jilju.serve.ledger import Call
from jilju.serve.runs.kept import KeptPrompt, KeptRun, KeptSequence


class RunStore:
    """`max_bytes` of ended runs, the oldest go first; 0: none is kept."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._runs: OrderedDict[str, KeptRun] = OrderedDict()  # by the call's id, in the order of their beginnings
        self._sizes: dict[str, int] = {}  # of those that ended
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._runs)

    def begin(self, call: Call, created: float, choices: Sequence[Choice]) -> None:
        """A call goes to the engine: from now on its tokens are kept."""
        if not self._max_bytes:
            return
        run = KeptRun(call, created)
        prompts: dict[int, KeptPrompt] = {}
        for choice in choices:
            prompt, index = choice.prompt, choice.life.prompt_index
            assert prompt is not None, "a choice that goes to the engine has a prompt"
            if index not in prompts:
                prompts[index] = KeptPrompt(array("i", prompt.ids), prompt.messages, prompt.num_truncated)
            choice.kept = KeptSequence(choice.index, prompts[index], choice.request.params)
            run.sequences.append(choice.kept)
        run.prompts = list(prompts.values())
        self._runs[call.id] = run

    def find(self, call_id: str, key_name: str | None) -> KeptRun | None:
        """None: there is none, or it is another key's."""
        run = self._runs.get(call_id)
        return run if run is not None and run.call.key_name == key_name else None

    def newest(self, key_name: str | None) -> Iterator[KeptRun]:
        """Of this key, the newest first."""
        return (run for run in reversed(self._runs.values()) if run.call.key_name == key_name)

    def on_token(self, call: Call, gap_ns: int | None) -> None:
        pass

    def on_end(self, call: Call) -> None:
        run = self._runs.get(call.id)
        if run is None:
            return
        size = self._sizes[call.id] = run.num_bytes
        self.num_bytes += size
        for call_id in list(self._sizes):
            if self.num_bytes <= self._max_bytes:
                return
            self.num_bytes -= self._sizes.pop(call_id)
            del self._runs[call_id]
