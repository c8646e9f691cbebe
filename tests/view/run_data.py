"""Runs for tests of the run page: made with the contract's own types, from a small simulated time line, so that all sums hold.

Owns the making. A run's prompt and output are given as bytes of tokens; characters, intervals and steps follow from them.
Knows nothing of the page or of a server.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from jilju.serve.runs.types import (
    Alternative,
    Blame,
    Cache,
    CostShare,
    Interval,
    Ledger,
    Machine,
    Neighbour,
    OutputToken,
    Prompt,
    PromptToken,
    Run,
    RunList,
    RunSummary,
    Sequence,
    Step,
    StepOp,
    StepOps,
    TextSpan,
)

RUN_ID = "chatcmpl-9f2c61d0a7b84e"
OTHER_ID = "chatcmpl-91aa07c35e2f10"
WEIGHT_BYTES = 386_000_000
KV_BYTES = 23_040
READ_BYTES_PER_S = 21.4e9
FLOPS_PER_S = 198e9
FLOPS_A_TOKEN = 988_000_000

MACHINE = Machine(
    kernel_set="avx2",
    num_threads=2,
    read_bytes_per_s=READ_BYTES_PER_S,
    flops_per_s=FLOPS_PER_S,
    weight_bytes=WEIGHT_BYTES,
    kv_bytes_per_token=KV_BYTES,
    num_layers=24,
)


@dataclass
class Timeline:
    """Intervals as they follow each other; `now` is where the last one ends."""

    now: float = 0.0
    intervals: list[Interval] = field(default_factory=list)

    def add(self, kind: str, ms: float, *blame: Blame) -> None:
        if ms > 0:
            self.intervals.append(Interval(kind=kind, begin_ms=self.now, ms=ms, blame=list(blame)))
            self.now += ms

    def ledger(self) -> Ledger:
        by_kind: dict[str, float] = {}
        blamed: dict[str | None, Blame] = {}
        for interval in self.intervals:
            by_kind[interval.kind] = by_kind.get(interval.kind, 0.0) + interval.ms
            for blame in interval.blame:
                before = blamed.get(blame.run)
                blamed[blame.run] = replace(blame, ms=blame.ms + (before.ms if before else 0.0))
        return Ledger(
            total_ms=self.now,
            is_balanced=True,
            intervals=self.intervals,
            by_kind=by_kind,
            blame=sorted(blamed.values(), key=lambda blame: -blame.ms),
        )


def characters(pieces: Items[bytes]) -> tuple[str, list[tuple[int, int, str]]]:
    """The whole text, and of each piece the characters that it has a part of and those that it completes."""
    whole = b"".join(pieces)
    text = whole.decode()
    owners: list[int] = []  # of each byte, the character it belongs to
    for index, character in enumerate(text):
        owners += [index] * len(character.encode())
    spans, done, at = [], 0, 0
    for piece in pieces:
        at += len(piece)
        begin = owners[at - len(piece)] if piece else done
        end = owners[at - 1] + 1 if piece else done
        complete = end if at == len(whole) or owners[at] != owners[at - 1] else end - 1
        spans.append((begin, end, text[done:complete]))
        done = max(done, complete)
    return text, spans


def make_prompt(parts: Items[tuple[str | None, list[bytes]]], cache: Cache | None) -> Prompt:
    """`parts`: (role or None for the template, tokens). A token that looks like <|...|> is special."""
    pieces = [piece for _, tokens in parts for piece in tokens]
    text, spans = characters(pieces)
    hit = cache.hit_tokens if cache else 0
    tokens = [
        PromptToken(
            id=token_id(piece),
            text=piece_text,
            bytes=piece.hex(),
            begin=begin,
            end=end,
            is_special=piece.startswith(b"<|"),
            is_cached=index < hit,
        )
        for index, (piece, (begin, end, piece_text)) in enumerate(zip(pieces, spans, strict=True))
    ]
    text_spans, begin, message = [], 0, -1
    for role, part in parts:
        end = begin + len(b"".join(part).decode())
        message += role is not None
        text_spans.append(TextSpan(begin=begin, end=end, role=role, message_index=message if role else None))
        begin = end
    return Prompt(
        text=text,
        spans=text_spans,
        tokens=tokens,
        num_tokens=len(tokens),
        is_cut=False,
        num_truncated=0,
        cache=cache,
    )


def token_id(piece: bytes) -> int:
    if piece.startswith(b"<|"):
        return 151_644 if b"start" in piece else 151_645
    return 100 + int.from_bytes(piece[:4], "big") % 120_000


def make_step(
    timeline: Timeline,
    serial: int,
    *,
    start: int,
    count: int,
    kind: str,
    ms: float,
    cached: int = 0,
    neighbours: Items[Neighbour] = (),
    blame: Blame | None = None,
    is_recompute: bool = False,
) -> Step:
    """A step of `ms` without its host part; puts its intervals on the timeline."""
    schedule, pack, commit = 0.12, 0.06, 0.16
    others = blame.ms if blame else 0.0
    begin = timeline.now
    tokens = count + sum(neighbour.count for neighbour in neighbours)
    flops = FLOPS_A_TOKEN * tokens
    moved = WEIGHT_BYTES + KV_BYTES * (start + count) + 400_000 * tokens
    timeline.add("host", schedule + pack)
    timeline.add("recompute" if is_recompute else f"{kind}_own", ms - others)
    if blame:
        timeline.add(f"{kind}_others", others, blame)
    timeline.add("host", commit)
    whole = timeline.now - begin
    return Step(
        serial=serial,
        begin_ms=begin,
        ms=whole,
        schedule_ms=schedule,
        pack_ms=pack,
        run_ms=whole - schedule - pack - commit,
        commit_ms=commit,
        predicted_ms=whole * (0.93 + 0.14 * math.sin(serial) ** 2),
        kind=kind,
        start=start,
        count=count,
        cached=cached,
        is_recompute=is_recompute,
        rows=1 + len(neighbours),
        prefill_tokens=(count if kind == "prefill" else 0) + sum(n.count for n in neighbours if n.is_prefill),
        decode_tokens=(count if kind == "decode" else 0) + sum(n.count for n in neighbours if not n.is_prefill),
        flops=flops,
        bytes=moved,
        own_ms=ms - others,
        others_ms=others,
        memory_roof_share=moved / (ms / 1000) / READ_BYTES_PER_S,
        compute_roof_share=flops / (ms / 1000) / FLOPS_PER_S,
        neighbours=list(neighbours),
    )


def make_output(
    pieces: Items[bytes], steps: Items[Step], *, with_logprobs: bool, end: bytes | None
) -> list[OutputToken]:
    """One token a step, the first from the last step of prefill; `end` is a token that has no text."""
    _, spans = characters(pieces)
    last = spans[-1][1] if spans else 0
    rows = [(piece, span, False) for piece, span in zip(pieces, spans, strict=True)]
    rows += [(end, (last, last, ""), True)] if end else []
    first_step = max(index for index, step in enumerate(steps) if step.kind == "prefill" and not step.is_recompute)
    decodes = [index for index, step in enumerate(steps) if step.kind == "decode"]
    made_in = [first_step, *decodes]
    tokens = []
    for index, (piece, (begin, stop, text), is_special) in enumerate(rows):
        step = steps[made_in[index]]
        probability = 0.55 + 0.44 * math.sin(3.1 * index + 1) ** 2
        top = [
            Alternative(id=token_id(piece), text=text, bytes=piece.hex(), logprob=math.log(probability)),
            *(
                Alternative(
                    id=token_id(other),
                    text=other.decode(),
                    bytes=other.hex(),
                    logprob=math.log((1 - probability) * share),
                )
                for other, share in ((" 그".encode(), 0.5), (" 저".encode(), 0.25), (b" the", 0.1), (b"\n", 0.05))
            ),
        ]
        tokens.append(
            OutputToken(
                index=index,
                id=token_id(piece),
                text=text,
                bytes=piece.hex(),
                is_special=is_special,
                begin=begin,
                end=stop,
                step_index=made_in[index],
                at_ms=step.begin_ms + step.ms,
                logprob=top[0].logprob if with_logprobs else None,
                top=top if with_logprobs else [],
            )
        )
    return tokens


SYSTEM = [b"You", b" are", b" a", b" guide", b" to", b" Korea", b".", b" Answer", b" in", b" the", b" language", b" of",
          b" the", b" question", b"."]  # fmt: skip
QUESTION = ["대한".encode(), "민국".encode(), "의".encode(), " 수도".encode(), "는".encode(), " 어디".encode(),
            "인가".encode(), "요".encode(), b"?"]  # fmt: skip
# "밝" and "강" are made of two tokens each, as rarer syllables are in a byte-level vocabulary
ANSWER = ["서울".encode(), "은".encode(), " 대한".encode(), "민국".encode(), "의".encode(), " 수도".encode(), "이며".encode(),
          b", ", b"\xeb\xb0", b"\x9d", "게".encode(), " 빛".encode(), "나는".encode(), " 한".encode(), b"\xea\xb0", b"\x95",
          "을".encode(), " 품".encode(), "고".encode(), " 있".encode(), "습니다".encode(), b"."]  # fmt: skip


def chat_prompt(cache: Cache | None, system: list[bytes] = SYSTEM, question: list[bytes] = QUESTION) -> Prompt:
    return make_prompt(
        [
            (None, [b"<|im_start|>", b"system", b"\n"]),
            ("system", system),
            (None, [b"<|im_end|>", b"\n", b"<|im_start|>", b"user", b"\n"]),
            ("user", question),
            (None, [b"<|im_end|>", b"\n", b"<|im_start|>", b"assistant", b"\n"]),
        ],
        cache,
    )


def korean_run() -> Run:
    """A chat in Korean: a cache hit that ends where the texts differ, a wait for others, 22 tokens and an end."""
    cache = Cache(
        hit_tokens=16,
        miss_reason="diverged",
        first_miss_position=23,
        earlier_text="서울",
        own_text="대한",
        block_size=16,
    )
    prompt = chat_prompt(cache)
    timeline = Timeline()
    before_engine(timeline)
    timeline.add("queue_step", 9.4, Blame(run=OTHER_ID, ms=6.1), Blame(run=None, ms=3.3))
    timeline.add("queue_tokens", 21.7, Blame(run=OTHER_ID, ms=21.7))
    neighbours = [Neighbour(run=OTHER_ID, count=1, is_prefill=False), Neighbour(run=None, count=1, is_prefill=False)]
    steps = [
        make_step(
            timeline, 4_101, start=16, count=prompt.num_tokens - 16, kind="prefill", ms=128.3, cached=16,
            neighbours=neighbours, blame=Blame(run=OTHER_ID, ms=3.2),
        )
    ]  # fmt: skip
    for index in range(len(ANSWER)):
        timeline.add("host", 0.09)
        beside = neighbours[: max(0, 2 - index // 8)]
        blame = Blame(run=OTHER_ID, ms=0.4) if beside else None
        ms = 24.0 + 0.01 * index + 1.5 * math.sin(index) ** 2
        if index == 6:
            beside = [*beside, Neighbour(run=OTHER_ID, count=8, is_prefill=True)]
            blame, ms = Blame(run=OTHER_ID, ms=37.2), 62.0
        if index == 13:
            timeline.add("stall_budget", 14.2, Blame(run=OTHER_ID, ms=14.2))
        steps.append(
            make_step(timeline, 4_103 + index, start=prompt.num_tokens + index, count=1, kind="decode", ms=ms,
                      neighbours=beside, blame=blame)
        )  # fmt: skip
    after_engine(timeline)
    return run_of(prompt, [sequence_of(timeline, steps, ANSWER, with_logprobs=True, end=b"<|im_end|>")])


def before_engine(timeline: Timeline) -> None:
    for kind, ms in (("receive", 0.31), ("parse", 0.22), ("render", 0.48), ("tokenize", 0.94), ("admit", 0.12)):
        timeline.add(kind, ms)
    timeline.add("link_in", 0.18)


def after_engine(timeline: Timeline) -> None:
    for kind, ms in (("link_out", 0.15), ("text", 0.11), ("write", 0.24)):
        timeline.add(kind, ms)


def sequence_of(
    timeline: Timeline,
    steps: list[Step],
    pieces: Items[bytes],
    *,
    with_logprobs: bool,
    end: bytes | None,
    **changes: Any,
) -> Sequence:
    output = make_output(pieces, steps, with_logprobs=with_logprobs, end=end)
    gaps = len(output) - 1
    sequence = Sequence(
        index=0,
        prompt_index=0,
        finish_reason="stop" if end else "length",
        stop_reason=None,
        ledger=timeline.ledger(),
        steps=steps,
        output=output,
        text=b"".join(pieces).decode(),
        ttft_ms=output[0].at_ms + 0.3,
        tpot_ms=(output[-1].at_ms - output[0].at_ms) / gaps if gaps else None,
        preemptions=0,
        resumes=0,
    )
    return replace(sequence, **changes)


def run_of(prompt: Prompt, sequences: list[Sequence], **changes: Any) -> Run:
    total = max((sequence.ledger.total_ms for sequence in sequences), default=0.0)
    run = Run(
        id=RUN_ID,
        model="qwen2.5-0.5b-instruct-q4_k",
        route="/v1/chat/completions",
        created=1_764_166_000.0,
        state="completed",
        status=200,
        code=None,
        message=None,
        is_streamed=True,
        total_ms=total,
        ttft_ms=sequences[0].ttft_ms if sequences else None,
        parameters={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 7, "max_tokens": 256, "logprobs": True},
        prompts=[prompt],
        sequences=sequences,
        cost=CostShare(
            currency="USD",
            price_per_hour=0.05,
            is_default=False,
            amount=total * 0.6 * 0.05 / 3.6e6,
            machine_ms=total * 0.6,
            joules=None,
        ),
        machine=MACHINE,
    )
    return replace(run, **changes)


def long_run(num_prompt: int = 4_000, num_output: int = 2_000, chunk: int = 512) -> Run:
    """As long as runs of this server get: chunks of prefill, thousands of steps."""
    words = [f" word{index % 97}".encode() for index in range(num_prompt - 13)]
    cache = Cache(
        hit_tokens=1_024,
        miss_reason="evicted",
        first_miss_position=1_024,
        earlier_text=None,
        own_text=None,
        block_size=16,
    )
    prompt = chat_prompt(cache, system=[], question=words)
    timeline = Timeline()
    before_engine(timeline)
    steps = []
    for start in range(1_024, num_prompt, chunk):
        count = min(chunk, num_prompt - start)
        ms = count * (5.6 + start / 4_000)
        cached = 1_024 if start == 1_024 else 0
        steps.append(
            make_step(timeline, 9_000 + len(steps), start=start, count=count, kind="prefill", ms=ms, cached=cached)
        )
    for index in range(num_output - 1):
        timeline.add("host", 0.09)
        ms = 26.0 + 0.004 * index + 2 * math.sin(index) ** 2
        steps.append(make_step(timeline, 10_000 + index, start=num_prompt + index, count=1, kind="decode", ms=ms))
    after_engine(timeline)
    pieces = [f" item{index % 89}".encode() for index in range(num_output)]
    return run_of(prompt, [sequence_of(timeline, steps, pieces, with_logprobs=False, end=None)])


def two_answers() -> Run:
    """n = 2: the second answer is another text with another ledger."""
    run = korean_run()
    first = run.sequences[0]
    timeline = Timeline()
    before_engine(timeline)
    timeline.add("queue_rows", 40.0, Blame(run=None, is_self=True, ms=40.0))
    steps = [
        make_step(timeline, 4_110, start=32, count=run.prompts[0].num_tokens - 32, kind="prefill", ms=30.0, cached=32)
    ]
    pieces = [b"Seoul", b" is", b" it", b"."]
    for index in range(3):
        timeline.add("host", 0.1)
        steps.append(
            make_step(timeline, 4_111 + index, start=run.prompts[0].num_tokens + index, count=1, kind="decode", ms=25.0)
        )
    after_engine(timeline)
    second = sequence_of(timeline, steps, pieces, with_logprobs=False, end=None, index=1)
    return replace(run, sequences=[first, second])


def cut_run(run: Run, num_tokens: int) -> Run:
    """The same run while it runs: what there was after so many tokens."""
    sequence = run.sequences[0]
    output = sequence.output[:num_tokens]
    end = output[-1].at_ms
    intervals = [interval for interval in sequence.ledger.intervals if interval.begin_ms + interval.ms <= end + 1e-6]
    timeline = Timeline(now=end, intervals=intervals)
    part = replace(
        sequence,
        finish_reason=None,
        ledger=timeline.ledger(),
        output=output,
        steps=sequence.steps[: output[-1].step_index + 1],
        text="".join(token.text for token in output),
    )
    return replace(run, state="running", total_ms=end, sequences=[part], cost=None)


def refused_run() -> Run:
    """It waited until its deadline and was never in a step."""
    timeline = Timeline()
    before_engine(timeline)
    timeline.add("queue_rows", 2_000.0, Blame(run=OTHER_ID, ms=2_000.0))
    timeline.add("write", 0.2)
    sequence = Sequence(
        index=0, prompt_index=0, finish_reason=None, stop_reason=None, ledger=timeline.ledger(), steps=[], output=[], text="",
        ttft_ms=None, tpot_ms=None, preemptions=0, resumes=0,
    )  # fmt: skip
    return run_of(
        chat_prompt(None), [sequence], state="deadline", status=504, code="deadline_exceeded", cost=None,
        message="the deadline of 2,000 ms passed before the first token; ask when the server is less busy",
    )  # fmt: skip


def preempted_run() -> Run:
    """Its blocks were taken, its tokens computed again; then the engine died and came back."""
    prompt = chat_prompt(Cache(hit_tokens=0, miss_reason="never_seen", first_miss_position=0, earlier_text=None,
                               own_text=None, block_size=16))  # fmt: skip
    timeline = Timeline()
    before_engine(timeline)
    n = prompt.num_tokens
    steps = [make_step(timeline, 1, start=0, count=n, kind="prefill", ms=208.0)]
    for index in range(6):
        if index == 4:
            timeline.add("restart", 300.0)
        if index == 2:  # all that was computed so far, which gives the next token as well
            timeline.add("stall_preempted", 55.0, Blame(run=OTHER_ID, ms=55.0))
            steps.append(make_step(timeline, 50, start=0, count=n + 3, kind="decode", ms=219.0, is_recompute=True))
            continue
        timeline.add("host", 0.1)
        steps.append(make_step(timeline, 60 + index, start=n + index, count=1, kind="decode", ms=25.0))
    after_engine(timeline)
    pieces = [b"It", b" goes", b" on", b" as", b" it", b" was", b"."]
    return run_of(
        prompt, [sequence_of(timeline, steps, pieces, with_logprobs=False, end=None, preemptions=1, resumes=1)]
    )


def step_ops(step: Step) -> StepOps:
    """The ops of a step; their times sum to its run_ms."""
    tokens = step.prefill_tokens + step.decode_tokens
    lines = [
        ("linear", f"[{tokens} tokens, 896] x [896, 9728] q4_k", 24, 0.41, 0.42),
        ("linear", f"[{tokens} tokens, 4864] x [4864, 896] q6_k", 24, 0.24, 0.26),
        ("linear", f"[{step.rows} logits, 896] x [896, 151936] q8_0", 1, 0.2, 0.22),
        ("linear", f"[{tokens} tokens, 896] x [896, 1152] q4_k", 24, 0.06, 0.05),
        ("attention", f"[{tokens} tokens, 14 heads of 64] on {step.start + step.count} keys", 24, 0.05, 0.02),
        ("glu", f"[{tokens} tokens, 4864]", 24, 0.02, 0.02),
        ("rms_norm", f"[{tokens} tokens, 896]", 49, 0.01, 0.005),
        ("sample", f"[{step.rows} logits, 151936]", 1, 0.01, 0.005),
    ]
    bound = "compute" if tokens >= 16 else "memory"
    ops = [
        StepOp(op=op, shape=shape, count=count, flops=int(step.flops * share), bytes=int(step.bytes * part),
               ms=step.run_ms * share, share=share, bound="memory" if op in ("glu", "rms_norm", "sample") else bound)
        for op, shape, count, share, part in lines
    ]  # fmt: skip
    return StepOps(
        serial=step.serial, run_ms=step.run_ms, rows=step.rows, tokens=tokens, logits=step.rows, flops=step.flops,
        bytes=step.bytes, memory_roof_share=step.memory_roof_share, compute_roof_share=step.compute_roof_share,
        is_modelled=True, ops=ops,
    )  # fmt: skip


def run_list(*runs: Run) -> RunList:
    return RunList(
        runs=[
            RunSummary(
                id=run.id,
                route=run.route,
                created=run.created or 0.0,
                state=run.state,
                prompt_tokens=run.prompts[0].num_tokens,
                cached_tokens=run.prompts[0].cache.hit_tokens if run.prompts[0].cache else 0,
                output_tokens=len(run.sequences[0].output),
                total_ms=run.total_ms,
                ttft_ms=run.ttft_ms,
                text=run.sequences[0].text[:80],
            )
            for run in runs
        ]
    )
