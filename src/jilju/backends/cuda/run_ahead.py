"""Running ahead: the batch that is to be expected after a step, and what of the real one it has foreseen.

While the host commits a step and decides the next, the device would stand still. So a backend may run the expected next step
at once: every row that samples goes on by its one new token. A row of the real batch takes the result if it is the very row
that was expected; what else is in the batch runs as it comes, and a row that never comes costs its share of a step and
nothing else, for it writes where nobody reads. Owns that comparison and the arithmetic of blocks. Numpy alone: knows nothing of torch.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jilju.plan import Batch

# What a logit row is sampled by. Of these a row that runs ahead has no others: no list of ids, no mask, no target.
SAMPLED_BY = ("positions", "seeds", "temperatures", "top_ks", "top_ps", "min_ps", "num_top", "repetition_penalties", "presence_penalties", "frequency_penalties")  # fmt: skip
LISTS = (
    ("penalty_starts", ("penalty_ids", "penalty_counts")),
    ("bias_starts", ("bias_ids", "biases")),
    ("banned_starts", ("banned_ids",)),
    ("wanted_starts", ("wanted_ids",)),
)

Rows = np.ndarray  # int64 indices of rows


def part_of(batch: Batch, rows: Rows) -> tuple[Batch, np.ndarray]:
    """The batch of some rows, in that order, and which logit rows of the whole one are its own: int64 [num_logits]."""
    firsts = first_tokens(batch)
    tokens = np.concatenate([np.arange(firsts[r], firsts[r] + batch.counts[r]) for r in rows])
    place = np.full(batch.num_tokens, -1)
    place[tokens] = np.arange(len(tokens))
    logit_places = place[batch.logit_tokens]
    logits = np.flatnonzero(logit_places >= 0)
    logits = logits[np.argsort(logit_places[logits], kind="stable")]
    lists: dict[str, Any] = {}
    for starts_name, names in LISTS:
        starts = getattr(batch, starts_name)
        lengths = (starts[1:] - starts[:-1])[logits]
        lists[starts_name] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        taken = [np.arange(starts[i], starts[i + 1]) for i in logits] or [np.empty(0, np.int64)]
        for name in names:
            lists[name] = getattr(batch, name)[np.concatenate(taken)]
    columns = {name: getattr(batch, name)[logits] for name in (*SAMPLED_BY, "targets", "mask_rows")}
    part = replace(
        batch,
        token_ids=batch.token_ids[tokens],
        starts=batch.starts[rows],
        counts=batch.counts[rows],
        block_tables=np.ascontiguousarray(batch.block_tables[rows]),
        logit_tokens=logit_places[logits].astype(np.int32),
        **columns,
        **lists,
    )
    return part, logits


def logits_between(batch: Batch, first: int, end: int) -> Batch:
    """The batch with some of its logit rows alone; tokens and rows stay as they are."""
    lists: dict[str, Any] = {}
    for starts_name, names in LISTS:
        starts = getattr(batch, starts_name)
        lists[starts_name] = starts[first : end + 1] - starts[first]
        lists |= {name: getattr(batch, name)[starts[first] : starts[end]] for name in names}
    columns = {name: getattr(batch, name)[first:end] for name in (*SAMPLED_BY, "targets", "mask_rows", "logit_tokens")}
    return replace(batch, **columns, **lists)


def first_tokens(batch: Batch) -> np.ndarray:
    """Index of each row's first token: int64 [num_rows]"""
    return np.cumsum(batch.counts) - batch.counts


def logit_of_rows(batch: Batch) -> np.ndarray:
    """Of each row the logit row of its last token, if that samples and is the row's only one; else -1: int64 [num_rows]"""
    firsts = first_tokens(batch)
    lasts = firsts + batch.counts - 1
    places = np.searchsorted(batch.logit_tokens, lasts)
    inside = places < batch.num_logits
    places = np.where(inside, places, 0)
    found = inside & (batch.num_logits > 0)
    if batch.num_logits:
        before = np.searchsorted(batch.logit_tokens, firsts)
        found &= (batch.logit_tokens[places] == lasts) & (before == places) & (batch.targets[places] < 0)
    return np.where(found, places, -1)


def is_plain(batch: Batch) -> np.ndarray:
    """Of each logit row whether it has no lists of ids and no mask, so that it needs nothing but the logits: bool [num_logits]"""
    plain: np.ndarray = batch.mask_rows < 0
    for starts_name, _ in LISTS:
        starts = getattr(batch, starts_name)
        plain = plain & (starts[1:] == starts[:-1])
    return plain


def expect(batch: Batch, block_size: int, max_context: int, spare_block: int) -> tuple[Batch, Rows] | None:
    """The next batch if all goes on, token ids left open, and of each of its rows the logit row that samples its token.

    None where that cannot be told: a row that samples by lists or masks, which change with each token; a prompt under way,
    whose next part is not known; a full context. A row whose token needs a block that the engine has not given yet gets
    the block `spare_block` + its index.
    """
    logits = logit_of_rows(batch)
    starts = batch.starts + batch.counts
    if (logits < 0).any() or not is_plain(batch).all() or (starts >= max_context).any():
        return None
    num_rows = batch.num_rows
    rows, places = np.arange(num_rows), starts // block_size
    width = max(batch.block_tables.shape[1], int(places.max()) + 1)
    tables = np.full((num_rows, width), -1, np.int32)
    tables[:, : batch.block_tables.shape[1]] = batch.block_tables
    open_ = tables[rows, places] < 0
    tables[rows[open_], places[open_]] = spare_block + rows[open_]
    columns = {name: getattr(batch, name)[logits] for name in (*SAMPLED_BY, "targets", "mask_rows")}
    columns["positions"] = columns["positions"] + 1
    none = np.zeros(num_rows + 1, np.int32)
    expected = replace(
        batch,
        token_ids=np.zeros(num_rows, np.int32),
        starts=starts,
        counts=np.ones(num_rows, np.int32),
        block_tables=tables,
        logit_tokens=rows.astype(np.int32),
        **columns,
        **{name: none for name, _ in LISTS},
    )
    return expected, logits


def written_slots(batch: Batch, block_size: int) -> np.ndarray:
    """Of each row the slot that its first token is written to: int32 [num_rows]"""
    blocks = batch.block_tables[np.arange(batch.num_rows), batch.starts // block_size]
    return blocks * np.int32(block_size) + batch.starts % np.int32(block_size)


def match(expected: Batch, token_ids: np.ndarray, batch: Batch, block_size: int) -> np.ndarray:
    """Of each row of the batch the row of `expected`, with these token ids, that it is; -1: none. int64 [num_rows]

    Rows are found by the slot before the new token's, which only the sequence that wrote it holds; then everything that
    the result depends on is compared.
    """
    found = np.full(batch.num_rows, -1)
    logits = logit_of_rows(batch)
    rows = np.flatnonzero((logits >= 0) & (batch.counts == 1) & (batch.starts > 0))
    rows = rows[is_plain(batch)[logits[rows]]]
    if not len(rows):
        return found
    wanted = _slots_before(expected, np.arange(expected.num_rows), block_size)
    given = _slots_before(batch, rows, block_size)
    order = np.argsort(wanted, kind="stable")
    places = np.minimum(np.searchsorted(wanted[order], given), len(order) - 1)
    candidates = order[places]
    same = wanted[candidates] == given
    firsts = first_tokens(batch)[rows]
    same &= (batch.starts[rows] == expected.starts[candidates]) & (batch.token_ids[firsts] == token_ids[candidates])
    for name in SAMPLED_BY:
        same &= getattr(batch, name)[logits[rows]] == getattr(expected, name)[candidates]
    width = min(batch.block_tables.shape[1], expected.block_tables.shape[1])
    is_before = np.arange(width) < -(-batch.starts[rows] // block_size)[:, None]  # blocks with tokens in them
    tables = (batch.block_tables[rows, :width] == expected.block_tables[candidates, :width]) | ~is_before
    same &= tables.all(axis=1)
    found[rows[same]] = candidates[same]
    return found


def _slots_before(batch: Batch, rows: Rows, block_size: int) -> np.ndarray:
    last = batch.starts[rows] - 1
    slots: np.ndarray = batch.block_tables[rows, last // block_size].astype(np.int64) * block_size + last % block_size
    return slots
