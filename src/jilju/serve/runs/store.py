"""The run store: the newest runs of this server, within so many bytes.

Owns which runs are kept, and who may see which: a key sees its own. A ledger listener. Knows nothing of pages.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jilju.serve.generation import Choice
from jilju.serve.ledger import Call, LedgerListener
from jilju.serve.runs.kept import KeptPrompt, KeptRun, KeptSequence


class RunStore(LedgerListener):
    """`max_bytes` of ended runs, the oldest go first; 0: none is kept."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._runs: dict[str, KeptRun] = {}  # by the call's id
        self._by_key: dict[str | None, OrderedDict[str, KeptRun]] = {}  # likewise, in the order of their beginnings
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of those that ended, in the order of their ends
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
        self._runs[call.id] = self._by_key.setdefault(call.key_name, OrderedDict())[call.id] = run

    def find(self, call_id: str, key_name: str | None) -> KeptRun | None:
        """None: there is none, or it is another key's."""
        run = self._runs.get(call_id)
        return run if run is not None and run.call.key_name == key_name else None

    def newest(self, key_name: str | None) -> Iterator[KeptRun]:
        """Of this key, the newest first."""
        return reversed(self._by_key.get(key_name, OrderedDict[str, KeptRun]()).values())

    def on_end(self, call: Call) -> None:
        run = self._runs.get(call.id)
        if run is None:
            return
        size = self._sizes[call.id] = run.num_bytes
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            call_id, size = self._sizes.popitem(last=False)
            self.num_bytes -= size
            key_name = self._runs.pop(call_id).call.key_name
            of_key = self._by_key[key_name]
            del of_key[call_id]
            if not of_key:
                del self._by_key[key_name]
