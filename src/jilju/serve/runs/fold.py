"""The fold of one run: what was kept of it, joined with the log, as its page shows it.

Owns the join and the texts of tokens. Other runs are named only where the viewer's key may see them. What it is given does not
change meanwhile: it takes its time, in a thread. Knows nothing of HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from jilju.account.records import CallRecord, SequenceRecord
from jilju.account.step_model import StepModel
from jilju.account.time_ledger import Interval as Cut
from jilju.account.time_ledger import OwnStep, TimeLedger, make_time_ledger
from jilju.engine.client import EngineInfo
from jilju.engine.events import EventLog, RowRecord
from jilju.engine.request import CacheMiss
from jilju.plan import Plan
from jilju.serve.runs import types
from jilju.serve.runs.kept import KeptPrompt, KeptRun, KeptSequence
from jilju.text.detokenizer import Detokenizer
from jilju.text.spans import found_spans, token_offsets
from jilju.text.tokenizer import Tokenizer

MAX_SHOWN_TOKENS = 32_768  # of a prompt
MAX_INTERVALS = 2_000  # of a ledger; of longer ones neighbouring intervals are joined kind by kind
MAX_NEIGHBOURS = 16  # of a step, those with the most tokens
MAX_BLAMED = 16
SHOWN_IDS = 24  # of an answer, in the list of runs
LEAST_LOGPROB = -9999.0  # in the place of -inf, as in answers
OF_STEPS = frozenset({"host", "prefill_own", "prefill_others", "decode_own", "decode_others"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a run is seen with: the log, the model of costs, the tokenizer, its cost, and the names of other runs."""

    model_name: str
    tokenizer: Tokenizer
    log: EventLog  # a part that nobody adds to, with all steps of the run that are known
    model: StepModel
    info: EngineInfo
    plan: Plan | None
    now_ns: int
    run_of: Callable[[int], str | None]  # the run of a sequence's number, if the viewer may know it
    cost: "types.CostShare | None" = None


def make_run(kept: KeptRun, record: CallRecord, sight: Sight) -> types.Run:
    """`record` is that of its call at the same moment."""
    prompts = [_prompt(prompt, index, record, sight) for index, prompt in enumerate(kept.prompts)]
    by_index = {sequence.index: sequence for sequence in kept.sequences}
    sequences = [_sequence(life, by_index[life.index], record, sight) for life in record.sequences]
    return msgspec.structs.replace(
        run_without_text(record, sight),
        created=kept.created,
        message=kept.call.message,
        parameters=kept.parameters(),
        prompts=prompts,
        sequences=sequences,
    )


def run_without_text(record: CallRecord, sight: Sight) -> types.Run:
    """Of a call that did not come to the engine, or whose tokens are not kept any more."""
    end_ns = record.ended_ns or sight.now_ns
    first_ns = record.first_sent_ns
    return types.Run(
        id=record.run_id,
        model=sight.model_name,
        route=record.route,
        created=None,
        state=record.state or "running",
        status=record.status,
        code=record.code,
        message=None,
        is_streamed=record.is_streamed,
        total_ms=(end_ns - record.received_ns) / 1e6,
        ttft_ms=(first_ns - record.received_ns) / 1e6 if first_ns else None,
        parameters={},
        prompts=[],
        sequences=[],
        cost=sight.cost,
        machine=_machine(sight),
    )


def encoded(run: types.Run) -> bytes:
    """As JSON. It may be megabytes, and an encoder lets no other thread run, so it is made bit by bit."""
    encode = msgspec.json.Encoder().encode

    def raw(items: Sequence[msgspec.Struct]) -> list[Any]:
        return [msgspec.Raw(encode(item)) for item in items]

    replace = msgspec.structs.replace
    prompts = [replace(prompt, tokens=raw(prompt.tokens)) for prompt in run.prompts]
    sequences = [replace(each, steps=raw(each.steps), output=raw(each.output)) for each in run.sequences]
    return encode(replace(run, prompts=prompts, sequences=sequences))


def summary(kept: KeptRun, now_ns: int) -> tuple[types.RunSummary, list[int]]:
    """A line of the list without its text, and the tokens that this begins with."""
    call = kept.call
    line = types.RunSummary(
        id=call.run_id or call.id,
        route=call.route,
        created=kept.created,
        state=call.state or "running",
        prompt_tokens=call.num_prompt_tokens,
        cached_tokens=call.num_cached_tokens,
        output_tokens=call.num_output_tokens,
        total_ms=((call.ended_ns or now_ns) - call.received_ns) / 1e6,
        ttft_ms=(call.first_token_ns - call.received_ns) / 1e6 if call.first_token_ns else None,
        text="",
    )
    return line, list(kept.sequences[0].output_ids[:SHOWN_IDS]) if kept.sequences else []


def run_list(lines: Sequence[tuple[types.RunSummary, list[int]]], tokenizer: Tokenizer) -> types.RunList:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in lines]
    shown = [msgspec.structs.replace(line, text=text) for (line, _), text in zip(lines, texts, strict=True)]
    return types.RunList(runs=shown)


def _machine(sight: Sight) -> types.Machine:
    info = sight.info
    return types.Machine(
        kernel_set=info.kernel_set,
        num_threads=info.num_threads,
        read_bytes_per_s=info.read_bytes_per_s,
        flops_per_s=info.flops_per_s,
        weight_bytes=info.weight_bytes,
        kv_bytes_per_token=info.kv_bytes_per_token,
        num_layers=None if sight.plan is None else sight.plan.kv.num_layers,
    )


# ---- prompts ------------------------------------------------------------------------------------------------------------


def _prompt(kept: KeptPrompt, index: int, record: CallRecord, sight: Sight) -> types.Prompt:
    tokenizer = sight.tokenizer
    ids = list(kept.ids[:MAX_SHOWN_TOKENS])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    life = next((s for s in record.sequences if s.prompt_index == index), None)
    num_cached = 0 if life is None else life.num_cached_tokens
    tokens = [
        types.PromptToken(
            id=token_id,
            text=text[begin:end] if end > begin else "",
            bytes=tokenizer.token_bytes(token_id).hex(),
            begin=begin,
            end=end,
            is_special=token_id in tokenizer.special_ids,
            is_cached=position < num_cached,
            logprob=_logprob(kept.logprobs, position - 1),
        )
        for position, (token_id, (begin, end)) in enumerate(zip(ids, token_offsets(ids, tokenizer), strict=True))
    ]
    return types.Prompt(
        text=text,
        spans=text_spans(kept.messages, text),
        tokens=tokens,
        num_tokens=len(kept.ids),
        is_cut=len(kept.ids) > len(ids),
        num_truncated=kept.num_truncated,
        cache=None if life is None or life.miss is None else _cache(life.miss, num_cached, kept, sight),
    )


def _cache(miss: CacheMiss, num_cached: int, kept: KeptPrompt, sight: Sight) -> types.Cache:
    def text_of(token_id: int) -> str:
        return sight.tokenizer.token_bytes(token_id).decode(errors="replace")

    is_known = miss.earlier_id is not None and miss.position is not None and miss.position < len(kept.ids)
    return types.Cache(
        hit_tokens=num_cached,
        miss_reason=miss.reason,
        first_miss_position=miss.position,
        earlier_text=text_of(miss.earlier_id) if is_known and miss.earlier_id is not None else None,
        own_text=text_of(kept.ids[miss.position]) if is_known and miss.position is not None else None,
        block_size=sight.info.block_size,
    )


def text_spans(messages: Sequence[Mapping[str, object]], text: str) -> list[types.TextSpan]:
    """All of the text, in order: what each message says, and between them what the template wrote."""
    if not messages:
        return [types.TextSpan(begin=0, end=len(text), role="user", message_index=None)] if text else []
    spans: list[types.TextSpan] = []
    position = 0

    def add(end: int, role: str | None, index: int | None) -> None:
        nonlocal position
        if end > position:
            spans.append(types.TextSpan(begin=position, end=end, role=role, message_index=index))
            position = end

    for index, (message, span) in enumerate(zip(messages, found_spans(messages, text), strict=True)):
        if span is not None and span.start >= position:
            add(span.start, None, None)
            add(span.end, str(message.get("role")), index)
    add(len(text), None, None)
    return spans


# ---- sequences ----------------------------------------------------------------------------------------------------------


def _sequence(life: SequenceRecord, kept: KeptSequence, record: CallRecord, sight: Sight) -> types.Sequence:
    ledger = make_time_ledger(
        record, life, sight.log, sight.model, block_size=sight.info.block_size, now_ns=sight.now_ns
    )
    begin_ns = record.received_ns
    own_numbers = {sequence.number for sequence in record.sequences}
    tokens = _output(kept, life.num_prompt_tokens, ledger.steps, begin_ns, sight.tokenizer)
    moments = [token.at_ms for token in tokens if token.step_index is not None]
    gaps = len(moments) - 1
    return types.Sequence(
        index=life.index,
        prompt_index=life.prompt_index,
        finish_reason=life.finish_reason,
        stop_reason=kept.stop_reason,
        ledger=_ledger(ledger, own_numbers, sight),
        steps=[
            _step(own, begin_ns, index == 0 and not ledger.is_cut, own_numbers, sight)
            for index, own in enumerate(ledger.steps)
        ],
        output=tokens,
        text=sight.tokenizer.decode(list(kept.output_ids), skip_special_tokens=False),
        ttft_ms=moments[0] if moments else None,
        tpot_ms=(moments[-1] - moments[0]) / gaps if gaps > 0 else None,
        preemptions=life.num_preemptions,
        resumes=life.num_resumes,
    )


def _ledger(ledger: TimeLedger, own_numbers: set[int], sight: Sight) -> types.Ledger:
    def blames(blame: Mapping[int, float]) -> list[types.Blame]:
        largest = sorted(blame.items(), key=lambda item: -item[1])[:MAX_BLAMED]
        return [
            types.Blame(run=sight.run_of(number), is_self=number in own_numbers, ms=ns / 1e6) for number, ns in largest
        ]

    return types.Ledger(
        total_ms=ledger.total_ns / 1e6,
        is_balanced=ledger.is_balanced,
        intervals=[
            types.Interval(
                kind=cut.kind,
                begin_ms=(cut.begin_ns - ledger.begin_ns) / 1e6,
                ms=cut.ns / 1e6,
                blame=blames(cut.blame),
            )
            for cut in joined(ledger.intervals, MAX_INTERVALS)
        ],
        by_kind={kind: ns / 1e6 for kind, ns in ledger.by_kind().items()},
        blame=blames(ledger.blame()),
    )


def joined(intervals: Sequence[Cut], most: int) -> list[Cut]:
    """Fewer where there are more than about `most`: of some steps in a row the parts are summed by kind. They still touch and sum to
    the same; what is no part of a step stays where it is."""
    if len(intervals) <= most:
        return list(intervals)
    size = -(-8 * len(intervals) // most)
    found: list[Cut] = []
    for is_step, run in groupby(intervals, key=lambda cut: cut.kind in OF_STEPS):
        cuts = list(run)
        groups = [cuts[first : first + size] for first in range(0, len(cuts), size)] if is_step else [[c] for c in cuts]
        for group in groups:
            found += _by_kind(group)
    return found


def _by_kind(group: Sequence[Cut]) -> list[Cut]:
    at_ns = group[0].begin_ns
    found: list[Cut] = []
    for kind in dict.fromkeys(cut.kind for cut in group):
        cuts = [cut for cut in group if cut.kind == kind]
        blame: dict[int, float] = {}
        for cut in cuts:
            for number, ns in cut.blame.items():
                blame[number] = blame.get(number, 0.0) + ns
        end_ns = at_ns + sum(cut.ns for cut in cuts)
        found.append(Cut(kind, at_ns, end_ns, blame))
        at_ns = end_ns
    return found


def _output(
    kept: KeptSequence, num_prompt_tokens: int, steps: Sequence[OwnStep], begin_ns: int, tokenizer: Tokenizer
) -> list[types.OutputToken]:
    """A row that ends at the prompt's last token or at one of the answer chose the token after it."""
    ids = list(kept.output_ids)
    chose = {
        own.row.start + own.row.num_tokens - num_prompt_tokens: index
        for index, own in enumerate(steps)
        if own.row.is_sampled
    }
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    found: list[types.OutputToken] = []
    for index, (token_id, (begin, end)) in enumerate(zip(ids, token_offsets(ids, tokenizer), strict=True)):
        step_index = chose.get(index)
        at_ns = begin_ns if step_index is None else steps[step_index].logged.step.end_ns
        found.append(
            types.OutputToken(
                index=index,
                id=token_id,
                text=detokenizer.push(token_id),
                bytes=tokenizer.token_bytes(token_id).hex(),
                is_special=token_id in tokenizer.special_ids,
                begin=begin,
                end=end,
                step_index=step_index,
                at_ms=(at_ns - begin_ns) / 1e6,
                logprob=_logprob(kept.logprobs, index),
                top=_alternatives(kept.tops[index], tokenizer) if index < len(kept.tops) else [],
            )
        )
    return found


def _alternatives(top: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> list[types.Alternative]:
    found: list[types.Alternative] = []
    for token_id, logprob in top:
        data = tokenizer.token_bytes(token_id)
        text = data.decode(errors="replace")
        found.append(types.Alternative(id=token_id, text=text, bytes=data.hex(), logprob=max(logprob, LEAST_LOGPROB)))
    return found


def _logprob(logprobs: Sequence[float], index: int) -> float | None:
    return max(logprobs[index], LEAST_LOGPROB) if 0 <= index < len(logprobs) else None


def _step(own: OwnStep, begin_ns: int, is_first: bool, own_numbers: set[int], sight: Sight) -> types.Step:
    step, row, model = own.logged.step, own.row, sight.model
    run_ns = step.done_ns - step.packed_ns
    others = [other for other in own.logged.rows if other is not row]
    most = sorted(others, key=lambda other: -other.num_tokens)[:MAX_NEIGHBOURS]
    return types.Step(
        serial=own.logged.serial,
        begin_ms=(step.begin_ns - begin_ns) / 1e6,
        ms=(step.end_ns - step.begin_ns) / 1e6,
        schedule_ms=(step.scheduled_ns - step.begin_ns) / 1e6,
        pack_ms=(step.packed_ns - step.scheduled_ns) / 1e6,
        run_ms=run_ns / 1e6,
        commit_ms=(step.end_ns - step.done_ns) / 1e6,
        predicted_ms=step.predicted_ns / 1e6,
        kind="prefill" if own.is_prefill else "decode",
        start=row.start,
        count=row.num_tokens,
        cached=row.start if is_first else 0,
        is_recompute=own.is_recompute,
        rows=step.num_rows,
        prefill_tokens=step.num_prefill_tokens,
        decode_tokens=step.num_decode_tokens,
        flops=step.flops,
        bytes=step.bytes,
        own_ms=own.own_ns / 1e6,
        others_ms=(run_ns - own.own_ns) / 1e6,
        memory_roof_share=model.memory_roof_share(step.bytes, run_ns),
        compute_roof_share=model.compute_roof_share(step.flops, run_ns),
        neighbours=[_neighbour(other, own_numbers, sight) for other in most],
    )


def _neighbour(row: RowRecord, own_numbers: set[int], sight: Sight) -> types.Neighbour:
    return types.Neighbour(run=sight.run_of(row.number), count=row.num_tokens, is_prefill=row.num_tokens > 1)
