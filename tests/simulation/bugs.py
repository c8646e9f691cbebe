"""Planted bugs: mistakes that a tired engineer makes, each as a few words of production code read otherwise.

Owns the list and the switch: while a bug is planted, functions run code compiled from their own source with those words changed.
Production code has no hooks for that. A bug whose words are no longer in the source says so; it is to be written anew. Knows
nothing of scripts and laws: `test_bugs` asks whether the simulation sees each of them, `measure_bugs` how soon.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType

from jilju.engine.admission import Admission, _Sums
from jilju.engine.blocks import BlockPool
from jilju.engine.link import EngineTurns, FrameReader
from jilju.engine.loop import Engine
from jilju.engine.matcher import Grammar
from jilju.engine.pack import _Logits
from jilju.engine.prefix import PrefixIndex
from jilju.engine.queue import WaitingQueue, _Class, due_ns
from jilju.engine.scheduler import Scheduler
from jilju.engine.sequence import Sequence, _counts
from jilju.engine.supervisor import Supervisor, _Live
from jilju.serve.drain import Drain
from jilju.serve.ledger import Ledger
from jilju.text.stops import StopMatcher


@dataclass(frozen=True)
class Edit:
    """Words of a function's source, which are there once, and what stands there instead."""

    function: object  # a function, a method or a property
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    name: str
    category: str
    says: str
    edits: tuple[Edit, ...]


WEAK_HASH = Edit(
    PrefixIndex.__init__,
    "blake2b(data, digest_size=KEY_BYTES, key=hash_key).digest()",
    "blake2b(data, digest_size=1, key=hash_key).digest()",
)

BUGS = (
    # ---- blocks ----------------------------------------------------------------------------------------------------
    Bug(
        "cancel_in_prefill_keeps_blocks", "blocks", "Who is cancelled before its first token does not give its blocks back.",
        (Edit(Scheduler._withdraw, "self.pool.release(", "sequence.num_output and self.pool.release("),),
    ),
    Bug(
        "preempt_and_cancel_release_twice", "blocks", "A preempted sequence keeps its table, so its cancel gives the blocks back again.",
        (Edit(Scheduler._preempt, "victim.block_ids = []", "pass"),),
    ),
    Bug(
        "preempted_keeps_blocks", "blocks", "Preemption forgets to give the victim's blocks back.",
        (Edit(Scheduler._preempt, "self.pool.release(victim.block_ids, victim.tenant)", "pass"),),
    ),
    Bug(
        "stale_table_after_preemption", "blocks", "A preempted sequence starts again with the blocks that it had before.",
        (
            Edit(Scheduler._preempt, "victim.block_ids = []", "pass"),
            Edit(Scheduler._start, "sequence.block_ids = hits", "sequence.block_ids = hits + sequence.block_ids[len(hits) :]"),
        ),
    ),
    Bug(
        "goes_on_after_preemption", "blocks", "A preempted sequence is not computed again from its first missing block, but from where it was.",
        (
            Edit(Scheduler._preempt, "victim.num_computed = 0", "pass"),
            Edit(
                Scheduler._start, "sequence.num_computed = len(hits) * self.pool.block_size",
                "sequence.num_computed = max(sequence.num_computed, len(hits) * self.pool.block_size)",
            ),
        ),
    ),
    Bug(
        "shared_block_counted_once", "blocks", "Whoever shares a block sets its count to one instead of raising it.",
        (Edit(BlockPool.share, "self._refs[block_id] += 1", "self._refs[block_id] = 1"),),
    ),
    Bug(
        "hits_held_too_late", "blocks", "The blocks of a hit are held only after new ones were taken, which may evict them.",
        (
            Edit(Scheduler._start, "self.pool.share(block_id)", "pass"),
            Edit(
                Scheduler._let_in, "self._plan(draft, sequence, count)\n",
                "held = hits.copy()\n    self._plan(draft, sequence, count)\n    for block_id in held:\n        self.pool.share(block_id)\n",
            ),
        ),
    ),
    Bug(
        "cached_and_free", "blocks", "A block that goes to the cache goes to the free ones as well.",
        (Edit(BlockPool.release, "else:\n", "if True:\n"),),
    ),
    Bug(
        "evicted_stays_in_index", "blocks", "An evicted block stays in the prefix index.",
        (Edit(BlockPool.take, "self._prefix.remove(block_id)", "pass"),),
    ),
    Bug(
        "hot_blocks_miscounted", "blocks", "A hot block that leaves the cache is still counted as hot.",
        (Edit(BlockPool._uncache, "self._num_hot -= 1", "pass"),),
    ),
    Bug(
        "one_block_too_many", "blocks", "Tokens that fill their last block get another one.",
        (Edit(BlockPool.blocks_for, "-(-num_tokens // self.block_size)", "num_tokens // self.block_size + 1"),),
    ),
    Bug(
        "last_block_missing", "blocks", "The first token of a block does not get that block.",
        (Edit(Scheduler._plan, "self.pool.block_size < end", "self.pool.block_size < end - 1"),),
    ),
    Bug(
        "postponed_rows_leak", "blocks", "Rows that a failed step leaves for later drop the blocks taken for them, but do not give them back.",
        (Edit(Scheduler.give_up, "self.pool.release(spare, sequence.tenant)", "pass"),),
    ),
    Bug(
        "postponed_rows_keep", "blocks", "Rows that a failed step leaves for later keep the blocks taken for them.",
        (Edit(Engine._find_culprit, "self.scheduler.give_up(postponed)", "pass"),),
    ),
    Bug(
        "revived_not_counted", "blocks", "Whether a sequence fits is asked as if the cached blocks that it hits could still be evicted for it.",
        (Edit(Scheduler._let_in, "num_new + num_revived > room", "num_new > room"),),
    ),
    # ---- prefix ----------------------------------------------------------------------------------------------------
    Bug(
        "partial_block_cached", "prefix", "A block is entered in the index when its tokens are known, before its last ones are computed.",
        (
            Edit(
                Scheduler._commit_row, "end // self.pool.block_size):",
                "min(self.pool.blocks_for(end), sequence.num_tokens // self.pool.block_size)):",
            ),
        ),
    ),
    Bug(
        "tokens_not_compared", "prefix", "A hit trusts the hash, which is weak here, and does not compare the tokens.",
        (WEAK_HASH, Edit(PrefixIndex._find, "entry.tokens == self._tokens(sequence, index) and ", "")),
    ),
    Bug(
        "parent_not_compared", "prefix", "A hit compares its tokens, but not what comes before them, and the hash is weak.",
        (WEAK_HASH, Edit(PrefixIndex._find, " and entry.parent == self._parent(sequence, index)", "")),
    ),
    Bug(
        "parent_ignored", "prefix", "A block is known by its own tokens alone, whatever comes before them.",
        (
            Edit(PrefixIndex._key, "self._parent_key(sequence, index) + self._tokens", "self._tokens"),
            Edit(PrefixIndex._find, " and entry.parent == self._parent(sequence, index)", ""),
        ),
    ),
    Bug(
        "salt_ignored", "prefix", "The salt is not part of what a first block continues, so tenants hit each other's blocks.",
        (
            Edit(PrefixIndex._parent_key, "self._digest(b\"salt\" + sequence.request.salt)", "self._digest(b\"salt\")"),
            Edit(PrefixIndex._parent, "sequence.request.salt", "b\"\""),
        ),
    ),
    Bug(
        "hit_leaves_nothing_to_compute", "prefix", "A prompt that is wholly in the cache counts as computed to its last token.",
        (Edit(Scheduler._let_in, "else sequence.num_wanted - 1", "else sequence.num_wanted"),),
    ),
    Bug(
        "scored_prompt_hits", "prefix", "A prompt that is to be scored takes hits, so the scores of their tokens never come.",
        (Edit(Scheduler._let_in, "sequence.num_scored if sequence.is_scoring else sequence.num_wanted - 1", "sequence.num_wanted - 1"),),
    ),
    Bug(
        "cached_counts_output", "prefix", "Tokens found in the cache are counted beyond the prompt when a request is resumed.",
        (
            Edit(
                Scheduler._start, "min(sequence.num_computed, sequence.num_prompt_tokens)", "sequence.num_computed",
            ),
        ),
    ),
    # ---- tokens ----------------------------------------------------------------------------------------------------
    Bug(
        "noise_by_row", "tokens", "Noise is keyed by the row in the batch.",
        (Edit(_Logits._add, "self.positions.append(position)", "self.positions.append(len(self.positions))"),),
    ),
    Bug(
        "noise_from_resume", "tokens", "After a resume noise is keyed by the tokens of this engine alone.",
        (
            Edit(
                _Logits.add, "row.count - 1, sequence.num_tokens)",
                "row.count - 1, sequence.num_tokens - len(sequence.request.output_ids))",
            ),
        ),
    ),
    Bug(
        "seed_drawn_again", "tokens", "A request that is resumed gets another seed.",
        (
            Edit(
                _Live.resubmission, "self.request,",
                "self.request, params=msgspec.structs.replace(self.request.params, seed=len(self.tokens)),",
            ),
        ),
    ),
    Bug(
        "penalties_forget_output", "tokens", "Penalty counts are not rebuilt from the output so far when a request is resumed.",
        (Edit(_counts, "for token_id in request.output_ids:", "for token_id in ():"),),
    ),
    Bug(
        "min_tokens_from_resume", "tokens", "After a resume min_tokens counts from zero again.",
        (Edit(Sequence.banned_ids, "self.num_output <", "self.num_output - len(self.request.output_ids) <"),),
    ),
    Bug(
        "sampled_before_caught_up", "tokens", "While a sequence computes its output again, each chunk is sampled.",
        (Edit(Scheduler._make_step, "end == sequence.num_tokens", "end >= sequence.num_prompt_tokens"),),
    ),
    Bug(
        "scores_off_by_one", "tokens", "A prompt's scores are of the token itself, not of the one that follows.",
        (Edit(_Logits.add, "sequence.tokens[position + 1])", "sequence.tokens[position])"),),
    ),
    Bug(
        "scored_again", "tokens", "A resumed request is asked for its prompt's scores again.",
        (
            Edit(_Live.resubmission, "num_scored=self.num_scored", "num_scored=0"),
            Edit(Sequence.__init__, "request.prompt_logprobs is None or bool(request.output_ids)", "request.prompt_logprobs is None"),
            Edit(Supervisor._check, "event.start != start or not start < end <= wanted", "False"),
        ),
    ),
    Bug(
        "scores_told_again", "tokens", "A prompt that is computed again after a preemption is scored again.",
        (Edit(Scheduler._make_step, "max(start, sequence.num_scored)", "start"),),
    ),
    Bug(
        "wanted_of_a_neighbour", "tokens", "The logprobs of given ids are those that lie first in the step, whoever wants them.",
        (Edit(Scheduler._append, "result.wanted_logprobs[wanted.start : wanted.stop]", "result.wanted_logprobs[: len(wanted)]"),),
    ),
    Bug(
        "bad_words_from_resume", "tokens", "After a resume bad words are looked for in the tokens of this engine alone.",
        (Edit(Sequence.banned_ids, "self.bad_words.after(self.output)", "self.bad_words.after(self.output[len(self.request.output_ids) :])"),),
    ),
    Bug(
        "repetition_from_resume", "tokens", "After a resume repetitions are counted in the tokens of this engine alone.",
        (Edit(Sequence.__init__, "Repetition(params.repetition_detection, self.output)", "Repetition(params.repetition_detection, self.output[:0])"),),
    ),
    Bug(
        "repetition_before_min_tokens", "tokens", "An answer that repeats itself ends before min_tokens.",
        (Edit(Sequence.repeats_itself, " or self.num_output < self.request.params.min_tokens", ""),),
    ),
    Bug(
        "grammar_from_resume", "tokens", "After a resume a grammar begins anew.",
        (Edit(Grammar.__init__, "for token_id in request.output_ids:", "for token_id in ():"),),
    ),
    Bug(
        "raised_step_moves_grammar", "tokens", "A step that raised has taken tokens into grammars already, and does so again.",
        (
            Edit(
                Engine._run_rows, "raise StepRaised from error",
                "[row.sequence.grammar.take(int(row.sequence.tokens[row.sequence.num_tokens - 1]))"
                " for row in step.rows if row.sequence.grammar and row.sequence.num_output]\n        raise StepRaised from error",
            ),
        ),
    ),
    Bug(
        "end_before_whole", "tokens", "End ids are allowed before an answer is one of its grammar.",
        (Edit(Grammar.fill, "if self.is_complete:", "if True:"),),
    ),
    Bug(
        "length_before_stop", "tokens", "An end id that comes as the last allowed token ends the answer by length.",
        (
            Edit(
                Scheduler._append, "if token_id in sequence.end_ids or", "if (token_id in sequence.end_ids and sequence.wants_token) or",
            ),
        ),
    ),
    Bug(
        "wild_id_committed", "tokens", "Only negative ids are taken for out of range.",
        (Edit(Scheduler._error_of, "not 0 <= token_id < self._vocab_size", "token_id < 0"),),
    ),
    Bug(
        "nan_row_committed", "tokens", "The check for NaN leaves out the row that is sampled from.",
        (Edit(Scheduler.commit, "finite[logits.start : logits.stop]", "finite[logits.start : logits.stop - 1]"),),
    ),
    Bug(
        "stop_string_leaves", "tokens", "The stop string itself is given out.",
        (Edit(StopMatcher.push, "whole[: len(whole) - len(stop)]", "whole"),),
    ),
    Bug(
        "stop_missed_over_tokens", "tokens", "A stop string is looked for in each token's text alone.",
        (Edit(StopMatcher.push, "self._state = state\n", "self._state = 0\n"),),
    ),
    # ---- schedule --------------------------------------------------------------------------------------------------
    Bug(
        "budget_ignored", "schedule", "A chunk takes all it wants, whatever the step has left.",
        (Edit(Scheduler._allowed, "min(wanted, draft.budget)", "wanted"),),
    ),
    Bug(
        "victim_stays_planned", "schedule", "A sequence that is preempted after its row was planned is in the step all the same.",
        (Edit(Scheduler._preempt, "draft.counts.pop(victim, 0)", "draft.counts.get(victim, 0)"),),
    ),
    Bug(
        "gap_ignored", "schedule", "The bound on gaps is not applied beside decoding sequences.",
        (Edit(Scheduler._bound, "draft.gap_ns = self._gap_ns", "draft.gap_ns = 0"),),
    ),
    Bug(
        "decode_waits_for_chunks", "schedule", "Sequences that need one token are left out while seniors have chunks.",
        (Edit(Scheduler.schedule, "elif sequence.is_running:", "elif sequence.is_running and not chunks:"),),
    ),
    Bug(
        "double_dispatch", "schedule", "Who is let in stays in the queue, and is let in again.",
        (Edit(Scheduler._let_in, "self.waiting.take(sequence)", "pass"),),
    ),
    Bug(
        "failed_step_advances", "schedule", "Tokens count as computed before the step has run.",
        (
            Edit(
                Engine._run_rows, "self.executor.launch(batch)",
                "for row in step.rows:\n            row.sequence.num_computed = row.start + row.count\n        self.executor.launch(batch)",
            ),
        ),
    ),
    Bug(
        "whole_half_fails", "schedule", "When the half of a failed step fails again, all of it is to blame.",
        (Edit(Engine._find_culprit, "has_failed_alone = len(half) == 1", "has_failed_alone = True"),),
    ),
    Bug(
        "protected_are_preempted", "schedule", "Who was preempted four times is preempted again.",
        (Edit(Scheduler._most_junior, " if not s.is_protected", ""),),
    ),
    Bug(
        "most_senior_preempted", "schedule", "The most senior sequence gives way, not the most junior one.",
        (Edit(Scheduler._most_junior, "reversed(self.running)", "self.running"),),
    ),
    Bug(
        "owed_blocks_promised", "schedule", "Whoever comes gets blocks that those who run are still owed.",
        (Edit(Scheduler._let_in, "self.pool.num_available - owed", "self.pool.num_available"),),
    ),
    Bug(
        "bypassed_for_ever", "schedule", "One that does not fit may be passed any number of times.",
        (Edit(Scheduler._admit, " or any(s.num_bypassed >= MAX_BYPASSES for s in blocked)", ""),),
    ),
    Bug(
        "priority_inverted", "schedule", "A higher number of priority goes first.",
        (Edit(due_ns, "+ sequence.priority", "- sequence.priority"),),
    ),
    Bug(
        "priority_ignored", "schedule", "Turns between priorities go by arrival alone.",
        (Edit(due_ns, " + sequence.priority * AGEING_NS", ""),),
    ),
    Bug(
        "no_ageing", "schedule", "A better priority always goes first, however long others have waited.",
        (
            Edit(WaitingQueue.next_turns, "key=lambda entry: due_ns(entry[2])", "key=lambda entry: entry[2].priority"),
        ),
    ),
    Bug(
        "tags_stand_still", "schedule", "A tenant's tag does not move on with what it asks for, so shares are not fair.",
        (Edit(_Class.tag, "tag + charge(sequence)", "tag"),),
    ),
    Bug(
        "unused_charge_kept", "schedule", "A tenant does not get back what it was charged for an answer that ended early.",
        (Edit(WaitingQueue.ended, "used - charge(sequence)", "0"),),
    ),
    Bug(
        "preempted_goes_to_the_end", "schedule", "A preempted sequence queues up behind all that came meanwhile.",
        (Edit(WaitingQueue.push, "if sequence.tag < 0:", "if True:"),),
    ),
    Bug(
        "waits_for_dead_sibling", "schedule", "A sequence waits for its call's first one even when that has ended.",
        (
            Edit(
                Scheduler._awaits_sibling, "first is not None and first.max_computed",
                "bool(sequence.request.sibling_of) and (first is None or first.max_computed",
            ),
            Edit(Scheduler._awaits_sibling, "first.num_prompt_tokens - 1", "first.num_prompt_tokens - 1)"),
        ),
    ),
    Bug(
        "probation_in_company", "schedule", "A suspect of a crash is run beside others.",
        (
            Edit(Scheduler.schedule, "self._num_on_probation and self._plan_probation(draft)", "False"),
            Edit(Scheduler._admit, "not sequence.num_probation_steps and ", ""),
        ),
    ),
    # ---- endings ---------------------------------------------------------------------------------------------------
    Bug(
        "waiting_not_aborted", "endings", "The abort of a request that waits is forgotten.",
        (Edit(Scheduler.abort, "if request_id in self._live:", "if request_id in self._live and self._live[request_id].is_running:"),),
    ),
    Bug(
        "deadline_of_running_ignored", "endings", "Deadlines are applied to those who wait only.",
        (Edit(Scheduler.settle, "(is_of_all or late.num_steps == 0)", "late.num_steps == 0"),),
    ),
    Bug(
        "queue_deadline_of_running", "endings", "The deadline of the queue ends requests that run.",
        (Edit(Scheduler.settle, " and (is_of_all or late.num_steps == 0)", ""),),
    ),
    Bug(
        "deadline_from_resume", "endings", "A deadline counts from when the engine got the request, not from its arrival.",
        (
            Edit(
                Scheduler.submit, "(request.deadline_ns, 1, request.id)",
                "(request.deadline_ns + now_ns - sequence.arrival_ns, 1, request.id)",
            ),
        ),
    ),
    Bug(
        "deadline_waits_for_engine", "endings", "No deadline fires while the engine is started again.",
        (Edit(Supervisor.expired, "in list(self._live.values()):", "in list(self._live.values()) if is_ready else ():"),),
    ),
    Bug(
        "queue_deadline_after_resume", "endings", "A resumed request that has been in a step must not wait in the queue again.",
        (Edit(_Live.resubmission, "queue_deadline_ns=0 if self.is_scheduled else self.request.queue_deadline_ns,", ""),),
    ),
    Bug(
        "last_events_not_told", "endings", "An engine without work does not take another turn, so it keeps the last step's events.",
        (Edit(EngineTurns._has_news, "self.events or self._submits", "self._submits"),),
    ),
    Bug(
        "abort_before_taken_lost", "endings", "An abort that comes before the engine has taken the request does nothing.",
        (Edit(EngineTurns._abort, "if request is None:", "if True:"),),
    ),
    Bug(
        "told_after_the_end", "endings", "What an engine says of a request whose deadline was called is passed on.",
        (Edit(Supervisor._taken, "None if live.is_over else event", "event"),),
    ),
    Bug(
        "unstarted_not_resubmitted", "endings", "Only requests that have tokens are handed to the new engine.",
        (Edit(Supervisor.resubmissions, "for live in self._live.values()]", "for live in self._live.values() if live.tokens]"),),
    ),
    Bug(
        "resubmitted_backwards", "endings", "A new engine gets the newest request first.",
        (Edit(Supervisor.resubmissions, "for live in self._live.values()]", "for live in reversed(self._live.values())]"),),
    ),
    Bug(
        "last_token_not_recorded", "endings", "A token is given out before it is recorded, so the last one is lost at a death.",
        (Edit(_Live.resubmission, "output_ids=list(self.tokens)", "output_ids=list(self.tokens[:-1])"),),
    ),
    Bug(
        "index_from_resume", "endings", "After a resume tokens are numbered from zero again.",
        (Edit(Scheduler._append, "index = sequence.num_output\n", "index = sequence.num_output - len(sequence.request.output_ids)\n"),),
    ),
    Bug(
        "doubled_tokens_taken", "endings", "A token that was taken before is taken again.",
        (
            Edit(Supervisor._check, "event.index != index", "event.index > index"),
            Edit(FrameReader._message, "(epoch, number) != (self.epoch, self._number)", "epoch != self.epoch"),
        ),
    ),
    Bug(
        "aborting_forgotten_at_death", "endings", "Who was being aborted when the engine died gets no end.",
        (Edit(Supervisor.ended, "events.append(self._aborted(live))", "self._aborted(live)"),),
    ),
    Bug(
        "abort_while_restarting_lost", "endings", "An abort while the engine is started again is marked, and nobody is told.",
        (Edit(Supervisor.abort, 'if self.state == "ready":', 'if self.state != "gone":'),),
    ),
    Bug(
        "drain_lets_in_while_busy", "endings", "A server that drains takes new calls as long as it has others.",
        (Edit(Drain.check, "if self.draining:", "if self.draining and not self._ledger.live:"),),
    ),
    # ---- faults ----------------------------------------------------------------------------------------------------
    Bug(
        "frame_number_unchecked", "faults", "A frame that was lost or came twice is not noticed.",
        (Edit(FrameReader._message, "(epoch, number) != (self.epoch, self._number)", "epoch != self.epoch"),),
    ),
    Bug(
        "frame_epoch_unchecked", "faults", "A frame of another engine is read.",
        (Edit(FrameReader._message, "(epoch, number) != (self.epoch, self._number)", "number != self._number"),),
    ),
    Bug(
        "frame_sum_unchecked", "faults", "A frame whose sum is wrong is read if it can be.",
        (Edit(FrameReader._message, "zlib.crc32(body) != crc", "False"),),
    ),
    Bug(
        "old_epoch_taken", "faults", "What an engine said is taken after another one was started.",
        (Edit(Supervisor.receive, "epoch != self.epoch", "epoch > self.epoch"),),
    ),
    Bug(
        "suspects_for_ever", "faults", "A suspect stays one after it has passed the place where it was.",
        (Edit(Supervisor._taken, "live.is_suspect = False", "pass"),),
    ),
    Bug(
        "suspects_not_noted", "faults", "Who was in the step of a death comes back without probation.",
        (Edit(Supervisor._suspect, "live.is_suspect = True", "pass"),),
    ),
    Bug(
        "quarantined_at_once", "faults", "A single death is enough for quarantine.",
        (Edit(Supervisor._suspect, "live.num_deaths >= MAX_DEATHS", "live.num_deaths >= 1"),),
    ),
    Bug(
        "quarantined_in_company", "faults", "Two deaths are enough for quarantine, though never alone.",
        (Edit(Supervisor._suspect, "is_alone and is_guilty", "is_guilty"),),
    ),
    Bug(
        "never_quarantined", "faults", "A request that kills engines is run again for ever.",
        (Edit(Supervisor._suspect, "live.num_deaths >= MAX_DEATHS", "False"),),
    ),
    Bug(
        "kills_not_counted", "faults", "Kills by memory pressure are not held against who was alone in three of them.",
        (Edit(Supervisor._suspect, "live.num_kills_alone >= MAX_KILLS", "False"),),
    ),
    Bug(
        "given_up_too_early", "faults", "A step between two deaths does not end the row of failures.",
        (Edit(Supervisor._stepped, "self._num_failures = 0", "pass"),),
    ),
    Bug(
        "stuck_step_unseen", "faults", "The watchdog does not look at the step in flight.",
        (Edit(Supervisor.tick, "if self._step_age_ns - ", "if False and self._step_age_ns - "),),
    ),
    Bug(
        "idle_engine_killed", "faults", "Only steps count as signs of life, so an idle engine is killed.",
        (
            Edit(Supervisor.receive, "self._heard_ns = now_ns\n", "self._heard_ns = now_ns if not isinstance(message, Beat) else self._heard_ns\n"),
        ),
    ),
    # ---- counts ----------------------------------------------------------------------------------------------------
    Bug(
        "admission_leaks_waiting", "counts", "Admission forgets to count the end of a call that still waited.",
        (Edit(Admission.ended, "if live is None:", "if live is None or not live.is_running:"),),
    ),
    Bug(
        "admission_leaks_tokens", "counts", "Admission counts the prompt tokens of those who come, and not of those who go.",
        (Edit(_Sums.add, "self.prompt_tokens += sign * live.num_prompt_tokens", "self.prompt_tokens += max(sign, 0) * live.num_prompt_tokens"),),
    ),
    Bug(
        "ledger_forgets_cancelled", "counts", "The ledger counts only sequences that ended by themselves.",
        (Edit(Ledger.sequence_ended, "self.num_live_sequences -= 1", "self.num_live_sequences -= times is not None"),),
    ),
)  # fmt: skip


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug is in the code that runs, in this process."""
    edits: dict[FunctionType, list[Edit]] = {}
    for edit in bug.edits:
        edits.setdefault(_function(edit.function), []).append(edit)
    changed = {function: _changed(bug, function, some) for function, some in edits.items()}
    whole = {function: function.__code__ for function in edits}
    try:
        for function, code in changed.items():
            function.__code__ = code
        yield
    finally:
        for function, code in whole.items():
            function.__code__ = code


def bug_of(name: str) -> Bug:
    return next(bug for bug in BUGS if bug.name == name)


def _function(target: object) -> FunctionType:
    found: object = target.fget if isinstance(target, property) else target
    assert isinstance(found, FunctionType), f"{found!r} is no function of Python"
    return found


def _changed(bug: Bug, function: Callable[..., object], edits: list[Edit]) -> CodeType:
    """The function's code with the edits, at its place in its file."""
    assert isinstance(function, FunctionType), f"{function!r} is no function of Python"
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        num = source.count(edit.old)
        assert num == 1, f"{bug.name}: {edit.old!r} is {num} times in {function.__qualname__}; write the bug anew"
        source = source.replace(edit.old, edit.new)
    tree = ast.parse(source)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    module = compile(tree, function.__code__.co_filename, "exec")
    return next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == function.__name__)
