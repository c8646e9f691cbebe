"""History: the ids behind what a model has said, for an answer that comes back as text is else cut into other ones.

A chat's client sends an earlier answer as text. Where its plain tokens are not those that were generated, the prefix cache
would miss from there on; here the answer is found again, by the conversation before it and its text, and keeps its ids. Owns
the answers, their bound, and when one may be kept. Knows nothing of messages, engines or HTTP.

A conversation comes in pieces: plain text and control tokens' texts in turn, plain first and last (`template.chat_pieces`). So
a boundary is always a control token, and its text inside a message is never taken for one. Law: kept ids stand for exactly the
text that they are found by.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Unpack

from jilju.text.stream import Piece, TextOptions, TextStream
from jilju.text.template import encode_piece
from jilju.text.tokenizer import Tokenizer

MAX_ANSWERS = 1 << 14
MAX_BYTES = 16 << 20  # an answer of 500 tokens takes 2.4 kB: 7,000 of them
ANSWER_BYTES = 400  # of one beside its ids: key, record, array and its place in the table


class Opening(NamedTuple):
    """Where an answer begins: behind the last piece of a conversation, which it continues."""

    before: bytes  # digest of salt and pieces before the last
    text: str  # the last piece


class _Answer(NamedTuple):
    start: int  # characters of its piece before it
    ids: "array[int]"


class History:
    """Threads share it. The answers used least recently are given up; what it finds depends on the calls alone."""

    def __init__(self, *, max_answers: int = MAX_ANSWERS, max_bytes: int = MAX_BYTES):
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()  # by digest of salt and pieces up to its own
        self._lock = threading.Lock()  # long conversations are encoded in threads
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def encode(self, salt: bytes, pieces: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], Opening]:
        """Ids of a conversation: of each answer that is remembered under this salt its own, of the rest the plain ones. And
        where the next answer begins. The last piece is open, it has no boundary behind it: always the plain ones."""
        digests = [_root(salt)]
        for piece in pieces:
            digests.append(_followed(digests[-1], piece))
        answers = self._found({index: digests[index + 1] for index in range(0, len(pieces) - 1, 2)})
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if (answer := answers.get(index)) is None:
                ids += encode_piece(tokenizer, index, piece)
            else:
                ids += encode_piece(tokenizer, index, piece[: answer.start])
                ids += answer.ids
        return ids, Opening(digests[-2], pieces[-1])

    def remember(self, opening: Opening, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Keeps the shortest beginning of the generated `ids` that stands for an answer's `text`; False if none does. It may
        go on behind it, with the token that ended the answer or those of a stop string."""
        num_ids = _num_ids_of(text, ids, tokenizer)
        if num_ids == 0 or _bytes_of(num_ids) > self._max_bytes:
            return False
        key = _followed(opening.before, opening.text + text)
        with self._lock:
            self._drop(key)
            self._answers[key] = _Answer(len(opening.text), array("I", ids[:num_ids]))
            self.num_bytes += _bytes_of(num_ids)
            while len(self._answers) > self._max_answers or self.num_bytes > self._max_bytes:
                self._drop(next(iter(self._answers)))
        return True

    def _found(self, keys: dict[int, bytes]) -> dict[int, _Answer]:
        """By index of the piece. Used from the last to the first: of a conversation the end goes first, as a beginning is of
        use without its end, and not the other way round."""
        found: dict[int, _Answer] = {}
        with self._lock:
            for index, key in reversed(keys.items()):
                if (answer := self._answers.get(key)) is not None:
                    self._answers.move_to_end(key)
                    found[index] = answer
        return found

    def _drop(self, key: bytes) -> None:
        if (answer := self._answers.pop(key, None)) is not None:
            self.num_bytes -= _bytes_of(len(answer.ids))


class RememberedStream(TextStream):
    """The text of an answer that is remembered when it is complete: finished, or ended by a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        history: History,
        opening: Opening,
        **options: Unpack[TextOptions],
    ):
        super().__init__(tokenizer, **options)
        self._tokenizer, self._history, self._opening = tokenizer, history, opening
        self._ids: list[int] = []
        self._texts: list[str] = []

    def push(self, token_id: int) -> Piece:
        piece = super().push(token_id)
        self._ids.append(token_id)
        self._texts.append(piece.text)
        if piece.stop is not None:
            self._remember()
        return piece

    def finish(self) -> Piece:
        piece = super().finish()
        self._texts.append(piece.text)
        self._remember()
        return piece

    def _remember(self) -> None:
        self._history.remember(self._opening, "".join(self._texts), self._ids, self._tokenizer)


def _root(salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=32, person=b"jilju-history").digest()


def _followed(digest: bytes, piece: str) -> bytes:
    """Digest of what `digest` stands for and one piece more: 256 bits, so that equal digests are taken for equal texts. A
    lone surrogate, which no answer holds, has a form of its own here; the tokenizer refuses it."""
    return hashlib.blake2b(piece.encode(errors="surrogatepass"), digest_size=32, key=digest).digest()


def _num_ids_of(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many of the ids stand for `text`, byte for byte; 0 if a token goes over its end, has bytes that are no character
    (text shows U+FFFD), or is a control token, which a message cannot hold."""
    wanted = text.encode()
    num_bytes = num_ids = 0
    for id_ in ids:
        if num_bytes == len(wanted):
            break
        token = tokenizer.token_bytes(id_)
        if id_ in tokenizer.special_ids or not wanted.startswith(token, num_bytes):
            return 0
        num_bytes += len(token)
        num_ids += 1
    return num_ids if num_bytes == len(wanted) else 0


def _bytes_of(num_ids: int) -> int:
    return ANSWER_BYTES + 4 * num_ids
